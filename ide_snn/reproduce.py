"""Experiments x seeds through the code of train.py, one folder each, and the report in the end.

    reproduce(request)  # `configs/reproduce.yaml` has the options

What is finished is skipped, what was cut off is continued, and a run that fails does not keep the others from running.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ide_snn.checkpoint import flatten
from ide_snn.config import CONFIG_DIR, ConfigError, check, config_from_dict, config_to_dict, load_config, quote
from ide_snn.files import sole_writer
from ide_snn.hydra_tools import launch, read_config_file, require_launcher
from ide_snn.paper import ROWS
from ide_snn.report import write_report
from ide_snn.report.collect import BrokenRunError, read_json
from ide_snn.report.lines import compare
from ide_snn.reporting import warnings_and_errors_in_log_files, write_json
from ide_snn.run import train
from ide_snn.schemas import Config, DownloadDatasetConfig, NMnistDatasetConfig, ReproduceConfig

__all__ = ["Job", "Outcome", "State", "attempt", "choose_experiments", "inspect", "plan", "reproduce"]

log = logging.getLogger(__name__)

# Errors with a message that says what to change; of any other the log has the traceback
EXPECTED = (ValueError, ArithmeticError, OSError, ImportError)


class State(Enum):
    """Where a job stands, by what its folder holds."""

    FINISHED = "finished"
    CUT_OFF = "cut off"
    TO_DO = "to do"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Job:
    """One experiment with one seed; `overrides` of `configs/train.yaml` give `config`."""

    experiment: str
    run_dir: Path
    config: Config
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.experiment} seed {self.config.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended; all None where it was finished."""

    error: str | None = None
    interrupted: int | None = None


def reproduce(request: ReproduceConfig) -> int:
    """Run what is asked for and write the report.

    Returns:
        The exit code: 0, 1 if a job failed, 128 + the signal's number if stopped.

    Raises:
        ConfigError: an unknown experiment or a wrong option, before anything is run.
        ImportError: an extra is missing, before anything is run.
    """
    _require_extras(request)
    jobs = plan(request)
    states = [inspect(job) for job in jobs]
    for job, (state, detail) in zip(jobs, states, strict=True):
        print(f"{state.value:<9} {job}{f': {detail}' if detail else ''}", flush=True)
    if request.dry_run:
        return 0
    blocked = {
        job.run_dir: Outcome(detail) for job, (s, detail) in zip(jobs, states, strict=True) if s is State.BLOCKED
    }
    todo = [
        _as_begun(job) if state is State.CUT_OFF else job
        for job, (state, _) in zip(jobs, states, strict=True)
        if state in (State.TO_DO, State.CUT_OFF)
    ]
    if len(todo) == len(jobs):
        _require_data_dir(todo)
    outcomes, stopped = _run(todo, request) if todo else ({}, None)
    code = _summary(jobs, {**blocked, **outcomes}, skipped=len(jobs) - len(todo) - len(blocked), stopped=stopped)
    if stopped is None and request.report is not None:
        print(f"report: {write_report(request.runs, request.report)}")
    return code


