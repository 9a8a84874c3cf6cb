"""From `configs/` and command-line overrides to the objects they describe; all that knows Hydra and OmegaConf.

    config = load_config(["experiment=mnist_f64c5_lif", "seed=1"])
    net = build_model(config)
    optimizer = build_optimizer(config, net)

A config is a plain dataclass (`ide_snn.schemas.Config`); an unknown option or a value of the wrong type or range is
one ConfigError that names it. Classes are found by closed name -> class mappings, never by import path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ide_snn.config_errors import ConfigError, explain, one_error, refuse_added_keys
from ide_snn.data import Augmentation, DataError, Dataset, DeviceLoader, EventSplit, load_dataset
from ide_snn.implicit import GRADIENTS, Gradient
from ide_snn.models import FeedbackClassifier, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet
from ide_snn.neurons import NeuronParams
from ide_snn.optim import OPTIMIZERS, SCHEDULES, Schedule
from ide_snn.schemas import (
    SCHEMAS,
    TOOLS,
    Config,
    DatasetConfig,
    EventDatasetConfig,
    ImageDatasetConfig,
    ImageFolderDatasetConfig,
    options,
)
from ide_snn.solvers import SOLVERS, Solver

__all__ = [
    "CONFIG_DIR",
    "ConfigError",
    "Loaders",
    "build_dataset",
    "build_gradient",
    "build_loaders",
    "build_model",
    "build_neuron",
    "build_optimizer",
    "build_schedule",
    "build_solver",
    "check",
    "config_from_dict",
    "config_to_dict",
    "hydra_on_configs",
    "load_config",
    "resolve_device",
    "run_app",
    "run_dir_of_this_job",
    "to_config",
    "to_yaml",
]

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
NETWORKS: dict[str, Callable[..., FeedbackClassifier]] = {
    "fc": SNNIDEFCNet,
    "conv": SNNIDEConvNet,
    "multilayer": SNNIDEConvMultiLayerNet,
}
RESUME = ("none", "auto")
T = TypeVar("T")


@dataclass(frozen=True)
class Loaders:
    """Batches of the parts of a data set, on the device."""

    train: DeviceLoader
    test: DeviceLoader
    validation: DeviceLoader | None


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
        missing = OmegaConf.missing_keys(raw)
        if missing:
            raise ConfigError(f"required: {', '.join(f'{key}=...' for key in sorted(missing))}")
        config = OmegaConf.to_object(raw)
    if not isinstance(config, kind):
        raise ConfigError(f"expected a {kind.__name__}, got {type(config).__name__}")
    if isinstance(config, Config):
        check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError for an option out of range; the built classes check theirs themselves."""
    trainer = config.trainer
    smallest = {"epochs": 0, "batch_size": 1, "evaluation_batch_size": 1, "accumulation": 1, "log_every": 1}
    for name, least in smallest.items():
        if getattr(trainer, name) < least:
            raise ConfigError(f"trainer.{name} must be at least {least}, got {getattr(trainer, name)}")
    if any(size < 1 for size in config.dataset.input_shape):
        raise ConfigError(f"dataset.input_shape must be positive, got {config.dataset.input_shape}")
    if trainer.gradient_clip is not None and not trainer.gradient_clip > 0:
        raise ConfigError(f"trainer.gradient_clip must be positive or null, got {trainer.gradient_clip}")
    if not 0 <= trainer.label_smoothing < 1:
        raise ConfigError(f"trainer.label_smoothing must lie in [0, 1), got {trainer.label_smoothing}")
    if trainer.threads is not None and trainer.threads < 1:
        raise ConfigError(f"trainer.threads must be at least 1 or null, got {trainer.threads}")
    if config.seed < 0:
        raise ConfigError(f"seed must not be negative, got {config.seed}")
    if config.resume not in RESUME:
        raise ConfigError(f"resume: there is no {config.resume!r}; choose one of {', '.join(RESUME)}")
    for group, members in SCHEMAS.items():
        section = getattr(config, group)
        if group not in members and members.get(_label(group, section)) is not type(section):
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


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def build_neuron(config: Config) -> NeuronParams:
    with _naming("neuron"):
        return NeuronParams(**options(config.neuron))


def build_solver(config: Config) -> Solver:
    return _build("solver", SOLVERS, config.solver)


def build_gradient(config: Config) -> Gradient:
    return _build("gradient", GRADIENTS, config.gradient)


