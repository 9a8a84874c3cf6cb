"""From a typed configuration to the objects that it describes.

Classes are found by closed name -> class mappings, never by import path. A value that a constructor refuses is a
ConfigError that names the group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ide_snn.bptt import Bptt
from ide_snn.config_errors import ConfigError
from ide_snn.data import Augmentation, Dataset, DeviceLoader, EventSplit, Normalization, load_dataset
from ide_snn.dsr import DSRIFNode, DSRLIFNode, DSRNode
from ide_snn.dsr_network import DSRClassifier, DSRConvNet, DSRFCNet
from ide_snn.encoding import ENCODERS, Direct, Encoder
from ide_snn.implicit import GRADIENTS, Gradient
from ide_snn.models import FeedbackClassifier, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet
from ide_snn.neurons import NeuronParams
from ide_snn.optim import OPTIMIZERS, SCHEDULES, Schedule
from ide_snn.precision import require_precision
from ide_snn.schemas import (
    Config,
    ConvModelConfig,
    DatasetConfig,
    DSRConfig,
    EventDatasetConfig,
    FCModelConfig,
    ImageDatasetConfig,
    MultiLayerModelConfig,
    OwnImagesConfig,
    TrainerConfig,
    options,
)
from ide_snn.solvers import SOLVERS, Solver
from ide_snn.surrogate import SURROGATES, Surrogate

__all__ = [
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
    "input_normalization",
    "resolve_device",
]

NETWORKS: dict[str, Callable[..., FeedbackClassifier]] = {
    "fc": SNNIDEFCNet,
    "conv": SNNIDEConvNet,
    "multilayer": SNNIDEConvMultiLayerNet,
}
T = TypeVar("T")


@dataclass(frozen=True)
class Loaders:
    """Batches of the parts of a data set, on the device."""

    train: DeviceLoader
    test: DeviceLoader
    validation: DeviceLoader | None


def build_neuron(config: Config) -> NeuronParams:
    with _naming("neuron"):
        return NeuronParams(**options(config.neuron))


def build_solver(config: Config) -> Solver:
    return _build("solver", SOLVERS, config.solver)


def build_gradient(config: Config) -> Gradient | Bptt:
    """How the feedback networks are differentiated: by the group `gradient`, or through time with method=bptt."""
    if config.method.name == "bptt":
        with _naming("method"):
            return Bptt(surrogate=build_surrogate(config), **options(config.method))
    return _build("gradient", GRADIENTS, config.gradient)


def build_surrogate(config: Config) -> Surrogate:
    return _build("surrogate", SURROGATES, config.surrogate)


def build_encoder(config: Config) -> Encoder | None:
    """What turns images into input over time; None for a constant current, and for events, which have time."""
    encoder = _build("encoder", ENCODERS, config.encoder)
    return None if isinstance(encoder, Direct) or isinstance(config.dataset, EventDatasetConfig) else encoder


def input_normalization(config: Config, normalization: Normalization | None) -> Normalization | None:
    """That of the data; encoders take stored values in [0, 1] instead."""
    if normalization is None or build_encoder(config) is None:
        return normalization
    channels = len(normalization.mean)
    return Normalization(normalization.input_scale, (0.0,) * channels, (1.0,) * channels)


def build_schedule(config: Config) -> Schedule:
    extra = {"epochs": config.trainer.epochs} if config.schedule.name == "cosine" else {}
    return _build("schedule", SCHEDULES, config.schedule, **extra)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Over all parameters of `model` alike: weight decay applies to biases, batch norm and alpha too.

    One kernel per tensor ("fused") instead of one per operation.
    """
    values = options(config.optimizer)
    for name, value in values.items():
        if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
            raise ConfigError(f"optimizer.{name} must be finite, got {value}")
    if len(values.get("betas", (0, 0))) != 2:
        raise ConfigError(f"optimizer.betas are two numbers, got {values['betas']}")
    return _build("optimizer", OPTIMIZERS, config.optimizer, params=model.parameters(), fused=True)


def precision_of(config: Config) -> str:
    """The precision that is used: the others than float32 are for implicit differentiation."""
    return config.precision.name if config.method.name == "ide" else "float32"


