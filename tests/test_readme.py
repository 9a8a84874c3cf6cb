"""The README's Python runs as it stands, and its network learns."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import PROJECT


def test_readme_code_runs_and_the_network_of_twenty_lines_learns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 5
    network = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(network) <= 20
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["accuracy"] > 0.9
    assert namespace["result"].test_accuracy_last > 0.9
    assert (tmp_path / "runs/my_network/checkpoints/last.pt").exists()
    assert sum(p.numel() for p in namespace["model"].parameters()) == 229_643


def test_files_the_readme_names_exist() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\((results/[^)]*|docs/[^)]*)\)", text) + re.findall(r"scripts/\w+\.py", text):
        assert (PROJECT / path).exists(), path
