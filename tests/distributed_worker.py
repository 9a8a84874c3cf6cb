"""What the tests of several processes compute: the same cases in one process and in each of several.

`python tests/distributed_worker.py <folder> <rank> <count> [<case> ...]` is one rank; it leaves `rank<k>.pt` there.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ide_snn import (
    Connection,
    FeedbackSNN,
    Gmres,
    Implicit,
    NeuronParams,
    SNNIDEConvMultiLayerNet,
    SNNIDEConvNet,
    SNNIDEFCNet,
    Unrolled,
)
from ide_snn.bptt import Bptt
from ide_snn.build import build_dataset
from ide_snn.config import load_config
from ide_snn.data import Augmentation, DeviceLoader, Normalization, Split
from ide_snn.distributed import Ranks
from ide_snn.dsr import DSRIFNode
from ide_snn.dsr_network import DSRConvNet
from ide_snn.encoding import Bernoulli
from ide_snn.optim import CosineSchedule
from ide_snn.training import evaluate, fit

CLASSES = 3
SHAPE = (2, 6, 6)
STEPS = 3  # simulated, of small networks
EXACT = Gmres(tol=1e-13, max_steps=300)
Result = dict[str, Any]


def images(count: int, seed: int = 0) -> Split:
    """Images [2, 6, 6] whose bright row says their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pixels = torch.randint(100, (count, *SHAPE), generator=generator)
    pixels[torch.arange(count), 0, labels] += 120
    return Split(pixels.to(torch.uint8), labels)


def loader(count: int = 28, batch_size: int = 11, *, seed: int = 0, **options: Any) -> DeviceLoader:
    settings = {"normalization": Normalization(255.0, (0.3, 0.3), (0.3, 0.3)), "shuffle": True, "dtype": torch.float64}
    return DeviceLoader(images(count, seed), batch_size=batch_size, seed=seed, **{**settings, **options})


class Spy(torch.optim.SGD):
    """Keeps the gradients of every step."""

    def __init__(self, model: nn.Module, lr: float = 0.05) -> None:
        super().__init__(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        self.gradients: list[list[Tensor | None]] = []

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        super().step(closure)


def trained(model: nn.Module, train: DeviceLoader | None = None, test: Any = None, **options: Any) -> Result:
    """Gradients of every step, weights and buffers in the end, and the record of a short training."""
    optimizer = Spy(model)
    settings: dict[str, Any] = {"epochs": 2, "seed": 5, "progress": False}
    result = fit(
        model,
        loader() if train is None else train,
        loader(13, 5, seed=1) if test is None else test,
        optimizer=optimizer,
        **{**settings, **options},
    )
    return {
        "gradients": optimizer.gradients,
        "state": dict(model.state_dict()),
        "accuracy": result.test_accuracy_last,
        "loss": result.test_loss,
    }


def network(kind: str, **options: Any) -> nn.Module:
    made: dict[str, Callable[..., nn.Module]] = {
        "fc": lambda **o: SNNIDEFCNet(SHAPE, CLASSES, hidden=9, **o),
        "conv": lambda **o: SNNIDEConvNet(SHAPE, CLASSES, channels=3, kernel_size=3, padding=1, **o),
        "multilayer": lambda **o: SNNIDEConvMultiLayerNet(SHAPE, CLASSES, channels=(3, 4, 3), strides=(2, 1, 1), **o),
    }
    settings = {"solver": EXACT, "time_steps": STEPS, "dropout": 0.2, "generator": torch.Generator().manual_seed(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made[kind](**{**settings, **options}).double()


def own_modules() -> nn.Module:
    """Batch norm inside a user's affine module, and outside of the block; a parameter without gradient."""
    torch.manual_seed(2)
    stage = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3))
    back = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    chain = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, momentum=None))
    block = FeedbackSNN(
        input=Connection(stage, dropout=0.2),
        layers=[Connection(chain, dropout=0.2)],
        feedback=Connection(back, constraint="spectral_operator", input_size=(6, 6)),
        neuron=NeuronParams(2.0, 0.9),
        time_steps=STEPS,
        solver=EXACT,
    )
    model = nn.Sequential(block, nn.Flatten(), nn.BatchNorm1d(108, affine=False), nn.Linear(108, CLASSES)).double()
    model.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    return model


def over_time(kind: str, gradient: Any) -> Result:
    """An input that varies in time, drawn by an encoder."""
    plain = Normalization(255.0, (0.0, 0.0), (1.0, 1.0))
    options = {"encoder": Bernoulli(), "time_steps": STEPS, "normalization": plain}
    model = network(kind, gradient=gradient, input_has_time=True)
    return trained(model, loader(**options), loader(13, 5, seed=1, **options))


def digits(folder: Path) -> Result:
    """Part of the digits, for two epochs, dropout 0.2."""
    data = build_dataset(load_config(["dataset.train_limit=200", "dataset.test_limit=61"]))
    options = {"normalization": data.normalization, "dtype": torch.float64}
    train = DeviceLoader(data.train, batch_size=32, shuffle=True, seed=3, **options)
    test = DeviceLoader(data.test, batch_size=50, shuffle=False, **options)
    options = {"solver": EXACT, "time_steps": 5, "dropout": 0.2, "generator": torch.Generator().manual_seed(1)}
    model = SNNIDEFCNet((1, 8, 8), 10, hidden=30, **options).double()
    schedule = CosineSchedule(epochs=2, warmup_steps=5)
    run = {"epochs": 2, "schedule": schedule, "run_dir": folder / "digits", "log_every": 1, "seed": 3}
    return trained(model, train, test, **run)


def augmented(_: Path) -> Result:
    return trained(network("conv"), loader(augmentation=Augmentation(crop_padding=1, flip=True)))


