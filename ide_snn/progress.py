"""The state of a training run, in plain containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ide_snn.distributed import Ranks, Share
from ide_snn.evaluation import Batch
from ide_snn.optim import Schedule

__all__ = [
    "Batches",
    "FitResult",
    "NonFiniteLossError",
    "Progress",
    "SharedBatches",
    "describe",
    "random_state",
    "require_in_range",
    "require_usable",
    "set_random_state",
]


class Batches(Sized, Protocol):
    """Training batches: `epoch(e, start=k)` gives those of epoch e without the first k, always the same."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


@runtime_checkable
class SharedBatches(Batches, Protocol):
    """Batches that several processes can divide, such as a `DeviceLoader`."""

    def shared(self, ranks: Ranks) -> SharedBatches:
        """The same batches, each without what is not this rank's."""
        ...

    def shares(self, start: int = 0) -> Iterator[Share]:
        """Which part of each batch of an epoch that is, without the first `start` batches."""
        ...


class NonFiniteLossError(ArithmeticError):
    """Training diverged: the loss or a weight is NaN or infinite."""


@dataclass(frozen=True)
class FitResult:
    """How a run stands after `fit`, in fractions and seconds; accuracies are None before the first evaluation.

    The best epoch is chosen on `best_selected_on`: the validation split, or the test set where there is none.
    Each of several processes solves for its share of a batch, and `solves` counts all of these.
    `interrupted` is the signal that stopped the run; `already_finished` says that nothing was left to do.
    """

    test_accuracy_last: float | None
    test_accuracy_best: float | None
    best_epoch: int | None
    best_selected_on: str
    test_loss: float | None
    epochs: int
    seconds: float
    parameters: int
    neurons: int | None
    solves: int
    solver_failures: int
    interrupted: int | None = None
    already_finished: bool = False

    @classmethod
    def of(cls, progress: Progress, model: nn.Module, *, best_selected_on: str, **ending: Any) -> FitResult:
        """Of a run that stands like this."""
        last = progress.rows[-1] if progress.rows else {"test_accuracy": None, "test_loss": None}
        return cls(
            test_accuracy_last=last["test_accuracy"],
            test_accuracy_best=progress.test_accuracy_best,
            best_epoch=progress.best_epoch,
            best_selected_on=best_selected_on,
            test_loss=last["test_loss"],
            epochs=progress.epoch,
            seconds=progress.seconds,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            neurons=getattr(model, "num_neurons", None),
            solves=progress.solves,
            solver_failures=progress.solver_failures,
            **ending,
        )


@dataclass
class Progress:
    """Where a run stands, in plain numbers: saved in every checkpoint."""

    epoch: int = 0  # epochs completed
    batches: int = 0  # batches of the current epoch that were trained on
    step: int = 0  # optimiser steps
    seconds: float = 0.0
    rows: list[dict[str, float | int | None]] = field(default_factory=list)
    best_epoch: int | None = None
    best_accuracy: float = -1.0
    test_accuracy_best: float | None = None
    solves: int = 0
    solver_failures: int = 0


def require_in_range(
    prefix: str = "",
    *,
    epochs: int,
    accumulation: int,
    log_every: int,
    gradient_clip: float | None,
    label_smoothing: float,
) -> None:
    """Raises ValueError for an option of `fit` that is out of range, named with `prefix`."""
    for name, value, least in (("epochs", epochs, 0), ("accumulation", accumulation, 1), ("log_every", log_every, 1)):
        if value < least:
            raise ValueError(f"{prefix}{name} must be at least {least}, got {value}")
    if gradient_clip is not None and not gradient_clip > 0:
        raise ValueError(f"{prefix}gradient_clip must be positive or null (None), got {gradient_clip}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{prefix}label_smoothing must lie in [0, 1), got {label_smoothing}")


def require_usable(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Raises ValueError for what `fit` could not train with, or would train nothing with."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS needs the loss several times per step, which fit does not offer: use another optimizer")
    if not (callable(schedule) and hasattr(schedule, "depends_on_epochs")):
        raise ValueError(
            f"schedule must be an ide_snn.optim.Schedule, a factor at (step, epoch), got a {type(schedule).__name__}: "
            "use StepSchedule, CosineSchedule or a subclass of your own; schedulers of torch change the optimizer"
        )
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if own and not own & given:
        raise ValueError(
            "the optimizer has no parameter of the model, so nothing would be trained: make it of model.parameters(), "
            "after the model was built, copied or moved"
        )


def random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    """The generators dropout draws from."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_gpu else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def describe(row: Mapping[str, Any], epochs: int) -> str:
    """One line for the log."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    for name in ("train", "validation", "test"):
        if f"{name}_loss" in row:
            parts.append(f"{name} loss {row[f'{name}_loss']:.4f} accuracy {100 * row[f'{name}_accuracy']:.2f} %")
    if row.get("solver_failures"):
        parts.append(f"{row['solver_failures']} failed solves")
    return ", ".join([*parts, f"{row['seconds']:.1f} s"])
