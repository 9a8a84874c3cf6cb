"""Whether a module of a user's own is affine, by looking at what it does."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ide_snn.normalization import frozen_statistics
from ide_snn.precision import without_autocast


class Probe(NamedTuple):
    """A module that was found to be affine: its parts then, and the shape of its response, without the batch."""

    parts: list[weakref.ref[nn.Module]]
    response: tuple[int, ...]

    @classmethod
    def of(cls, op: nn.Module, shape: tuple[int, ...]) -> Probe:
        """Compares op(3/4 x + 1/4 y) with 3/4 op(x) + 1/4 op(y) for inputs of `shape`, without the batch.

        Raises:
            ValueError: where they differ by more than rounding.
        """
        tensors = [t for t in (*op.parameters(), *op.buffers()) if t.is_floating_point()]
        like = tensors[0] if tensors else torch.empty(0, device="cpu")
        with torch.no_grad(), frozen_statistics(op), without_autocast(like.device.type):
            x, y = _inputs(shape, like)
            mixed, separate = op(0.75 * x + 0.25 * y), 0.75 * op(x) + 0.25 * op(y)
        computed_in = torch.promote_types(like.dtype, torch.float32), mixed.dtype
        eps = max(torch.finfo(dtype).eps for dtype in computed_in)
        tolerance = min(1e3 * eps, 0.05) * float(separate.abs().max())
        if not bool(((mixed - separate).abs() <= tolerance).all()):
            raise ValueError(
                f"{type(op).__name__} is not affine, but simulation, equilibrium and gradient of a feedback SNN "
                "require connections that are affine for fixed statistics: remove activations and random layers "
                "from it (the populations are the nonlinearity), or put them in front of the whole network"
            )
        return cls([weakref.ref(part) for part in op.modules()], tuple(mixed.shape[1:]))

    def is_of(self, op: nn.Module) -> bool:
        """True where the module has the parts that it had."""
        parts = list(op.modules())
        return len(parts) == len(self.parts) and all(a() is b for a, b in zip(self.parts, parts, strict=True))


def _inputs(shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Two random inputs [1, *shape], of so few bits that they and their mixture are exact in every type."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x, y = (torch.randint(-8, 9, (1, *shape), generator=generator, device="cpu").to(like) / 4 for _ in range(2))
    return x, y
