"""What a training run saves besides the model in order to go on, and whether it may."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ide_snn.checkpoint import Checkpoint, CheckpointError, config_differences
from ide_snn.data_record import data_differences
from ide_snn.distributed import Ranks
from ide_snn.evaluation import Totals
from ide_snn.monitor import BlockMonitor, merged
from ide_snn.optim import Schedule
from ide_snn.progress import random_state, set_random_state

__all__ = ["CHANGEABLE", "refuse_changes", "restore_training", "training_state"]

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
    longer = bool(saved) and epochs >= saved["trainer"]["epochs"] > 0
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


def training_state(
    optimizer: torch.optim.Optimizer,
    totals: Totals,
    monitor: BlockMonitor,
    seed: int,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, Any]:
    """Plain containers; all ranks take part, and rank 0 saves them.

    The sums are those of all ranks, so that any number of processes can go on; what each of several ranks has is kept
    beside them, so that the same number goes on exactly.
    """
    own: dict[str, Any] = {
        "totals": totals.state_dict(),
        "monitor": monitor.state_dict(),
        "random": random_state(device),
    }
    every = ranks.gather(own)
    state = {
        "optimizer": optimizer.state_dict(),
        "totals": merged([part["totals"] for part in every]),
        "monitor": merged([part["monitor"] for part in every]),
        "random": every[0]["random"],
        "seed": seed,
    }
    return state if ranks.is_alone else {**state, "ranks": every}


def restore_training(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    totals: Totals,
    monitor: BlockMonitor,
    seed: int,
    device: torch.device,
    ranks: Ranks,
) -> int:
    """Puts back what `training_state` gave, by whatever number of ranks; returns the seed of the dropout masks."""
    optimizer.load_state_dict(state["optimizer"])
    every = state.get("ranks", [state])  # a single process, and version 0.1, have no list
    if len(every) == ranks.count:
        own: Mapping[str, Any] | None = every[ranks.rank]
    else:
        own = state if ranks.is_first else None
    if own is None:
        own_random(seed, ranks)
    else:
        totals.load_state_dict(own["totals"])
        monitor.load_state_dict(own["monitor"])
        set_random_state(own["random"], device)
    return int(state.get("seed", seed))


def own_random(seed: int, ranks: Ranks) -> None:
    """Another random state on each rank but the first: torch's own dropout would give all shares the same mask."""
    if not ranks.is_first:
        torch.manual_seed(int(np.random.SeedSequence((seed, ranks.rank, 4)).generate_state(1, np.uint64)[0]))