def build_model(config: Config) -> FeedbackClassifier | DSRClassifier:
    """The network, with initial weights drawn from `config.seed`; needs no data.

    Raises ConfigError naming the group of an option that is out of range.
    """
    encoder = build_encoder(config)
    with _naming("model"):
        shape, classes = tuple(config.dataset.input_shape), config.dataset.num_classes
        if encoder is not None:  # some widen the channels
            shape = tuple(encoder.encode(torch.zeros(1, *shape), config.time_steps).shape[2:])
    common = {
        "time_steps": config.time_steps,
        "input_has_time": encoder is not None or isinstance(config.dataset, EventDatasetConfig),
        "generator": torch.Generator().manual_seed(config.seed),
    }
    if isinstance(config.method, DSRConfig):
        return _build_dsr(config, config.method, shape, common)
    network = _choose("model.network", NETWORKS, config.model.network)
    parts = {"neuron": build_neuron(config), "solver": build_solver(config), "gradient": build_gradient(config)}
    precision = precision_of(config)
    with _naming("precision"):
        require_precision(precision)
    with _naming("model"):
        return network(
            shape, classes, **options(config.model), precision=precision, compile=config.compile, **parts, **common
        )


def _build_dsr(config: Config, method: DSRConfig, shape: tuple[int, ...], common: dict[str, Any]) -> DSRClassifier:
    """The feed-forward network of DSR nodes with the sizes of `config.model`."""
    model, classes = config.model, config.dataset.num_classes
    common = {**common, "dropout": model.dropout, "batch_norm": model.batch_norm, "node": _dsr_node(config, method)}
    with _naming("model"):
        if isinstance(model, FCModelConfig):
            return DSRFCNet(shape, classes, hidden=model.hidden, **common)
        if isinstance(model, ConvModelConfig):
            kernel = model.kernel_size
            if model.padding != kernel // 2 or model.feedback_kernel_size is not None:
                raise ValueError(
                    f"method=dsr needs model.padding={kernel // 2} for this kernel_size and no feedback_kernel_size"
                )
            return DSRConvNet(
                shape, classes, channels=(model.channels,), strides=(model.stride,), kernel_size=kernel, **common
            )
        assert isinstance(model, MultiLayerModelConfig)
        return DSRConvNet(shape, classes, channels=model.channels, strides=model.strides, kernel_size=3, **common)


def _dsr_node(config: Config, method: DSRConfig) -> Callable[[], DSRNode]:
    neuron, settings = build_neuron(config), options(method)
    tau = settings.pop("tau")
    with _naming("method"):
        if neuron.leak == 1:
            node: Callable[[], DSRNode] = functools.partial(DSRIFNode, v_threshold=neuron.v_threshold, **settings)
        else:
            # its membrane takes in a share of the drive: in that unit its threshold is IF's, and learns as IF's does
            share, delta_t = 1 - neuron.leak, -tau * math.log(neuron.leak)
            settings["v_threshold_grad_scaling"] *= share**2
            settings["v_threshold_lower_bound"] *= share
            threshold = share * neuron.v_threshold
            node = functools.partial(DSRLIFNode, v_threshold=threshold, tau=tau, delta_t=delta_t, **settings)
        node()  # refuses options out of range, in the name of the group
    return node


def build_dataset(config: Config) -> Dataset:
    """The data of `config.dataset`, from `config.data_dir`.

    Raises DataError for missing or damaged files, ConfigError where the data are not as configured.
    """
    section = options(config.dataset)
    shape, classes = tuple(section.pop("input_shape")), section.pop("num_classes")
    if isinstance(config.dataset, ImageDatasetConfig):
        del section["crop_padding"], section["flip"]  # for the loader
    if isinstance(config.dataset, OwnImagesConfig):
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
    if isinstance(config.model, FCModelConfig) and config.model.batch_norm:
        _refuse_batches_of_one(trainer, len(dataset.train))
    fixed: dict[str, Any] = {
        "normalization": input_normalization(config, dataset.normalization),
        "device": device,
        "encoder": build_encoder(config),
    }
    if isinstance(dataset.train, EventSplit) or fixed["encoder"] is not None:
        fixed["time_steps"] = config.time_steps
    evaluating = {**fixed, "batch_size": trainer.evaluation_batch_size, "shuffle": False, "seed": config.seed}
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


def _refuse_batches_of_one(trainer: TrainerConfig, samples: int) -> None:
    """Of single values batch norm has no variance; convolutions have more of each channel."""
    if trainer.batch_size == 1:
        raise ConfigError(
            "trainer.batch_size=1 leaves batch norm nothing to normalise by: use at least 2, or model.batch_norm=false"
        )
    if samples % trainer.batch_size == 1 and not trainer.drop_last:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} leaves a last batch of one of the {samples} training images, "
            "which batch norm cannot use: set trainer.drop_last=true or another batch size"
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
