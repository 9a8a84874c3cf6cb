"""Several processes train the model that one process trains: same gradients, same curve, same files."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_worker as worker
import numpy as np
import pytest
import torch
from conftest import PROJECT
from torch import Tensor

from ide_snn.checkpoint import load_checkpoint
from ide_snn.distributed import Ranks, Share
from ide_snn.dropout import DropoutStream, VariationalDropout, random_bits

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
TRAINED = [name for name in worker.CASES if name not in ("interrupted", "per_replica", "evaluations", "refusals")]


def start(folder: Path, count: int, names: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """Exit code and errors of each rank."""
    script = PROJECT / "tests" / "distributed_worker.py"
    commands = [[sys.executable, str(script), str(folder), str(rank), str(count), *names] for rank in range(count)]
    started = [subprocess.Popen(c, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=folder) for c in commands]
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """(folder, results of each rank) of all cases in 2 and in 3 processes, of which 11 samples are no whole shares."""
    folder = tmp_path_factory.mktemp("several")
    for code, errors in start(folder, request.param):
        assert code == 0, errors
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str], Any]]:
    """(folder, name of a case -> its result in this process)."""
    folder = tmp_path_factory.mktemp("alone")
    known: dict[str, Any] = {}

    def result(name: str) -> Any:
        if name not in known:
            torch.manual_seed(0)
            known[name] = worker.CASES[name](folder)
        return known[name]

    return folder, result


def assert_close(a: Any, b: Any, tolerance: float, where: str = "") -> None:
    """Equal up to `tolerance`, relative to the largest value of each tensor."""
    if isinstance(a, Tensor):
        assert a.shape == b.shape, where
        scale = max(float(a.abs().max()), 1e-3) if a.numel() else 1.0
        assert float((a - b).abs().max()) <= tolerance * scale, where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_close(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, tolerance, f"{where}[{index}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=1e-12), where
    else:
        assert a == b, where


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_weights_and_statistics_are_those_of_one_process(
    several: tuple[Path, list[Any]], alone: tuple[Path, Callable[[str], Any]], name: str
) -> None:
    expected = alone[1](name)
    assert any(gradient is not None and bool(gradient.any()) for gradient in expected["gradients"][-1])
    for own in several[1]:
        assert_close(own[name]["gradients"][0], expected["gradients"][0], 1e-10)
        assert_close(own[name], expected, 1e-8)


@pytest.mark.parametrize("name", TRAINED)
def test_all_ranks_have_the_same_bits(several: tuple[Path, list[Any]], name: str) -> None:
    first, *others = several[1]
    for other in others:
        assert_close(other[name], first[name], 0.0)


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "digits" / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_the_loss_curve_is_that_of_one_process(
    several: tuple[Path, list[Any]], alone: tuple[Path, Callable[[str], Any]]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alone[1]("digits")
    one, many = rows(alone[0]), rows(several[0])
    assert len(one) == len(many) == 2
    for a, b in zip(one, many, strict=True):
        for key in ("step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "firing_rate_population_1"):
            assert b[key] == pytest.approx(a[key], rel=1e-6), key
        assert b["feedback_norm"] == pytest.approx(a["feedback_norm"], rel=1e-6)
        assert b["solver_failures"] == 0
        assert 1 <= b["solver_steps_mean"] <= b["solver_steps_max"]
    assert one[0]["train_loss"] > one[-1]["train_loss"]
    curves = []
    for folder in (alone[0], several[0]):
        assert len(list((folder / "digits" / "tensorboard").iterdir())) == 1  # of rank 0 alone
        events = EventAccumulator(str(folder / "digits" / "tensorboard"))
        events.Reload()
        curves.append([event.value for event in events.Scalars("train/loss_recent")])
    assert len(curves[0]) == 14
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on_exactly(
    several: tuple[Path, list[Any]],
) -> None:
    folder, results = several
    for own in results:
        found = own["interrupted"]
        assert found["signals"] == (signal.SIGTERM, None)
        assert_close(found["stopped"], results[0]["interrupted"]["stopped"], 0.0)
        assert_close(found["continued"], found["whole"], 0.0)
    saved = load_checkpoint(folder / "stopped" / "checkpoints" / "last.pt")
    assert (saved.progress["epoch"], saved.progress["batches"], saved.progress["step"]) == (1, 1, 4)
    assert_close(saved.model, results[0]["interrupted"]["stopped"], 0.0)


def test_one_process_continues_the_run_of_several(several: tuple[Path, list[Any]]) -> None:
    folder, results = several
    torch.manual_seed(7)
    model = worker.network("conv")
    options = {"epochs": 3, "seed": 5, "run_dir": folder / "stopped", "resume": True, "progress": False}
    test = worker.loader(13, 5, seed=1)
    worker.fit(model, worker.loader(), test, optimizer=worker.Spy(model), **options)
    assert_close(dict(model.state_dict()), results[0]["interrupted"]["whole"], 1e-9)
    curves = [
        [row["train_loss"] for row in load_checkpoint(folder / name / "checkpoints" / "last.pt").progress["rows"]]
        for name in ("whole", "parts", "stopped")
    ]
    assert curves[1] == curves[0]
    assert curves[2] == pytest.approx(curves[0], rel=1e-9)


def test_checkpoints_are_those_of_the_plain_model(several: tuple[Path, list[Any]]) -> None:
    saved = load_checkpoint(several[0] / "whole" / "checkpoints" / "last.pt")
    assert list(saved.model) == list(worker.network("conv").state_dict())
    assert saved.training is not None
    assert len(saved.training["ranks"]) == len(several[1])
    assert saved.training["totals"]["samples"] == 0  # an epoch has ended


def test_without_synchronisation_statistics_are_averaged(several: tuple[Path, list[Any]]) -> None:
    parts = [own["per_replica"] for own in several[1]]
    assert sum(len(part["seen"]) for part in parts) == 10
    mean = torch.stack([part["seen"].mean(0) for part in parts]).mean(0)
    var = torch.stack([part["seen"].var(0) for part in parts]).mean(0)
    for part in parts:
        torch.testing.assert_close(part["state"]["2.running_mean"], 0.1 * mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(part["state"]["2.running_var"], 0.9 + 0.1 * var, rtol=1e-12, atol=0)


def test_evaluation_is_shared(several: tuple[Path, list[Any]], alone: tuple[Path, Callable[[str], Any]]) -> None:
    expected = alone[1]("evaluations")
    for own in several[1]:
        assert_close(own["evaluations"], expected, 1e-12)
    assert (expected["loader"]["samples"], expected["list"]["samples"]) == (13, 25)


def test_what_cannot_be_divided_is_refused(several: tuple[Path, list[Any]]) -> None:
    count = len(several[1])
    for own in several[1]:
        said = own["refusals"]
        assert f"a batch of 1 samples cannot be divided among {count} processes" in said["small batch"]
        assert "trainer.drop_last=true" in said["small batch"]
        assert "trainer.sync_bn=true" in said["single sample"]
        assert "jacobian_bn=running" in said["coupled"]
        assert said["coupled alone"] == said["coupled without batch norm"] == ""
        assert said["list"].startswith("TypeError: several processes cannot divide")
        assert said["drifted"].startswith("RankError: noise is not the same in all processes")
    assert not (several[0] / "drifted" / "checkpoints").exists()


def test_a_rank_that_dies_ends_the_others_with_a_clear_error(tmp_path: Path) -> None:
    (code, errors), (killed, _) = start(tmp_path, 2, ("lost",))
    assert (code, killed) == (0, -signal.SIGKILL), errors
    said = torch.load(tmp_path / "rank0.pt", weights_only=False)["lost"]
    assert said.startswith("RankLostError: another process of this job has ended")
    assert "resume=auto" in said
    assert not (tmp_path / "lost" / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize("total", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_cover_the_batch(total: int, count: int) -> None:
    shares = [Ranks(rank, count).share(total) for rank in range(count)]
    assert [i for share in shares for i in range(share.first, share.end)] == list(range(total))
    sizes = [share.size for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_loader_for_ranks_divides_every_batch() -> None:
    whole = worker.loader(28, 10)
    parts = [whole.shared(Ranks(rank, 3)) for rank in range(3)]
    for start_at in (0, 2):
        for (x, y), *own in zip(whole.epoch(4, start_at), *(part.epoch(4, start_at) for part in parts), strict=True):
            assert torch.equal(torch.cat([part[0] for part in own]), x)
            assert torch.equal(torch.cat([part[1] for part in own]), y)
    assert [share.total for share in parts[1].shares()] == [10, 10, 8]
    assert [share.size for share in parts[2].shares(1)] == [4, 3]
    assert whole.ranks == Ranks()


@pytest.mark.parametrize("p", [0.2, 0.5, 2.0**-16, 0.999999])
def test_masks_have_the_probability_they_say(p: float) -> None:
    """Each of the four pieces of a random number, too: one of 63 bits would never drop its fourth piece."""
    gain = VariationalDropout(p).draw(torch.empty(1000, 401), torch.Generator().manual_seed(1))
    assert gain is not None
    keep = VariationalDropout(p).keep
    assert keep == pytest.approx(1 - p, abs=2**-16)
    for piece in range(4):
        kept = (gain[:, piece::4] > 0).double()
        assert float(kept.mean()) == pytest.approx(keep, abs=5 * (keep * (1 - keep) / kept.numel()) ** 0.5)
    assert gain.unique().tolist() == pytest.approx([0, 1 / keep])
    for columns in ((gain[:, :8] > 0).double() - keep, (gain[:8].t() > 0).double() - keep):  # elements, samples
        correlation = columns.t() @ columns / len(columns) / (keep * (1 - keep))
        if p in (0.2, 0.5):
            assert float((correlation - torch.eye(8)).abs().max()) < 5 / len(columns) ** 0.5


def split_mix(state: int, n: int) -> int:
    """Number n = 1, 2, ... of the generator SplitMix64, in whole numbers of any length."""
    z = (state + n * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("key", [0, 5, -1, -(2**63), 2**63 - 1])
def test_random_bits_are_those_of_split_mix(key: int) -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [split_mix(1234567, n) for n in range(1, 5)] == published
    expected = [[split_mix(split_mix(key, b + 1), j + 1) for j in range(4)] for b in (3, 4, 5)]
    for given in (key, torch.tensor(key)):
        bits = random_bits(given, 3, (3, 4), torch.device("cpu"))
        assert (bits.numpy().view(np.uint64) == np.array(expected, dtype=np.uint64)).all()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(7, 3, 3, 5), (7, 4, 2, 2)])
def test_a_sample_gets_the_same_mask_whatever_its_batch(shape: tuple[int, ...], memory: torch.memory_format) -> None:
    dropouts = torch.nn.Sequential(VariationalDropout(0.3), VariationalDropout(0.3))
    like = torch.empty(shape, dtype=torch.float64).to(memory_format=memory)
    stream = DropoutStream(11)

    def draw(step: int, *shares: Share) -> list[Tensor]:
        """Of both modules, for each share."""
        stream.begin(step)
        gains = []
        for share in shares:
            stream.serve(share)
            gains += [module.draw(like[: share.size]) for module in dropouts]
        return gains

    with stream.serving(dropouts):
        first, second = draw(0, Share.whole(7))
        assert first.stride() == like.stride()
        assert not torch.equal(first, second)
        assert not torch.equal(first, draw(1, Share.whole(7))[0])
        for part in (Share(0, 3, 7), Share(3, 7, 7), Share(6, 7, 7)):
            own = draw(0, part)
            assert torch.equal(own[0], first[part.first : part.end])
            assert torch.equal(own[1], second[part.first : part.end])
        # a step in two batches of which this process has some samples
        accumulated = draw(0, Share(1, 3, 4), Share(0, 2, 3))
        assert torch.equal(accumulated[0], first[1:3])
        assert torch.equal(accumulated[2], first[4:6])
        # a module that is called twice in a forward
        stream.begin(0)
        stream.serve(Share.whole(7))
        assert torch.equal(dropouts[0].draw(like), first)
        twice = dropouts[0].draw(like)
        assert not torch.equal(twice, first)
        stream.begin(0)
        for part in (Share.whole(4), Share.whole(3)):
            stream.serve(part)
            begin = 0 if part.total == 4 else 4
            for expected in (first, twice):
                assert torch.equal(dropouts[0].draw(like[: part.total]), expected[begin : begin + part.total])
        stream.serve(Share(0, 3, 7))
        with pytest.raises(ValueError, match="3 of 7 samples"):
            dropouts[0].draw(like)
    again = []
    for _ in range(2):  # outside of a training run: torch's global generator
        torch.manual_seed(2)
        again.append(dropouts[0].draw(like))
    assert torch.equal(*again)
    assert not torch.equal(again[0], dropouts[0].draw(like))


@pytest.mark.parametrize("each", [3, 513])
def test_a_compiled_mask_of_a_share_is_that_part_of_the_whole(each: int) -> None:
    dropout, stream = VariationalDropout(0.3), DropoutStream(5)
    like = torch.empty(9, each)
    with stream.serving(torch.nn.Sequential(dropout)):
        stream.begin(1)
        stream.serve(Share.whole(9))
        whole = dropout.draw(like)
        for native in (False, True):
            stream.begin(1)
            stream.serve(Share(2, 6, 9))
            assert torch.equal(dropout.draw(like[:4], native=native), whole[2:6])


TINY = ["trainer.epochs=12", "dataset.train_limit=200", "dataset.test_limit=61", "time_steps=3", "model.hidden=16"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(run_dir: Path, *overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    script = str(PROJECT / "scripts" / "train.py")
    command = [*TORCHRUN, *options, script, *TINY, "device=cpu", f"hydra.run.dir={run_dir}"]
    environment = {**ENVIRONMENT, "TMPDIR": str(run_dir.parent)}
    return subprocess.Popen(
        [*command, *overrides], env=environment, cwd=run_dir.parent, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        errors = process.communicate(timeout=250)[1]
    finally:
        process.kill()
        process.communicate()
    return process.returncode, errors


def after_the_first_epoch(process: subprocess.Popen[str], run_dir: Path) -> list[int]:
    """The process ids of the ranks, once there is something to continue from."""
    limit = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "last.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
def test_torchrun_restarts_after_a_rank_was_killed_and_stops_on_sigterm(tmp_path: Path) -> None:
    whole = torchrun(tmp_path / "whole")
    assert ended(whole)[0] == 0
    assert not list(tmp_path.glob("ide_snn_*"))  # the other rank's temporary folder is gone
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"result.json", "metrics.csv", "train.log"}

    killed = torchrun(tmp_path / "killed", "resume=auto", options=("--max-restarts", "1"))
    os.kill(after_the_first_epoch(killed, tmp_path / "killed")[1], signal.SIGKILL)
    code, errors = ended(killed)
    assert code == 0, errors
    assert "resuming" in (tmp_path / "killed" / "train.log").read_text()

    stopped = torchrun(tmp_path / "stopped")
    after_the_first_epoch(stopped, tmp_path / "stopped")
    stopped.send_signal(signal.SIGTERM)
    assert ended(stopped)[0] != 0
    assert "stopped; to go on" in (tmp_path / "stopped" / "train.log").read_text()
    assert not (tmp_path / "stopped" / "result.json").exists()
    code, errors = ended(torchrun(tmp_path / "stopped", "resume=auto"))
    assert code == 0, errors

    expected = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last.pt")
    for name in ("killed", "stopped"):
        found = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
        assert_close(found.model, expected.model, 0.0)
        assert [row["train_loss"] for row in found.progress["rows"]] == [
            row["train_loss"] for row in expected.progress["rows"]
        ]
