"""Minutes of training: run with pytest -m slow."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_main_job_reaches_97_percent_on_digits(tmp_path: Path) -> None:
    script = str(PROJECT / "scripts" / "train.py")
    sweep = [sys.executable, script, "-m", "seed=0,1,2,3,4", "device=cpu", f"hydra.sweep.dir={tmp_path}"]
    subprocess.run(sweep, check=True, capture_output=True)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/result.json"))]
    assert [result["seed"] for result in results] == [0, 1, 2, 3, 4]
    assert statistics.median(result["test_accuracy_last"] for result in results) >= 0.97
    assert sum(result["solver_failures"] for result in results) == 0
