"""Import of checkpoints that the original authors' code wrote.

Such a file has `state_dict` (with or without the data-parallel prefix `module.`) and numbers about the run. It holds
every network several times: the network in use under up to three names, which must agree, and a copy that served
the backward pass and lags behind (`snn_func_copy`), which is not read. W_fb is stored as in `ide_snn.optimizations`:

    W_fb = clip(weight_g, -c, c) W / (u^T W v)      W = weight_w, u = weight_u, v = weight_v

with W as the matrix (first dimension, rest), so the constraint is `spectral_matrix_first_dim`. The state is loaded as
it is: no step of power iteration is made. Batch norm has torch's eps, 1e-5.

The file says neither the data nor strides, padding, neuron and time steps: those come from the configuration, which
is checked against the file. Format: the names and shapes of published files; mathematics: Xiao et al., NeurIPS 2021,
section 4.4.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ide_snn.checkpoint import PARTS, CheckpointError, save_checkpoint
from ide_snn.config import ConfigError, build_dataset, build_model, config_to_dict, load_config
from ide_snn.data.digits import INPUT_SCALE as DIGITS_SCALE
from ide_snn.data.mnist import FASHION_CLASSES
from ide_snn.models import FeedbackClassifier
from ide_snn.paper import TITLES
from ide_snn.progress import Progress
from ide_snn.schemas import Config, ImageDatasetConfig, options

__all__ = [
    "OriginalCheckpoint",
    "compose_config",
    "import_original",
    "network_from_original",
    "read_original",
    "split_arguments",
]

log = logging.getLogger(__name__)

CONSTRAINT = "spectral_matrix_first_dim"

_ROOT = re.compile(r"(?:module\.)?((?:snn_ide_\w+\.)?snn_func(?P<copy>_copy)?\.)?(?P<name>.+)")
_FEEDBACK = re.compile(r"network_s\d*\.(?P<op>fc|conv|convT)\.weight_(?P<part>[gwuv])")
_LAYER = re.compile(r"block\.layers\.\d+\.op\.weight")
_FEEDBACK_PARTS = {"g": "0.alpha", "w": "original", "u": "0.u", "v": "0.v"}
_KINDS = {"fc": "fc", "conv": "conv", "convT": "multilayer"}


# networks of the paper: the member of the group model, the leak of its LIF neurons
_PAPER = {"fc": {"f400": 0.95}, "conv": {"f64c5": 0.95}, "multilayer": {"alexnetf": 0.99, "cifarnetf": 0.99}}
_V_THRESHOLD = 2.0
# what decides the geometry and leaves no trace in the shapes of the weights
_GEOMETRY = {"fc": (), "conv": ("model.stride", "model.padding"), "multilayer": ("model.strides",)}

_DIGITS = tuple(str(digit) for digit in range(10))
_CLASS_NAMES = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "nmnist": _DIGITS,
    "fashion_mnist": FASHION_CLASSES,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What `read_original` found.

    Attributes:
        path: of the file.
        kind: fc | conv | multilayer, the value of model.network.
        sizes: the options of the model that follow from shapes, e.g. {"channels": 64, "kernel_size": 5}.
        weights: the network's state under this package's names.
        names: the file's name of each of `weights`, without prefix.
        numbers: numbers about the run that the file holds, e.g. epoch and best_acc, as they are.
        ignored: what else the file holds and was not used.
    """

    path: Path
    kind: str
    sizes: dict[str, Any]
    weights: dict[str, Tensor]
    names: dict[str, str]
    numbers: dict[str, int | float]
    ignored: tuple[str, ...]


def read_original(path: str | Path) -> OriginalCheckpoint:
    """Read a checkpoint of the original code onto the CPU; executes nothing that the file contains.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, has tensors of unknown meaning, or says
            different things in different places.
    """
    path = Path(path)
    content = _load(path)
    state = content["state_dict"]
    weights, names, copies = _network_in_use(path, state)
    kind = _kind(path, names)
    others = [name for name in content if name != "state_dict"]
    numbers = {name: content[name] for name in others if isinstance(content[name], (int, float))}
    ignored = tuple(name for name in others if name not in numbers) + copies
    if ignored:
        log.info("%s: ignored %s", path, ", ".join(ignored))
    return OriginalCheckpoint(path, kind, _sizes(path, kind, weights), weights, names, numbers, ignored)


