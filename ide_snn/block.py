"""FeedbackSNN: the reusable block, an `nn.Module` like any other."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ide_snn import conv_rates, input_stage, integers
from ide_snn.bptt import Bptt, Frames, through_time
from ide_snn.compiled import CompiledSteps
from ide_snn.equilibrium import EquilibriumMap
from ide_snn.graphed_simulation import GraphedSimulations
from ide_snn.graphed_solve import GraphedSolves
from ide_snn.implicit import Gradient, Implicit, SolveHook, attach_gradient
from ide_snn.layers import Apply, FixedConnection, as_connection
from ide_snn.neurons import NeuronParams, require_finite, step_, time_average
from ide_snn.operators import Operator
from ide_snn.paths import PathChoice
from ide_snn.precision import Precision, products_rounded
from ide_snn.record import Path, Rates, Record
from ide_snn.say_once import SayOnce
from ide_snn.settings import REQUIRED
from ide_snn.simulation import EVENT_PATHS, FUSED_PATHS, simulate
from ide_snn.solvers import Anderson, FixedPointProblem, Gmres, Solution, Solver, solve

log = logging.getLogger(__name__)
SimulationHook = Callable[[Rates], None]


class FeedbackSNN(nn.Module):
    """A feedback spiking network: input stage, n >= 1 populations, feedback from the last to the first.

    Its value is the firing rate a_n[T] of the last population after T simulated steps; its gradient is that of
    the equilibrium a_n = f(a_n) (`ide_snn.implicit`), or that of the simulated steps (`ide_snn.bptt`). It holds no
    state between calls.

    Args:
        input: input stage, a `Connection` or a module that is wrapped into one.
        layers: connections from population i to i + 1; empty for one population.
        feedback: connection from the last population to the first.
        neuron: threshold and leak of all populations.
        time_steps: T >= 1, the simulated time steps.
        solver: for the implicit linear system.
        gradient: `Implicit`, `Unrolled` or `Bptt`.
        input_has_time: inputs are [T, B, *] (spikes, frames) instead of a constant [B, *].
        check_input: refuse NaN and infinity in the input; None: on a CPU only, since on a GPU the check waits for the
            device. One that is not refused makes the sample's rates NaN, with batch norm in training all of them.
        precision: how the simulation and the products of J are computed, see `ide_snn.precision`.
        compile: prepare the training step once and run it by a few calls, where that can be done (`ide_snn.compiled`);
            on a GPU the time steps and GMRES, as CUDA graphs. None: on a CPU alone, with exact or fast, without a
            warning where it cannot be done. The attribute is `compile_`: modules have a method `compile`.

    Settings are attributes of the same names, which may be set between forwards.

    Shapes: x [B, *] or [T, B, *] -> rates [B, *shape of the last population]; with `Bptt(output="spikes")` its spikes
    [T, B, *].

    Raises:
        ValueError: for a setting of the wrong kind, when it is given or set, and in forward for inputs or connections
            that do not fit.
    """

    def __init__(
        self,
        *,
        input: nn.Module,
        feedback: nn.Module,
        layers: Sequence[nn.Module] = (),
        neuron: NeuronParams = NeuronParams(),
        time_steps: int = 30,
        solver: Solver = Gmres(),
        gradient: Gradient | Bptt = Implicit(),
        input_has_time: bool = False,
        check_input: bool | None = None,
        precision: Precision = "float32",
        compile: bool | None = None,
    ) -> None:
        super().__init__()
        if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"layers must be a list of connections, one for each further population, got {type(layers).__name__}: "
                "give [module]; what belongs to one connection, such as a convolution and its batch norm, is one module"
            )
        self.input = as_connection(input)
        self.layers = nn.ModuleList(as_connection(layer) for layer in layers)
        self.feedback = as_connection(feedback)
        self.neuron = neuron
        self.time_steps = time_steps
        self.solver = solver
        self.gradient = gradient
        self.input_has_time = input_has_time
        self.check_input = check_input
        self.precision: Precision = precision
        self.compile_ = compile
        self._require_differentiable()
        self._compiled, self._graphed, self._solves = CompiledSteps(), GraphedSimulations(), GraphedSolves()
        self.say_once = SayOnce(log)
        self._solve_hooks: OrderedDict[int, SolveHook] = OrderedDict()
        self._simulation_hooks: OrderedDict[int, SimulationHook] = OrderedDict()

    def __setattr__(self, name: str, value: Any) -> None:
        require = REQUIRED.get(name)
        if require is not None:
            require(value)
        if name in ("input", "feedback"):
            value = as_connection(value)
        super().__setattr__(name, value)

    def _require_differentiable(self) -> None:
        if isinstance(self.gradient, Bptt) and self.precision != "float32":
            raise ValueError(
                f"precision={self.precision} is for implicit differentiation; with Bptt use precision='float32'"
            )

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Rates of the last population [B, *]; `generator` is for the dropout masks."""
        if self._may_be_compiled(x):
            value = self._compiled(self, x, generator)
            if value is not None:
                return value
        else:
            self._compiled.say_once.latest = None
        at_rates = isinstance(self.gradient, Implicit) and self.gradient.jacobian_at == "rate"
        record = Record(spike_fraction=bool(self._simulation_hooks), mean_response=at_rates and torch.is_grad_enabled())
        if isinstance(self.gradient, Bptt):  # whose backward pass repeats products: in torch's settings, as they do
            rates, value = self._prepare(x, generator).through_time(self.gradient, record)
            self.tell(rates)
            return value
        with products_rounded(self.precision, x.device):
            moment = self._prepare(x, generator)
            rates = moment.simulate(record)
            self.tell(rates)
            return self._attach(rates.last, moment.map, rates.mean_response)

    def read_out(self, linear: nn.Linear, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """linear(self(x)) in one compiled step; None where there is none, for the two to be called."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        own = type(self).forward is not FeedbackSNN.forward or "forward" in self.__dict__
        return None if own or hooks or not self._may_be_compiled(x) else self._compiled(self, x, generator, linear)

    def _may_be_compiled(self, x: Tensor) -> bool:
        is_usual = type(self) is FeedbackSNN  # others may have methods of their own
        wanted = is_usual and self.precision != "float32" if self.compile_ is None else self.compile_
        return wanted and self.training and torch.is_grad_enabled() and not x.is_cuda

    def tell(self, rates: Rates) -> None:
        """Calls the simulation hooks, as a forward does; without the mean response, which the gradient overwrites."""
        rates = replace(rates, mean_response=None) if self._simulation_hooks else rates
        for hook in self._simulation_hooks.values():
            hook(rates)

    def simulate(
        self,
        x: Tensor,
        record: Record = Record(),
        *,
        generator: torch.Generator | None = None,
    ) -> Rates:
        """The simulation alone, with what `record` asks for and without a gradient.

        In training mode the constraints advance and the input stage's running statistics are updated, as in a
        forward; call it in evaluation mode to look without touching. The chain uses running statistics.
        """
        with torch.no_grad(), products_rounded(self.precision, x.device):
            return self._prepare(x, generator).simulate(record)

    def equilibrium(
        self,
        x: Tensor,
        solver: Solver = Anderson(tol=1e-6, max_steps=200),
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Solution]:
        """The solved equilibrium a* = f(a*) [B, *] with its implicit gradient, and the solver's verdict on it.

        Batch norms of the chain use running statistics in the solve, as in the simulation.

        Raises:
            ValueError: with `Bptt`, which has no gradient for it, unless gradients are disabled.
        """
        with products_rounded(self.precision, x.device):
            return self._solved_equilibrium(self._prepare(x, generator), x, solver)

    def _solved_equilibrium(self, moment: _Moment, x: Tensor, solver: Solver) -> tuple[Tensor, Solution]:
        with torch.no_grad():
            start = moment.drive_value.new_zeros(x.shape[1 if self.input_has_time else 0], *moment.shapes[-1])
            solution = solve(FixedPointProblem(lambda a: moment.map(a, "running"), start), solver)
        return self._attach(solution.value, moment.map), solution

    def linearisation_point(self, x: Tensor) -> tuple[Tensor, EquilibriumMap]:
        """(simulated rates, f) of one forward, for analysis: f(rates, "running"), f.linearise(rates, "running")."""
        with products_rounded(self.precision, x.device):
            moment = self._prepare(x, None)
            return moment.simulate(Record()).last, moment.map

    def register_solve_hook(self, hook: SolveHook) -> RemovableHandle:
        """`hook(solution)` is called after every backward solve; returns a handle with `remove()`."""
        handle = RemovableHandle(self._solve_hooks)
        self._solve_hooks[handle.id] = hook
        return handle

    def register_simulation_hook(self, hook: SimulationHook) -> RemovableHandle:
        """`hook(rates)` is called after every simulation of a forward, with spike fractions recorded."""
        handle = RemovableHandle(self._simulation_hooks)
        self._simulation_hooks[handle.id] = hook
        return handle

    def population_shapes(self, input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of the n populations for inputs of `input_shape`, both without time and batch.

        Raises:
            ValueError: if the connections do not fit the input or each other.
        """
        try:
            shapes = [self.input.output_shape(input_shape)]
            for number, layer in enumerate(self.layers):
                if not hasattr(layer, "output_shape"):
                    raise ValueError(f"layers[{number}] is a plain {type(layer).__name__}: wrap it in a Connection")
                shapes.append(layer.output_shape(shapes[-1]))  # type: ignore[operator]
            returned = self.feedback.output_shape(shapes[-1])
        except (ValueError, RuntimeError) as error:
            hint = "; for inputs [T, B, ...] set input_has_time=True" if self._lacks_time(input_shape) else ""
            raise ValueError(f"input of shape {list(input_shape)} does not fit the network: {error}{hint}") from error
        if returned != shapes[0]:
            raise ValueError(
                f"the feedback's output {list(returned)} must have the shape of population 1, {list(shapes[0])}: "
                f"change its kernel, stride or padding, or the size of the input, {list(input_shape)}"
            )
        return shapes

    def _lacks_time(self, input_shape: tuple[int, ...]) -> bool:
        """True where the input stage, a known module, takes the shape without its first dimension, then the batch."""

        def fits(shape: tuple[int, ...]) -> bool:
            try:
                return bool(self.input.output_shape(shape))
            except ValueError:
                return False

        is_constant = self.input.is_known and not self.input_has_time  # an own module is not asked for strange shapes
        return is_constant and fits(input_shape[1:])

    def feedback_diagnostics(self) -> dict[str, float]:
        """||W_fb|| in use, |alpha| and the excess of the norm's estimate; empty without a constraint."""
        return self.feedback.feedback_diagnostics()

    @property
    def path(self) -> str:
        """How the latest forwards were computed, in the words of the log: the simulation, and what `compile` does."""
        steps = [self._compiled.say_once] if self.compile_ is not False else []
        graphs = [self._graphed.say_once] if self.compile_ else []
        return "; ".join(filter(None, (say.latest for say in (self.say_once, *steps, *graphs)))) or "no forward yet"

    def extra_repr(self) -> str:
        return f"{self.neuron}, time_steps={self.time_steps}, {self.solver}, {self.gradient}"

    def path_for(self, links: Sequence[FixedConnection], device: torch.device) -> Path:
        """How a forward over `links` is computed; says so, once, where it is not what `precision` asked for."""
        if self.precision == "float32":
            self.say_once("precision=float32: dense")
            return "dense"
        self._require_differentiable()
        path, reason, message = self._choice.of(links, device)
        self.say_once(message, warn=reason is not None)
        return path

    def takes_integers(self, path: Path) -> bool:
        """True where the input stage's products are those of `ide_snn.integers`, if the forward takes this path."""
        return self._choice.takes_integers(path)

    @property
    def _choice(self) -> PathChoice:
        return PathChoice(self.precision, self.gradient, self.solver, self.input, self.input_has_time)

    def _attach(self, rates: Tensor, f: EquilibriumMap, response: Tensor | None = None) -> Tensor:
        if not (self.training or torch.is_grad_enabled()):
            return rates
        gradient = self.gradient
        if isinstance(gradient, Bptt):
            if torch.is_grad_enabled():
                raise ValueError(
                    "an equilibrium has no gradient through time: call it under torch.no_grad(), or set "
                    "block.gradient = Implicit()"
                )
            gradient = Implicit()  # nothing is differentiated; running statistics are updated
        return attach_gradient(rates, f, gradient, self.solver, tuple(self._solve_hooks.values()), response)

    def _prepare(self, x: Tensor, generator: torch.Generator | None) -> _Moment:
        dtype = self._parameter_dtype(x)
        self.check(x, dtype)
        input_shape = tuple(x.shape[2 if self.input_has_time else 1 :])
        shapes = self.population_shapes(input_shape)
        batch = x.shape[1 if self.input_has_time else 0]
        # an empty tensor [B] of the dtype and device of membranes and rates
        like = torch.empty(batch, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        native = self.precision != "float32" and (like.device.type == "cpu" or self.precision == "fast")
        links = [
            connection.prepare(shape, like, generator, native=native)
            for connection, shape in zip((self.input, *self.layers, self.feedback), (input_shape, *shapes), strict=True)
        ]
        return _Moment.of(self, x, links, shapes, like.dtype)

    def _parameter_dtype(self, x: Tensor) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype)

    def check(self, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """Raises ValueError for an input that the block cannot take, by its type, number of dimensions and values.

        Args:
            dtype: of the parameters, where it is known.
        """
        expected = self._parameter_dtype(x) if dtype is None else dtype
        lead = "[T, B, ...]" if self.input_has_time else "[B, ...]"
        if x.dim() < (3 if self.input_has_time else 2):
            raise ValueError(f"input must have shape {lead}, got {list(x.shape)}")
        if self.input_has_time and x.shape[0] != self.time_steps:
            raise ValueError(
                f"input has {x.shape[0]} time steps but the network simulates {self.time_steps}: "
                "set time_steps, or cut the input (x[:T])"
            )
        if not x.is_floating_point() and not self.input_has_time:
            raise ValueError(f"a constant input must be floating point, got {x.dtype}: convert with x.float()")
        if expected in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"parameters are {expected}, too coarse for membranes and solves: keep them in float32 and use "
                "torch.autocast"
            )
        if not self.input_has_time and x.dtype != expected and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"input is {x.dtype} but the parameters are {expected}: convert with x.to({expected})")
        is_checked = x.device.type == "cpu" if self.check_input is None else self.check_input
        if is_checked and x.is_floating_point():
            require_finite(x)


