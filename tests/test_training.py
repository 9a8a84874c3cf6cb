"""`fit` and `evaluate` on plain objects."""

from __future__ import annotations

import copy
import csv
import logging
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ide_snn import FixedPoint, SNNIDEFCNet
from ide_snn.checkpoint import load_checkpoint
from ide_snn.data import DeviceLoader, Normalization, Split
from ide_snn.optim import ConstantSchedule, CosineSchedule, StepSchedule
from ide_snn.training import NonFiniteLossError, evaluate, fit

CLASSES = 3


def blobs(count: int, seed: int = 0) -> Split:
    """Images [1, 4, 4] whose bright row says their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.randint(100, (count, 1, 4, 4), generator=generator)
    images[torch.arange(count), 0, labels] += 120
    return Split(images.to(torch.uint8), labels)


def loader(count: int, batch_size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> DeviceLoader:
    normalization = Normalization(255.0, (0.3,), (0.3,))
    return DeviceLoader(
        blobs(count, seed),
        batch_size=batch_size,
        normalization=normalization,
        shuffle=True,
        seed=seed,
        dtype=dtype,
    )


def snn(**options: Any) -> SNNIDEFCNet:
    settings = {"hidden": 12, "time_steps": 4, "generator": torch.Generator().manual_seed(1)} | options
    return SNNIDEFCNet((1, 4, 4), CLASSES, **settings)


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_spiking_network_learns_and_reports(tmp_path: Path) -> None:
    net = snn()
    result = fit(
        net,
        loader(120, 16),
        loader(60, 25, seed=1),
        optimizer=sgd(net),
        epochs=6,
        run_dir=tmp_path,
        log_every=3,
        progress=False,
    )
    assert result.test_accuracy_last is not None
    assert result.test_accuracy_last > 0.9
    assert (result.epochs, result.best_selected_on, result.interrupted) == (6, "test", None)
    assert result.parameters == sum(p.numel() for p in net.parameters())
    assert result.neurons == 16 + 12 + CLASSES
    assert result.solves == 6 * 8
    rows = read_rows(tmp_path)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows] == [8, 16, 24, 32, 40, 48]
    last = {key: float(value) for key, value in rows[-1].items()}
    assert last["test_accuracy"] == result.test_accuracy_last
    assert 0 < last["firing_rate_population_1"] < 1
    assert last["solver_steps_max"] >= 1
    assert last["solver_failures"] == 0
    assert last["feedback_norm"] > 0
    assert "feedback_alpha" in last
    best = max(range(6), key=lambda i: float(rows[i]["test_accuracy"]))
    assert (result.best_epoch, result.test_accuracy_best) == (best + 1, float(rows[best]["test_accuracy"]))
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt").progress["epoch"] == best + 1
    assert not net.block._solve_hooks
    assert not net.block._simulation_hooks


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    net = snn()
    fit(
        net,
        loader(40, 16),
        loader(30, 25),
        optimizer=sgd(net),
        epochs=2,
        run_dir=tmp_path,
        log_every=2,
        progress=False,
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = "train/loss train/accuracy test/loss test/accuracy run/learning_rate firing_rate/population_1 "
    expected += (
        "solver/steps_mean solver/products_mean solver/residual_max solver/failures feedback/norm feedback/alpha"
    )
    assert set(expected.split()) <= tags
    assert [event.step for event in events.Scalars("test/accuracy")] == [3, 6]
    assert [event.step for event in events.Scalars("train/loss_recent")] == [2, 4, 6]


def test_evaluate_is_the_mean_over_samples_and_changes_nothing() -> None:
    model, batches = plain(), loader(50, 16)  # the last batch is smaller
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    model.train()
    result = evaluate(model, batches)
    with torch.no_grad():
        logits = model(x)
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-6)
    assert result.accuracy == float((logits.argmax(1) == y).double().mean())
    assert (result.samples, result.firing_rate, model.training) == (50, {}, True)
    data = DataLoader(TensorDataset(x, y), batch_size=7)
    assert evaluate(model, data).accuracy == result.accuracy
    with pytest.raises(ValueError, match="no batch"):
        evaluate(model, [])


def test_firing_rates_are_weighted_by_the_batch_size() -> None:
    net = snn()
    whole = evaluate(net, loader(50, 50)).firing_rate["population_1"]
    parts = evaluate(net, loader(50, 16)).firing_rate["population_1"]
    assert parts == pytest.approx(whole, rel=1e-6)


def test_several_blocks_report_under_their_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = snn(), snn()

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)

    rates = evaluate(Two(), loader(20, 10)).firing_rate
    assert list(rates) == ["left_block_population_1", "right_block_population_1"]


def test_zero_epochs_evaluate_the_untrained_model(tmp_path: Path) -> None:
    net = snn()
    before = copy.deepcopy(net.state_dict())
    result = fit(net, loader(40, 16), loader(30, 25), optimizer=sgd(net), epochs=0, run_dir=tmp_path, progress=False)
    assert result.test_accuracy_last == result.test_accuracy_best == evaluate(net, loader(30, 25)).accuracy
    assert (result.epochs, result.best_epoch, result.solves) == (0, 0, 0)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert (tmp_path / "checkpoints" / "last.pt").exists()


def test_the_validation_split_chooses_the_best_epoch() -> None:
    net = snn()
    result = fit(
        net,
        loader(60, 16),
        loader(40, 20, seed=1),
        validation=loader(40, 20, seed=2),
        optimizer=sgd(net),
        epochs=3,
        progress=False,
    )
    assert result.best_selected_on == "validation"


class Recorder(nn.Module):
    """Passes the batches on and remembers how large they were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.sizes.append(len(x))
        return self.model(x)


