"""The copies of a model in the processes of a job: equal at the start, one gradient, one decision to stop.

Gradients are summed explicitly after the backward pass, in one message per data type, and not by torch's
`DistributedDataParallel`: the gradients of a feedback block all appear at the end of its backward pass, behind the
solve, so that there is next to nothing to overlap their transfer with; accumulation needs one message per step anyway;
the model keeps its class, its attributes and the keys of its state dict; and a parameter that a batch does not use is
no special case. In a loop of one's own `DistributedDataParallel` works as for any other module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ide_snn.distributed import RankError, Ranks, Share
from ide_snn.evaluation import Batch, labelled
from ide_snn.implicit import Implicit
from ide_snn.monitor import feedback_blocks
from ide_snn.normalization import batch_norms, synchronised
from ide_snn.optimizations import get_constraint
from ide_snn.progress import Batches, SharedBatches

__all__ = ["Replicas", "with_shares"]

# steps between looks at the stop flag on a GPU, each of which waits for the device
STOP_EVERY = 8


class Replicas:
    """This process's copy of `model` among those of the other ranks. Alone, all of this does nothing.

    Args:
        model: on its device.
        ranks: of the job; every method but `synchronised` is collective.
        sync_bn: batch norms normalise by the batch of all ranks; else by each rank's share, and their running
            statistics are averaged at the end of an epoch and whenever the model is saved.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, sync_bn: bool) -> None:
        self.model = model
        self.ranks = ranks
        self.sync_bn = sync_bn
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._asked: Tensor | None = None
        self._constraints = list(filter(None, map(get_constraint, model.modules())))

    def begin(self, train: Batches) -> Batches:
        """Gives all ranks the weights and buffers of rank 0; returns this rank's share of the training batches.

        Raises:
            TypeError, ValueError: the batches or the model cannot be divided among the ranks.
        """
        if self.ranks.is_alone:
            return train
        if not isinstance(train, SharedBatches):
            raise TypeError(
                f"several processes cannot divide the batches of a {type(train).__name__}: use a DeviceLoader, or "
                "give it the methods of ide_snn.progress.SharedBatches"
            )
        train = train.shared(self.ranks)
        smallest = min(share.total for share in train.shares())
        if smallest < self.ranks.count:
            raise ValueError(
                f"a batch of {smallest} samples cannot be divided among {self.ranks.count} processes: raise "
                "trainer.batch_size, which counts the samples of all processes, set trainer.drop_last=true if it is "
                "the last batch that is small, or start fewer processes"
            )
        if not self.sync_bn and smallest < 2 * self.ranks.count and batch_norms(self.model):
            raise ValueError(
                f"trainer.sync_bn=false leaves a process one sample of a batch of {smallest}, which batch norm "
                "cannot use: set trainer.sync_bn=true, a larger trainer.batch_size or trainer.drop_last=true"
            )
        self._refuse_coupled_solves()
        self.ranks.copy_from_first_([*self.model.parameters(), *self.model.buffers()])
        return train

    def synchronised(self) -> AbstractContextManager[None]:
        """Scope of training, in which batch norms see the batch of all ranks (if they are to)."""
        return synchronised(self.model, self.ranks if self.sync_bn else Ranks())

    def sum_gradients(self, wants_to_stop: bool) -> None:
        """Replaces every gradient by its sum over the ranks; tells the others if this rank wants to stop.

        A gradient that no rank has stays None. On a GPU the vectors of power iterations become those of rank 0.
        """
        if self.ranks.is_alone:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self._parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for key, parameters in groups.items():
            self._asked = self._sum_group(key, parameters, wants_to_stop)
        estimates = [buffer for constraint in self._constraints for buffer in constraint.buffers()]
        if any(estimate.is_cuda for estimate in estimates):  # cuDNN need not give two ranks the same bits
            self.ranks.copy_from_first_(estimates)

    @torch.no_grad()
    def _sum_group(
        self, key: tuple[torch.dtype, torch.device], parameters: list[nn.Parameter], wants_to_stop: bool
    ) -> Tensor:
        """One message: the gradients, for each of them whether it is there, and the wish to stop; returns the last."""
        sizes = [parameter.numel() for parameter in parameters]
        missing = [i for i, parameter in enumerate(parameters) if parameter.grad is None]
        flat = self._buffers.get(key)
        if flat is None:
            flat = self._buffers[key] = torch.empty(sum(sizes) + len(sizes) + 1, dtype=key[0], device=key[1])
        *pieces, present, asked = flat.split([*sizes, len(sizes), 1])
        present.fill_(1)
        asked.fill_(float(wants_to_stop))
        for i, (parameter, piece) in enumerate(zip(parameters, pieces, strict=True)):
            if parameter.grad is None:
                piece.zero_()
                present[i].zero_()
            else:
                piece.view(parameter.shape).copy_(parameter.grad)
        self.ranks.sum_(flat)
        for i in missing:
            if bool(present[i] > 0):
                parameters[i].grad = torch.zeros_like(parameters[i])
        for parameter, piece in zip(parameters, pieces, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(piece.view(parameter.shape))
        return asked

    def stop_signal(self, own: int | None, step: int) -> int | None:
        """The signal after which all ranks stop behind this step, None to go on; `own` is what this rank received.

        The wish to stop came with the gradients, so that no further message is needed to agree.
        """
        if self.ranks.is_alone:
            return own
        if self._asked is None or (self._asked.is_cuda and step % STOP_EVERY) or not bool(self._asked > 0):
            return None
        return self.agreed_signal(own)

    def agreed_signal(self, own: int | None) -> int | None:
        """The same, by a message of its own; any rank that received a signal decides for all."""
        return self.ranks.largest(own or 0) or None

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Without `sync_bn`, running statistics become their mean over the ranks."""
        if self.ranks.is_alone or self.sync_bn:
            return
        for norm in batch_norms(self.model):
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:
                    statistic.copy_(self.ranks.sum_(statistic.clone()) / self.ranks.count)

    def require_identical(self) -> None:
        """Raises RankError if a weight or buffer (of batch norm, power iteration, ...) is not the same on all ranks."""
        if self.ranks.is_alone:
            return
        every = self.ranks.gather({key: _digest(value) for key, value in self.model.state_dict().items()})
        different = [key for key in every[0] if len({other[key] for other in every}) > 1]
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise RankError(
                f"{different[0]}{more} is not the same in all processes, so they no longer train one model and nothing "
                "was saved. Processes have to run on equal processors with equal versions; buffers of your own modules "
                "must not depend on the rank. The last good state is in last.pt"
            )

    def _refuse_coupled_solves(self) -> None:
        for block in feedback_blocks(self.model).values():
            coupled = isinstance(block.gradient, Implicit) and block.gradient.jacobian_bn == "batch"
            if coupled and self.sync_bn and batch_norms(nn.ModuleList([*block.layers, block.feedback])):
                raise ValueError(
                    "gradient.jacobian_bn=batch couples all samples of a batch in one linear system, which several "
                    "processes do not solve together: use gradient.jacobian_bn=running, or trainer.sync_bn=false, "
                    "where each process has a batch of its own"
                )


def with_shares(train: Batches, epoch: int, start: int) -> Generator[tuple[Batch, Share], None, None]:
    """The batches of an epoch without the first `start`, and which part of the whole batch each of them is."""
    batches = train.epoch(epoch, start=start)
    if isinstance(train, SharedBatches):
        yield from zip(batches, train.shares(start), strict=True)
    else:
        for batch in batches:
            x, y = labelled(batch)
            yield (x, y), Share.whole(len(y))


def _digest(value: Any) -> bytes:
    if isinstance(value, Mapping):  # of a module's get_extra_state, as anything but a tensor
        return b"".join(repr(key).encode() + _digest(own) for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return b"".join(map(_digest, value))
    if not isinstance(value, Tensor):
        return repr(value).encode()
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(content.tobytes(), digest_size=16).digest()
