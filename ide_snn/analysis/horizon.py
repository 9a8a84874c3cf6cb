"""How few steps are enough: accuracy over t = 1..T from one simulation, and early exit by confidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ide_snn.analysis.observe import Observation, measure
from ide_snn.evaluation import require_class_indices, require_logits

__all__ = ["EarlyExit", "Horizon", "accuracy_over_time", "check_thresholds", "early_exit", "logits_over_time"]


@dataclass(frozen=True)
class EarlyExit:
    """Each sample stops at the first step where its confidence exceeds `threshold`, at the latest at T.

    Confidence is the largest softmax probability. A threshold of 1 is never exceeded.
    """

    threshold: float
    accuracy: float
    mean_steps: float


class Horizon:
    """The model's logits after every time step; a `Meter`. Keeps T * C numbers per sample.

    Raises:
        ValueError: in `add`, if the model does not return logits [B, C] for labels [B].
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, observation: Observation, labels: Tensor) -> None:
        require_class_indices(labels)
        require_logits(observation.output, labels.cpu())
        steps = range(1, observation.time_steps + 1)
        self._logits.append(torch.stack([observation.output_at(t) for t in steps]).cpu())
        self._labels.append(labels.cpu())

    @property
    def logits(self) -> Tensor:
        """[T, N, C]."""
        return torch.cat(self._logits, dim=1)

    @property
    def labels(self) -> Tensor:
        """[N]."""
        return torch.cat(self._labels)

    def accuracy(self) -> list[float]:
        """Share of correct samples at t = 1..T."""
        return accuracy_over_time(self.logits, self.labels)

    def as_dict(self, thresholds: Sequence[float]) -> dict[str, Any]:
        logits, labels = self.logits, self.labels
        return {
            "accuracy_over_time": accuracy_over_time(logits, labels),
            "early_exit": [asdict(point) for point in early_exit(logits, labels, thresholds)],
        }


def logits_over_time(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(logits [T, N, C] after t = 1..T steps, labels [N]) from one simulation per batch.

    The logits at t are, bit for bit, those of a separate evaluation with `time_steps=t` (for blocks with a smaller T:
    min(t, T)); inputs with time: of the first t frames.
    """
    horizon = Horizon()
    measure(model, batches, horizon)
    return horizon.logits, horizon.labels


def accuracy_over_time(logits: Tensor, labels: Tensor) -> list[float]:
    """Share of correct samples at t = 1..T, for logits [T, N, C]."""
    return (logits.argmax(2) == labels).double().mean(1).tolist()


def early_exit(logits: Tensor, labels: Tensor, thresholds: Sequence[float]) -> list[EarlyExit]:
    """Accuracy and mean steps used for every confidence threshold.

    Args:
        logits: [T, N, C].
        labels: [N].
        thresholds: in (0, 1].

    Raises:
        ValueError: for a threshold outside (0, 1].
    """
    check_thresholds(thresholds)
    confidence = logits.double().softmax(2).amax(2)
    correct = logits.argmax(2) == labels
    points = []
    for threshold in thresholds:
        confident = confidence > threshold
        confident[-1] = True
        first = confident.int().argmax(0)  # the first of the largest values
        hits = correct.gather(0, first[None])[0].double()
        points.append(EarlyExit(threshold, float(hits.mean()), float(first.double().mean()) + 1))
    return points


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Raises ValueError for a threshold outside (0, 1]."""
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise ValueError(f"thresholds must lie in (0, 1], got {threshold}")
