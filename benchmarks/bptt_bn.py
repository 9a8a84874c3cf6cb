"""Accuracy of `method=bptt` by what the chain's batch norms normalise with while training: `method.bn`.

    python benchmarks/bptt_bn.py --data-dir path/to/data
    python benchmarks/bptt_bn.py --data-dir path/to/data time_steps=10 dataset.train_limit=20000 trainer.epochs=4

Five populations on Fashion-MNIST by default; anything behind the options is an override of the configuration, as in
scripts/train.py. Every run has a folder <output>/<bn>/seed<k>, is skipped when finished and goes on when it was cut
off. Evaluation uses running statistics in all of them. Writes bptt_bn.md to --output.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from ide_snn.config import load_config
from ide_snn.hydra_tools import quote
from ide_snn.run import train

STATISTICS = ("frozen", "per_step", "time_batch")
NETWORK = [
    "dataset=fashion_mnist",
    "dataset.train_limit=10000",
    "dataset.test_limit=5000",
    "model=alexnetf",
    "model.channels=[12,24,32,32,24]",
    "neuron=if",
    "method=bptt",
    "schedule=cosine",
    "trainer=paper",
    "trainer.batch_size=64",
    "trainer.epochs=3",
    "trainer.progress=false",
    "time_steps=6",
]


def run(bn: str, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Trains unless done; the last epoch's figures, or None if it was interrupted."""
    folder = options.output / bn / f"seed{seed}"
    if not (folder / "result.json").exists():
        settings = [*NETWORK, f"method.bn={bn}", f"seed={seed}", f"trainer.threads={options.threads}", "resume=auto"]
        config = load_config([*settings, quote("data_dir", options.data_dir), *options.overrides])
        if train(config, folder).interrupted is not None:
            return None
    result = json.loads((folder / "result.json").read_text())
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {"accuracy": result["test_accuracy_last"], "loss": float(last["train_loss"]), "seconds": result["seconds"]}


def table(runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    lines = [
        "| `method.bn` | seeds | test, last epoch, % | mean ± std | training loss, last epoch | seconds, median |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for bn, rows in runs.items():
        accuracies = [100 * row["accuracy"] for row in rows.values()]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        lines.append(
            f"| {bn} | {', '.join(map(str, rows))} | {' / '.join(f'{a:.2f}' for a in accuracies)} | "
            f"{statistics.fmean(accuracies):.2f}{spread} | {statistics.fmean(r['loss'] for r in rows.values()):.4f} | "
            f"{statistics.median(r['seconds'] for r in rows.values()):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the configuration, e.g. optimizer.lr=0.01")
    parser.add_argument("--bn", nargs="+", default=list(STATISTICS), choices=STATISTICS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/bptt_bn"))
    options = parser.parse_intermixed_args()
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in options.seeds:  # the slow index, so that what is done so far can be compared
        for bn in options.bn:
            row = run(bn, seed, options)
            if row is None:
                sys.exit("interrupted; the same command goes on from here")
            runs.setdefault(bn, {})[seed] = row
            print(f"{bn} seed {seed}: {json.dumps(row)}", flush=True)
            (options.output / "bptt_bn.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
