"""What the implicit solve meets while a network of five populations trains, by the statistics chosen for J.

    python benchmarks/jacobian_bn.py alexnetf --jacobian-bn running --images cifar10_jpeg.tar.xz
    python benchmarks/jacobian_bn.py cifarnetf --jacobian-bn batch --steps 20 --images cifar10_jpeg.tar.xz

Trains from scratch with SGD (momentum 0.9, weight decay 5e-4, constant learning rate, no warm-up), LIF with leak 0.99,
dropout 0.2, and writes one JSON line per step: loss, outcome, steps and largest residual of the solve, and every 25
steps ||J||_2 over the batch. The last line sums up. `--images` is a tar archive with train/<class>/*.jpg and
test/<class>/*.jpg of 3x32x32 (needs pillow); without it images are noise and only the solver's figures mean something.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ide_snn import Implicit, NeuronParams, Outcome, SNNIDEConvMultiLayerNet, Solution, SolverWarning
from ide_snn.solvers import SOLVERS

CHANNELS = {"alexnetf": (96, 256, 384, 384, 256), "cifarnetf": (128, 256, 512, 1024, 512)}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def read_images(archive: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """`count` images [N, 3, 32, 32] and labels of `part` ("train" | "test"), drawn with a fixed seed."""
    import numpy as np
    from PIL import Image

    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and m.name.split("/")[-3] == part]
        classes = sorted({m.name.split("/")[-2] for m in members})
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))[:count]
        wanted = {members[i].name for i in order.tolist()}
        images, labels = [], []
        for member in members:  # in the archive's order: seeking back in a compressed file is slow
            if member.name in wanted:
                data = tar.extractfile(member)
                assert data is not None
                pixels = np.array(Image.open(io.BytesIO(data.read())).convert("RGB"))
                images.append(torch.from_numpy(pixels).permute(2, 0, 1))
                labels.append(classes.index(member.name.split("/")[-2]))
    x = torch.stack(images).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    return x[shuffle], torch.tensor(labels)[shuffle]


def jacobian_norm(net: nn.Module, x: Tensor, statistics: str, iterations: int = 15) -> float:
    """||J||_2 over the batch, by power iteration on J^T J; leaves the network's buffers as they were."""
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        rates, f = net.block.linearisation_point(x)
    jacobian = f.linearise(rates, statistics)
    v = torch.randn_like(rates)
    norm = 0.0
    for _ in range(iterations):
        w = jacobian.matvec(v / v.norm())
        norm = float(w.norm())
        v = jacobian.rmatvec(w)
    net.load_state_dict(kept)
    return norm


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    with torch.no_grad():
        hits = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(50), y.split(50), strict=True))
    net.train()
    return hits / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(CHANNELS))
    parser.add_argument("--jacobian-bn", choices=["running", "batch"], required=True)
    parser.add_argument("--jacobian-at", choices=["rate", "f"], default="rate")
    parser.add_argument("--solver", choices=list(SOLVERS), default="gmres")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=500, help="test images to evaluate at the end")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    needed = options.steps * options.batch
    if options.images is None:
        x, y = torch.randn(needed, 3, 32, 32), torch.randint(0, 10, (needed,))
    else:
        x, y = read_images(options.images, "train", needed)
    net = SNNIDEConvMultiLayerNet(
        (3, 32, 32),
        10,
        channels=CHANNELS[options.network],
        neuron=NeuronParams(2.0, 0.99),
        gradient=Implicit(options.jacobian_bn, options.jacobian_at),
        solver=SOLVERS[options.solver](),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    solutions: list[Solution] = []
    net.block.register_solve_hook(solutions.append)
    warnings.simplefilter("ignore", SolverWarning)  # counted below
    losses, start = [], time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out:
        for step, (a, b) in enumerate(zip(x.split(options.batch), y.split(options.batch), strict=True), 1):
            loss = F.cross_entropy(net(a), b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            last = solutions[-1]
            row = {"step": step, "loss": losses[-1], "outcome": str(last.outcome)}
            row |= {"steps": last.stats.steps, "residual": last.stats.max_residual}
            if step == 1 or step % 25 == 0 or step == options.steps:
                row |= {f"norm_{s}": jacobian_norm(net, a, s) for s in ("running", "batch")}
            print(json.dumps(row), file=out, flush=True)
        summary = {
            "network": options.network,
            "jacobian_bn": options.jacobian_bn,
            "jacobian_at": options.jacobian_at,
            "solver": str(SOLVERS[options.solver]()),
            "batch": options.batch,
            "solves": len(solutions),
            "failures": sum(s.outcome is not Outcome.converged for s in solutions),
            "largest_residual": max(s.stats.max_residual for s in solutions),
            "largest_steps": max(s.stats.steps for s in solutions),
            "mean_steps": sum(s.stats.steps for s in solutions) / len(solutions),
            "mean_loss_last_20": sum(losses[-20:]) / len(losses[-20:]),
            "seconds": round(time.perf_counter() - start, 1),
            "threads": torch.get_num_threads(),
        }
        if options.images is not None:
            summary["test_accuracy"] = accuracy(net, *read_images(options.images, "test", options.test))
            summary["test_images"] = options.test
        print(json.dumps(summary), file=out, flush=True)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
