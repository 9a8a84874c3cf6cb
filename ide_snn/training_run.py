"""What `ide_snn.training.fit` does, step by step: epochs, steps, evaluations, and saving so that all can go on."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ide_snn.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_weights, plain, save_checkpoint
from ide_snn.data.torch_loader import TorchLoader
from ide_snn.distributed import Ranks, Share
from ide_snn.dropout import DropoutStream
from ide_snn.evaluation import Batch, Totals, device_of, labelled, require_logits, run_evaluation, show_bar
from ide_snn.interrupt import StopRequest
from ide_snn.monitor import (
    BlockMonitor,
    GradientNorms,
    feedback_diagnostics,
    gradient_figures,
    gradient_norm,
    merged,
    peak_of,
    solver_figures,
)
from ide_snn.optim import Schedule, set_learning_rate
from ide_snn.progress import (
    Batches,
    FitResult,
    NonFiniteLossError,
    Progress,
    describe,
    random_state,
    set_random_state,
)
from ide_snn.replicas import Replicas, with_shares
from ide_snn.reporting import RunLog, write_csv
from ide_snn.resuming import TrainingState, optimizer_options, own_random, refuse_changes, settings_of
from ide_snn.solvers import SolverWarning

__all__ = ["TrainingRun"]

log = logging.getLogger("ide_snn.training")

PEAK = 20  # times the mean of the other steps of the epoch: a norm of the gradient that is worth a warning
LOST_WORKER = (RuntimeError, OSError, EOFError)  # what reading batches raises when a worker has ended


@dataclass
class TrainingRun:
    """One call of `fit`, whose arguments its attributes are."""

    model: nn.Module
    train: Batches
    test: Iterable[Batch]
    optimizer: torch.optim.Optimizer
    epochs: int
    schedule: Schedule
    validation: Iterable[Batch] | None
    accumulation: int
    gradient_clip: float | None
    label_smoothing: float
    seed: int | None
    sync_bn: bool
    ranks: Ranks
    run_dir: Path | None
    config: Mapping[str, Any]
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    data: Mapping[str, Any]
    begun: Callable[[bool], object] | None
    log_every: int
    show: bool | None

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.device = device_of(self.model)
        self.selected_on = "test" if self.validation is None else "validation"
        self.stop = StopRequest()
        self.stopped: int | None = None  # the signal that stops all ranks
        self.told_of_peaks = False
        self.show = self.show if self.ranks.is_first else False
        self.replicas = Replicas(self.model, self.ranks, self.sync_bn)
        drawn = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        self.mask_seed = self.ranks.from_first(drawn)
        self._begin_epoch()
        # never read back from a checkpoint: there the rates are those of some step
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.options = optimizer_options(self.optimizer)
        self.order = self.train.seed if isinstance(self.train, TorchLoader) else None
        self.settings = settings_of(self.model, self.train)

    def run(self, resume: bool) -> FitResult:
        if self.run_dir is not None:  # what could not be saved is said before anything is trained
            plain(self.optimizer.state_dict(), "the optimizer's state")
            plain(self.model.state_dict(), "the model's state")
        self.train = self.replicas.begin(self.train)
        own_random(self.mask_seed, self.ranks)
        resumed = self._resume_or_refuse(resume)
        if isinstance(self.train, TorchLoader) and self.train.seed is None:
            self.train = copy.copy(self.train)
            self.train.seed = self.mask_seed  # a resumed run keeps that which it had
        if resumed and self.progress.epoch >= self.epochs and self.progress.rows:
            self._say(f"{self.run_dir} is finished ({self.progress.epoch} epochs); nothing to do")
            if self.run_dir is not None and self.ranks.is_first:  # a run killed while it wrote its last row lacks it
                write_csv(self.run_dir / "metrics.csv", self.progress.rows)
            set_learning_rate(self.optimizer, self.base_rates, 1.0)
            return self._result(already_finished=True)
        if self.begun is not None and self.ranks.is_first:
            self.begun(resumed)
        self.started = time.perf_counter() - self.progress.seconds
        self.log = RunLog(self.run_dir if self.ranks.is_first else None, self.progress.step + 1 if resumed else 0)
        self.masks = DropoutStream(self.mask_seed)
        try:
            with self.stop, self.replicas.synchronised(), self.masks.serving(self.model), warnings.catch_warnings():
                complete = self._all_epochs()
                if not complete:
                    self._save("last")
                    self.ranks.wait()  # a rank that ends before makes the launcher end the one that saves
        finally:
            self.log.close()
            set_learning_rate(self.optimizer, self.base_rates, 1.0)
        return self._result(interrupted=None if complete else self.stopped)

    def _all_epochs(self) -> bool:
        """False if stopped on the way."""
        if self.epochs == 0:
            return self._finish_epoch(untrained=True)
        while self.progress.epoch < self.epochs:
            if not (self._train_epoch() and self._finish_epoch()):
                return False
        return True

    def _begin_epoch(self) -> None:
        self.progress.batches = 0
        self.totals = Totals(self.device)
        self.monitor = BlockMonitor(self.model)
        self.gradients = GradientNorms(self.device)

    def _train_epoch(self) -> bool:
        progress = self.progress
        title = f"epoch {progress.epoch + 1}/{self.epochs}"
        self.model.train()
        logged = self._sums()
        with (
            contextlib.closing(with_shares(self.train, progress.epoch, progress.batches)) as batches,
            self.monitor,
            show_bar(None, title, self.show, len(self.train), progress.batches) as bar,
        ):
            while group := self._next_group(batches):
                rate = self._step(group)
                bar.update(len(group))
                if progress.step % self.log_every == 0:
                    sums = self._sums()
                    recent = (sums["loss"] - logged["loss"]) / (sums["samples"] - logged["samples"])
                    logged = sums
                    self._require_finite(recent, "training loss")
                    self.log.scalars({"train_loss_recent": recent, "learning_rate": rate}, progress.step)
                    bar.set_postfix(loss=f"{recent:.4f}", failed_solves=self.monitor.failures)
                self.stopped = self.replicas.stop_signal(self.stop.signum, progress.step)
                if self.stopped is not None:
                    return False
        return self.stopped is None

    def _next_group(self, batches: Iterator[tuple[Batch, Share]]) -> list[tuple[Batch, Share]]:
        """The batches of one optimiser step; none at the end of the epoch, and where a signal ended their workers."""
        try:
            group = list(itertools.islice(batches, self.accumulation))
            self.stop.hold_back_deaths()
            return group
        except LOST_WORKER:
            if not self._was_stopped():
                raise
            return []

    def _was_stopped(self) -> bool:
        """True if the signal that this process got may have ended the workers of a loader, too; it stops then."""
        self.stopped = self.stop.signum if self.ranks.is_alone else None
        return self.stopped is not None

    def _sums(self) -> Mapping[str, int | float]:
        """Loss, correct answers and samples of the epoch so far, of all ranks."""
        return merged(self.ranks.gather(self.totals.state_dict()))

    def _step(self, group: list[tuple[Batch, Share]]) -> float:
        """One optimiser step on the mean loss over all samples of the group; returns the learning rate."""
        if not all(share.total for _, share in group):
            raise ValueError("a training batch has no samples: leave empty batches out of the loader")
        samples = sum(share.total for _, share in group)
        factor = self.schedule(self.progress.step, self.progress.epoch)
        rate = set_learning_rate(self.optimizer, self.base_rates, factor)
        self.optimizer.zero_grad(set_to_none=True)
        self.masks.begin(self.progress.step)
        for batch, share in group:
            x, y = labelled(batch)
            self.masks.serve(share)
            logits = self.model(x.to(self.device))
            require_logits(logits, y, over_time=True)
            targets = y = y.to(self.device)
            if logits.dim() == 3:
                targets = y.expand(len(logits), -1).flatten()
            loss = F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=self.label_smoothing)
            (loss * (len(y) / samples)).backward()
            self.totals.add(loss, logits if logits.dim() == 2 else logits.mean(0), y)
        self.replicas.sum_gradients(wants_to_stop=self.stop.signum is not None)
        if self.gradient_clip is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        else:
            norm = gradient_norm(self.model.parameters())
        self.gradients.add(norm)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.batches += len(group)
        if self.monitor.failures:
            # the first failure of a run was shown; from now on they are counted only
            warnings.simplefilter("ignore", SolverWarning)
        return rate

    def _finish_epoch(self, untrained: bool = False) -> bool:
        """Evaluate, record and save; False if stopped in the evaluation."""
        row: dict[str, float | int | None] = {"epoch": self.progress.epoch + (not untrained)}
        row["step"] = self.progress.step
        self.replicas.average_statistics()
        if not untrained:
            sums = self._sums()
            loss = sums["loss"] / sums["samples"]
            self._require_finite(loss, "training loss")
            self._require_finite_weights()
            row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            row.update(train_loss=loss, train_accuracy=sums["correct"] / sums["samples"])
        for name, batches in (("test", self.test), ("validation", self.validation)):
            if batches is not None:
                random = random_state(self.device)  # a loader of torch draws; a stopped evaluation is repeated
                try:
                    result = run_evaluation(self.model, batches, name, self.show, self._is_stopped, self.ranks)
                except LOST_WORKER:
                    if not self._was_stopped():
                        raise
                    result = None
                set_random_state(random, self.device)
                if result is None:
                    return False
                self._require_finite(result.loss, f"{name} loss")
                row.update({f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy})
                if name == "test":
                    row.update({f"firing_rate_{key}": rate for key, rate in result.firing_rate.items()})
        solves = merged(self.ranks.gather(self.monitor.state_dict()))
        row.update(solver_figures(solves))
        gradients = self.gradients.state_dict()
        row.update(gradient_figures(gradients))
        if solves["solves"]:
            self._tell_of_peaks(peak_of(gradients), gradients["max_norm"])
        row.update(feedback_diagnostics(self.model))
        self._record(row, solves)
        return True

    def _tell_of_peaks(self, peak: float, largest: float) -> None:
        """A warning, once in this call, where the gradient of one step was far larger than the others."""
        if self.told_of_peaks or self.gradient_clip is not None or not peak > PEAK:
            return
        self.told_of_peaks = True
        if self.ranks.is_first:
            log.warning(
                "epoch %d: the norm of the gradient was %.3g in one step, %.3g times the mean of the others. "
                "trainer.gradient_clip=1.0 keeps one step from undoing many. The cause may be a wrong label or an "
                "outlier, or an I - J^T that is close to singular for a single sample (docs/constraints.md)",
                self.progress.epoch + 1,
                largest,
                peak,
            )

    def _is_stopped(self) -> bool:
        self.stopped = self.replicas.agreed_signal(self.stop.signum)
        return self.stopped is not None

    def _record(self, row: dict[str, float | int | None], solves: Mapping[str, int | float]) -> None:
        progress = self.progress
        progress.seconds = time.perf_counter() - self.started
        row["seconds"] = progress.seconds
        progress.rows.append(row)
        progress.epoch = int(row["epoch"] or 0)
        progress.solves += int(solves["solves"])
        progress.solver_failures += int(solves["failures"])
        accuracy = row[f"{self.selected_on}_accuracy"] or 0.0
        is_best = accuracy > progress.best_accuracy
        if is_best:
            progress.best_accuracy, progress.best_epoch = accuracy, progress.epoch
            progress.test_accuracy_best = row["test_accuracy"]
        self._begin_epoch()
        if is_best:  # before last.pt: a run killed in between repeats the epoch and finds it to be the best again
            self._save("best")
        self._save("last")
        self.log.epoch(progress.rows, progress.step)
        self._say(describe(row, self.epochs))

    def _say(self, message: str) -> None:
        if self.ranks.is_first:
            log.info(message)

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            self._give_up(f"the {what} became {value}")

    def _require_finite_weights(self) -> None:
        for key, value in self.model.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                self._give_up(f"{key} became NaN or infinite")

    def _give_up(self, what: str) -> None:
        saved = ""
        if self.run_dir is not None and self._path("last").exists():
            saved = f" The last good state is in {self._path('last')}."
        raise NonFiniteLossError(
            f"{what} in epoch {self.progress.epoch + 1}, step {self.progress.step}.{saved} Try a lower "
            "learning rate (optimizer.lr), clipping (trainer.gradient_clip=1.0) or warm-up "
            "(schedule.warmup_steps), and look at the solver's failures: a diverged solve gives a bad gradient."
        )

    def _path(self, name: str) -> Path:
        assert self.run_dir is not None
        return self.run_dir / "checkpoints" / f"{name}.pt"

    def _save(self, name: str) -> None:
        """Write a checkpoint, unless a weight is not finite; `last` holds what is needed to continue."""
        if self.run_dir is None:
            return
        self.replicas.average_statistics()
        self._require_finite_weights()
        self.replicas.require_identical()
        self.progress.seconds = time.perf_counter() - self.started
        training = None
        if name == "last":
            training = self._state().saved()
        if self.ranks.is_first:
            save_checkpoint(
                self._path(name),
                self.model,
                config=self.config,
                data=self.data,
                progress=asdict(self.progress),
                training=training,
            )

    def _state(self) -> TrainingState:
        counted = self.totals, self.monitor, self.gradients
        return TrainingState(
            self.optimizer, self.options, self.settings, *counted, self.mask_seed, self.order, self.device, self.ranks
        )

    def _resume_or_refuse(self, resume: bool) -> bool:
        """True if the state of last.pt was restored."""
        if self.run_dir is None:
            if resume:
                raise ValueError("resuming needs the run_dir to resume from")
            return False
        path = self._path("last")
        if not self.ranks.from_first(path.exists()):
            if resume:
                self._say(f"no checkpoint at {path}: starting anew")
            return False
        if not resume:
            raise FileExistsError(
                f"{self.run_dir} holds a run already; continue it with resume=auto, or choose another folder "
                "(hydra.run.dir) or remove it"
            )
        self._restore(load_checkpoint(path))
        return True

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.training is None:
            raise CheckpointError(f"{checkpoint.path} holds no training state to continue from")
        refuse_changes(checkpoint, self.config, self.upgrade, self.data, self.epochs, self.schedule)
        state = self._state()
        state.refuse_another_optimizer(checkpoint)  # before anything is changed
        state.refuse_another_order(checkpoint)
        state.refuse_other_settings(checkpoint)
        load_weights(self.model, checkpoint)
        self.progress = Progress(**checkpoint.progress)
        state.restore(checkpoint.training)
        self.mask_seed, self.options = state.seed, state.options
        done = f"{self.progress.epoch} epochs and {self.progress.batches} batches"
        self._say(f"resuming {checkpoint.path} after {done}")

    def _result(self, *, interrupted: int | None = None, already_finished: bool = False) -> FitResult:
        ending = {"interrupted": interrupted, "already_finished": already_finished}
        return FitResult.of(self.progress, self.model, best_selected_on=self.selected_on, **ending)