def test_accumulated_batches_are_one_large_batch() -> None:
    def train(batch_size: int, accumulation: int) -> tuple[nn.Module, list[int]]:
        model = Recorder(plain(torch.float64))
        fit(
            model,
            loader(50, batch_size, dtype=torch.float64),
            loader(50, 50, dtype=torch.float64),
            optimizer=sgd(model),
            epochs=3,
            accumulation=accumulation,
            gradient_clip=0.5,
            progress=False,
        )
        return model, model.sizes

    whole, _ = train(18, 1)  # 18, 18, 14
    parts, sizes = train(6, 3)  # the last group has a smaller batch
    assert sizes[-9:] == [6] * 8 + [2]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_the_gradient_is_clipped_by_its_global_norm() -> None:
    norms: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.cat(gradients).norm()))
            super().step(closure)

    for clip in (None, 0.01):
        model = plain()
        fit(
            model,
            loader(48, 16),
            loader(10, 10),
            optimizer=Spy(model.parameters(), lr=0.1),
            epochs=1,
            gradient_clip=clip,
            progress=False,
        )
    assert min(norms[:3]) > 0.02
    assert norms[3:] == pytest.approx([0.01] * 3, rel=1e-3)


def test_label_smoothing_spreads_the_target_in_training_only(tmp_path: Path) -> None:
    model = plain(torch.float64)
    batches = loader(40, 40, dtype=torch.float64)
    (x, y), *_ = batches
    with torch.no_grad():
        log_p = model(x).log_softmax(1)
    hard = -log_p.gather(1, y[:, None]).mean().item()
    even = -log_p.mean().item()
    # one batch at learning rate 0: both losses are those of the initial weights
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    fit(model, batches, batches, optimizer=frozen, epochs=1, label_smoothing=0.3, run_dir=tmp_path, progress=False)
    with open(tmp_path / "metrics.csv") as file:
        row = next(csv.DictReader(file))
    assert float(row["train_loss"]) == pytest.approx(0.7 * hard + 0.3 * even, rel=1e-9)
    assert float(row["test_loss"]) == pytest.approx(hard, rel=1e-9)


