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
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ide_snn.checkpoint import plain
from ide_snn.data.torch_loader import as_batches
from ide_snn.distributed import Ranks
from ide_snn.evaluation import Batch, Evaluation, evaluate
from ide_snn.files import sole_writer
from ide_snn.optim import ConstantSchedule, Schedule
from ide_snn.progress import Batches, FitResult, NonFiniteLossError, require_in_range, require_usable
from ide_snn.training_run import TrainingRun

__all__ = ["Batches", "Evaluation", "FitResult", "NonFiniteLossError", "evaluate", "fit"]


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
            not be told otherwise. That neurons, time steps, solvers and gradients of feedback blocks, the optimizer
            and the number of batches are the same is seen to in any case.
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
        ValueError: an argument is out of range or does not fit the model, batches are not pairs of inputs and class
            indices, the model does not give logits, or the batches cannot be divided among the processes.
        RankLostError, RankError: another process has ended, or has other weights.
    """
    require_in_range(
        epochs=epochs,
        accumulation=accumulation,
        log_every=log_every,
        gradient_clip=gradient_clip,
        label_smoothing=label_smoothing,
    )
    schedule = schedule or ConstantSchedule()
    require_usable(model, optimizer, schedule)
    run = TrainingRun(
        model=model,
        train=as_batches(train),
        test=test,
        optimizer=optimizer,
        epochs=epochs,
        schedule=schedule,
        validation=validation,
        accumulation=accumulation,
        gradient_clip=gradient_clip,
        label_smoothing=label_smoothing,
        seed=None if seed is None else operator.index(seed),
        sync_bn=sync_bn,
        ranks=Ranks.current() if ranks is None else ranks,
        run_dir=None if run_dir is None else Path(run_dir),
        config=plain(config or {}, "config"),
        upgrade=upgrade,
        data=plain(data or {}, "data"),
        begun=begun,
        log_every=log_every,
        show=progress,
    )
    folder = run.run_dir if run.ranks.is_first else None
    with contextlib.nullcontext() if folder is None else sole_writer(folder):
        return run.run(resume)