class _Moment:
    """Everything that is fixed during one forward: drive, maps, shapes."""

    def __init__(
        self,
        block: FeedbackSNN,
        equilibrium_map: EquilibriumMap,
        drive_value: Tensor,
        drive_at: Callable[[int], Tensor] | None,
        shapes: list[tuple[int, ...]],
        frames: Frames | None,
    ) -> None:
        self.block = block
        self.map = equilibrium_map
        self.drive_value = drive_value
        self.drive_at = drive_at
        self.shapes = shapes
        self.frames = frames

    @classmethod
    def of(
        cls,
        block: FeedbackSNN,
        x: Tensor,
        links: list[FixedConnection],
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> _Moment:
        """The input stage is evaluated here: once, on the time average, and per step for inputs with time."""
        first, *layers, feedback = links
        mean_input = time_average(x, block.neuron.leak, dtype) if block.input_has_time else x
        moments = first.moments(mean_input) if block.input_has_time else None
        if block.input_has_time and not first.connection.is_known and first.connection.uses_batch_statistics:
            raise ValueError(
                "an input stage of your own cannot contain batch norm when the input has time: its training "
                "statistics are those of the mean input; use Connection(nn.Conv2d(...), batch_norm=True)"
            )
        path = block.path_for((feedback, *layers), x.device)
        operator, apply = first.operator, cast(Apply, Operator.apply)
        if operator is not None and operator.has_few_inputs and block.precision != "float32" and not x.is_cuda:
            apply = Operator.apply_by_columns
        elif block.takes_integers(path):
            apply = integers.apply
        if apply is integers.apply and input_stage.suits(first, len(x)):
            drive = input_stage.respond(first, mean_input)
        elif path in EVENT_PATHS and conv_rates.suits(first, len(mean_input)):
            drive = conv_rates.respond(first, first.product(mean_input, apply))
        else:
            drive = first.respond(mean_input, "batch", update_running=True, apply=apply)
        value = drive.detach()
        at = None
        if block.input_has_time:
            stage = first.affine(moments)

            def at(t: int) -> Tensor:
                return stage(x[t].detach().to(dtype))

        frames = Frames(x, mean_input, first) if block.input_has_time else None
        ahead = None
        if path in FUSED_PATHS:
            ahead = functools.partial(block._solves.ahead, precision=block.precision, captured=bool(block.compile_))
        f = EquilibriumMap(feedback, tuple(layers), drive, block.neuron, path, block.precision, ahead)
        return cls(block, f, value, at, shapes, frames)

    def simulate(self, record: Record) -> Rates:
        feedback, layers = self.map.feedback.frozen, [layer.frozen for layer in self.map.layers]
        drive = self.drive_value if self.drive_at is None else self.drive_at
        neuron, gradient = self.block.neuron, self.block.gradient
        advance = gradient.firing(neuron).step_ if isinstance(gradient, Bptt) else step_
        steps, path = self.block.time_steps, self.map.path
        if self.block.compile_ and (self.drive_value.is_cuda or path in FUSED_PATHS):
            found = self.block._graphed(drive, layers, feedback, self.shapes, neuron, steps, record, path)
            if found is not None:
                return found
        return simulate(drive, layers, feedback, self.shapes, neuron, steps, record, advance, path)

    def through_time(self, gradient: Bptt, record: Record) -> tuple[Rates, Tensor]:
        return through_time(gradient, self.map, self.frames, self.shapes, self.block.time_steps, record)
