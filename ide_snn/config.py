"""From `configs/` and command-line overrides to the objects they describe; all that knows Hydra and OmegaConf.

    config = load_config(["experiment=mnist_f64c5_lif", "seed=1"])
    net = build_model(config)
    optimizer = build_optimizer(config, net)

A config is a plain dataclass (`ide_snn.schemas.Config`); an unknown option or a value of the wrong type or range is
one ConfigError that names it. The `build_*` functions are those of `ide_snn.build`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ide_snn.build import (
    Loaders,
    build_dataset,
    build_encoder,
    build_gradient,
    build_loaders,
    build_model,
    build_neuron,
    build_optimizer,
    build_schedule,
    build_solver,
    build_surrogate,
    input_normalization,
    resolve_device,
)
from ide_snn.config_errors import ConfigError, explain, one_error, refuse_added_keys
from ide_snn.data import DataError
from ide_snn.data.cache import Cache
from ide_snn.distributed import RankError, environment_rank
from ide_snn.progress import require_in_range
from ide_snn.schemas import SCHEMAS, TOOLS, AnalyzeConfig, Config

__all__ = [
    "CONFIG_DIR",
    "ConfigError",
    "Loaders",
    "build_dataset",
    "build_encoder",
    "build_gradient",
    "build_loaders",
    "build_model",
    "build_neuron",
    "build_optimizer",
    "build_schedule",
    "build_solver",
    "build_surrogate",
    "check",
    "config_from_dict",
    "config_to_dict",
    "how_to_go_on",
    "hydra_on_configs",
    "input_normalization",
    "load_config",
    "quote",
    "resolve_device",
    "run_app",
    "run_dir_of_this_job",
    "to_config",
    "to_yaml",
]

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
RESUME = ("none", "auto")
# neither the shell nor Hydra sees anything special in it
PLAIN_OVERRIDE = re.compile(r"[a-z_.]+=[\w/.+-]+", re.ASCII)
OVERRIDE = re.compile(r"[~+]|[^-][^=]*=")
# errors whose message is meant for the user
EXPECTED = (HydraException, OmegaConfBaseException, ValueError, ArithmeticError, OSError, ImportError, RankError)
# groups that configurations saved by version 0.1 lack; these members are what that version did
NEW_GROUPS = {"method": "ide", "surrogate": "atan", "encoder": "direct", "precision": "float32"}
T = TypeVar("T")


def register_schemas() -> None:
    """Make the schemas known to Hydra as `/schema/<group>/<member>`, which the YAML files extend."""
    store = ConfigStore.instance()
    for name, top in {"train": Config, **TOOLS}.items():
        store.store(group="schema", name=name, node=top)
    for group, members in SCHEMAS.items():
        for name, schema in members.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


register_schemas()


def load_config(overrides: Sequence[str] = ()) -> Config:
    """The configuration of a training run, from `configs/train.yaml` and command-line style overrides.

    Raises ConfigError for an unknown option, naming the valid ones, and for a value of the wrong type.
    """
    if not (CONFIG_DIR / "train.yaml").is_file():
        raise ConfigError(
            f"there are no configuration files at {CONFIG_DIR}: install from a clone, with pip install -e ."
        )
    with one_error(), hydra_on_configs():
        return to_config(compose("train", overrides=list(overrides)), Config)


@contextmanager
def hydra_on_configs() -> Iterator[None]:
    """Hydra reads `configs/`, inside a function decorated by `hydra.main` too."""
    hydra = GlobalHydra.instance()
    outer, hydra.hydra = hydra.hydra, None
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="train"):
            yield
    finally:
        hydra.hydra = outer


def to_config(raw: DictConfig, kind: type[T]) -> T:
    """The typed form of a composed configuration; Raises ConfigError as `load_config`."""
    with one_error():
        refuse_added_keys(raw, "")
        _refuse_one_output_of_many(raw, kind)
        missing = OmegaConf.missing_keys(raw)
        if missing:
            raise ConfigError(f"required: {', '.join(f'{key}=...' for key in sorted(missing))}")
        config = OmegaConf.to_object(raw)
    if not isinstance(config, kind):
        raise ConfigError(f"expected a {kind.__name__}, got {type(config).__name__}")
    if isinstance(config, Config):
        check(config)
    return config


def _refuse_one_output_of_many(raw: DictConfig, kind: type) -> None:
    """The jobs of a sweep would overwrite each other's output."""
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    is_analysis = kind is AnalyzeConfig  # which always writes: a folder
    is_shared = raw.get("output") is not None or is_analysis
    if is_sweep and is_shared and not OmegaConf.is_interpolation(raw, "output"):
        output = "null (the folder of the checkpoint's run)" if raw.output is None else raw.output
        own = "analysis_${hydra:job.num}" if is_analysis else "figures_${hydra:job.num}.json"
        raise ConfigError(
            f"output={output} would hold the last job of the sweep only: give each its own, 'output={own}'"
        )


