"""Loss, accuracy and firing rates of a classifier over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ide_snn.monitor import BlockMonitor

__all__ = ["Batch", "Evaluation", "Totals", "device_of", "evaluate", "run_evaluation", "show_bar"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy as a fraction, mean cross entropy, mean spikes per neuron and step of each population."""

    accuracy: float
    loss: float
    firing_rate: dict[str, float]
    samples: int


class Totals:
    """Running loss and accuracy, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += loss.detach().double() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.samples += len(labels)

    def means(self) -> tuple[float, float]:
        """(loss, accuracy); the only place that waits for the device."""
        return float(self.loss) / self.samples, float(self.correct) / self.samples

    def state_dict(self) -> dict[str, float | int]:
        return {"loss": float(self.loss), "correct": int(self.correct), "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss.fill_(state["loss"])
        self.correct.fill_(state["correct"])
        self.samples = state["samples"]


def evaluate(model: nn.Module, batches: Iterable[Batch], *, progress: bool | None = False) -> Evaluation:
    """Accuracy, loss and firing rates of `model` in evaluation mode; its mode is put back afterwards.

    `progress`: show a bar; None means only on a terminal.
    """
    result = run_evaluation(model, batches, "evaluating", progress, stop=lambda: False)
    assert result is not None  # nothing asks it to stop
    return result


def run_evaluation(
    model: nn.Module, batches: Iterable[Batch], title: str, progress: bool | None, stop: Callable[[], bool]
) -> Evaluation | None:
    """As `evaluate`; None if asked to stop before the end."""
    device = device_of(model)
    totals = Totals(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), BlockMonitor(model, firing_rates=True) as monitor:
            for x, y in show_bar(batches, title, progress):
                x, y = x.to(device), y.to(device)
                logits = model(x)
                totals.add(F.cross_entropy(logits, y), logits, y)
                monitor.count(len(y))
                if stop():
                    return None
    finally:
        model.train(was_training)
    if not totals.samples:
        raise ValueError(
            "there is no batch to evaluate on: pass a loader or a list, an iterator is used up after one pass"
        )
    loss, accuracy = totals.means()
    return Evaluation(accuracy, loss, monitor.firing_rate(), totals.samples)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def show_bar(
    batches: Iterable[Batch] | None,
    title: str,
    progress: bool | None,
    total: int | None = None,
    initial: int = 0,
) -> Any:
    """A progress bar; `progress` None means only on a terminal."""
    disable = None if progress is None else not progress
    return tqdm(batches, title, total, initial=initial, disable=disable, leave=False, dynamic_ncols=True)
