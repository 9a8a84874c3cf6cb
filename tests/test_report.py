"""The report: exact numbers of known runs, and every way in which a run can be other than the paper's."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st
from run_folders import rising, write_run

from ide_snn.paper import ROWS
from ide_snn.report import ReportError, collect, lines, write_report
from ide_snn.report.lines import Line, spread
from ide_snn.report.tables import COLUMNS, format_time, machines, statements
from ide_snn.reporting import record_versions

FASHION = "experiment=fashion_mnist_f400_if"
FULL = {"train_samples": 60_000, "test_samples": 10_000}


def line_of(root: Path, experiment: str = "fashion_mnist_f400_if") -> Line:
    """The only line of this row that has runs."""
    (found,) = (x for x in lines(collect(root).runs) if x.runs and x.paper and x.paper.experiment == experiment)
    return found


def cells(line: Line) -> dict[str, str]:
    return {column.title: column.text(line) for column in COLUMNS}


def notes(line: Line) -> dict[str, str]:
    return {note.kind: note.text for note in line.notes}


def points(root: Path) -> dict[str, tuple[str, ...]]:
    collection = collect(root)
    return {point.title: point.items for point in statements(lines(collection.runs), collection)}


def test_the_numbers_of_three_seeds(tmp_path: Path) -> None:
    for seed, (best, last) in enumerate([(0.9000, 0.8990), (0.9010, 0.9010), (0.9032, 0.8991)]):
        accuracies = rising(best, last)
        write_run(tmp_path / str(seed), FASHION, seed=seed, accuracies=accuracies, **FULL)
    line = line_of(tmp_path)
    assert line.as_in_paper
    assert line.notes == ()
    assert cells(line) == {
        "Data": "Fashion-MNIST",
        "Network": "F400",
        "Neuron": "IF",
        "T": "5",
        "Paper: mean ± std (best)": "90.04 ± 0.09 (90.14)",
        "Ours: best epoch": "90.14 ± 0.16",  # 90.00, 90.10, 90.32: n - 1 gives 0.1637, n 0.1337
        "Ours: last epoch": "89.97 ± 0.11",
        "Ours: best run": "90.32",
        "Ours − paper": "+0.10",
        "Seeds": "0–2",
        "Epochs": "100 of 100",
        "Neurons": "56",
        "Parameters": "1,234",
        "Firing rate": "0.200",
        "Time per run": "1.7 h",
        "Failed solves": "300 of 140,700",
    }


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", FASHION, accuracies=rising(0.9, 0.89))
    line = line_of(tmp_path)
    assert cells(line)["Ours: best epoch"] == "90.00"
    assert line.best is not None
    assert line.best.std is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_spread_is_the_sample_standard_deviation(values: list[float]) -> None:
    result = spread(values)
    assert result.mean == pytest.approx(statistics.mean(values))
    assert result.std == pytest.approx(statistics.stdev(values), abs=1e-12)


def test_rows_that_were_not_run_keep_their_place(tmp_path: Path) -> None:
    write_run(tmp_path / "run", FASHION, accuracies=rising(0.9, 0.89))
    table = lines(collect(tmp_path).runs)
    assert [line.paper for line in table] == list(ROWS)
    missing = cells(table[0])
    assert (missing["Data"], missing["Paper: mean ± std (best)"]) == ("MNIST", "99.49 ± 0.04 (99.55)")
    assert (missing["Ours: best epoch"], missing["Ours − paper"], missing["Epochs"]) == ("not run", "–", "–")
    assert (missing["Neurons"], missing["Parameters"]) == ("13,338", "229,643")
    told = points(tmp_path)
    assert told["Run as in the paper, to the end: 1 of its 19 rows"] == ("fashion_mnist_f400_if (seed 0)",)
    unrun = told["Not run: 18 of the paper's 19 rows"]
    assert len(unrun) == 18
    assert "fashion_mnist_f400_if" not in unrun
    assert "cifar100_cifarnetf_lif_t100" in unrun


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        (["trainer.epochs=3"], "shorter", "3 of the paper's 100 epochs"),
        (["dataset.train_limit=1000"], "less data", "1,000 training samples only"),
        (["dataset.test_limit=500"], "less data", "500 test samples only"),
        (["time_steps=7"], "changed", "T = 7 instead of 5"),
        (["trainer.batch_size=64"], "changed", "batches of 64 instead of 128"),
        (["solver.tol=1e-5"], "changed", "solver.tol: 0.001 -> 1e-05"),
        (["neuron.leak=0.9"], "changed", "neuron.leak: 1.0 -> 0.9"),
        (["model.hidden=100"], "changed", "model.hidden: 400 -> 100"),
        (["solver=anderson"], "changed", "solver.name: gmres -> anderson"),
        (["trainer.gradient_clip=1"], "changed", "trainer.gradient_clip: null -> 1.0"),
    ],
)
def test_other_settings_are_told(tmp_path: Path, overrides: list[str], kind: str, text: str) -> None:
    epochs = 3 if overrides == ["trainer.epochs=3"] else 100
    write_run(tmp_path / "run", FASHION, *overrides, accuracies=rising(0.9, 0.89, epochs))
    line = line_of(tmp_path)
    assert not line.as_in_paper
    assert text in [note.text for note in line.notes if note.kind == kind]
    assert "Run as in the paper, to the end: 0 of its 19 rows" in points(tmp_path)
    assert any(text in item for items in points(tmp_path).values() for item in items)


def test_a_shorter_run_counts_against_the_papers_epochs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", FASHION, "trainer.epochs=3", accuracies=[0.5, 0.6, 0.7])
    assert cells(line_of(tmp_path))["Epochs"] == "3 of 100"


@pytest.mark.parametrize(
    "neutral", [["trainer.threads=1"], ["device=cpu"], ["data_dir=/elsewhere"], ["name=other"], ["resume=auto"]]
)
def test_what_does_not_bear_on_the_result_is_not_a_change(tmp_path: Path, neutral: list[str]) -> None:
    write_run(tmp_path / "0", FASHION, accuracies=rising(0.90, 0.89))
    write_run(tmp_path / "1", FASHION, *neutral, seed=1, accuracies=rising(0.91, 0.89))
    line = line_of(tmp_path)
    assert line.as_in_paper
    assert [run.seed for run in line.runs] == [0, 1]
    assert cells(line)["Seeds"] == "0, 1"


def test_runs_with_other_settings_are_lines_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", FASHION, accuracies=rising(0.90, 0.89))
    write_run(tmp_path / "b", FASHION, "optimizer.lr=0.1", accuracies=rising(0.92, 0.89))
    table = [line for line in lines(collect(tmp_path).runs) if line.runs]
    assert [line.as_in_paper for line in table] == [True, False]
    assert [cells(line)["Ours: best epoch"] for line in table] == ["90.00", "92.00"]


def test_the_settings_decide_and_not_the_name(tmp_path: Path) -> None:
    write_run(tmp_path / "mnist_f64c5_if", FASHION, "name=mnist_f64c5_if", accuracies=rising(0.90, 0.89))
    assert line_of(tmp_path).label == "fashion_mnist_f400_if"


def test_the_row_of_the_same_time_steps_is_chosen(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "experiment=cifar10_alexnetf_if_t100", accuracies=rising(0.92, 0.91), steps=391)
    assert line_of(tmp_path, "cifar10_alexnetf_if_t100").as_in_paper


def test_unfinished_runs_are_apart_and_say_how_far_they_are(tmp_path: Path) -> None:
    write_run(tmp_path / "0", FASHION, accuracies=rising(0.90, 0.89))
    write_run(tmp_path / "1", FASHION, seed=1, accuracies=[0.7, 0.8], finished=False)
    write_run(tmp_path / "2", FASHION, seed=2, accuracies=[0.7], finished=False)
    finished, unfinished, other = (line for line in lines(collect(tmp_path).runs) if line.runs)
    assert finished.as_in_paper
    assert cells(finished)["Seeds"] == "0"
    assert not unfinished.as_in_paper
    assert re.match(r"seed 1: epoch 2 of 100, in progress or cut off; last written 20", notes(unfinished)["unfinished"])
    assert cells(unfinished)["Epochs"] == "2 of 100"
    assert cells(unfinished)["Ours − paper"] == "–"
    assert cells(unfinished)["Parameters"] == "478,811"  # the row's: there is no result.json yet
    assert cells(other)["Seeds"] == "2"  # never a mean over runs that stand at different epochs
    assert len(points(tmp_path)["In progress or cut off"]) == 2


def test_a_finished_run_that_is_continued_is_unfinished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", FASHION, accuracies=rising(0.90, 0.89))
    longer = write_run(tmp_path / "other", FASHION, accuracies=[*rising(0.90, 0.89), 0.91])
    (folder / "metrics.csv").write_text((longer / "metrics.csv").read_text())
    assert not collect(folder).runs[0].finished


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", FASHION, accuracies=[0.7], finished=False)
    (folder / "failure.json").write_text('{"error": "the training loss became nan"}')
    assert notes(line_of(tmp_path))["unfinished"] == "seed 0: epoch 1 of 100, failed: the training loss became nan"


def test_the_jpeg_copy_is_never_cifar10(tmp_path: Path) -> None:
    overrides = ["experiment=cifar10_alexnetf_lif", "dataset=cifar10_jpeg"]
    write_run(tmp_path / "0", *overrides, accuracies=rising(0.91, 0.90), steps=391)
    line = line_of(tmp_path, "cifar10_alexnetf_lif")
    assert not line.as_in_paper
    assert notes(line) == {"stand-in": "ran on CIFAR-10 (JPEG copy), a stand-in for CIFAR-10"}
    assert cells(line)["Data"] == "CIFAR-10 (JPEG copy)"
    assert cells(line)["Ours − paper"] == "–"
    assert points(tmp_path)["On other data than the paper's"] == (
        "cifar10_alexnetf_lif on CIFAR-10 (JPEG copy): ran on CIFAR-10 (JPEG copy), a stand-in for CIFAR-10",
    )


def test_images_of_a_user_belong_to_no_row(tmp_path: Path) -> None:
    overrides = ["experiment=cifar10_alexnetf_lif", "dataset=image_folder"]
    write_run(tmp_path / "0", *overrides, accuracies=rising(0.91, 0.90), dataset_title="cats and dogs")
    line = lines(collect(tmp_path).runs)[-1]
    assert line.paper is None
    assert (cells(line)["Data"], cells(line)["Ours − paper"]) == ("cats and dogs", "–")
    assert points(tmp_path)["Not in the paper's tables"] == (f"{line.label} (seed 0)",)


def test_a_part_of_nmnist_is_told_by_its_counts_and_by_its_steps(tmp_path: Path) -> None:
    experiment = "experiment=nmnist_f64c5_if"
    write_run(tmp_path / "0", experiment, accuracies=rising(0.9, 0.8), steps=8, train_samples=1_000, test_samples=100)
    write_run(tmp_path / "1", experiment, seed=1, accuracies=[0.9], steps=8, finished=False)
    counted, by_steps = (line for line in lines(collect(tmp_path).runs) if line.runs)
    assert counted.less_data == "1,000 of 60,000 training samples, 100 of 10,000 test samples"
    assert not counted.as_in_paper
    assert cells(counted)["Data"] == "N-MNIST (part)"
    assert cells(counted)["Ours − paper"] == "–"
    assert by_steps.less_data == "897 to 1,024 of 60,000 training samples, by the number of steps"
    assert len(points(tmp_path)["With fewer images or recordings"]) == 2


def test_an_option_that_came_later_is_no_difference(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", FASHION, accuracies=rising(0.9, 0.89))
    path = folder / "config.yaml"
    kept = [x for x in path.read_text().splitlines() if not re.search("drop_last|threads|label_smoothing|flip", x)]
    path.write_text("\n".join(kept))
    assert line_of(tmp_path).as_in_paper


def test_a_seed_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", FASHION, accuracies=rising(0.90, 0.89))
    write_run(tmp_path / "b", FASHION, accuracies=rising(0.92, 0.89))
    line = line_of(tmp_path)
    assert cells(line)["Ours: best epoch"] == "90.00"
    assert str(tmp_path / "b") in notes(line)["repeated"]


def test_runs_of_ones_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "trainer.epochs=2", seed=seed, accuracies=[0.8, 0.9 + 0.01 * seed])
    line = lines(collect(tmp_path).runs)[-1]
    assert line.label == "digits_fc_lif"
    assert cells(line)["Neuron"] == "LIF, leak 0.95"
    assert cells(line)["Ours: best epoch"] == "90.50 ± 0.71"
    assert cells(line)["Epochs"] == "2 of 2"


def test_another_method_is_one_change_of_the_recipe(tmp_path: Path) -> None:
    write_run(tmp_path / "run", FASHION, "method=bptt", accuracies=rising(0.9, 0.89, 100))
    assert [note.text for note in line_of(tmp_path).notes] == ["method.name: ide -> bptt"]


def damage(folder: Path, what: str) -> None:
    metrics = folder / "metrics.csv"
    text = metrics.read_text()
    if what == "truncated csv":
        metrics.write_text(text[:-30])
    elif what == "no epochs":
        metrics.write_text(text.splitlines()[0])
    elif what == "no config":
        (folder / "config.yaml").unlink()
    elif what == "other config":
        (folder / "config.yaml").write_text("a: 1")
    elif what == "broken config":
        (folder / "config.yaml").write_text("a: [1")
    elif what == "broken result":
        (folder / "result.json").write_text('{"epochs": 1')
    elif what == "other result":
        content = (folder / "result.json").read_text()
        (folder / "result.json").write_text(content.replace("0.9}", "0.8}").replace('best": 0.9', 'best": 0.8'))
    elif what == "bytes":
        metrics.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("truncated csv", "line 101 of metrics.csv is damaged or truncated"),
        ("no epochs", "metrics.csv holds no epoch"),
        ("no config", "there is no config.yaml"),
        ("other config", "config.yaml is not that of a training run"),
        ("broken config", "config.yaml is damaged"),
        ("broken result", "result.json is damaged or truncated"),
        ("other result", "result.json says test_accuracy_best = 0.8, metrics.csv 0.9"),
        ("bytes", "metrics.csv"),
    ],
)
def test_a_broken_folder_is_a_line_of_the_report(tmp_path: Path, what: str, reason: str) -> None:
    write_run(tmp_path / "good", FASHION, accuracies=rising(0.9, 0.89))
    damage(write_run(tmp_path / "bad", FASHION, seed=1, accuracies=rising(0.9, 0.89)), what)
    collection = collect(tmp_path)
    assert [run.folder.name for run in collection.runs] == ["good"]
    (bad,) = collection.unreadable
    assert (bad.folder.name, reason in bad.reason) == ("bad", True), bad.reason
    write_report(tmp_path, tmp_path / "report", figures=False)
    assert reason in (tmp_path / "report" / "report.md").read_text()


def test_a_folder_that_failed_before_its_first_epoch(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failure.json").write_text('{"error": "MNIST was not found"}')
    assert points(tmp_path)["Folders without usable numbers"] == (f"{tmp_path / 'run'}: failed: MNIST was not found",)


def test_hydras_own_files_are_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FASHION, accuracies=rising(0.9, 0.89))
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("a: 1")
    collection = collect(tmp_path)
    assert (len(collection.runs), collection.unreadable) == (1, ())


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no run"):
        write_report(tmp_path, tmp_path / "report")
    with pytest.raises(ReportError, match="no such folder"):
        write_report(tmp_path / "none", tmp_path / "report")


def test_machines_are_counted(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), FASHION, seed=seed, accuracies=rising(0.9, 0.89))
    (tmp_path / "1" / "versions.json").unlink()
    first, second = machines(collect(tmp_path).runs)
    assert dict(first.values)["git_commit"] == "0123456789ab with changes"
    assert (first.runs, second.runs, second.values) == (1, 1, ())


def test_a_run_resumed_elsewhere_names_both_machines(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", FASHION, accuracies=rising(0.9, 0.89))
    before = json.loads((folder / "versions.json").read_text())
    for _ in range(2):
        record_versions(folder / "versions.json", {**before, "device": "another"}, resumed=True)
    found = machines(collect(tmp_path).runs)
    assert [(dict(machine.values)["device"], machine.runs) for machine in found] == [
        ("another", 1),
        (before["device"], 1),
    ]


def test_times_read_well() -> None:
    assert [format_time(s) for s in (9.94, 100, 1646, 7300)] == ["9.9 s", "2 min", "27 min", "2.0 h"]


def test_the_pages_and_figures(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write_run(runs / f"a{seed}", FASHION, seed=seed, accuracies=rising(0.9 + 0.001 * seed, 0.89))
    write_run(runs / "b", FASHION, "name='<b>x|y</b>'", "trainer.epochs=2", accuracies=[0.2, 0.3])
    write_run(runs / "c", FASHION, seed=3, accuracies=[0.2], finished=False)
    page = write_report(runs, tmp_path / "out")
    html, text = page.read_text(encoding="utf-8"), (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == [
        "curves_b_x_y_b.png",
        "curves_fashion_mnist_f400_if.png",
        "curves_fashion_mnist_f400_if_2.png",
        "overview.png",
    ]
    for name in figures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*['\"]?([^'\")\s>]{0,30})", html)
    assert len(sources) == len(figures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in html
    assert "http" not in html
    assert "<b>x" not in html
    assert "&lt;b&gt;x|y&lt;/b&gt;" in html
    for part in ("90.05 ± 0.07", "90.04 ± 0.09 (90.14)", "2 of the paper&#x27;s 100 epochs", "not run"):
        assert part in html
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(lines(collect(runs).runs))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(COLUMNS) + 2}


def test_a_missing_matplotlib_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", FASHION, accuracies=rising(0.9, 0.89))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"\[viz\].*figures=false"):
        write_report(tmp_path, tmp_path / "out")
    write_report(tmp_path, tmp_path / "out", figures=False)


def test_the_script(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "run", FASHION, accuracies=rising(0.9, 0.89))
    command = [sys.executable, str(PROJECT / "scripts" / "report.py"), "figures=false"]
    done = subprocess.run([*command, "runs=runs"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, "runs/report/report.html"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_the_results_of_the_project_can_be_read() -> None:
    table = lines(collect(PROJECT / "results").runs)
    assert any(line.label == "fashion_mnist_f400_if" and line.as_in_paper for line in table)


@pytest.mark.parametrize(
    ("override", "is_as_in_paper"),
    [("precision=float32", True), ("compile=true", True), ("precision=fast", False), ("solver=anderson", False)],
)
def test_how_the_same_numbers_are_computed_is_no_change_of_the_recipe(
    tmp_path: Path, override: str, is_as_in_paper: bool
) -> None:
    write_run(tmp_path / "run", FASHION, override, accuracies=rising(0.9, 0.89))
    (line,) = (line for line in lines(collect(tmp_path).runs) if line.runs)
    assert line.as_in_paper is is_as_in_paper