def interrupted(folder: Path) -> Result:
    """A run that is stopped in its 4th step by a signal to the last rank alone, continued, and never stopped."""
    ranks = Ranks.current()

    class Signalled(DeviceLoader):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(super().epoch(epoch, start), start):
                if (epoch, index) == (1, 0) and self.ranks.rank == ranks.count - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    def run(train: DeviceLoader, name: str, resume: bool = False) -> Any:
        torch.manual_seed(7)
        model = network("conv")
        options = {"epochs": 3, "seed": 5, "run_dir": folder / name, "resume": resume, "progress": False}
        return model, fit(model, train, loader(13, 5, seed=1), optimizer=Spy(model), **options)

    plain = loader()
    whole, _ = run(plain, "whole")
    other = loader()
    other.__class__ = Signalled
    stopped, first = run(other, "parts")
    state = {key: value.clone() for key, value in stopped.state_dict().items()}
    ranks.wait()
    if ranks.is_first:  # for the tests, which go on from there with another number of processes
        (folder / "stopped" / "checkpoints").mkdir(parents=True)
        saved = (folder / "parts" / "checkpoints" / "last.pt").read_bytes()
        (folder / "stopped" / "checkpoints" / "last.pt").write_bytes(saved)
    continued, second = run(plain, "parts", resume=True)
    return {
        "signals": (first.interrupted, second.interrupted),
        "stopped": state,
        "whole": dict(whole.state_dict()),
        "continued": dict(continued.state_dict()),
    }


def per_replica(_: Path) -> Result:
    """One step with batch norm over each share: its statistics, and what is put in their place."""
    seen: list[Tensor] = []

    class Watched(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x.detach().clone())
            return super().forward(x)

    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), Watched(4), nn.Linear(4, CLASSES)).double()
    result = trained(model, loader(10, 10), epochs=1, sync_bn=False)
    return {**result, "seen": seen[0]}


def evaluations(_: Path) -> Result:
    """Batches that can be divided, and a plain list of them."""
    model, ranks = network("conv"), Ranks.current()
    results = {}
    for name, batches in (("loader", loader(13, 5)), ("small", loader(5, 4)), ("list", list(loader(25, 5)))):
        results[name] = vars(evaluate(model, batches, ranks=ranks))
    return results


def refusals(folder: Path) -> dict[str, str]:
    """The messages of errors that all ranks meet."""

    def message(model: nn.Module, train: Any, **options: Any) -> str:
        try:
            trained(model, train, epochs=1, **options)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    ranks = Ranks.current()
    drifting = network("fc")
    drifting.register_buffer("noise", torch.zeros(2, dtype=torch.float64))
    drifting.register_forward_hook(lambda *_: [drifting.noise.fill_(ranks.rank), None][1])
    return {
        "small batch": message(network("fc"), loader(11, 5)),
        "single sample": message(network("fc"), loader(10, ranks.count), sync_bn=False),
        "coupled": message(network("multilayer", gradient=Implicit(jacobian_bn="batch")), loader()),
        "coupled alone": message(
            network("multilayer", gradient=Implicit(jacobian_bn="batch")), loader(), sync_bn=False
        ),
        "coupled without batch norm": message(network("fc", gradient=Implicit(jacobian_bn="batch")), loader()),
        "list": message(network("fc"), ListOfBatches(list(loader()))),
        "drifted": message(drifting, loader(), run_dir=folder / "drifted"),
    }


class ListOfBatches(list):
    """Batches that nobody can divide."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:  # noqa: ARG002
        return iter(self[start:])


CASES: dict[str, Callable[[Path], Any]] = {
    **{kind: lambda _, kind=kind: trained(network(kind)) for kind in ("fc", "conv", "multilayer")},
    "unrolled": lambda _: trained(network("multilayer", gradient=Unrolled(4))),
    "jacobian_at_f": lambda _: trained(network("multilayer", gradient=Implicit(jacobian_at="f"))),
    "accumulation": lambda _: trained(network("conv"), loader(28, 7), accumulation=2, gradient_clip=0.5),
    "own_modules": lambda _: trained(own_modules()),
    "frames": lambda _: over_time("conv", Implicit()),
    "bptt_frozen": lambda _: over_time("multilayer", Bptt(bn="frozen")),
    "bptt_per_step": lambda _: trained(network("multilayer", gradient=Bptt(bn="per_step"))),
    "bptt_time_batch": lambda _: over_time("multilayer", Bptt(bn="time_batch", recompute=2)),
    "bptt_spikes": lambda _: trained(network("conv", gradient=Bptt(output="spikes"))),
    "dsr": lambda _: trained(
        DSRConvNet(SHAPE, CLASSES, channels=(3, 4), strides=(1, 2), kernel_size=3, time_steps=STEPS, dropout=0.2,
                   node=DSRIFNode, generator=torch.Generator().manual_seed(1)).double()
    ),
    "digits": digits,
    "augmented": augmented,
    "interrupted": interrupted,
    "per_replica": per_replica,
    "evaluations": evaluations,
    "refusals": refusals,
}  # fmt: skip


def lost(folder: Path) -> str:
    """The last rank ends without a word in the 2nd step; what the others say."""
    ranks = Ranks.current()

    class Dying(DeviceLoader):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(super().epoch(epoch, start)):
                if index == 1 and self.ranks.rank == ranks.count - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    train = loader()
    train.__class__ = Dying
    try:
        trained(network("fc"), train, run_dir=folder / "lost")
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path, rank: int, count: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=limit, rank=rank, world_size=count)
    cases = {**CASES, "lost": lost}
    results = {}
    for name in names or CASES:
        torch.manual_seed(0)
        results[name] = cases[name](folder)
    torch.save(results, folder / f"rank{rank}.pt")
    if "lost" not in names:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