def plan(request: ReproduceConfig) -> list[Job]:
    """Every experiment with every seed, composed and checked.

    Raises:
        ConfigError: an unknown experiment or override, or a seed given twice.
    """
    if len(set(request.seeds)) != len(request.seeds) or not request.seeds:
        raise ConfigError(f"seeds must be a list of different numbers, got {request.seeds}")
    parallel = request.launcher != "serial"
    threads = request.threads
    if threads is None and request.launcher == "joblib":
        threads = max(1, torch.get_num_threads() // request.jobs)
    common = ["resume=auto", f"device={request.device}"]
    common += [] if request.data_dir is None else [quote("data_dir", request.data_dir)]
    common += [] if threads is None else [f"trainer.threads={threads}"]
    common += ["trainer.progress=false"] if parallel else []  # the bars of several runs would mix
    jobs = []
    for experiment in choose_experiments(request.experiments):
        overrides = [f"experiment={experiment}", *common, *request.overrides]
        composed = load_config(overrides)
        for seed in request.seeds:
            config = replace(composed, seed=seed)
            check(config)
            folder = Path(request.runs) / experiment / f"seed{seed}"
            jobs.append(Job(experiment, folder, config, (*overrides, f"seed={seed}")))
    return jobs


def choose_experiments(asked: Any) -> list[str]:
    """Names from names and patterns, or all rows of the paper; the paper's come first, in its order.

    Raises:
        ConfigError: nothing fits; the message lists what there is.
    """
    known = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
    paper = [row.experiment for row in ROWS]
    patterns = [asked] if isinstance(asked, str) else list(asked or ())
    if not patterns:
        raise ConfigError(f"experiments is empty; choose from all, {', '.join(known)}")
    chosen: set[str] = set()
    for pattern in map(str, patterns):
        found = paper if pattern == "all" else fnmatch.filter(known, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"experiments: there is no {pattern!r}{hint}; choose from all, {', '.join(known)}")
        chosen.update(found)
    return [name for name in dict.fromkeys([*paper, *known]) if name in chosen]


def inspect(job: Job) -> tuple[State, str]:
    """Where a job stands, and what a person should know of it. A folder of another configuration is left alone."""
    folder, epochs = job.run_dir, job.config.trainer.epochs
    checkpoint, result_file = folder / "checkpoints" / "last.pt", folder / "result.json"
    if not (checkpoint.exists() or result_file.exists()):
        return State.TO_DO, ""
    try:
        saved, result = config_from_dict(read_config_file(folder / "config.yaml")), read_json(result_file)
    except (ConfigError, BrokenRunError) as error:
        return State.BLOCKED, f"{folder} cannot be used ({error}); remove it or choose another folder with runs=..."
    changes = compare(flatten(config_to_dict(job.config)), config_to_dict(saved))
    planned, seed = saved.trainer.epochs, saved.seed
    other = [f"{c.key}: {c.run} -> {c.recipe}" for c in changes if c.key != "trainer.epochs" or planned > epochs]
    other += [] if seed == job.config.seed else [f"seed: {seed} -> {job.config.seed}"]
    if other:
        return State.BLOCKED, (
            f"{folder} holds a run with other settings ({'; '.join(other)}; there -> now); "
            "choose another folder with runs=... or remove it"
        )
    if result is not None and result.get("epochs", -1) >= epochs:
        return State.FINISHED, ""
    if not checkpoint.exists():
        return State.TO_DO, f"{result_file} is of {planned} epochs and has no checkpoint to continue"
    return State.CUT_OFF, "" if result is None else f"finished with {planned} epochs, now {epochs}"


def _as_begun(job: Job) -> Job:
    """A continued run keeps its number of threads, of which the last digits depend."""
    threads = config_from_dict(read_config_file(job.run_dir / "config.yaml")).trainer.threads
    trainer = replace(job.config.trainer, threads=threads)
    override = f"trainer.threads={'null' if threads is None else threads}"
    return replace(job, config=replace(job.config, trainer=trainer), overrides=(*job.overrides, override))


def attempt(config: Config, run_dir: Path) -> Outcome:
    """Train one run; an error is written to failure.json and returned. A folder of another process is left alone."""
    try:
        with sole_writer(run_dir):
            return _attempt(config, run_dir)
    except OSError as error:  # the folder is another process's, or cannot be written to
        log.error("left alone: %s", error)
        return Outcome(error=str(error))


def _attempt(config: Config, run_dir: Path) -> Outcome:
    failure = run_dir / "failure.json"
    failure.unlink(missing_ok=True)
    try:
        return Outcome(interrupted=train(config, run_dir).interrupted)
    except Exception as error:  # whatever it is, the other jobs can still run
        text = str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
        log.error("failed: %s", text, exc_info=not isinstance(error, EXPECTED))
        try:
            write_json(failure, {"error": text})
        except OSError as unwritable:
            log.error("%s could not be written: %s", failure, unwritable)
        return Outcome(error=text)


def _run(jobs: Sequence[Job], request: ReproduceConfig) -> tuple[dict[Path, Outcome], int | None]:
    """Folder -> outcome of the jobs that were started, and the signal that stopped all."""
    outcomes: dict[Path, Outcome] = {}
    try:
        with _signals_raise():
            if request.launcher != "serial":
                outcomes = _run_launched(jobs, request)
                return outcomes, next((o.interrupted for o in outcomes.values() if o.interrupted), None)
            for number, job in enumerate(jobs, start=1):
                log.info("%d of %d: %s", number, len(jobs), job)
                with _log_file(job.run_dir / "train.log"), warnings_and_errors_in_log_files():
                    outcome = outcomes[job.run_dir] = attempt(job.config, job.run_dir)
                if outcome.interrupted is not None:
                    return outcomes, outcome.interrupted
    except KeyboardInterrupt as stop:
        return outcomes, stop.args[0] if stop.args else signal.SIGINT
    return outcomes, None


def _run_launched(jobs: Sequence[Job], request: ReproduceConfig) -> dict[Path, Outcome]:
    runs = Path(request.runs)
    overrides = [[*job.overrides, quote("hydra.sweep.subdir", str(job.run_dir.relative_to(runs)))] for job in jobs]
    try:
        returned = launch(
            request.launcher,
            overrides,
            attempt,
            folder=runs,
            at_once=request.jobs,
            overrides=request.launcher_overrides,
        )
    except (RuntimeError, OSError) as error:  # a worker was killed, or a queue refused the jobs
        log.error("launcher=%s: %s", request.launcher, error)
        returned = [Outcome() if inspect(job)[0] is State.FINISHED else error for job in jobs]
    return {
        job.run_dir: value if isinstance(value, Outcome) else Outcome(f"{type(value).__name__}: {value}")
        for job, value in zip(jobs, returned, strict=True)
    }


def _summary(jobs: Sequence[Job], outcomes: dict[Path, Outcome], *, skipped: int, stopped: int | None) -> int:
    """Print how it ended; returns the exit code."""
    ended = Counter(
        "failed" if outcome.error else "stopped" if outcome.interrupted else "done" for outcome in outcomes.values()
    )
    missing = len(jobs) - skipped - sum(ended.values())
    counts = {"finished before": skipped, **ended, "not finished" if stopped else "not started": missing}
    print("; ".join(f"{count} {what}" for what, count in counts.items() if count))
    failed: dict[str, list[str]] = {}
    for job in jobs:
        if error := outcomes.get(job.run_dir, Outcome()).error:
            failed.setdefault(error, []).append(str(job))
    for error, names in failed.items():
        print(f"failed: {', '.join(names)}: {error}")
    if stopped is not None:
        print("stopped; the same command continues")
        return 128 + stopped
    return 1 if ended["failed"] else 0


def _require_data_dir(jobs: Sequence[Job]) -> None:
    from_files = (DownloadDatasetConfig, NMnistDatasetConfig)
    lacking = [j.experiment for j in jobs if isinstance(j.config.dataset, from_files) and j.config.data_dir is None]
    if lacking and len(lacking) == len(jobs):  # otherwise the others run, and these are named at the end
        names = ", ".join(dict.fromkeys(lacking))
        raise ConfigError(f"these experiments need data: {names}. Set data_dir=path/to/data")


def _require_extras(request: ReproduceConfig) -> None:
    if request.launcher != "serial":
        require_launcher(request.launcher)
        if request.jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {request.jobs}")
    if request.report is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the report's figures need matplotlib: pip install -e '.[viz]', or set report=null")


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt with their number; while training, `fit` takes them itself."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """The log of a run goes to its folder too, as with train.py."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    root, own = logging.getLogger(), logging.getLogger("ide_snn")
    level = own.level
    if not own.isEnabledFor(logging.INFO):
        own.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(level)
        handler.close()
