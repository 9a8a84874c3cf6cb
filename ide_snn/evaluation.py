"""Loss, accuracy and firing rates of a classifier over batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ide_snn.distributed import Ranks
from ide_snn.monitor import BlockMonitor, merged

__all__ = [
    "Batch",
    "Evaluation",
    "Totals",
    "device_of",
    "evaluate",
    "labelled",
    "pair_of",
    "require_class_indices",
    "require_logits",
    "run_evaluation",
    "show_bar",
]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy as a fraction, mean cross entropy, mean spikes per neuron and step of each population.

    With early exit the last are of the steps that each sample took; `mean_steps` is their mean, else None.
    `confusion[label][answer]` counts the samples, where that was asked for, else it is empty.
    """

    accuracy: float
    loss: float
    firing_rate: dict[str, float]
    samples: int
    mean_steps: float | None = None
    confusion: list[list[int]] = field(default_factory=list)

    @property
    def class_accuracy(self) -> list[float | None]:
        """Of the samples of each class, where `confusion` is known; None for a class without any."""
        return [row[label] / sum(row) if any(row) else None for label, row in enumerate(self.confusion)]


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

    def state_dict(self) -> dict[str, float | int]:
        """The sums; the only place that waits for the device."""
        return {"loss": float(self.loss), "correct": int(self.correct), "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss.fill_(state["loss"])
        self.correct.fill_(state["correct"])
        self.samples = state["samples"]


def pair_of(batch: Any) -> Batch:
    """The two tensors (x, y) of a batch.

    Raises:
        ValueError: it is anything else.
    """
    parts = tuple(batch) if isinstance(batch, Iterable) and not isinstance(batch, (Tensor, str)) else (batch,)
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        found = ", ".join([*(type(part).__name__ for part in parts[:4]), *(["..."] if len(parts) > 4 else [])])
        raise ValueError(
            f"batches must be pairs (x, y) of tensors, got ({found}): give a loader that yields inputs and labels"
        )
    return parts


def labelled(batch: Any) -> Batch:
    """The inputs of a batch and their labels, class indices [B].

    Raises:
        ValueError: it is anything else.
    """
    x, y = pair_of(batch)
    require_class_indices(y)
    return x, y


def require_class_indices(y: Tensor) -> None:
    """Raises ValueError unless these are the labels [B] of a classification."""
    if y.dim() != 1 or y.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"labels must be class indices [B], int64, got {list(y.shape)}, {str(y.dtype).removeprefix('torch.')}: "
            "use y.long(), y.squeeze(1), or y.argmax(1) for one-hot labels"
        )


def require_logits(logits: Any, y: Tensor, *, over_time: bool = False) -> None:
    """Raises ValueError unless these are logits [B, classes] for the labels y [B], or of each step [T, B, classes].

    Labels are compared with the number of classes where they lie on the CPU: elsewhere that would wait for the device.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must give logits [B, classes], got a {type(logits).__name__}")
    shape = list(logits.shape)
    if not (len(shape) == 2 or (over_time and len(shape) == 3)) or shape[-2] != len(y):
        raise ValueError(f"the model must give logits [B, classes] for {len(y)} labels, got {shape}")
    if len(y) and y.device.type == "cpu":
        low, high = (int(bound) for bound in torch.aminmax(y))
        if low < 0 or high >= shape[-1]:
            raise ValueError(
                f"labels must lie in [0, {shape[-1]}), the classes of the model, got {low} to {high}: leave samples "
                "out that have no label"
            )


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    early_exit: float | None = None,
    confusion: bool = False,
    progress: bool | None = False,
    ranks: Ranks = Ranks(),
) -> Evaluation:
    """Accuracy, loss and firing rates of `model` in evaluation mode; its mode is put back afterwards.

    Args:
        model: gives logits [B, classes].
        batches: what to evaluate on.
        early_exit: confidence at which the simulation of a sample ends (`FeedbackClassifier.exit_early`); None: at T.
        confusion: count the answers for every label, too: classes^2 numbers.
        progress: show a bar; None means only on a terminal.
        ranks: processes that share the work; all of them have to call this, with the same batches, and get the result.
    """
    result = run_evaluation(model, batches, "evaluating", progress, lambda: False, ranks, early_exit, confusion)
    assert result is not None  # nothing asks it to stop
    return result


def run_evaluation(
    model: nn.Module,
    batches: Iterable[Batch],
    title: str,
    progress: bool | None,
    stop: Callable[[], bool],
    ranks: Ranks = Ranks(),
    early_exit: float | None = None,
    with_confusion: bool = False,
) -> Evaluation | None:
    """As `evaluate`; None if `stop`, asked after each batch by all ranks alike, says so before the end."""
    if early_exit is not None and not hasattr(model, "exit_early"):
        raise ValueError(f"a {type(model).__name__} has no early exit: only networks with one feedback block have")
    device = device_of(model)
    totals, steps, confusion = Totals(device), 0, _Confusion() if with_confusion else None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), BlockMonitor(model, firing_rates=True) as monitor:
            count = len(batches) if isinstance(batches, Sized) else None
            for batch in show_bar(_own(batches, ranks), title, progress, count):
                x, labels = labelled(batch)
                if len(labels):
                    x, y = x.to(device), labels.to(device)
                    if early_exit is None:
                        logits = model(x)
                    else:
                        logits, rates = model.exit_early(x, early_exit)  # type: ignore[operator]
                        steps += int(rates.steps.sum())
                    require_logits(logits, labels)
                    totals.add(F.cross_entropy(logits, y), logits, y)
                    if confusion is not None:
                        confusion.add(logits, y)
                    monitor.count(len(y))
                if stop():
                    return None
    finally:
        model.train(was_training)
    sums = merged(ranks.gather(totals.state_dict()))
    samples = int(sums["samples"])
    if not samples:
        raise ValueError(
            "there is no batch to evaluate on: pass a loader or a list, an iterator is used up after one pass"
        )
    mean_steps = None if early_exit is None else sum(ranks.gather(steps)) / samples
    firing_rate = monitor.firing_rate(ranks)
    figures = sums["correct"] / samples, sums["loss"] / samples, firing_rate, samples, mean_steps
    return Evaluation(*figures, [] if confusion is None else confusion.of_all(ranks))


class _Confusion:
    """Counts of (label, answer), on the device."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # [classes, classes]

    def add(self, logits: Tensor, labels: Tensor) -> None:
        classes = logits.shape[1]
        if self.counts is None:
            self.counts = labels.new_zeros(classes, classes, dtype=torch.int64)
        cells = labels.long() * classes + logits.argmax(1)
        self.counts.view(-1).scatter_add_(0, cells, torch.ones_like(cells))

    def of_all(self, ranks: Ranks) -> list[list[int]]:
        every = ranks.gather(None if self.counts is None else self.counts.cpu())
        counted = [counts for counts in every if counts is not None]  # some ranks may have had no sample
        return torch.stack(counted).sum(0).tolist()


def _own(batches: Iterable[Batch], ranks: Ranks) -> Iterator[Batch]:
    """This rank's part of every batch; of batches that cannot be divided, some whole ones.

    Equally many on all ranks, so that parts can be empty.
    """
    if ranks.is_alone:
        yield from batches
    elif hasattr(batches, "shared"):
        yield from batches.shared(ranks)
    else:
        iterator = iter(batches)
        while group := list(itertools.islice(iterator, ranks.count)):
            x, y = group[min(ranks.rank, len(group) - 1)]
            yield (x, y) if ranks.rank < len(group) else (x[:0], y[:0])


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
