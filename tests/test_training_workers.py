"""Workers of a torch `DataLoader` that `fit` trains on, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ide_snn.checkpoint import load_checkpoint
from ide_snn.data import TorchLoader

STOPPED_WITH_WORKERS = """
import os, signal, sys, threading
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ide_snn.training import fit

started = threading.Event()

class Slow(TensorDataset):
    def __getitem__(self, index):
        threading.Event().wait(0.01)
        return super().__getitem__(index)

torch.manual_seed(0)
data = Slow(torch.randn(400, 4), torch.arange(400) % 3)
net = nn.Linear(4, 3)

def stop_when_workers_work(module, inputs, output):
    if not started.is_set():
        started.set()
        threading.Timer(0.3, os.killpg, (0, signal.SIGTERM)).start()

net.register_forward_hook(stop_when_workers_work)
train = DataLoader(data, 8, shuffle=True, num_workers=2)
result = fit(net, train, [], optimizer=torch.optim.SGD(net.parameters(), 0.1), epochs=50, run_dir=sys.argv[1])
print("interrupted", result.interrupted)
"""


def test_a_signal_to_the_group_ends_no_worker_before_the_run_is_saved(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED_WITH_WORKERS, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.stdout.strip() == f"interrupted {signal.SIGTERM.value}", done.stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").progress["step"] > 0


class Groups(TensorDataset):
    """Which process group an item was read in."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return (torch.tensor(os.getpgrp()),)


def test_workers_have_groups_of_their_own() -> None:
    loader = DataLoader(Groups(torch.arange(8.0)), 2, num_workers=2)
    groups = {int(group) for (batch,) in TorchLoader(loader).epoch(0) for group in batch}
    assert len(groups) == 2
    assert os.getpgrp() not in groups
    assert {int(group) for (batch,) in loader for group in batch} == {os.getpgrp()}


def test_a_worker_that_is_stuck_does_not_keep_the_process() -> None:
    """It waits in C, where handlers of Python do not run."""
    code = """
import ctypes, torch
from torch.utils.data import DataLoader, TensorDataset
from ide_snn.data import TorchLoader
class Stuck(TensorDataset):
    def __getitem__(self, index):
        libc = ctypes.CDLL(None)
        mutex = ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
try:
    list(TorchLoader(DataLoader(Stuck(torch.zeros(4)), 2, num_workers=1, timeout=1)).epoch(0))
except RuntimeError as error:
    print("timed out" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.stdout.strip() == "True", done.stderr


SIGNALLED_IN_A_STEP = """
import multiprocessing, os, subprocess, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ide_snn.training import fit

kill = "import os, sys; [os.kill(int(pid), 15) for pid in sys.argv[1:]]"

class Signalled(nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 5:
            workers = [child.pid for child in multiprocessing.active_children()]
            order = [os.getpid(), *workers] if sys.argv[2] == "first" else [*workers, os.getpid()]
            subprocess.run([sys.executable, "-c", kill, *map(str, order)])
            while any(child.is_alive() for child in multiprocessing.active_children()):
                time.sleep(0.01)
        return super().forward(x)

net = Signalled(4, 3)
data = DataLoader(TensorDataset(torch.randn(64, 4), torch.arange(64) % 3), 4, num_workers=2)
result = fit(net, data, [], optimizer=torch.optim.SGD(net.parameters(), 0.1), epochs=2, run_dir=sys.argv[1])
print("interrupted", result.interrupted)
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_workers_that_end_in_the_midst_of_a_step(tmp_path: Path, order: str) -> None:
    """Where every process of a job gets the signal; torch would raise in the forward pass."""
    command = [sys.executable, "-c", SIGNALLED_IN_A_STEP, str(tmp_path / "run"), order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"interrupted {signal.SIGTERM.value}", done.stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").progress["step"] == 5


ENDING_BY_ITSELF = """
import os, signal, subprocess, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, get_worker_info
from ide_snn.training import fit
from ide_snn.training_run import LOST_WORKER

class Ending(TensorDataset):
    def __getitem__(self, index):
        if index == 20 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

net = nn.Linear(4, 3)
data = DataLoader(Ending(torch.randn(64, 4), torch.arange(64) % 3), 4, num_workers=1)
try:
    fit(net, data, [], optimizer=torch.optim.SGD(net.parameters(), 0.1), epochs=1, progress=False)
except LOST_WORKER as error:
    kept = error
    print("told")
subprocess.run([sys.executable, "-c", ""], check=True)  # the end of which torch would take for the worker's
print(signal.getsignal(signal.SIGCHLD).__module__)
"""


def test_a_worker_that_ends_by_itself_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING_BY_ITSELF], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["told", "torch.utils.data._utils.signal_handling"], done.stderr