def build_schedule(config: Config) -> Schedule:
    extra = {"epochs": config.trainer.epochs} if config.schedule.name == "cosine" else {}
    return _build("schedule", SCHEDULES, config.schedule, **extra)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Over all parameters of `model` alike: weight decay applies to biases, batch norm and alpha too."""
    return _build("optimizer", OPTIMIZERS, config.optimizer, params=model.parameters())


def build_model(config: Config) -> FeedbackClassifier:
    """The network, with initial weights drawn from `config.seed`; needs no data.

    Raises ConfigError naming the group of an option that is out of range.
    """
    common = {
        "neuron": build_neuron(config),
        "solver": build_solver(config),
        "gradient": build_gradient(config),
        "time_steps": config.time_steps,
        "input_has_time": isinstance(config.dataset, EventDatasetConfig),
        "generator": torch.Generator().manual_seed(config.seed),
    }
    network = _choose("model.network", NETWORKS, config.model.network)
    with _naming("model"):
        shape = tuple(config.dataset.input_shape)
        return network(shape, config.dataset.num_classes, **options(config.model), **common)


def build_dataset(config: Config) -> Dataset:
    """The data of `config.dataset`, from `config.data_dir`.

    Raises DataError for missing or damaged files, ConfigError where the data are not as configured.
    """
    section = options(config.dataset)
    shape, classes = tuple(section.pop("input_shape")), section.pop("num_classes")
    if isinstance(config.dataset, ImageDatasetConfig):
        del section["crop_padding"], section["flip"]  # for the loader
    if isinstance(config.dataset, ImageFolderDatasetConfig):
        section["channels"] = shape[0]
    if isinstance(config.dataset, EventDatasetConfig):
        section["time_steps"] = config.time_steps
    dataset = load_dataset(config.dataset.name, data_dir=config.data_dir, **section)
    for name, expected, found in (
        ("input_shape", shape, dataset.input_shape),
        ("num_classes", classes, dataset.num_classes),
    ):
        if expected != found:
            value = str(list(found) if isinstance(found, tuple) else found).replace(" ", "")
            raise ConfigError(f"dataset.{name} is {expected}, but the data have {found}: set dataset.{name}={value}")
    return dataset


def _augmentation(section: DatasetConfig) -> Augmentation:
    if isinstance(section, ImageDatasetConfig):
        return Augmentation(section.crop_padding, section.flip)
    return Augmentation()


def build_loaders(config: Config, dataset: Dataset, device: torch.device) -> Loaders:
    """Loaders of the parts; the order of the training data depends on `config.seed` and the epoch only.

    Of event recordings they serve the first `config.time_steps` frames.
    """
    trainer, validation = config.trainer, dataset.validation
    if len(dataset.train) % trainer.batch_size == 1 and config.model.batch_norm and not trainer.drop_last:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} leaves a last batch of one of the {len(dataset.train)} training "
            "images, which batch norm cannot use: set trainer.drop_last=true or another batch size"
        )
    fixed: dict[str, Any] = {"normalization": dataset.normalization, "device": device}
    if isinstance(dataset.train, EventSplit):
        fixed["time_steps"] = config.time_steps
    evaluating = {**fixed, "batch_size": trainer.evaluation_batch_size, "shuffle": False}
    with _naming("dataset"):
        return Loaders(
            DeviceLoader(
                dataset.train,
                batch_size=trainer.batch_size,
                shuffle=True,
                seed=config.seed,
                drop_last=trainer.drop_last,
                augmentation=_augmentation(config.dataset),
                **fixed,
            ),
            DeviceLoader(dataset.test, **evaluating),
            None if validation is None else DeviceLoader(validation, **evaluating),
        )


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; `cuda:1` is the second."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise ConfigError(f"device: there is no {name!r}; choose one of auto, cpu, cuda, cuda:<n>")
    if kind == "cuda" and int(index or 0) >= count:
        raise ConfigError(f"device={name}: torch sees {count} CUDA devices; use device=cpu or device=auto")
    return torch.device(name)


def run_dir_of_this_job() -> Path:
    """hydra.run.dir, or the job's folder of a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def run_app(main: Callable[[], object]) -> None:
    """Run a function decorated by `hydra.main`; expected errors become one message and exit code 1."""
    # argparse takes overrides on one side of a flag only: train.py neuron=if -m seed=0,1
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of the output has gone, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (HydraException, OmegaConfBaseException, ValueError, ArithmeticError, OSError, ImportError) as error:
        if wants_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        if not isinstance(error, (HydraException, OmegaConfBaseException, ConfigError, DataError)):
            print("(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(1) from None


def _build(group: str, classes: Mapping[str, Callable[..., T]], section: Any, **more: Any) -> T:
    cls = _choose(f"{group}.name", classes, section.name)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in options(section).items()}
    with _naming(group):
        return cls(**values, **more)


def _choose(key: str, classes: Mapping[str, T], name: str) -> T:
    if name not in classes:
        raise ConfigError(f"{key}: there is no {name!r}; choose one of {', '.join(classes)}")
    return classes[name]


@contextmanager
def _naming(group: str) -> Iterator[None]:
    """Say in which group an option is that a constructor refuses."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{group}: {error}") from error
