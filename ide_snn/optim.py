"""Optimisers by name, and learning rate schedules as pure functions of (step, epoch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "OPTIMIZERS",
    "ConstantSchedule",
    "CosineSchedule",
    "Schedule",
    "StepSchedule",
    "set_learning_rate",
]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Schedule:
    """Factor on the base learning rate: linear warm-up over optimiser steps, times a decay per epoch.

        factor(step, epoch) = min(1, (step + 1) / warmup_steps) * decay(epoch)

    Both count from 0. It has no state, so a resumed run cannot lose the base learning rate.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")

    def __call__(self, step: int, epoch: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * self.decay(epoch)

    def decay(self, epoch: int) -> float:
        """Factor of an epoch."""
        raise NotImplementedError

    @property
    def depends_on_epochs(self) -> bool:
        """Whether a longer run has other learning rates from its start; then it is not a longer same run."""
        return False


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """No decay."""

    def decay(self, epoch: int) -> float:  # noqa: ARG002
        return 1.0


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """Times `factor` at each milestone (in epochs), the paper's recipe."""

    milestones: tuple[int, ...] = (30, 60, 90)
    factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones are epochs and at least 1, got {list(self.milestones)}")
        if not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}")

    def decay(self, epoch: int) -> float:
        return self.factor ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Half a cosine from 1 in the first epoch towards `final_factor` after the last of `epochs`."""

    epochs: int = 100
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.final_factor <= 1.0:
            raise ValueError(f"final_factor must lie in [0, 1], got {self.final_factor}")

    @property
    def depends_on_epochs(self) -> bool:
        return True

    def decay(self, epoch: int) -> float:
        progress = min(1.0, epoch / self.epochs) if self.epochs else 1.0
        return self.final_factor + (1.0 - self.final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, type[Schedule]] = {
    "none": ConstantSchedule,
    "step": StepSchedule,
    "cosine": CosineSchedule,
}


def set_learning_rate(optimizer: torch.optim.Optimizer, base: Sequence[float], factor: float) -> float:
    """Set every group's rate to its base rate times `factor`; returns the first group's."""
    for group, rate in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = rate * factor
    return base[0] * factor
