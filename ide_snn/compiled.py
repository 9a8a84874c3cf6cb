"""Which training steps are prepared once and then run by a few calls (`compile`), see `ide_snn.prepared_step`.

A plan is made for a block, a size of batch and everything else that it depends on; before every step this is compared.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from ide_snn import integers, native
from ide_snn.dropout import VariationalDropout
from ide_snn.implicit import Implicit, SolveHook
from ide_snn.input_stage import why_not_batch_norm
from ide_snn.layers import Connection, FixedConnection
from ide_snn.native import is_plain
from ide_snn.neurons import NeuronParams, require_finite
from ide_snn.operators import Operator
from ide_snn.optimizations import SpectralMatrix, SpectralMatrixFirstDim, get_constraint, raw_weight
from ide_snn.precision import Precision
from ide_snn.prepared_step import Parts, Plan
from ide_snn.readout import suits
from ide_snn.record import Path
from ide_snn.say_once import SayOnce
from ide_snn.simulation import EVENT_PATHS
from ide_snn.solvers import Gmres, Solver
from ide_snn.torch_modules import GLOBAL_HOOKS, HOOKS, has_own_methods, owns

log = logging.getLogger(__name__)

MOST_PLANS = 4  # sizes of batches and other settings whose buffers are kept

# of connections, dropout, batch norm and constraints, as long as they are those that are known
SETTINGS = ("training", "pool", "p", "eps", "momentum", "track_running_stats", "bound")


class Block(Protocol):
    """What is needed of a `FeedbackSNN`."""

    input: Connection
    layers: nn.ModuleList
    feedback: Connection
    neuron: NeuronParams
    solver: Solver
    gradient: Any
    time_steps: int
    input_has_time: bool
    check_input: bool | None
    precision: Precision
    compile_: bool | None
    say_once: SayOnce
    _modules: dict[str, nn.Module | None]
    _solve_hooks: OrderedDict[int, SolveHook]
    _simulation_hooks: OrderedDict[int, Any]

    def check(self, x: Tensor) -> None: ...

    def population_shapes(self, input_shape: tuple[int, ...]) -> list[tuple[int, ...]]: ...

    def path_for(self, links: Sequence[FixedConnection], device: torch.device) -> Path: ...

    def takes_integers(self, path: Path) -> bool: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...


class _Kept(NamedTuple):
    """A plan, or why there is none, and what there was to say of it."""

    plan: Plan | str
    watch: _Watch
    said_of_path: str | None
    said: str | None


class CompiledSteps:
    """The compiled training steps of one block, by what they were made for.

    A copy or a pickle starts without any.
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
        self._latest: tuple[tuple[Any, ...], _Kept] | None = None  # is found without hashing
        self.say_once = SayOnce(log)

    def __call__(
        self, block: Block, x: Tensor, generator: Generator | None, readout: nn.Linear | None = None
    ) -> Tensor | None:
        """The rates of a training forward, or their readout, with their gradient.

        None where it is not compiled, which the log says.

        Args:
            readout: a linear layer behind the block; where it is not compiled, the block alone may be.
        """
        key = (
            *(x.shape, x.dtype, x.device, x.is_contiguous(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")),
            *(block.precision, block.neuron, block.time_steps, block.solver, block.gradient, block.input_has_time),
            *(
                bool(block._simulation_hooks),
                any(GLOBAL_HOOKS),
                len(block.layers),
                block.compile_,
                None if readout is None else id(readout),
            ),
        )
        latest = self._latest
        try:
            kept = latest[1] if latest is not None and latest[0] == key else self._plans.get(key)
        except (TypeError, ValueError, RuntimeError):  # a setting with an __eq__ of its own, or with tensors, arrays
            self._say_no(block, "a setting is of your own kind and cannot be hashed or compared")
            return None
        if kept is None or not kept.watch.is_as_it_was(block):
            if readout is not None and not _suits(readout, block):
                return None  # the block alone may be compiled
            plan = self._make(block, x, readout)
            if not _are_leaves(block.parameters()):
                return None  # nothing is kept: it would keep their graphs
            said = block.say_once.latest, self.say_once.latest
            kept = _Kept(plan, _Watch(block, readout), *said)
        if latest is None or kept is not latest[1]:
            self._latest = key, kept
            self._plans.pop(key, None)  # to the end; another thread may have been faster
            self._plans[key] = kept
            if len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        plan, self.say_once.latest = kept.plan, kept.said
        if isinstance(plan, str):
            return None
        block.say_once.latest = kept.said_of_path
        if block.check_input is not False:
            require_finite(x)
        return plan.step(x, generator, tuple(block._solve_hooks.values()))

    def _make(self, block: Block, x: Tensor, readout: nn.Linear | None) -> Plan | str:
        """The plan, or why there is none."""
        if block.compile_ is None and has_own_methods(cast(nn.Module, block)):  # before they are called
            found = "the block has a method of your own"
            self._say_no(block, found)
            return found
        block.check(x)
        block.population_shapes(tuple(x.shape[2 if block.input_has_time else 1 :]))
        found = _path_or_reason(block, x)
        if found in EVENT_PATHS:
            for connection in (block.input, block.feedback):  # whose weights are plain, or constrained by what is known
                weight, bias = raw_weight(connection.op), cast("Tensor | None", connection.op.bias)
                connection.require_sizes(cast(Operator, connection.operator), weight, bias)
            self.say_once("the training step is compiled")
            return Plan(_parts(block, cast(Path, found), readout), len(x))
        self._say_no(block, found)
        return found

    def _say_no(self, block: Block, reason: str) -> None:
        if block.compile_:
            self.say_once(f"compile=True: no effect ({reason})", warn=True)
        else:
            self.say_once(f"the training step is not compiled ({reason})")

    def __reduce__(self) -> tuple[type[CompiledSteps], tuple[()]]:
        return CompiledSteps, ()


def _suits(readout: nn.Linear, block: Block) -> bool:
    """True where a layer behind the block can be part of its step: not where nothing in front of it is trained."""
    operator = block.feedback.operator
    if operator is None or operator.kind != "linear":
        return False
    is_trained = any(p.requires_grad for p in block.parameters())
    return suits(readout, operator.out_channels) and is_trained and _are_leaves(readout.parameters())


def _are_leaves(parameters: Iterable[Tensor]) -> bool:
    """False where one is computed from others, as `torch.func.functional_call` may be given them."""
    return all(parameter.is_leaf for parameter in parameters)


def _path_or_reason(block: Block, x: Tensor) -> str:
    """The path of the simulation where the training step for inputs like x can be compiled, else the reason."""
    stage, feedback = block.input, block.feedback
    if len(block.layers) or stage.operator is None or feedback.operator is None:
        return "it is for one population between linear layers"
    if {stage.operator.kind, feedback.operator.kind} != {"linear"} or max(stage.pool, feedback.pool) > 1:
        return "it is for fully connected networks"
    if block.input_has_time:
        return "the input has time"
    if not isinstance(block.gradient, Implicit) or block.gradient.jacobian_at != "rate":
        return "it is for implicit differentiation at the rates"
    if type(block.solver) is not Gmres:
        return "it is for solver gmres"
    if feedback.bn is not None:
        return "the feedback has batch norm"
    if parametrize.is_parametrized(stage.op):
        return "the input stage has a parametrized weight"
    if any(type(connection) is not Connection for connection in (stage, feedback)):
        return "a connection is one of your own"
    if any(type(connection.dropout) is not VariationalDropout for connection in (stage, feedback)):
        return "dropout is one of your own"
    if any(map(has_own_methods, (stage, feedback, stage.dropout, feedback.dropout))):
        return "a connection or dropout has a method of your own"
    if not all(module.training for module in block.modules()):
        return "a part is in evaluation mode"
    return (
        _why_not_constraint(feedback.op)
        or why_not_batch_norm(stage.bn, len(x))
        or _why_not_hooks(block)
        or _path_or_reason_of_kernels(block, x)
    )


def _why_not_constraint(op: nn.Module) -> str | None:
    constraint = get_constraint(op)
    if constraint is None:
        return "the feedback has a parametrization of its own" if parametrize.is_parametrized(op) else None
    kinds = cast(nn.ModuleDict, op.parametrizations)
    if type(constraint) not in (SpectralMatrix, SpectralMatrixFirstDim) or has_own_methods(constraint):
        return "of constraints, it knows spectral_matrix"
    if list(kinds) != ["weight"] or len(cast(nn.ModuleList, kinds["weight"])) != 1 or not _is_torchs(kinds["weight"]):
        return "the feedback has a parametrization of its own"
    return None


def _is_torchs(inner: nn.Module) -> bool:
    return type(inner) is parametrize.ParametrizationList and not has_own_methods(inner)


def _why_not_hooks(block: Block) -> str | None:
    own = 1 if get_constraint(block.feedback.op) is not None else 0  # a constraint advances by one
    hooks = sum(_hooks(module) for part in (block.input, block.feedback) for module in part.modules())
    is_free = hooks == own and not block._simulation_hooks and not any(GLOBAL_HOOKS)
    return None if is_free else "there are hooks"


def _hooks(module: nn.Module) -> int:
    return sum(len(module.__dict__[kind]) for kind in HOOKS)


def _path_or_reason_of_kernels(block: Block, x: Tensor) -> str:
    if block.precision == "float32":
        return "precision=float32 is torch's own operations: take exact or fast"
    tensors = (x, *block.parameters(), *(t for t in block.buffers() if t.is_floating_point()))
    if not all(map(is_plain, tensors)):
        return "it is for contiguous float32 on a CPU"
    if not _are_leaves(block.parameters()):
        return "a parameter is computed from others"
    if not all(owns(part, *names) for part, names in _used(block)):
        return "a weight, bias or vector is neither a parameter nor a buffer"  # whose replacement would go unseen
    shape = block.input.output_shape(tuple(x.shape[1:]))
    op, operator = block.feedback.op, block.feedback.operator
    with torch.no_grad():
        weight, bias = cast(Tensor, op.weight), cast("Tensor | None", op.bias)
    path = block.path_for((FixedConnection(block.feedback, operator, weight, bias, None, shape, shape),), x.device)
    if path not in EVENT_PATHS:
        return "the products are dense"
    reasons = (native.why_unavailable(name) for name in ("spectral", "features", "sequence", "readout"))
    return next(filter(None, reasons), path)


def _used(block: Block) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """The tensors that a plan uses, by module."""
    yield block.input.op, ("weight", "bias")
    constraint, op = get_constraint(block.feedback.op), block.feedback.op
    if constraint is None:
        yield op, ("weight", "bias")
    else:
        yield op, ("bias",)
        yield cast(nn.Module, op.parametrizations)["weight"], ("original",)  # type: ignore[index]
        yield constraint, ("alpha", "u", "v")
    if block.input.bn is not None:
        yield block.input.bn, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class _Watch:
    """What a plan depends on, to be compared before every step: quickly, so by torch's own containers."""

    def __init__(self, block: Block, readout: nn.Linear | None) -> None:
        self._owners: list[tuple[dict[str, Any], str, Any]] = []  # who is where
        self._modules, self._root = [cast(nn.Module, block)], vars(block)
        self._look_at(block._modules, ("input", "feedback"))
        if readout is not None:
            self._look_at({"readout": readout}, ("readout",))
        self._tensors = [what for _, _, what in self._owners if isinstance(what, Tensor)]
        states = [module.__dict__ for module in self._modules]
        self._settings = [(own, name) for own in states for name in SETTINGS if name in own]
        self._counted = [(own, name) for own in states for name in (*HOOKS, "_modules", "_parameters", "_buffers")]
        self._state, self._addresses = self._now(), self._addresses_now()

    def _look_at(self, modules: dict[str, nn.Module | None], names: Iterable[str]) -> None:
        for name in names:
            inner = modules[name]
            self._owners.append((modules, name, inner))
            if inner is not None:
                self._modules.append(inner)
                for tensors in (inner._parameters, inner._buffers):
                    self._owners += [(tensors, key, tensor) for key, tensor in tensors.items()]
                self._look_at(inner._modules, inner._modules)

    def is_as_it_was(self, block: Block) -> bool:
        if vars(block) is not self._root:  # a shallow copy has the plans of the other
            return False
        for owner, name, what in self._owners:
            if owner.get(name) is not what:
                return False
        return self._state == self._now() and self._addresses == self._addresses_now()

    def _now(self) -> list[Any]:
        return [
            *(own[name] for own, name in self._settings),
            *(len(own[name]) for own, name in self._counted),
            *((type(module), *module.__dict__) for module in self._modules),  # a new one: a method of somebody's own
        ]

    def _addresses_now(self) -> list[Any]:
        return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.requires_grad) for tensor in self._tensors]


def _parts(block: Block, path: Path, readout: nn.Linear | None) -> Parts:
    stage, feedback = block.input, block.feedback
    return Parts(
        w_in=cast(Tensor, stage.op.weight),
        b_in=cast("Tensor | None", stage.op.bias),
        bn=cast("nn.BatchNorm1d | None", stage.bn),
        w=raw_weight(feedback.op),
        b=cast("Tensor | None", feedback.op.bias),
        constraint=cast("SpectralMatrix | None", get_constraint(feedback.op)),
        dropouts=(stage.dropout, feedback.dropout),
        operator=cast(Operator, feedback.operator),
        neuron=block.neuron,
        time_steps=block.time_steps,
        solver=cast(Gmres, block.solver),
        path=path,
        in_integers=block.takes_integers(path),
        may_be_whole=integers.allowed(block.precision),
        readout=readout,
    )
