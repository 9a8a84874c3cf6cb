"""Training and evaluation of any classifier on plain objects; no configuration files involved.

    train = DeviceLoader(data.train, batch_size=128, normalization=data.normalization, shuffle=True, seed=0)
    test = DeviceLoader(data.test, batch_size=500, normalization=data.normalization, shuffle=False)
    result = fit(net, train, test, optimizer=torch.optim.SGD(net.parameters(), lr=0.05), epochs=10)
    evaluate(net, test).accuracy

The loss is the cross entropy of `model(x)`, logits [B, classes]; of logits per time step [T, B, classes] it is the mean
over the steps. Feedback blocks anywhere in the model report
their solves and firing rates. With a `run_dir` the run can be stopped and continued at any step.

Several processes (torchrun, or any process group that is there) train one model: each calls `fit` with the same
arguments and takes its share of every batch; the result is that of one process with the whole batch (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ide_snn.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_weights, save_checkpoint
from ide_snn.data.torch_loader import as_batches
from ide_snn.distributed import Ranks, Share
from ide_snn.dropout import DropoutStream
from ide_snn.evaluation import Batch, Evaluation, Totals, device_of, evaluate, run_evaluation, show_bar
from ide_snn.files import sole_writer
from ide_snn.interrupt import StopRequest
from ide_snn.monitor import BlockMonitor, feedback_diagnostics, merged, solver_figures
from ide_snn.optim import ConstantSchedule, Schedule, set_learning_rate
from ide_snn.progress import Batches, FitResult, NonFiniteLossError, Progress, describe
from ide_snn.replicas import Replicas, with_shares
from ide_snn.reporting import RunLog, write_csv
from ide_snn.resuming import own_random, refuse_changes, restore_training, training_state
from ide_snn.solvers import SolverWarning

__all__ = ["Batches", "Evaluation", "FitResult", "NonFiniteLossError", "evaluate", "fit"]

log = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    train: Batches | DataLoader[Any],
    test: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    schedule: Schedule | None = None,
    validation: Iterable[Batch] | None = None,
    accumulation: int = 1,
    gradient_clip: float | None = None,
    label_smoothing: float = 0.0,
    seed: int | None = None,
    sync_bn: bool = True,
    ranks: Ranks | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    data: Mapping[str, Any] | None = None,
    begun: Callable[[bool], object] | None = None,
    log_every: int = 50,
    progress: bool | None = True,
) -> FitResult:
    """Train `model` in place and evaluate it after each epoch.

    Args:
        model: gives logits [B, classes], or in training [T, B, classes]; it lies on its device already.
        train: a torch `DataLoader`, a `DeviceLoader`, or `Batches` of your own; for several processes `SharedBatches`.
        test: evaluated after each epoch.
        optimizer: with the base learning rates, which `schedule` multiplies; they are put back in the end.
        epochs: 0 only evaluates the untrained model.
        schedule: factor on the learning rate as a function of (step, epoch), both from 0.
        validation: selects the best epoch; without it the test set does.
        accumulation: batches per optimiser step; their gradients are averaged over the samples.
        gradient_clip: largest global norm of the gradient, None for no clipping.
        label_smoothing: share of the target that is spread evenly over all classes, in training only.
        seed: of the dropout masks, which depend on it, the step and the sample only; None draws one from torch's
            global generator. A resumed run keeps the seed that it has.
        sync_bn: with several processes: batch norms normalise by the whole batch; False: by each process's share, with
            running statistics that are averaged at the end of each epoch and whenever the model is saved.
        ranks: the processes; None: those of torch's process group, or this one alone.
        run_dir: where metrics.csv, tensorboard/ and checkpoints/{last,best}.pt go; None writes nothing.
        resume: continue checkpoints/last.pt of `run_dir` if there is one.
        config: saved in the checkpoints; a resumed run must have the same one, except for what does not
            change the computation (and `trainer.epochs`, which may grow if the schedule does not depend on it).
        upgrade: brings a saved config of an older version into the present form before it is compared.
        data: what else should be known about the data, saved in the checkpoints; plain containers. A resumed run must
            not be told otherwise.
        begun: called by rank 0 before the first step of this call, with True where a run is continued; `run_dir` is
            this process's then.
        log_every: optimiser steps between looks at the running loss, each of which waits for the device.
        progress: show bars; None means only on a terminal.

    On SIGINT and SIGTERM the current step is finished, last.pt is saved and the result says `interrupted`; of several
    processes all do so after the same step, whichever of them got the signal. Only rank 0 writes files and shows bars.

    Raises:
        NonFiniteLossError: the loss or a weight became NaN or infinite; last.pt is the last good state.
        CheckpointError: the checkpoint to resume from is damaged, of another model, config or data.
        FileExistsError: `run_dir` holds a run and `resume` is not set, or another process is training in it.
        ValueError: an argument is out of range, or the batches cannot be divided among the processes.
        RankLostError, RankError: another process has ended, or has other weights.
    """
    for name, value, least in (
        ("epochs", epochs, 0),
        ("accumulation", accumulation, 1),
        ("log_every", log_every, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if gradient_clip is not None and not gradient_clip > 0:
        raise ValueError(f"gradient_clip must be positive, or None for no clipping; got {gradient_clip}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    run = _Run(
        model=model,
        train=as_batches(train, seed),
        test=test,
        optimizer=optimizer,
        epochs=epochs,
        schedule=schedule or ConstantSchedule(),
        validation=validation,
        accumulation=accumulation,
        gradient_clip=gradient_clip,
        label_smoothing=label_smoothing,
        seed=seed,
        sync_bn=sync_bn,
        ranks=Ranks.current() if ranks is None else ranks,
        run_dir=None if run_dir is None else Path(run_dir),
        config=config or {},
        upgrade=upgrade,
        data=data or {},
        begun=begun,
        log_every=log_every,
        show=progress,
    )
    folder = run.run_dir if run.ranks.is_first else None
    with contextlib.nullcontext() if folder is None else sole_writer(folder):
        return run.run(resume)


@dataclass
class _Run:
    """One call of `fit`."""

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
        self.show = self.show if self.ranks.is_first else False
        self.replicas = Replicas(self.model, self.ranks, self.sync_bn)
        drawn = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        self.mask_seed = self.ranks.from_first(drawn)
        self._begin_epoch()
        # never read back from a checkpoint: there the rates are those of some step
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, resume: bool) -> FitResult:
        self.train = self.replicas.begin(self.train)
        own_random(self.mask_seed, self.ranks)
        resumed = self._resume_or_refuse(resume)
        if resumed and self.progress.epoch >= self.epochs and self.progress.rows:
            self._say(f"{self.run_dir} is finished ({self.progress.epoch} epochs); nothing to do")
            if self.run_dir is not None and self.ranks.is_first:  # a run killed while it wrote its last row lacks it
                write_csv(self.run_dir / "metrics.csv", self.progress.rows)
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

    def _train_epoch(self) -> bool:
        progress = self.progress
        batches = with_shares(self.train, progress.epoch, progress.batches)
        title = f"epoch {progress.epoch + 1}/{self.epochs}"
        self.model.train()
        logged = self._sums()
        with self.monitor, show_bar(None, title, self.show, len(self.train), progress.batches) as bar:
            while group := list(itertools.islice(batches, self.accumulation)):
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
        return True

    def _sums(self) -> Mapping[str, int | float]:
        """Loss, correct answers and samples of the epoch so far, of all ranks."""
        return merged(self.ranks.gather(self.totals.state_dict()))

    def _step(self, group: list[tuple[Batch, Share]]) -> float:
        """One optimiser step on the mean loss over all samples of the group; returns the learning rate."""
        samples = sum(share.total for _, share in group)
        factor = self.schedule(self.progress.step, self.progress.epoch)
        rate = set_learning_rate(self.optimizer, self.base_rates, factor)
        self.optimizer.zero_grad(set_to_none=True)
        self.masks.begin(self.progress.step)
        for (x, y), share in group:
            x, y = x.to(self.device), y.to(self.device)
            self.masks.serve(share)
            logits = self.model(x)
            targets = y
            if logits.dim() == 3:
                targets = y.expand(len(logits), -1).flatten()
            loss = F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=self.label_smoothing)
            (loss * (len(y) / samples)).backward()
            self.totals.add(loss, logits if logits.dim() == 2 else logits.mean(0), y)
        self.replicas.sum_gradients(wants_to_stop=self.stop.signum is not None)
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
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
                result = run_evaluation(self.model, batches, name, self.show, self._is_stopped, self.ranks)
                if result is None:
                    return False
                self._require_finite(result.loss, f"{name} loss")
                row.update({f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy})
                if name == "test":
                    row.update({f"firing_rate_{key}": rate for key, rate in result.firing_rate.items()})
        solves = merged(self.ranks.gather(self.monitor.state_dict()))
        row.update(solver_figures(solves))
        row.update(feedback_diagnostics(self.model))
        self._record(row, solves)
        return True

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
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
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
            state = self.optimizer, self.totals, self.monitor, self.mask_seed, self.device, self.ranks
            training = training_state(*state)
        if self.ranks.is_first:
            save_checkpoint(
                self._path(name),
                self.model,
                config=self.config,
                data=self.data,
                progress=asdict(self.progress),
                training=training,
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
        load_weights(self.model, checkpoint)
        self.progress = Progress(**checkpoint.progress)
        state = self.optimizer, self.totals, self.monitor, self.mask_seed, self.device, self.ranks
        self.mask_seed = restore_training(checkpoint.training, *state)
        done = f"{self.progress.epoch} epochs and {self.progress.batches} batches"
        self._say(f"resuming {checkpoint.path} after {done}")

    def _result(self, *, interrupted: int | None = None, already_finished: bool = False) -> FitResult:
        ending = {"interrupted": interrupted, "already_finished": already_finished}
        return FitResult.of(self.progress, self.model, best_selected_on=self.selected_on, **ending)
