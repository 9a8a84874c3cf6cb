"""Checkpoints: written atomically, plain containers only, safe to load (no code is executed).

A file holds `{"format": 1, "config", "data", "model", "progress", "training"}`: the resolved configuration
(from which the network is rebuilt), what the data were (normalisation, class names), the state dict, where the
run stood, and, in `last.pt`, what is needed to continue it (optimiser, random states, running sums).
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ide_snn.files import write_atomically

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointError",
    "config_differences",
    "flatten",
    "load_checkpoint",
    "load_weights",
    "plain",
    "save_checkpoint",
    "write_atomically",
]

FORMAT = 1
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
PARTS = ("format", "config", "data", "model", "progress", "training")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the difference."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read.

    `training` is None where a run cannot be continued from it; `config` and `data` are empty where `fit` was
    called without them.
    """

    path: Path
    config: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    progress: dict[str, Any]
    training: dict[str, Any] | None


def save_checkpoint(
    path: Path,
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    progress: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of `model`.

    Raises:
        CheckpointError: a part holds something that could not be read back safely.
    """
    content = {
        "format": FORMAT,
        "config": plain(config, "config"),
        "data": plain(data, "data"),
        "model": plain(model.state_dict(), "model"),
        "progress": plain(progress, "progress"),
        "training": plain(training, "training"),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def plain(value: Any, name: str) -> Any:
    """`value` in what can be read back without executing code: containers, numbers, text and tensors.

    Numbers of numpy become Python's, paths text.

    Raises:
        CheckpointError: for anything else, naming where in `name` it is.
    """
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):  # float64 is a float as well
        return plain(value.item(), name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key, f"a key of {name}"): plain(own, f"{name}.{key}") for key, own in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items = [plain(own, f"{name}[{index}]") for index, own in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, Tensor) or type(value) in PLAIN:
        return value
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: use numbers, text, lists, dictionaries "
        "or tensors"
    )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises CheckpointError for a missing, foreign, truncated or newer file.
    """
    path = Path(path)
    if path.is_dir():
        found = ", ".join(str(file) for file in sorted(path.glob("**/*.pt"))) or "of which it has none (*.pt)"
        raise CheckpointError(f"{path} is a folder: give one of its checkpoints, {found}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: no such file")
    content_of_file = path.read_bytes()  # apart, since torch raises OSError for damaged content too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on foreign files; they are refused anyway
            content = torch.load(io.BytesIO(content_of_file), map_location="cpu", weights_only=True)
    except Exception as error:  # there is no end to what a damaged pickle can raise
        raise CheckpointError(f"{path} is not a checkpoint of ide_snn, or it is damaged or truncated") from error
    missing = set(PARTS) - set(content if isinstance(content, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of ide_snn: it lacks {', '.join(sorted(missing))}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {content['format']}; this version reads {FORMAT}")
    return Checkpoint(path, **{part: content[part] for part in PARTS[1:]})


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into `model`, or raise CheckpointError naming what differs."""
    expected = {name: _shape(value) for name, value in model.state_dict().items()}
    found = {name: _shape(value) for name, value in checkpoint.model.items()}
    differences = [f"it lacks {name}" for name in expected if name not in found]
    differences += [f"it has {name}, which the model has not" for name in found if name not in expected]
    differences += [
        f"{name} has shape {found[name]}, the model's {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise CheckpointError(f"{checkpoint.path} is a checkpoint of another model: {'; '.join(differences[:3])}{more}")
    model.load_state_dict(checkpoint.model)


def _shape(value: Any) -> tuple[int, ...] | None:
    """None for what a module's `get_extra_state` gives."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Every option in which two resolved configurations differ, as 'key: old -> new'."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    unset = "(unset)"
    return [
        f"{key}: {before.get(key, unset)} -> {after.get(key, unset)}"
        for key in keys
        if key not in ignore and not alike(before.get(key, unset), after.get(key, unset))
    ]


def alike(first: Any, second: Any, rel_tol: float = 0.0) -> bool:
    """True where both say the same.

    NaN is NaN, tensors are of one type and shape, numbers agree to `rel_tol`, two integers exactly.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and _numbers_agree(first, second, rel_tol)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(alike(first[key], second[key], rel_tol) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(alike(a, b, rel_tol) for a, b in zip(first, second, strict=True))
    if isinstance(first, int) and isinstance(second, int):  # not as floats, which round them
        return first == second
    if isinstance(first, (float, int)) and isinstance(second, (float, int)):
        return math.isclose(first, second, rel_tol=rel_tol) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


def _numbers_agree(first: Tensor, second: Tensor, rel_tol: float) -> bool:
    first, second = (tensor.detach().cpu().to_dense() for tensor in (first, second))
    return torch.allclose(first, second, rtol=rel_tol, atol=0, equal_nan=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
