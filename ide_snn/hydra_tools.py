"""Besides `ide_snn.config` all that knows Hydra and OmegaConf: a run's config.yaml, and Hydra's launchers."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra._internal.callbacks import Callbacks  # no public way to a launcher; hydra-core is capped below 1.4
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from ide_snn.config import ConfigError, hydra_on_configs, quote, run_dir_of_this_job, to_config
from ide_snn.reporting import warnings_and_errors_in_log_files
from ide_snn.schemas import Config

__all__ = ["LAUNCHERS", "launch", "read_config_file", "require_launcher"]

# name here -> (member of hydra/launcher, its package, its option for the number of jobs at once if it has one)
LAUNCHERS: dict[str, tuple[str, str, str | None]] = {
    "joblib": ("joblib", "hydra_joblib_launcher", "n_jobs"),
    "submitit": ("submitit_slurm", "hydra_submitit_launcher", "array_parallelism"),
    "submitit_local": ("submitit_local", "hydra_submitit_launcher", None),
}
T = TypeVar("T")


def read_config_file(path: Path) -> dict[str, Any]:
    """The config.yaml of a run as plain containers.

    Raises:
        ConfigError: the file is not YAML, or not a mapping.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # of the YAML reader, of OmegaConf, of the text's encoding
        raise ConfigError(f"{path.name} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path.name} is damaged: it holds no named values")
    return {str(key): value for key, value in content.items()}


def require_launcher(name: str) -> None:
    """Raises:
    ValueError: there is no such launcher.
    ImportError: its package is missing; the message names the extra.
    """
    if name not in LAUNCHERS:
        raise ValueError(f"launcher: there is no {name!r}; choose one of serial, {', '.join(LAUNCHERS)}")
    package = LAUNCHERS[name][1]
    if importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(f"hydra_plugins.{package}"):
        raise ImportError(
            f"launcher={name} needs {package.replace('_', '-')}, which is not installed: pip install -e '.[sweep]'"
        )


def launch(
    name: str,
    jobs: Sequence[Sequence[str]],
    task: Callable[[Config, Path], T],
    *,
    folder: Path,
    at_once: int,
    overrides: Sequence[str] = (),
) -> list[T | Exception]:
    """Run `task(config, run_dir)` for each job through one of Hydra's launchers.

    Args:
        name: one of `LAUNCHERS`, or `basic` for Hydra's own, which runs one after the other in this process.
        jobs: overrides of `configs/train.yaml` for each; `hydra.sweep.subdir=...` is the run's folder in `folder`.
        task: a function of a module, since other processes have to find it.
        folder: the launcher's own, where the runs' folders lie.
        at_once: jobs at the same time; submitit_local, there to try things out, starts all.
        overrides: options of the launcher, e.g. `hydra.launcher.partition=gpu`.

    Returns:
        What `task` returned, or the exception that ended the job; one for each job.
    """
    settings = [quote("hydra.sweep.dir", str(folder)), *overrides]
    if name != "basic":
        member, _, parallel = LAUNCHERS[name]
        limit = [] if parallel is None else [f"hydra.launcher.{parallel}={at_once}"]
        settings = [f"hydra/launcher={member}", *limit, *settings]
    with hydra_on_configs(), _logging_restored():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("train", settings, run_mode=RunMode.MULTIRUN, from_shell=False)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
            task_function=functools.partial(_run_task, task),
            config=config,
        )
        returned = launcher.launch([list(job) for job in jobs], initial_job_idx=0)
    return [_value(job) for job in returned]


@contextmanager
def _logging_restored() -> Iterator[None]:
    """Launchers set up the log of this process as that of a job."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _run_task(task: Callable[[Config, Path], T], raw: DictConfig) -> T:
    with warnings_and_errors_in_log_files():
        return task(to_config(raw, Config), run_dir_of_this_job())


def _value(job: Any) -> Any:
    try:
        return job.return_value  # raises what ended the job
    except Exception as error:
        return error