def check(config: Config) -> None:
    """Raises ConfigError for an option out of range; the built classes check theirs themselves."""
    trainer = config.trainer
    try:
        names = ("epochs", "accumulation", "log_every", "gradient_clip", "label_smoothing")
        require_in_range("trainer.", **{name: getattr(trainer, name) for name in names})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name in ("batch_size", "evaluation_batch_size"):
        if getattr(trainer, name) < 1:
            raise ConfigError(f"trainer.{name} must be at least 1, got {getattr(trainer, name)}")
    if any(size < 1 for size in config.dataset.input_shape):
        raise ConfigError(f"dataset.input_shape must be positive, got {config.dataset.input_shape}")
    if not trainer.process_timeout > 0:
        raise ConfigError(f"trainer.process_timeout must be positive (seconds), got {trainer.process_timeout}")
    if trainer.threads is not None and trainer.threads < 1:
        raise ConfigError(f"trainer.threads must be at least 1 or null, got {trainer.threads}")
    if config.seed < 0:
        raise ConfigError(f"seed must not be negative, got {config.seed}")
    if config.resume not in RESUME:
        raise ConfigError(f"resume: there is no {config.resume!r}; choose one of {', '.join(RESUME)}")
    for group, members in SCHEMAS.items():
        if group in members:  # a group with a single schema is not told apart by its members' names
            continue
        section = getattr(config, group)
        label = _label(group, section)
        if label not in members:
            raise ConfigError(f"{group}: there is no {label!r}; choose one of {', '.join(members)}")
        if members[label] is not type(section):
            raise ConfigError(f"{group}: choose a member of the group with {group}=..., not by its name")


def _label(group: str, section: Any) -> str:
    return str(section.network if group == "model" else section.name)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain containers, for checkpoints; `config_from_dict` is the inverse."""
    content = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def config_from_dict(content: Mapping[str, Any]) -> Config:
    """A training configuration from plain containers.

    Raises ConfigError where they do not fit the schemas.
    """
    sections: dict[str, Any] = {}
    if not set(content) >= set(NEW_GROUPS):
        defaults = config_to_dict(load_config([f"{group}={member}" for group, member in NEW_GROUPS.items()]))
        content = {**{group: defaults[group] for group in NEW_GROUPS}, **content}
    content = _with_a_cache(content)
    for group, members in SCHEMAS.items():
        section = content.get(group)
        if not isinstance(section, Mapping):
            raise ConfigError(f"the configuration lacks the section {group}")
        label = "network" if group == "model" else "name"
        # a group with a single schema is not told apart by its members' names
        key = group if group in members else section.get(label)
        if key not in members:
            raise ConfigError(f"{group}.{label}: there is no {key!r}; choose one of {', '.join(members)}")
        sections[group] = OmegaConf.structured(members[key])
    with one_error():
        merged = OmegaConf.merge(OmegaConf.structured(Config), sections, dict(content))
        assert isinstance(merged, DictConfig)
        return to_config(merged, Config)


def _with_a_cache(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Earlier versions took any word for a folder, `false` too; what they decoded is the same with any cache."""
    dataset = content.get("dataset")
    if not isinstance(dataset, Mapping) or "cache" not in dataset:
        return content
    try:
        Cache(str(dataset["cache"]), None)
    except DataError:
        return {**content, "dataset": {**dataset, "cache": "auto"}}
    return content


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def run_dir_of_this_job() -> Path:
    """hydra.run.dir, or the job's folder of a sweep; of several processes that of rank 0 counts."""
    return Path(HydraConfig.get().runtime.output_dir)


def how_to_go_on() -> str:
    """The overrides that continue the run of this job, or the sweep that it belongs to, as a shell takes them."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        key, folder = "hydra.sweep.dir", Path(HydraConfig.get().sweep.dir).resolve()
    else:
        key, folder = "hydra.run.dir", run_dir_of_this_job().resolve()
    override = f"{key}={folder}"
    if not PLAIN_OVERRIDE.fullmatch(override):
        override = shlex.quote(quote(key, str(folder)))
    return f"resume=auto {override}"


def quote(key: str, value: str) -> str:
    """The override that gives `key` this text, whatever characters it has."""
    # backslashes count only before a quote, where they are doubled
    return f"{key}='" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (m[2] and "\\'"), value) + "'"


@contextmanager
def _folder_of_this_rank() -> Iterator[None]:
    """Of several processes only rank 0 leaves Hydra's folder behind: that of any other is a temporary one."""
    if environment_rank() == 0:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ide_snn_", ignore_cleanup_errors=True) as folder:
        sys.argv += [f"hydra.run.dir='{folder}'", f"hydra.sweep.dir='{folder}'"]
        yield


def run_app(main: Callable[[], object]) -> None:
    """Run a function decorated by `hydra.main`; expected errors become one message and exit code 1."""
    # argparse takes overrides on one side of the flags only: train.py neuron=if -m seed=0,1
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: bool(OVERRIDE.match(argument)))
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting
    try:
        with _folder_of_this_rank():
            main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of the output has gone, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except EXPECTED as error:
        if wants_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        if not isinstance(error, (HydraException, OmegaConfBaseException, ConfigError, DataError)):
            print("(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(1) from None
