"""The README's Python runs as it stands, its network learns, and the links of all documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_a_constraint_of_one_s_own_bounds_the_weight_and_has_its_gradient() -> None:
    """As docs/constraints.md has it."""
    (code,) = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/constraints.md").read_text(encoding="utf-8"), re.S)
    namespace: dict[str, Any] = {}
    exec(compile(code, "constraints.md", "exec"), namespace)
    feedback, block = namespace["feedback"], namespace["block"]
    original = feedback.parametrizations.weight.original
    with torch.no_grad():
        original.mul_(10)
    assert feedback.weight.abs().sum(1).max().item() == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 64, generator=generator)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    target, losses = torch.rand(16, 50, generator=generator), []
    for _ in range(30):
        loss = (block(x) - target).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        # moving along the weight itself changes nothing that the constraint lets through
        assert (original.grad * original).sum().abs() < 1e-4 * original.grad.norm() * original.norm()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_scripts_the_readme_names_exist() -> None:
    for path in re.findall(r"scripts/\w+\.py", (PROJECT / "README.md").read_text(encoding="utf-8")):
        assert (PROJECT / path).exists(), path


DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "results/**/*.md") for path in PROJECT.glob(pattern))


def anchors(document: Path) -> set[str]:
    """Of its headings, as they are made from a heading's text: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ +(.+?)\s*$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
