"""How reports name lines, so that runs of one name are told apart."""

from __future__ import annotations

from pathlib import Path

from run_folders import rising, write_run

from ide_snn.report import collect, lines, write_report

FASHION = "experiment=fashion_mnist_f400_lif"


def test_runs_of_one_name_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    options = {
        "loose": ["solver.tol=0.1"],
        "tight": ["solver.tol=0.01"],
        "bptt": ["method=bptt", "solver.tol=0.01", "trainer.threads=1"],
        "other network": ["neuron=if"],
    }
    for folder, overrides in options.items():
        write_run(tmp_path / folder, "trainer.epochs=1", *overrides, accuracies=[0.9])
    assert [line.label for line in lines(collect(tmp_path).runs) if line.paper is None] == [
        "digits_fc_if",
        "digits_fc_lif (solver.tol=0.01, method=bptt)",
        "digits_fc_lif (solver.tol=0.01, method=ide)",
        "digits_fc_lif (solver.tol=0.1, method=ide)",
    ]


def test_runs_of_a_row_of_the_paper_are_told_apart_too(tmp_path: Path) -> None:
    for tol in ("1e-3", "0.1", "0.01"):
        write_run(tmp_path / tol, FASHION, f"solver.tol={tol}", accuracies=rising(0.9, 0.89))
    found = [line for line in lines(collect(tmp_path).runs) if line.runs]
    assert [line.label for line in found] == [
        "fashion_mnist_f400_lif",  # the recipe's
        "fashion_mnist_f400_lif (solver.tol=0.01)",
        "fashion_mnist_f400_lif (solver.tol=0.1)",
    ]
    assert found[0].as_in_paper
    assert found[1].differing == ("solver.tol=0.01",)


def test_data_sets_of_ones_own_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    for folder, seed, digest in (("a", 0, "11112222aa"), ("b", 1, "33334444bb"), ("c", 2, "11112222aa")):
        write_run(
            tmp_path / folder,
            "trainer.epochs=1",
            seed=seed,
            accuracies=[0.5],
            dataset_title="images",
            data_digest=digest,
        )
    found = {line.label: [run.seed for run in line.runs] for line in lines(collect(tmp_path).runs) if line.runs}
    assert found == {"digits_fc_lif (data=11112222)": [0, 2], "digits_fc_lif (data=33334444)": [1]}


def test_seeds_of_data_that_say_nothing_of_themselves_stay_together(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "trainer.epochs=1", seed=seed, accuracies=[0.5])
    (line,) = (line for line in lines(collect(tmp_path).runs) if line.runs)
    assert line.label == "digits_fc_lif"
    assert len(line.runs) == 2


def test_runs_of_versions_that_do_not_name_their_data_stay_with_the_others(tmp_path: Path) -> None:
    for seed, digest in ((0, None), (1, "11112222aa"), (2, "11112222aa")):
        own = {} if digest is None else {"data_digest": digest}
        write_run(tmp_path / str(seed), "trainer.epochs=1", seed=seed, accuracies=[0.5], **own)
    (line,) = (line for line in lines(collect(tmp_path).runs) if line.runs)
    assert (line.label, len(line.runs)) == ("digits_fc_lif", 3)
    write_run(tmp_path / "unfinished", "trainer.epochs=2", seed=0, accuracies=[0.5], finished=False)
    write_run(tmp_path / "longer", "trainer.epochs=2", seed=0, accuracies=[0.5, 0.6], data_digest="11112222aa")
    labels = sorted(line.label for line in lines(collect(tmp_path).runs) if line.runs)
    assert labels == ["digits_fc_lif (trainer.epochs=1)", *["digits_fc_lif (trainer.epochs=2)"] * 2]


def test_labels_of_many_options_give_files_that_can_be_written(tmp_path: Path) -> None:
    many = [
        "model.dropout=0.3",
        "model.constraint=frobenius",
        "model.gamma=0.4",
        "neuron.leak=0.91",
        "neuron.v_threshold=1.25",
        "solver.tol=0.123456",
        "solver.max_steps=12",
        "optimizer.lr=0.0123",
        "optimizer.momentum=0.5",
        "trainer.batch_size=17",
        "trainer.label_smoothing=0.125",
        "trainer.gradient_clip=1.5",
        "time_steps=7",
    ]
    for number in range(2):
        write_run(tmp_path / str(number), *many[number:], "name=n", accuracies=[0.5, 0.6])
    write_run(tmp_path / "other", "name=n", accuracies=[0.5, 0.6])
    write_report(tmp_path, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("curves_*.png"))
    assert len(names) == 3
    assert max(map(len, names)) < 130
