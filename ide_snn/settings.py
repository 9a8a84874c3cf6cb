"""What the settings of a block have to be, whenever they are set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from ide_snn.bptt import Bptt
from ide_snn.implicit import GRADIENTS
from ide_snn.neurons import NeuronParams
from ide_snn.precision import require_precision
from ide_snn.solvers import SOLVERS, Solver
from ide_snn.solvers.base import check_settings, require_count


def _require_kind(name: str, kinds: tuple[type, ...], value: object) -> None:
    if not isinstance(value, kinds):
        names = ", ".join(f"{kind.__name__}(...)" for kind in kinds)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")


def _require_solver(value: object) -> None:
    if isinstance(value, type) or not all(hasattr(value, name) for name in ("begin", "tol", "max_steps")):
        names = ", ".join(f"{kind.__name__}(...)" for kind in SOLVERS.values())
        raise ValueError(
            f"solver must be one of {names}, or a custom one with begin, tol and max_steps (`ide_snn.Solver`), "
            f"got {value!r}"
        )
    check_settings(cast(Solver, value))


def _require_one_of(name: str, choices: tuple[object, ...], value: object) -> None:
    if not any(value is choice for choice in choices):  # 1 is not True
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _refuse_compile(value: object) -> None:
    raise ValueError(f"compile is a method of every nn.Module: for the setting write block.compile_ = {value!r}")


REQUIRED: dict[str, Callable[[Any], None]] = {  # by name; each raises ValueError
    "precision": require_precision,
    "solver": _require_solver,
    "gradient": functools.partial(_require_kind, "gradient", (*GRADIENTS.values(), Bptt)),
    "neuron": functools.partial(_require_kind, "neuron", (NeuronParams,)),
    "time_steps": functools.partial(require_count, "time_steps"),
    "input_has_time": functools.partial(_require_one_of, "input_has_time", (False, True)),
    "check_input": functools.partial(_require_one_of, "check_input", (None, False, True)),
    "compile_": functools.partial(_require_one_of, "compile", (None, False, True)),
    "compile": _refuse_compile,
}