def network_from_original(original: OriginalCheckpoint, config: Config) -> FeedbackClassifier:
    """The configured network with the file's weights, in evaluation mode.

    Raises:
        CheckpointError: the file does not fit the configuration; lists every tensor that differs.
        ConfigError: the configuration describes no network, or another constraint than the file's.
    """
    if config.model.network != original.kind:
        sizes = ", ".join(f"{name}={value}" for name, value in original.sizes.items())
        raise CheckpointError(
            f"{original.path} holds a network of the kind {original.kind} ({sizes}), but the configuration describes "
            f"{config.model.name}, of the kind {config.model.network}: leave model= out, or choose another"
        )
    if config.model.constraint != CONSTRAINT:
        raise ConfigError(f"model.constraint must be {CONSTRAINT} for these files, got {config.model.constraint}")
    model = build_model(config)
    if not isinstance(model, FeedbackClassifier):
        raise ConfigError(f"these files hold feedback networks, but method={config.method.name} builds another kind")
    _check_shapes(original, model)
    model.load_state_dict(original.weights)
    return model.eval()


def compose_config(original: OriginalCheckpoint, overrides: Sequence[str]) -> Config:
    """The training configuration of the file: what its shapes say, completed by `overrides` as for train.py.

    Without `experiment=` or `model=` the network is read off the file; the paper's networks bring their strides,
    padding, threshold and leak.

    Raises:
        ConfigError: an option is unknown or required; names all that are missing.
    """
    given = {_option(override): override.partition("=")[2] for override in overrides}
    found = [f"model.constraint={CONSTRAINT}"]
    if "experiment" in given:
        return load_config([*found, *overrides])
    required = ["dataset", "neuron", "time_steps"]
    leaks, lif = _PAPER[original.kind], given.get("neuron") == "lif"
    network = given.get("model", _paper_network(original))
    if "model" not in given:
        # a network of none of the paper's sizes starts from the first of its kind
        found.append(f"model={network or next(iter(leaks))}")
    if network is None:
        found.append(f"model.name=original_{original.kind}")
        found += [f"model.{name}={value}".replace(" ", "") for name, value in original.sizes.items()]
        required += _GEOMETRY[original.kind]
    if network in leaks:
        found += [f"neuron.v_threshold={_V_THRESHOLD}"] + [f"neuron.leak={leaks[network]}"] * lif
    else:
        required += ["neuron.v_threshold"] + ["neuron.leak"] * lif
    missing = [name for name in required if name not in given]
    if missing:
        raise ConfigError(
            f"required: {', '.join(f'{name}=...' for name in missing)}; {original.path} does not say "
            "(experiment=... chooses a whole recipe of the paper)"
        )
    return load_config([*found, *overrides])


