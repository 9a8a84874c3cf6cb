"""What `fit` and `evaluate` say to what they cannot use, and to a run that is another one."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ide_snn import Anderson, Bptt, Gmres, Implicit, NeuronParams, SNNIDEFCNet, Unrolled
from ide_snn.analysis import FiringRates, analyze_model, logits_over_time, measure
from ide_snn.checkpoint import CheckpointError, save_checkpoint
from ide_snn.files import write_atomically
from ide_snn.surrogate import ATan
from ide_snn.training import evaluate, fit

LABELS = torch.arange(24) % 3


def network(**options: Any) -> SNNIDEFCNet:
    settings = {
        "time_steps": 3,
        "neuron": NeuronParams(2.0, 0.95),
        "solver": Gmres(),
        "gradient": Implicit(),
        **options,
    }
    return SNNIDEFCNet((4,), 3, hidden=8, generator=torch.Generator().manual_seed(0), **settings)


def batches(labels: Any = LABELS, samples: int = 24) -> DataLoader:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x[:samples], labels[:samples]), batch_size=8)


def train(net: nn.Module, loader: Any = None, **options: Any) -> None:
    loader = batches() if loader is None else loader
    settings = {"optimizer": torch.optim.SGD(net.parameters(), 0.1), "epochs": 1, "progress": False, **options}
    fit(net, loader, [], **settings) if options.get("epochs") == 0 else fit(net, loader, batches(), **settings)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, r"labels must lie in \[0, 3\).* got 1 to 3"),
        (LABELS.where(LABELS > 0, -100), r"labels must lie in \[0, 3\).* got -100 to 2"),
        (LABELS.int(), r"class indices \[B\], int64, got \[8\], int32: use y.long"),
        (LABELS.float(), r"got \[8\], float32"),
        (LABELS[:, None], r"got \[8, 1\], int64: .*y.squeeze"),
        (nn.functional.one_hot(LABELS), r"got \[8, 3\], int64: .*y.argmax"),
    ],
)
def test_labels(labels: Tensor, message: str) -> None:
    net = network()
    before = net.classifier.weight.clone()
    with pytest.raises(ValueError, match=message):
        train(net, batches(labels))
    with pytest.raises(ValueError, match=message):
        evaluate(net, batches(labels))
    with pytest.raises(ValueError, match=message):
        analyze_model(net, batches(labels))
    assert torch.equal(net.classifier.weight, before)
    assert evaluate(net, batches(LABELS.to(torch.uint8))).samples == 24


def test_labels_matter_to_an_analysis_that_needs_them() -> None:
    """Rates and cost need none, so any tensor may stand beside the inputs; accuracy does."""
    net = network()
    targets = [(x, y.float()) for x, y in batches()]
    rates = FiringRates()
    measure(net, targets, rates)
    assert rates.result()
    with pytest.raises(ValueError, match=r"class indices \[B\], int64, got \[8\], float32: use y.long\(\)"):
        logits_over_time(net, targets)


@pytest.mark.parametrize("extra", [[torch.arange(24)], [torch.arange(24), torch.rand(24, 2)], None])
def test_batches_of_more_or_less_than_a_pair(extra: list[Tensor] | None) -> None:
    """Data sets with an index, a mask or nothing besides the inputs."""
    net, x = network(), torch.randn(24, 4)
    data = TensorDataset(x) if extra is None else TensorDataset(x, LABELS, *extra)
    found = ", ".join(["Tensor"] * (1 if extra is None else 2 + len(extra)))
    loader = DataLoader(data, batch_size=8)
    for call in (lambda: train(net, loader), lambda: evaluate(net, loader), lambda: analyze_model(net, loader)):
        with pytest.raises(ValueError, match=rf"pairs \(x, y\) of tensors, got \({found}\)"):
            call()


def test_batches_of_something_else() -> None:
    class Words:
        def __len__(self) -> int:
            return 1

        def epoch(self, epoch: int, start: int = 0) -> Any:  # noqa: ARG002
            yield from [("inputs", "labels")][start:]

    with pytest.raises(ValueError, match=r"pairs \(x, y\) of tensors, got \(str, str\)"):
        train(network(), Words())
    with pytest.raises(ValueError, match=r"pairs \(x, y\) of tensors, got \(str, str\)"):
        evaluate(network(), [("inputs", "labels")])
    with pytest.raises(ValueError, match=r"got \(float, float, float, float, \.\.\.\)"):
        evaluate(network(), [[0.5] * 1000])  # type: ignore[list-item]


def test_a_batch_without_samples() -> None:
    class Emptied:
        def __len__(self) -> int:
            return 2

        def epoch(self, epoch: int, start: int = 0) -> Any:  # noqa: ARG002
            yield from [(torch.randn(3, 4), LABELS[:3]), (torch.randn(0, 4), LABELS[:0])][start:]

    with pytest.raises(ValueError, match="training batch has no samples"):
        train(network(), Emptied())


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda logits: (logits, None), "a tuple"),
        (lambda logits: logits[:, 0], r"\[8\]"),
        (lambda logits: logits[:4], r"for 8 labels, got \[4, 3\]"),
        (lambda logits: logits[..., None, None], r"\[8, 3, 1, 1\]"),
    ],
)
def test_models_that_give_no_logits(output: Any, found: str) -> None:
    net = network()
    net.register_forward_hook(lambda *parts: output(parts[-1]))
    with pytest.raises(ValueError, match=rf"the model must give logits \[B, classes\].*{found}"):
        train(net)
    with pytest.raises(ValueError, match=rf"the model must give logits \[B, classes\].*{found}"):
        evaluate(net, batches())


def test_optimizers_and_schedules_that_cannot_work() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"no parameter of the model, so nothing would be trained"):
        train(net, optimizer=torch.optim.SGD(network().parameters(), 0.1))
    train(net, optimizer=torch.optim.SGD(net.classifier.parameters(), 0.1))  # a part of it may be what is wanted
    with pytest.raises(ValueError, match=r"LBFGS needs the loss several times"):
        train(net, optimizer=torch.optim.LBFGS(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"schedule must be .* got a StepLR.*StepSchedule"):
        train(net, optimizer=optimizer, schedule=torch.optim.lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"neuron": NeuronParams(2.0, 0.5)}, "neuron.leak: 0.95 -> 0.5"),
        ({"neuron": NeuronParams(1.0, 0.95)}, "neuron.v_threshold: 2.0 -> 1.0"),
        ({"time_steps": 4}, "time_steps: 3 -> 4"),
        ({"solver": Gmres(tol=0.5)}, "solver.tol: 0.001 -> 0.5"),
        ({"solver": Anderson()}, "solver.kind: Gmres -> Anderson"),
        ({"gradient": Unrolled(2)}, "gradient.kind: Implicit -> Unrolled"),
        ({"gradient": Bptt(surrogate=ATan())}, "gradient.kind: Implicit -> Bptt"),
    ],
)
def test_another_network_of_the_same_shapes_is_refused(tmp_path: Path, options: dict[str, Any], change: str) -> None:
    train(network(), run_dir=tmp_path)
    net = network(**options)
    before = net.classifier.weight.clone()
    with pytest.raises(CheckpointError, match=f"a run with other settings.*{re.escape(change)}"):
        train(net, run_dir=tmp_path, resume=True, epochs=2)
    assert torch.equal(net.classifier.weight, before)
    train(network(), run_dir=tmp_path, resume=True, epochs=2)


def test_solvers_of_your_own_are_told_apart_by_their_class(tmp_path: Path) -> None:
    class Mine:
        """By delegation, and no dataclass."""

        def __init__(self) -> None:
            self.inner = Gmres()
            self.tol, self.max_steps = self.inner.tol, self.inner.max_steps

        def begin(self, *given: Any) -> Any:
            return self.inner.begin(*given)

    train(network(solver=Mine()), run_dir=tmp_path)
    train(network(solver=Mine()), run_dir=tmp_path, resume=True, epochs=2)
    with pytest.raises(CheckpointError, match=r"solver.kind: Mine -> Gmres"):
        train(network(), run_dir=tmp_path, resume=True, epochs=3)


def test_epochs_of_other_lengths_are_refused(tmp_path: Path) -> None:
    train(network(), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"batches: 3 -> 2"):
        train(network(), batches(samples=16), run_dir=tmp_path, resume=True, epochs=2)


def test_states_without_settings_are_resumed(tmp_path: Path) -> None:
    train(network(), run_dir=tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    del content["training"]["settings"]
    torch.save(content, path)
    train(network(time_steps=4), run_dir=tmp_path, resume=True, epochs=2)


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save turns it into a RuntimeError of its zip writer."""

    def full(content: Any, file: Any) -> None:  # noqa: ARG001
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 60224 vs 60120")  # noqa: B904 - as torch does

    monkeypatch.setattr(torch, "save", full)
    path = tmp_path / "last.pt"
    with pytest.raises(OSError, match=rf"No space left on device: '{re.escape(str(path))}'"):
        save_checkpoint(path, nn.Linear(1, 1), config={}, data={}, progress={})
    assert list(tmp_path.iterdir()) == []

    def other(file: Any) -> None:  # noqa: ARG001
        raise RuntimeError("of something else")

    with pytest.raises(RuntimeError, match="of something else"):
        write_atomically(path, other)
