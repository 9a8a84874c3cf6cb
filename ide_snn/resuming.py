"""What a training run saves besides the model in order to go on, and whether it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ide_snn.checkpoint import Checkpoint, CheckpointError, alike, config_differences, flatten, plain
from ide_snn.data_record import data_differences
from ide_snn.distributed import Ranks
from ide_snn.evaluation import Totals
from ide_snn.monitor import BlockMonitor, GradientNorms, feedback_blocks, merged
from ide_snn.optim import Schedule
from ide_snn.progress import random_state, set_random_state

__all__ = ["CHANGEABLE", "TrainingState", "optimizer_options", "refuse_changes", "settings_of"]

# Options that may change when a run is resumed: they do not change what is computed, but for rounding.
CHANGEABLE = (
    "resume",
    "device",
    "compile",
    "data_dir",
    "dataset.cache",
    "dataset.download",
    "trainer.threads",
    "trainer.progress",
    "trainer.log_every",
    "trainer.process_timeout",
)

# Of the groups of an optimizer: which parameters, rates (`fit` has its own), and how steps are computed
OF_THE_RUN = ("params", "param_names", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")


def refuse_changes(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    data: Mapping[str, Any],
    epochs: int,
    schedule: Schedule,
) -> None:
    """Raises CheckpointError if the run was begun with another configuration, or with other data."""
    ignore: tuple[str, ...] = CHANGEABLE
    saved = upgrade(checkpoint.config) if checkpoint.config else {}
    longer = epochs >= flatten(saved).get("trainer.epochs", math.inf) > 0
    if longer and not schedule.depends_on_epochs:
        ignore = (*ignore, "trainer.epochs")
    changes = config_differences(saved, config, ignore=ignore)
    if changes:
        only_longer = schedule.depends_on_epochs and any(change.startswith("trainer.epochs:") for change in changes)
        remedy = "; the learning rate of this schedule depends on the number of epochs" if only_longer else ""
        raise CheckpointError(
            f"{checkpoint.path} belongs to a run with another configuration, so it cannot be resumed: "
            f"{'; '.join(changes)} (saved -> now){remedy}. Set these options back, or train in another folder"
        )
    others = data_differences(checkpoint.data, data)
    if others:
        raise CheckpointError(
            f"{checkpoint.path} belongs to a run on other data, so it cannot be resumed: {'; '.join(others)} (saved -> "
            "now); set data_dir to the data that it was begun with"
        )


@dataclass
class TrainingState:
    """What a run has besides its model and its progress; all ranks save and restore it together.

    Attributes:
        options: of the optimizer as this part of the run was begun, see `optimizer_options`.
        settings: of the network and its data, see `settings_of`.
        seed: of the dropout masks, and of the order of batches where that is drawn here.
        order: the seed of that order where it is the loader's own.
    """

    optimizer: torch.optim.Optimizer
    options: list[dict[str, Any]]
    settings: dict[str, Any]
    totals: Totals
    monitor: BlockMonitor
    gradients: GradientNorms
    seed: int
    order: int | None
    device: torch.device
    ranks: Ranks

    def saved(self) -> dict[str, Any]:
        """Plain containers, which rank 0 writes.

        The sums are those of all ranks, so that any number of processes can go on; what each of several ranks has is
        kept beside them, so that the same number goes on exactly.
        """
        own: dict[str, Any] = {
            "totals": self.totals.state_dict(),
            "monitor": self.monitor.state_dict(),
            "random": random_state(self.device),
        }
        every = self.ranks.gather(own)
        state = {
            "optimizer_kind": type(self.optimizer).__name__,
            "optimizer_options": self.options,
            "settings": self.settings,
            "optimizer": self.optimizer.state_dict(),
            "totals": merged([part["totals"] for part in every]),
            "monitor": merged([part["monitor"] for part in every]),
            "gradients": self.gradients.state_dict(),  # the same on all ranks
            "random": every[0]["random"],
            "seed": self.seed,
            "order": self.order,
        }
        return state if self.ranks.is_alone else {**state, "ranks": every}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `saved` gave, to any number of ranks; `seed` and `options` are those of the run then."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.options = state.get("optimizer_options", self.options)
        self.seed = int(state.get("seed", self.seed))
        if "gradients" in state:
            self.gradients.load_state_dict(state["gradients"])
        elif state["totals"]["samples"]:  # in the midst of an epoch that version 0.1 began
            self.gradients.load_state_dict(self.gradients.uncounted())
        every = state.get("ranks", [state])  # a single process, and version 0.1, have no list
        if len(every) == self.ranks.count:
            own: Mapping[str, Any] | None = every[self.ranks.rank]
        else:
            own = state if self.ranks.is_first else None
        if own is None:
            own_random(self.seed, self.ranks)
        else:
            self.totals.load_state_dict(own["totals"])
            self.monitor.load_state_dict(own["monitor"])
            set_random_state(own["random"], self.device)

    def refuse_other_settings(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError where the network computes something else, or an epoch has other batches.

        Of settings that only one of the two has, versions may be the reason; version 0.1 saved none.
        """
        saved = (checkpoint.training or {}).get("settings", {})
        before, now = flatten(saved), flatten(self.settings)
        changes = [
            f"{key}: {before[key]} -> {now[key]}" for key in before if key in now and not alike(before[key], now[key])
        ]
        if changes:
            raise CheckpointError(
                f"{checkpoint.path} belongs to a run with other settings, so it cannot be resumed: "
                f"{'; '.join(changes)} (saved -> now). Set these back, or train in another folder"
            )

    def refuse_another_order(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if the loader brings another seed than the run was begun with.

        The run's own seed is taken from the checkpoint. Version 0.1 took it even where the loader had one.
        """
        state = checkpoint.training or {}
        begun = state.get("order", state.get("seed") if self.order is not None else None)
        if begun != self.order:
            kept = "a loader without a seed" if begun is None else f"TorchLoader(seed={begun})"
            now = "a loader without a seed" if self.order is None else f"seed={self.order}"
            raise CheckpointError(
                f"{checkpoint.path} was begun with {kept}, so it cannot be resumed with {now}, which is another order"
            )

    def refuse_another_optimizer(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for an optimizer of another kind, or with other options than its rates.

        Those it was begun with, or those it had when it was saved, which some optimizers change. Of options that only
        one of the two has, versions of torch may be the reason; older states have none.
        """
        state, path = checkpoint.training or {}, checkpoint.path
        kind, now = state.get("optimizer_kind"), type(self.optimizer).__name__
        if kind not in (None, now):
            raise CheckpointError(f"{path} was begun with the optimizer {kind}, so it cannot be resumed with {now}")
        saved = state["optimizer"]["param_groups"]
        if len(saved) != len(self.options):
            raise CheckpointError(
                f"{path} has {len(saved)} groups of parameters in its optimizer, so it cannot be resumed with "
                f"{len(self.options)}"
            )
        for number, (group, mine) in enumerate(zip(saved, self.optimizer.param_groups, strict=True)):
            count, own = len(group["params"]), len(mine["params"])
            if count != own:
                raise CheckpointError(
                    f"{path} has {count} parameters in group {number} of its optimizer, so it cannot be resumed with "
                    f"{own}"
                )
        begun = state.get("optimizer_options", self.options)
        changes = [
            f"{name}: {before[name]} -> {mine[name]}"
            for before, last, mine in zip(begun, saved, self.options, strict=True)
            for name in mine
            if name in before and not any(alike(was[name], mine[name]) for was in (before, last) if name in was)
        ]
        if changes:
            raise CheckpointError(
                f"{path} was begun with another optimizer, so it cannot be resumed: {'; '.join(changes)} (saved -> "
                "now). Set these options back, or train in another folder"
            )


def settings_of(model: nn.Module, train: Sized) -> dict[str, Any]:
    """What the feedback blocks of `model` compute besides their weights, and the number of batches in an epoch."""
    names = ("neuron", "time_steps", "solver", "gradient", "input_has_time")
    blocks = {
        f"{prefix}{name}": _described(getattr(block, name))
        for prefix, block in feedback_blocks(model).items()
        for name in names
    }
    return {"batches": len(train), **blocks}


def _described(value: Any) -> Any:
    """The fields of a dataclass, numbers and words as they are; of anything else its class."""
    if is_dataclass(value):
        own = {field.name: _described(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **own}
    return plain(value, "setting") if _is_simple(value) else {"kind": type(value).__name__}


def optimizer_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group, what it was made with: numbers and words, without the rates, which `fit` sets itself."""
    return [
        {name: plain(value, name) for name, value in group.items() if name not in OF_THE_RUN and _is_simple(value)}
        for group in optimizer.param_groups
    ]


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str, np.generic))


def own_random(seed: int, ranks: Ranks) -> None:
    """Another random state on each rank but the first: torch's own dropout would give all shares the same mask."""
    if not ranks.is_first:
        torch.manual_seed(int(np.random.SeedSequence((seed, ranks.rank, 4)).generate_state(1, np.uint64)[0]))
