"""Whether a module of torch does what torch wrote: no forward, subclass or hook of somebody's own has a part in it."""

from __future__ import annotations

import inspect

from torch import nn
from torch.nn.modules import module as every_module

from ide_snn.operators import KNOWN_MODULES
from ide_snn.optimizations import advance_before_training_forward

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# hooks of all modules (`torch.nn.modules.module.register_module_forward_hook` and its like): torch keeps these dicts
GLOBAL_HOOKS = tuple(
    getattr(every_module, f"_global_{kind}_hooks") for kind in ("forward_pre", "forward", "backward_pre", "backward")
)

CALLED = ("forward", "_conv_forward", "__call__")


def runs_as_torch_wrote_it(op: nn.Module) -> bool:
    """True where calling `op` does nothing but its linear operator with `op.weight` and `op.bias`."""
    own = [name for name in CALLED if name in op.__dict__]
    if own or not any(isinstance(op, kind) and _computes_as(type(op), kind) for kind in KNOWN_MODULES):
        return False
    if op._forward_hooks or op._backward_hooks or op._backward_pre_hooks:
        return False
    return all(hook is advance_before_training_forward for hook in op._forward_pre_hooks.values())


def _computes_as(kind: type[nn.Module], known: type[nn.Module]) -> bool:
    """True where a subclass has a known module's forward, and what that calls."""
    return all(getattr(kind, name, None) is getattr(known, name, None) for name in CALLED)


def returns_what_nobody_keeps(bn: nn.Module) -> bool:
    """True where what a batch norm returns may be overwritten: torch's own needs it no more, and nobody looks at it."""
    is_torchs = type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d) and "forward" not in bn.__dict__
    return is_torchs and not any(bn.__dict__[kind] for kind in HOOKS) and not any(GLOBAL_HOOKS)


def has_own_methods(module: nn.Module) -> bool:
    """True where something that was set on the module hides a method of its class."""
    return any(inspect.isfunction(getattr(type(module), name, None)) for name in vars(module))


def owns(module: nn.Module, *names: str) -> bool:
    """True where the tensors of these names are parameters or buffers, or None, and not attributes like any other."""
    return all(name in module._parameters or name in module._buffers for name in names)
