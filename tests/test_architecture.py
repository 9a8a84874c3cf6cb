"""The layering of the package, its size rules, and what it may not depend on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

PACKAGE = PROJECT / "ide_snn"
# From the bottom up; a module may import those before it.
LAYERS = [
    "distributed",
    "memory",
    "once",
    "native",
    "say_once",
    "precision",
    "neurons",
    "kernels",
    "graphs",
    "surrogate",
    "encoding",
    "dsr",
    "operators",
    "reach",
    "spiking",
    "dropout",
    "spectral",
    "singular",
    "optimizations",
    "torch_modules",
    "solvers",
    "normalization",
    "affinity",
    "layers",
    "links",
    "products",
    "integers",
    "input_stage",
    "dense",
    "event_works",
    "event_driven",
    "convolutions",
    "firing",
    "conv_rates",
    "record",
    "simulation",
    "graphed_simulation",
    "equilibrium",
    "graphed_solve",
    "chain",
    "bptt",
    "implicit",
    "settings",
    "paths",
    "readout",
    "prepared_step",
    "compiled",
    "block",
    "models",
    "dsr_network",
    "files",
    "events",
    "data",
    "checkpoint",
    "data_record",
    "interrupt",
    "monitor",
    "evaluation",
    "reporting",
    "optim",
    "progress",
    "replicas",
    "resuming",
    "training_run",
    "training",
    "schemas",
    "paper",
    "config_errors",
    "build",
    "config",
    "hydra_tools",
    "original",
    "run",
    "analysis",
    "report",
    "reproduce",
]
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {"torch", "numpy", "scipy", "hydra", "omegaconf", "tensorboard", "tqdm", "sklearn", "ide_snn"}
OPTIONAL = {"matplotlib", "PIL", "pooch", "triton"}  # extras: imported inside functions only
ON_DEMAND = {"triton_kernels.py"}  # needs its extra at the top level, and is itself imported inside functions only


def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    own = layer(path)
    if own == "__init__":
        return
    assert own in LAYERS, f"say in LAYERS where {own} belongs"
    for name in imports(path):
        if name.startswith("ide_snn."):
            other = name.split(".")[1]
            assert LAYERS.index(other) <= LAYERS.index(own), f"{own} imports {other}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependencies(path: Path) -> None:
    for name in imports(path):
        root = name.split(".")[0]
        assert root in ALLOWED | OPTIONAL | set(sys.stdlib_module_names), f"{path.name} imports {root}"
    for name in imports(path, top_level_only=True):
        optional = name.split(".")[0] in OPTIONAL
        assert path.name in ON_DEMAND or not optional, f"{path.name} imports {name} at the top level; it is an extra"


def test_only_config_knows_hydra() -> None:
    for path in FILES:
        if layer(path) not in ("config", "config_errors", "schemas", "hydra_tools"):
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & {"hydra", "omegaconf"}, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 420
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno if documented else 0
            length = (node.end_lineno or 0) - node.lineno - docstring
            assert length <= 60, f"{path.name}:{node.name} has {length} lines of code"
