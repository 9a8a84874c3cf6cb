"""What can be configured: one dataclass per config group, its fields being the valid option names.

The values live in `configs/`; the schemas of neurons, solvers and gradients mirror the classes they build, so
an option added there is valid here. Slots make a misspelt assignment (`config.sed = 1`) an error as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ide_snn.bptt import Bptt
from ide_snn.encoding import ENCODERS, Delta
from ide_snn.implicit import GRADIENTS
from ide_snn.neurons import NeuronParams
from ide_snn.solvers import SOLVERS
from ide_snn.surrogate import SURROGATES

__all__ = [
    "LABELS",
    "SCHEMAS",
    "TOOLS",
    "AnalyzeConfig",
    "Config",
    "ConvModelConfig",
    "DatasetConfig",
    "EvaluateConfig",
    "EventDatasetConfig",
    "FCModelConfig",
    "ImageDatasetConfig",
    "ImageFolderDatasetConfig",
    "ModelConfig",
    "MultiLayerModelConfig",
    "NMnistDatasetConfig",
    "NamedConfig",
    "NpzEventsDatasetConfig",
    "OwnImagesConfig",
    "PredictConfig",
    "ReportConfig",
    "ReproduceConfig",
    "TrainerConfig",
    "options",
]


@dataclass(slots=True)
class NamedConfig:
    """A member of a config group; `name` says which and is set by choosing it (`solver=anderson`)."""

    name: str


@dataclass(slots=True)
class PrecisionConfig(NamedConfig):
    """`ide_snn.precision`, with the tolerance that the solvers' YAML files take from it."""

    solver_tol: float


def _plain(annotation: Any) -> Any:
    """The type an option has in a config file: a choice is a string, a tuple is a list."""
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    return annotation


def _mirror(source: type, without: tuple[str, ...] = ()) -> type[NamedConfig]:
    """Schema with the fields of the dataclass `source` and a name; no defaults, the YAML files hold them."""
    hints = get_type_hints(source)
    fields = [(f.name, _plain(hints[f.name])) for f in dataclasses.fields(source) if f.name not in without]
    name = f"{source.__name__}Config"
    schema = dataclasses.make_dataclass(
        name, fields, bases=(NamedConfig,), namespace={"__module__": __name__}, slots=True
    )
    globals()[name] = schema  # other processes, the workers of a launcher, find it by its name
    return schema


@dataclass(slots=True)
class DatasetConfig(NamedConfig):
    """Which data and how split; `input_shape` and `num_classes` are checked against the data."""

    input_shape: list[int]
    num_classes: int
    validation_size: int
    split_seed: int
    train_limit: int | None
    test_limit: int | None


@dataclass(slots=True, kw_only=True)
class ImageDatasetConfig(DatasetConfig):
    """Images; `crop_padding` and `flip` change those for training, see `ide_snn.data.Augmentation`.

    Options that came later have a default, so that what was saved before can be read.
    """

    mean: list[float]
    std: list[float]
    crop_padding: int = 0
    flip: bool = False


@dataclass(slots=True, kw_only=True)
class DownloadDatasetConfig(ImageDatasetConfig):
    """Images that `download` fetches where they are missing."""

    download: bool = False


@dataclass(slots=True, kw_only=True)
class CifarDatasetConfig(DownloadDatasetConfig):
    cache: str = "auto"


@dataclass(slots=True, kw_only=True)
class OwnImagesConfig(ImageDatasetConfig):
    """Images of one's own, with the channels of `input_shape`."""

    path: str
    title: str | None


@dataclass(slots=True, kw_only=True)
class ImageFolderDatasetConfig(OwnImagesConfig):
    """train/<class>/*, test/<class>/* in a folder or archive."""

    image_size: list[int] | None
    cache: str


@dataclass(slots=True, kw_only=True)
class EventDatasetConfig(DatasetConfig):
    """Event recordings: the top-level `time_steps` says how many frames."""


@dataclass(slots=True, kw_only=True)
class NpzEventsDatasetConfig(EventDatasetConfig):
    """Frames of one's own."""

    path: str
    title: str | None


@dataclass(slots=True, kw_only=True)
class NMnistDatasetConfig(EventDatasetConfig):
    """Frames of equal length over `duration_ms`, `binary` or `counts`."""

    frames: str
    duration_ms: int
    cache: str


@dataclass(slots=True)
class ModelConfig(NamedConfig):
    """What all networks share. The feedback's norm is bounded by gamma * neuron.v_threshold."""

    network: str
    dropout: float
    constraint: str
    gamma: float
    batch_norm: bool


@dataclass(slots=True)
class FCModelConfig(ModelConfig):
    hidden: int


@dataclass(slots=True)
class ConvModelConfig(ModelConfig):
    channels: int
    kernel_size: int
    stride: int
    padding: int
    feedback_kernel_size: int | None = None


@dataclass(slots=True)
class MultiLayerModelConfig(ModelConfig):
    channels: list[int]
    strides: list[int]


@dataclass(slots=True)
class SGDConfig(NamedConfig):
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


@dataclass(slots=True)
class AdamConfig(NamedConfig):
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float


@dataclass(slots=True)
class ScheduleConfig(NamedConfig):
    warmup_steps: int


@dataclass(slots=True)
class StepScheduleConfig(ScheduleConfig):
    milestones: list[int]
    factor: float


