"""The original authors' code (github.com/pkuxmq/IDE-FSNN) as something to measure; it is not part of this project.

The clone is given by its path; nothing of it is kept here but the names of its classes and of the options that its
training scripts set. It has no licence, so it is not distributed. What its scripts import for figures and coloured text
is not needed: an empty stand-in serves where `termcolor` is not installed.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ide_snn.schemas import Config, ConvModelConfig, FCModelConfig, MultiLayerModelConfig

MODULES = {
    "fc": ("models.snn_ide_fc", "SNNIDEFCNet"),
    "conv": ("models.snn_ide_conv", "SNNIDEConvNet"),
    "multilayer": ("models.snn_ide_conv_multilayer", "SNNIDEConvMultiLayerNet"),
}
SOLVER_STEPS, SOLVER = 30, "broy"  # what its scripts set


def settings(config: Config) -> dict[str, Any]:
    """Its nested options for the network of `config`.

    Raises:
        ValueError: for a network it cannot build.
    """
    model, neuron = config.model, config.neuron
    shape, leak = config.dataset.input_shape, neuron.leak  # type: ignore[attr-defined]
    common = {
        "num_classes": config.dataset.num_classes,
        "threshold": SOLVER_STEPS,
        "time_step": config.time_steps,
        "vth": neuron.v_threshold,  # type: ignore[attr-defined]
        "dropout": model.dropout,
        "leaky": None if leak == 1 else leak,
    }
    if isinstance(model, FCModelConfig):
        own: dict[str, Any] = {"dim_in": shape[0] * shape[1] * shape[2], "dim_hidden": model.hidden}
    elif isinstance(model, ConvModelConfig):
        size = [(n + 2 * model.padding - model.kernel_size) // model.stride + 1 for n in shape[1:]]
        own = _input_stage(shape[0], model.channels, model.kernel_size, model.stride, model.padding)
        own |= {"h_hidden": size[0], "w_hidden": size[1], "kernel_size_s": model.kernel_size}
    elif isinstance(model, MultiLayerModelConfig):
        if len(model.channels) != 5 or tuple(model.strides) != (2, 1, 2, 1, 1):
            raise ValueError("the original has five populations with strides 2, 1, 2, 1, 1")
        own = _input_stage(shape[0], model.channels[0], 3, 2, 1)
        own |= {f"c_s{i}": width for i, width in enumerate(model.channels[1:], 1)}
        own |= {"h_hidden": shape[1] // 4, "w_hidden": shape[2] // 4, "kernel_size_s": 3}
    else:
        raise ValueError(f"the original has no network {model.network!r}")
    return {"MODEL": common | own, "OPTIM": {"solver": SOLVER}}


def _input_stage(channels: int, hidden: int, kernel: int, stride: int, padding: int) -> dict[str, Any]:
    return {
        "c_in": channels,
        "c_hidden": hidden,
        "kernel_size_x": kernel,
        "stride_x": stride,
        "padding_x": padding,
        "pooling_x": False,
    }


def build_original(clone: Path, config: Config) -> nn.Module:
    """Its network with the sizes, T, threshold, leak and dropout of `config`, freshly initialised.

    Raises:
        FileNotFoundError: if `clone` is not a clone of it.
    """
    module, name = MODULES[config.model.network]
    if not (clone / module.replace(".", "/")).with_suffix(".py").is_file():
        raise FileNotFoundError(
            f"{clone} has no {module.replace('.', '/')}.py: clone https://github.com/pkuxmq/IDE-FSNN and give its path"
        )
    with _importable(clone):
        kind = getattr(importlib.import_module(module), name)
    torch.manual_seed(config.seed)
    network: nn.Module = kind(settings(config))
    return network


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first on the path; its packages have common names, so they are forgotten afterwards."""
    taken = {"models", "modules", "utils"}
    try:
        importlib.import_module("termcolor")
    except ImportError:
        stand_in = types.ModuleType("termcolor")
        stand_in.colored = lambda text, *_: text  # type: ignore[attr-defined]
        sys.modules["termcolor"] = stand_in
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in taken}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in [name for name in sys.modules if name.split(".")[0] in taken]:
            del sys.modules[name]
        sys.modules.update(before)