def test_schedules_in_closed_form() -> None:
    step = StepSchedule(milestones=(2, 4), factor=0.1)
    assert [step(0, epoch) for epoch in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = CosineSchedule(epochs=10, final_factor=0.2)
    for epoch in range(12):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * min(epoch, 10) / 10)) / 2
        assert cosine(5, epoch) == pytest.approx(expected)
    warm = StepSchedule(warmup_steps=4, milestones=(1,), factor=0.5)
    assert [warm(i, 0) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm(1, 1) == 0.25
    assert [ConstantSchedule(2)(i, 9) for i in range(3)] == [0.5, 1, 1]
    with pytest.raises(ValueError, match="warmup_steps"):
        ConstantSchedule(-1)
    with pytest.raises(ValueError, match="factor"):
        StepSchedule(factor=0)
    with pytest.raises(ValueError, match="final_factor"):
        CosineSchedule(final_factor=2.0)


def test_the_optimiser_follows_the_schedule_in_all_groups() -> None:
    model = plain()
    groups = [{"params": model[1].parameters(), "lr": 0.2}, {"params": model[3].parameters(), "lr": 0.1}]
    seen: list[tuple[float, ...]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(tuple(group["lr"] for group in self.param_groups))
            super().step(closure)

    optimizer = Spy(groups)
    schedule = StepSchedule(warmup_steps=2, milestones=(1,), factor=0.1)
    fit(
        model,
        loader(48, 16),
        loader(10, 10),
        optimizer=optimizer,
        schedule=schedule,
        epochs=2,
        progress=False,
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    factors = [0.5, 1, 1, 0.1, 0.1, 0.1]
    assert seen == [(pytest.approx(0.2 * f), pytest.approx(0.1 * f)) for f in factors]


class Diverging(nn.Module):
    """After some steps, turns NaN: the gradient (`where="weight"`), the loss, or evaluation alone."""

    def __init__(self, after: int, where: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, CLASSES)
        self.after, self.where, self.steps = after, where, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(1))
        self.steps += self.training
        if self.where == "evaluation" and not self.training and self.steps >= self.after:
            return y * float("nan")
        if self.training and self.steps > self.after and self.where != "evaluation":
            if self.where == "loss":
                return y * float("nan")
            y.register_hook(lambda gradient: gradient * float("nan"))
        return y


@pytest.mark.parametrize(("after", "where"), [(8, "loss"), (8, "weight"), (9, "weight"), (9, "evaluation")])
@pytest.mark.parametrize("log_every", [1, 50])
def test_a_nonfinite_loss_stops_and_keeps_the_last_good_state(
    tmp_path: Path, after: int, where: str, log_every: int
) -> None:
    model = Diverging(after, where)
    with pytest.raises(NonFiniteLossError, match=r"nan|NaN") as caught:
        fit(
            model,
            loader(48, 16),
            loader(30, 25),
            optimizer=sgd(model),
            epochs=9,
            run_dir=tmp_path,
            log_every=log_every,
            progress=False,
        )
    assert "optimizer.lr" in str(caught.value)
    assert "trainer.gradient_clip" in str(caught.value)
    for name in ("last", "best"):
        saved = load_checkpoint(tmp_path / "checkpoints" / f"{name}.pt")
        assert all(bool(torch.isfinite(value).all()) for value in saved.model.values())
    last = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert last.progress["epoch"] == {"weight": after, "loss": after, "evaluation": after - 1}[where] // 3
    assert where != "loss" or "training loss" in str(caught.value)
    assert str(last.path) in str(caught.value)


def test_a_stop_request_does_not_save_broken_weights(tmp_path: Path) -> None:
    class Stopped(Diverging):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.steps == self.after:  # the step that breaks the weights
                signal.raise_signal(signal.SIGTERM)
            return super().forward(x)

    model = Stopped(4, "weight")
    with pytest.raises(NonFiniteLossError, match="NaN"):
        fit(
            model,
            loader(48, 16),
            loader(30, 25),
            optimizer=sgd(model),
            epochs=9,
            run_dir=tmp_path,
            progress=False,
        )
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt").progress["step"] == 3


def test_a_failing_solver_is_counted_and_said_once(tmp_path: Path) -> None:
    net = snn(solver=FixedPoint(tol=1e-9, max_steps=1))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        result = fit(
            net,
            loader(48, 16),
            loader(30, 25),
            optimizer=sgd(net),
            epochs=2,
            run_dir=tmp_path,
            progress=False,
        )
    assert result.solver_failures == result.solves == 6
    assert [entry.category.__name__ for entry in shown] == ["SolverWarning"]
    rows = read_rows(tmp_path)
    assert [row["solver_failures"] for row in rows] == ["3", "3"]


def test_the_log_says_how_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    model = plain()
    with caplog.at_level(logging.INFO, "ide_snn"):
        fit(model, loader(48, 16), loader(30, 25), optimizer=sgd(model), epochs=2, progress=False)
    assert [record.message.split(",")[0] for record in caplog.records] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"accumulation": 0},
        {"gradient_clip": 0.0},
        {"label_smoothing": 1.0},
        {"log_every": 0},
        {"resume": True},
    ],
)
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    model = plain()
    settings = {"epochs": 1, "progress": False} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("e")):
        fit(model, loader(48, 16), loader(30, 25), optimizer=sgd(model), **settings)
