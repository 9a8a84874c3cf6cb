"""What is measured: the cases, our training step in each variant, the original's, and the batches they all see."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from original import build_original
from torch import Tensor, nn

from ide_snn import Outcome
from ide_snn.config import (
    Loaders,
    build_dataset,
    build_loaders,
    build_model,
    build_optimizer,
    build_schedule,
    load_config,
    quote,
)
from ide_snn.data import DataError
from ide_snn.models import FeedbackClassifier
from ide_snn.optim import set_learning_rate
from ide_snn.precision import products_rounded
from ide_snn.schemas import Config
from ide_snn.solvers import SolveStats

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """An experiment of configs/ at a batch size; the rest is the experiment's."""

    experiment: str
    batch: int = 128
    batch_cuda: int = 128


CASES = {
    "f400": Case("fashion_mnist_f400_lif"),
    "f64c5": Case("mnist_f64c5_lif"),
    "alexnetf": Case("cifar10_alexnetf_lif", batch=32),
    "cifarnetf": Case("cifar10_cifarnetf_lif", batch=32),
}


@dataclass(frozen=True)
class Variant:
    """A way to run our step: its name and its overrides of the experiment."""

    name: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def all_of(cls, precisions: Sequence[str], more: Sequence[str]) -> list[Variant]:
        """One per precision, then one per text of overrides such as "precision=fast compile=false"."""
        found = [cls(p, (f"precision={p}",)) for p in precisions]
        found += [cls(text, tuple(text.split())) for text in more]
        return found or [cls("as configured")]


@dataclass(frozen=True)
class Setting:
    """Everything a process needs to build the subjects of a case anew; can be sent to one."""

    case: str
    device: str = "cpu"
    seed: int = 0
    threads: int = 1
    batch: int | None = None
    data_dir: str | None = None
    original: str | None = None
    overrides: tuple[str, ...] = ()

    def config(self, variant: Variant = Variant("as configured"), *more: str) -> Config:
        """The configuration of a variant; what the setting overrides holds for all of them.

        Raises:
            ConfigError: for an option that does not exist or is out of range.
        """
        case = CASES[self.case]
        usual = case.batch_cuda if self.device.startswith("cuda") else case.batch
        batch = usual if self.batch is None else self.batch
        fixed = [f"experiment={case.experiment}", f"trainer.batch_size={batch}", f"seed={self.seed}"]
        fixed += [f"device={self.device}", *([quote("data_dir", self.data_dir)] if self.data_dir else [])]
        return load_config([*fixed, *variant.overrides, *self.overrides, *more])


class Network:
    """A training step: forward, cross entropy, backward, and the optimizer that the configuration names.

    On a GPU peers may use TF32, ours as its precision says.
    """

    rounding = "fast"

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.config = config
        self.model = model.to(config.device).train()
        self.optimizer = build_optimizer(config, self.model)

    def step(self, x: Tensor, y: Tensor) -> None:
        with products_rounded(self.rounding, x.device):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """Logits in evaluation mode."""
        self.model.eval()
        logits: Tensor = self.model(x)
        self.model.train()
        return logits

    def train(self, batches: Iterable[Batch], steps: int) -> None:
        """`steps` steps with the experiment's learning rates."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        schedule = build_schedule(self.config)
        for number, (x, y) in enumerate(itertools.islice(batches, steps)):
            set_learning_rate(self.optimizer, rates, schedule(number, 0))
            self.step(x, y)

    def hold_weights(self) -> None:
        """Steps do the same as before and leave weights and running statistics where they are, which a floor is of."""
        set_learning_rate(self.optimizer, [0.0] * len(self.optimizer.param_groups), 1.0)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


class Ours(Network):
    """Ours, with the verdicts of its solves."""

    model: FeedbackClassifier

    def __init__(self, config: Config) -> None:
        model = build_model(config)
        if not isinstance(model, FeedbackClassifier):
            raise ValueError("steps are measured of feedback networks: method=dsr has none")
        super().__init__(model, config)
        self.rounding = config.precision.name
        self.solves: list[tuple[Outcome, SolveStats]] = []
        model.block.register_solve_hook(lambda s: self.solves.append((s.outcome, s.stats)))

    def solved_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """The solution v [B, *] of the solve of one step, which is made."""
        values: list[Tensor] = []
        handle = self.model.block.register_solve_hook(lambda s: values.append(s.value))
        try:
            self.step(x, y)
        finally:
            handle.remove()
        return values[0].detach()

    @property
    def path(self) -> str:
        """How the block computes."""
        return self.model.block.path


def the_original(setting: Setting, config: Config) -> Network:
    """The original's step with the sizes of `config`."""
    assert setting.original is not None  # asked for only where it was given
    return Network(build_original(Path(setting.original), config), config)


class Batches:
    """Training batches of a case, in the order of its data; random ones where there are no data.

    Attributes:
        title: what they are.
        loaders: of the data, None for random batches.
    """

    RANDOM = 16  # different random batches

    def __init__(self, config: Config) -> None:
        self.device = torch.device(config.device)
        self.loaders: Loaders | None = None
        self.title = "random images and labels (no --data-dir)"
        if config.data_dir is not None:
            try:
                dataset = build_dataset(config)
            except DataError as error:
                self.title = f"random images and labels ({str(error).split('.')[0]})"
            else:
                self.loaders, self.title = build_loaders(config, dataset, self.device), dataset.title
        if self.loaders is None:
            self._random = list(self._draw(config))

    def _draw(self, config: Config) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.trainer.batch_size, *config.dataset.input_shape)
        for _ in range(self.RANDOM):
            x = torch.randn(shape, generator=generator)
            y = torch.randint(0, config.dataset.num_classes, shape[:1], generator=generator)
            yield x.to(self.device), y.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        """Full batches without end."""
        if self.loaders is None:
            yield from itertools.cycle(self._random)
        else:
            train = self.loaders.train
            for epoch in itertools.count():
                yield from (batch for batch in train.epoch(epoch) if len(batch[1]) == train.batch_size)
