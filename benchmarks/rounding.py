"""What the roundings of `precision` do to the rates of a trained network, each by itself, on a CPU.

    python benchmarks/rounding.py f64c5 --warm-steps 300 --images 512 --data-dir path/to/data --output results/rounding

The same weights and test images, simulated in float32 by dense products and then

| name | weights | responses | who does so |
| --- | --- | --- | --- |
| other order | as they are | as they are, sums in the order of the spikes | `exact` on a CPU |
| 16-bit units | whole multiples of a unit per output | exact sums | `fast` on a CPU |
| 11 bits | 11 significant bits | as they are | products in TF32 |
| float16 | float16 | float16 | `fast` on a GPU: here with the factors and the response of a float32 product rounded |
| input noise | as they are | as they are | 1e-6 of the input itself, for comparison |
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import machine
from cases import CASES, Batches, Ours, Setting, Variant
from measure import NOISE, block_input, difference
from torch import Tensor

from ide_snn.layers import Affine
from ide_snn.record import Path as Way
from ide_snn.reporting import write_json
from ide_snn.simulation import Map, simulate

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rounded:
    """A connection with rounded weights and responses, before the gain."""

    affine: Affine
    of_weight: Round
    of_response: Round

    @property
    def is_silent_at_zero(self) -> bool:
        return self.affine.is_silent_at_zero

    def __call__(self, spikes: Tensor) -> Tensor:
        affine = self.affine
        bias = None if affine.bias is None else self.of_weight(affine.bias)
        response = self.of_response(replace(affine, weight=self.of_weight(affine.weight), bias=bias, gain=None)(spikes))
        return response if affine.gain is None else response * affine.gain


def plain(x: Tensor) -> Tensor:
    return x


def to_half(x: Tensor) -> Tensor:
    return x.half().float()


def to_11_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


WAYS: dict[str, tuple[Way, Round, Round]] = {
    "other order": ("events", plain, plain),
    "16-bit units": ("events16", plain, plain),
    "11 bits": ("dense", to_11_bits, plain),
    "float16": ("dense", to_half, to_half),
}


@torch.no_grad()
def rates(ours: Ours, x: Tensor, way: Way = "dense", of_weight: Round = plain, of_response: Round = plain) -> Tensor:
    """Those of the last population, simulated in evaluation mode."""
    block, inside = ours.model.block, block_input(ours, x)
    ours.model.eval()
    point, f = block.linearisation_point(inside)
    links: list[Any] = [link.frozen for link in f.chain]
    maps: list[Map] = links if way != "dense" else [Rounded(link, of_weight, of_response) for link in links]
    shapes = [*(tuple(link.input_shape) for link in links[1:]), tuple(point.shape[1:])]
    return simulate(f.drive, maps[1:], maps[0], shapes, block.neuron, block.time_steps, path=way).last


def measure(setting: Setting, warm_steps: int, images: int) -> dict[str, dict[str, float]]:
    """Differing rates, relative L2 and test accuracy of every way."""
    config = setting.config(Variant("trained", ("precision=fast",)))
    ours, batches = Ours(config), Batches(config)
    ours.train(iter(batches), warm_steps)
    if batches.loaders is None:
        raise SystemExit("rounding.py measures trained networks: say where the data is with --data-dir")
    test = batches.loaders.test
    chosen = list(itertools.islice(test.epoch(0), -(-images // test.batch_size)))
    x, y = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    reference = rates(ours, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = {name: rates(ours, x, *way) for name, way in WAYS.items()}
    found = {"float32": reference, **found, "input noise": rates(ours, x * (1 + NOISE * noise))}
    results = {}
    for name, a in found.items():
        with torch.no_grad():
            right = (ours.model._classify(a).argmax(1) == y).float().mean()
        results[name] = {**difference(reference, a), "accuracy": float(right), "images": len(y)}
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    rows = ["| rounding | share of rates that differ | relative L2 | test accuracy, % |", "| --- | --- | --- | --- |"]
    for name, r in results.items():
        rows.append(f"| {name} | {r['share_differing']:.2e} | {r['relative_l2']:.2e} | {100 * r['accuracy']:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[name for name in CASES if name in ("f400", "f64c5")])
    parser.add_argument("--warm-steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(case=options.case, threads=options.threads, data_dir=options.data_dir)
    results = measure(setting, options.warm_steps, options.images)
    print(table(results))
    if options.output is not None:
        found = {"machine": machine(), "case": options.case, "warm_steps": options.warm_steps, "ways": results}
        write_json(options.output / f"{options.case}.json", found)


if __name__ == "__main__":
    main()