def import_original(source: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Convert the file `source` into a checkpoint at `out` that evaluates and predicts like one that training wrote.

    Returns:
        What was read: kind and sizes of the network, the numbers in the file, what was ignored, and norm and excess
        of the feedback (see `NormConstraint.excess`; far from 0 the file's power iteration had not converged).

    Raises:
        CheckpointError, ConfigError: as `read_original`, `compose_config` and `network_from_original`; or `out` is
            `source`. Nothing is written then.
    """
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise CheckpointError(f"out={out} is the file to read: choose another name")
    original = read_original(source)
    config = compose_config(original, overrides)
    model = network_from_original(original, config)
    epoch = original.numbers.get("epoch", 0)
    progress = asdict(Progress(epoch=int(epoch)))
    save_checkpoint(out, model, config=config_to_dict(config), data=_data_section(config), progress=progress)
    log.info("%s: %s %s, written to %s", source, config.model.name, original.sizes, out)
    return {
        "in": str(source),
        "out": str(out),
        "name": config.name,
        "network": original.kind,
        **original.sizes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "neurons": model.num_neurons,
        **model.block.feedback_diagnostics(),
        "numbers_in_file": original.numbers,
        "ignored": list(original.ignored),
    }


def split_arguments(arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """(in, out, the other overrides) of a command line. `in` is a word of Python's own, so no field can have its name.

    Raises:
        ConfigError: in or out is missing, or an argument is not option=value with a known option.
    """
    valid = ["in", "out", "experiment", *(field.name for field in fields(Config))]
    paths: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not equals or option.startswith("-"):
            raise ConfigError(f"cannot read {argument!r}: write option=value; valid options are {', '.join(valid)}")
        if re.split(r"[.@/]", _option(argument))[0] not in valid:
            raise ConfigError(f"unknown option {option}; valid are {', '.join(valid)}")
        if option in ("in", "out"):
            paths[option] = value
        else:
            overrides.append(argument)
    missing = [name for name in ("in", "out") if not paths.get(name)]
    if missing:
        raise ConfigError(f"required: {', '.join(f'{name}=...' for name in missing)}")
    return paths["in"], paths["out"], overrides


def _option(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


class _NumpyType:
    """Stands for numpy.dtype in a file; keeps the type's code, e.g. f8."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and flags, which numbers of a common machine need not."""


def _numpy_number(kind: _NumpyType, raw: bytes) -> int | float:
    """Stands for numpy's own constructor: a NumPy number in a file becomes a Python number."""
    return np.frombuffer(raw, np.dtype(kind.code), count=1)[0].item()


# accuracies computed with NumPy are stored by these names, which torch alone refuses
_HARMLESS = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: no such file")
    with path.open("rb") as file:  # what the system refuses is its own error; from here on it is the content
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):  # type: ignore[arg-type]
                warnings.simplefilter("ignore")  # torch's hints on foreign files; they are refused anyway
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # there is no end to what a damaged pickle can raise
            raise CheckpointError(
                f"{path} is damaged or truncated, or holds more than tensors, numbers, text and containers, and is not "
                "loaded, because that could execute code"
            ) from error
    if isinstance(content, dict) and set(PARTS) <= set(content):
        raise CheckpointError(f"{path} is a checkpoint of ide_snn already: evaluate.py and predict.py read it as it is")
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is not a checkpoint of the original code: it has no state_dict")
    return content


def _network_in_use(path: Path, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """(weights, the file's names of them, what of the state was not read)."""
    weights: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unknown: list[str] = []
    different: set[str] = set()
    copies = 0
    for key, value in state.items():
        match = _ROOT.fullmatch(str(key))
        if match is not None and match["copy"] and isinstance(value, Tensor):
            copies += 1
            continue
        # network_s_list counts from 0 what the network itself calls network_s1, network_s2, ...
        name = re.sub(r"^network_s_list\.(\d+)", lambda m: f"network_s{int(m[1]) + 1}", match["name"] if match else "")
        ours = _translate(name)
        if ours is None or not isinstance(value, Tensor) or names.setdefault(ours, name) != name:
            unknown.append(str(key))
        elif not torch.equal(weights.setdefault(ours, value), value):
            different.add(name)
    if unknown:
        raise CheckpointError(f"{path} has entries of unknown meaning in its state_dict: {', '.join(unknown)}")
    damaged = [names[ours] for ours, value in weights.items() if not bool(torch.isfinite(value).all())]
    if damaged:
        raise CheckpointError(f"{path} has NaN or infinity in {', '.join(damaged)}")
    if different:
        raise CheckpointError(
            f"{path} holds the network in use several times, and these tensors differ, so it is unclear which to take: "
            f"{', '.join(sorted(different))}"
        )
    return weights, names, (f"snn_func_copy (the backward pass's own copy, {copies} tensors)",) if copies else ()


def _translate(name: str) -> str | None:
    """This package's name for a tensor of the network in use, None for an unknown one."""
    if match := _FEEDBACK.fullmatch(name):
        return f"block.feedback.op.parametrizations.weight.{_FEEDBACK_PARTS[match['part']]}"
    if match := re.fullmatch(r"network_x\.(?:(?:fc|conv)\.(weight|bias)|bn\.(\w+))", name):
        return f"block.input.op.{match[1]}" if match[1] else f"block.input.bn.{match[2]}"
    if match := re.fullmatch(r"network_s([1-9]\d*)\.(?:conv\.(weight|bias)|bn\.(\w+))", name):
        layer = f"block.layers.{int(match[1]) - 1}"
        return f"{layer}.op.{match[2]}" if match[2] else f"{layer}.bn.{match[3]}"
    return name if re.fullmatch(r"classifier\.(weight|bias)", name) else None


def _kind(path: Path, names: Mapping[str, str]) -> str:
    match = _FEEDBACK.fullmatch(names.get("block.feedback.op.parametrizations.weight.original", ""))
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint of the original code: it has no feedback weight (weight_w)")
    return _KINDS[match["op"]]


def _sizes(path: Path, kind: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of the model that the shapes of the forward weights determine."""
    weight = weights.get("block.input.op.weight")
    dims = 2 if kind == "fc" else 4
    if weight is None or weight.dim() != dims:
        found = "none" if weight is None else list(weight.shape)
        raise CheckpointError(f"{path}: a {kind} network has an input weight of {dims} dimensions, found {found}")
    if kind == "fc":
        return {"hidden": len(weight)}
    if kind == "conv":
        sizes = {"channels": len(weight), "kernel_size": weight.shape[2]}
        back = weights.get("block.feedback.op.parametrizations.weight.original", weight).shape[-1]
        return sizes if back == weight.shape[2] else {**sizes, "feedback_kernel_size": back}
    layers = {int(name.split(".")[2]): len(weights[name]) for name in weights if _LAYER.fullmatch(name)}
    return {"channels": [len(weight), *(layers[index] for index in sorted(layers))]}


def _paper_network(original: OriginalCheckpoint) -> str | None:
    """The network of the paper that has the file's sizes."""
    for name in _PAPER[original.kind]:
        standard = options(load_config([f"model={name}"]).model)
        if all(standard[option] == value for option, value in original.sizes.items()):
            return name
    return None


def _check_shapes(original: OriginalCheckpoint, model: FeedbackClassifier) -> None:
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in original.weights.items()}
    differences = [
        f"{original.names.get(name, name)}: {found.get(name, 'missing')} in the file, "
        f"{expected.get(name, 'not known')} in the network"
        for name in [*expected, *(name for name in found if name not in expected)]
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{original.path} does not fit the configured network: {'; '.join(differences)}. Its sizes follow from the "
            "options of model (channels, hidden, kernel_size, stride, padding), dataset.input_shape and "
            "dataset.num_classes"
        )


def _data_section(config: Config) -> dict[str, Any]:
    """What predictions need to know about the data; these are read only for class names that are not known here."""
    dataset = config.dataset
    title, names = TITLES.get(dataset.name, dataset.name), _CLASS_NAMES.get(dataset.name, ())
    if len(names) != dataset.num_classes:
        if config.data_dir is not None:
            loaded = build_dataset(config)
            title, names = loaded.title, loaded.class_names
        else:
            log.info("%s: predictions will give numbers for classes; data_dir=... gives their names", dataset.name)
            names = tuple(str(label) for label in range(dataset.num_classes))
    section: dict[str, Any] = {"name": dataset.name, "title": title, "class_names": list(names)}
    if isinstance(dataset, ImageDatasetConfig):
        scale = DIGITS_SCALE if dataset.name == "digits" else 255.0
        section |= {"input_scale": scale, "mean": list(dataset.mean), "std": list(dataset.std)}
    return section
