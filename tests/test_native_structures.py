"""The structures that Python fills in are those that the C kernels read, field by field."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from ide_snn import (
    conv_rates,
    convolutions,
    dense,
    dropout,
    event_works,
    firing,
    input_stage,
    integers,
    native,
    products,
    readout,
    spectral,
)
from ide_snn.event_driven import LANES, STRETCH
from ide_snn.solvers import krylov

REASON = native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")

# by source file and name in it
STRUCTURES: dict[tuple[str, str], type[ctypes.Structure]] = {
    ("dense.c", "Dense"): dense._Dense,
    ("dense.c", "Pack"): dense._Pack,
    ("elementwise.c", "Gains"): dropout._Gains,
    ("elementwise.c", "Rate"): firing._Rate,
    ("elementwise.c", "Rounded"): convolutions._Rounded,
    ("elementwise.c", "Slopes"): firing._Slopes,
    ("elementwise.c", "Turned"): dense._Turned,
    ("events.c", "Connection"): event_works.Connection,
    ("events.c", "Factor"): event_works.FactorWork,
    ("events.c", "Pack"): event_works.Pack,
    ("events.c", "Population"): event_works.Population,
    ("events.c", "Product"): event_works.Product,
    ("events.c", "Scratch"): event_works.Scratch,
    ("events.c", "Simulation"): event_works.Simulation,
    ("features.c", "Backward"): input_stage._Backward,
    ("features.c", "Forward"): input_stage._Forward,
    ("integers.c", "Pack"): integers._Pack,
    ("integers.c", "Whole"): integers._Whole,
    ("krylov.c", "Factor"): krylov._Factor,
    ("krylov.c", "Solve"): krylov._Solve,
    ("krylov.c", "Work"): krylov._Work,
    ("conv_rates.c", "Cotangents"): conv_rates._Cotangents,
    ("conv_rates.c", "Moments"): conv_rates._Moments,
    ("conv_rates.c", "Numbers"): conv_rates._Numbers,
    ("conv_rates.c", "Rates"): conv_rates._Rates,
    ("conv_rates.c", "Response"): conv_rates._Response,
    ("product.c", "Product"): products._Product,
    ("readout.c", "Combine"): readout._Combine,
    ("readout.c", "Dots"): readout._Dots,
    ("sequence.c", "Counter"): native._Counter,
    ("sequence.c", "Sequence"): native._Sequence,
    ("sequence.c", "Stage"): native._Stage,
    ("spectral.c", "Phase"): spectral._Phase,
    ("spectral.c", "Work"): spectral._Work,
}
CONSTANTS = {
    ("events.c", "LANES"): LANES,
    ("events.c", "STRETCH"): STRETCH,
    ("conv_rates.c", "ROWS"): conv_rates.ROWS,
    ("vectors.h", "SPARE"): integers.SPARE,
}
SOURCES = sorted({source for source, _ in (*STRUCTURES, *CONSTANTS)})
OF_C_ALONE = {"Row", "Space", "Events"}  # what no work of Python's points to


def facts(source: str) -> list[tuple[str, int]]:
    """(expression of C, its value in Python)."""
    found = [(name, value) for (where, name), value in CONSTANTS.items() if where == source]
    for (where, name), kind in STRUCTURES.items():
        if where == source:
            found.append((f"sizeof({name})", ctypes.sizeof(kind)))
            for field, *_ in kind._fields_:
                found.append((f"offsetof({name}, {field})", getattr(kind, field).offset))
                found.append((f"sizeof((({name} *)0)->{field})", getattr(kind, field).size))
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_sizes_and_places_of_all_fields(source: str, tmp_path: Path) -> None:
    expected = facts(source)
    prints = "\n".join(f'printf("%ld\\n", (long)({expression}));' for expression, _ in expected)
    program = tmp_path / "facts.c"
    program.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{native.SOURCES / source}"\n'
        f"int main(void) {{ {prints} }}\n"
    )
    flags = [flag for flag in native.FLAGS if flag != "-shared"]
    subprocess.run([native._compiler(), *flags, "-w", "-O0", str(program), "-o", tmp_path / "facts", "-lm"], check=True)
    printed = subprocess.run([tmp_path / "facts"], capture_output=True, text=True, check=True).stdout.split()
    assert dict(expected) == dict(zip([name for name, _ in expected], map(int, printed), strict=True))


def test_no_structure_is_left_out() -> None:
    for path in native.SOURCES.glob("*.c"):
        names = set(re.findall(r"^} (\w+);", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert names - OF_C_ALONE == {name for source, name in STRUCTURES if source == path.name}, path.name


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_what_kernels_count_in_is_put_back(structure: type[ctypes.Structure]) -> None:
    """Fields that are added to atomically have the names that `Stages` knows."""
    source = next(source for (source, _), kind in STRUCTURES.items() if kind is structure)
    text = (native.SOURCES / source).read_text(encoding="utf-8")
    counted = set(re.findall(r"__atomic_\w+\(&\w+->(?:\w+\.)*(\w+)", text))
    fields = {name for name, *_ in structure._fields_}
    assert counted & fields <= set(native.COUNTERS) or structure is spectral._Phase  # part of a field that is put back