@dataclass(slots=True)
class CosineScheduleConfig(ScheduleConfig):
    final_factor: float


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """How long and in which portions; `accumulation` batches make one optimiser step.

    Batch sizes are those of all processes together.
    """

    epochs: int
    batch_size: int
    evaluation_batch_size: int
    drop_last: bool = False
    accumulation: int
    gradient_clip: float | None
    log_every: int
    progress: bool | None
    threads: int | None = None
    label_smoothing: float = 0.0
    sync_bn: bool = True
    process_timeout: float = 1800.0


@dataclass(slots=True)
class DSRConfig(NamedConfig):
    """Options of DSR's nodes; `neuron` gives leak (delta_t = -tau ln(leak)) and where the learned threshold starts."""

    alpha: float
    tau: float
    v_threshold_training: bool
    v_threshold_grad_scaling: float
    v_threshold_lower_bound: float
    compat: str


@dataclass(slots=True)
class Config:
    """One training run: the groups, then the knobs of `configs/train.yaml`."""

    dataset: DatasetConfig
    model: ModelConfig
    neuron: NamedConfig
    solver: NamedConfig
    precision: PrecisionConfig
    method: NamedConfig
    gradient: NamedConfig
    surrogate: NamedConfig
    encoder: NamedConfig
    optimizer: NamedConfig
    schedule: ScheduleConfig
    trainer: TrainerConfig
    name: str
    time_steps: int
    seed: int
    device: str
    data_dir: str | None
    resume: str
    compile: bool | None = False  # configurations saved before there was this lack it


@dataclass(slots=True)
class EvaluateConfig:
    """`scripts/evaluate.py`; null means: as in the training run that wrote the checkpoint."""

    checkpoint: str
    time_steps: int | None
    data_dir: str | None
    batch_size: int | None
    device: str
    output: str | None
    early_exit: float | None = None


@dataclass(slots=True)
class PredictConfig:
    """`scripts/predict.py`; null means: as in the training run that wrote the checkpoint."""

    checkpoint: str
    image: str
    time_steps: int | None
    invert: bool
    device: str


@dataclass(slots=True)
class AnalyzeConfig:
    """`scripts/analyze.py`; null means: what the comment in `configs/analyze.yaml` says."""

    checkpoint: str
    time_steps: int | None
    data_dir: str | None
    samples: int | None
    batch_size: int | None
    neurons: list[int] | None
    trace_samples: list[int]
    thresholds: list[float]
    spectrum_samples: int
    device: str
    output: str | None


@dataclass(slots=True)
class ReproduceConfig:
    """`scripts/reproduce.py`: which experiments with which seeds, and how; see `configs/reproduce.yaml`."""

    experiments: Any  # a list of names and patterns, or all
    seeds: list[int]
    overrides: list[str]
    data_dir: str | None
    device: str
    runs: str
    launcher: str
    jobs: int
    threads: int | None
    launcher_overrides: list[str]
    dry_run: bool
    report: str | None


@dataclass(slots=True)
class ReportConfig:
    """`scripts/report.py`."""

    runs: str
    output: str
    figures: bool


# script -> its schema; that of train.py is Config
TOOLS: dict[str, type] = {
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "analyze": AnalyzeConfig,
    "reproduce": ReproduceConfig,
    "report": ReportConfig,
}
# group -> option that tells its members apart -> member -> schema
LABELS = ("name", "network")  # fields that only name a member
SCHEMAS: dict[str, dict[str, type]] = {
    "dataset": {
        "digits": ImageDatasetConfig,
        "mnist": DownloadDatasetConfig,
        "fashion_mnist": DownloadDatasetConfig,
        "cifar10": CifarDatasetConfig,
        "cifar100": CifarDatasetConfig,
        "image_folder": ImageFolderDatasetConfig,
        "npz": OwnImagesConfig,
        "nmnist": NMnistDatasetConfig,
        "npz_events": NpzEventsDatasetConfig,
    },
    "model": {"fc": FCModelConfig, "conv": ConvModelConfig, "multilayer": MultiLayerModelConfig},
    "neuron": {"neuron": _mirror(NeuronParams)},
    "solver": {name: _mirror(solver) for name, solver in SOLVERS.items()},
    "precision": {"precision": PrecisionConfig},
    # the surrogate is a group of its own; it fires spikes
    "method": {"ide": NamedConfig, "bptt": _mirror(Bptt, without=("surrogate",)), "dsr": DSRConfig},
    "gradient": {name: _mirror(gradient) for name, gradient in GRADIENTS.items()},
    "surrogate": {name: _mirror(surrogate, without=("spiking",)) for name, surrogate in SURROGATES.items()},
    # Delta encodes sequences, which no data set has
    "encoder": {name: _mirror(encoder) for name, encoder in ENCODERS.items() if encoder is not Delta},
    "optimizer": {"sgd": SGDConfig, "adam": AdamConfig, "adamw": AdamConfig},
    "schedule": {"step": StepScheduleConfig, "cosine": CosineScheduleConfig, "none": ScheduleConfig},
    "trainer": {"trainer": TrainerConfig},
}


def options(section: Any) -> dict[str, Any]:
    """The options of a group member without what only names it, e.g. to construct the class it stands for."""
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if f.name not in LABELS}
