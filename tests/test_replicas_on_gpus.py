"""What copies of a model do on GPUs only, with stand-ins for those."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ide_snn import SNNIDEFCNet
from ide_snn.distributed import Ranks
from ide_snn.replicas import Replicas


@pytest.mark.parametrize("is_cuda", [False, True])
def test_power_iterations_are_those_of_the_first_rank(is_cuda: bool) -> None:
    """On GPUs: cuDNN need not give two ranks the same bits, and other buffers would end the job at a checkpoint."""
    copied: list[Any] = []

    class Two(Ranks):
        def sum_(self, tensor: Any) -> Any:
            return tensor

        def copy_from_first_(self, tensors: Any) -> None:
            copied.extend(tensors)

    replicas = Replicas(SNNIDEFCNet((4,), 2, hidden=3), Two(0, 2), sync_bn=True)
    (constraint,) = replicas._constraints
    buffers = [SimpleNamespace(is_cuda=is_cuda, name=name) for name, _ in constraint.named_buffers()]
    replicas._constraints = [SimpleNamespace(buffers=lambda: buffers)]
    replicas.sum_gradients(wants_to_stop=False)
    assert {buffer.name for buffer in copied} == ({"u", "v"} if is_cuda else set())
