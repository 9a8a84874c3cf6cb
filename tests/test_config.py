"""Configurations as users write them: every experiment builds, every mistake is one clear error."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

import ide_snn
from ide_snn.config import (
    CONFIG_DIR,
    ConfigError,
    build_dataset,
    build_gradient,
    build_loaders,
    build_model,
    build_neuron,
    build_optimizer,
    build_schedule,
    build_solver,
    config_from_dict,
    config_to_dict,
    load_config,
    resolve_device,
    to_yaml,
)
from ide_snn.data import DATASETS, DataError
from ide_snn.implicit import GRADIENTS
from ide_snn.optim import OPTIMIZERS, SCHEDULES
from ide_snn.paper import ROWS
from ide_snn.schemas import Config, options
from ide_snn.solvers import SOLVERS

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
# those of the core; tests/test_experiments.py has the others
PAPER = [name for name in EXPERIMENTS if name.startswith(("mnist", "fashion_mnist")) and name.endswith("if")]
GROUPS = {
    folder.name: [path.stem for path in sorted(folder.glob("*.yaml"))]
    for folder in sorted(CONFIG_DIR.iterdir())
    if folder.is_dir() and folder.name not in ("experiment", "hydra")
}


@functools.cache
def composed(*overrides: str) -> Config:
    """Composing takes a few tenths of a second; the result must not be changed."""
    return load_config(overrides)


def test_the_experiments_are_those_of_the_paper_and_the_default() -> None:
    expected = {
        f"{data}_{network}_{neuron}"
        for data in ("mnist", "fashion_mnist")
        for network in ("f400", "f64c5")
        for neuron in ("if", "lif")
    }
    expected |= {"digits_fc_lif"} | {row.experiment for row in ROWS}
    assert expected <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_named_by_what_it_is(name: str) -> None:
    assert composed(f"experiment={name}").name == name


@pytest.mark.parametrize("name", [*PAPER, "digits_fc_lif"])
def test_an_experiment_builds_what_it_says(name: str) -> None:
    config = composed(f"experiment={name}")
    net = build_model(config)
    build_optimizer(config, net)
    build_schedule(config)
    assert net.block.time_steps == config.time_steps
    assert net.block.neuron == build_neuron(config)
    assert net.block.solver == build_solver(config)
    assert net.block.gradient == build_gradient(config)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipe(name: str) -> None:
    config = composed(f"experiment={name}")
    net = build_model(config)
    count = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    assert count == (478_811 if "f400" in name else 229_643)
    assert config.time_steps == (5 if "f400" in name else 30)
    neuron = build_neuron(config)
    assert (neuron.v_threshold, neuron.leak) == (2.0, 0.95 if name.endswith("lif") else 1.0)
    assert (config.dataset.mean, config.dataset.std) == ([0.1307], [0.3081])
    assert (config.trainer.epochs, config.trainer.batch_size) == (100, 128)
    assert config.model.dropout == 0.2
    optimizer = build_optimizer(config, net)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    assert {id(p) for p in group["params"]} == {id(p) for p in net.parameters()}
    schedule = build_schedule(config)
    rates = [schedule(0, epoch) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_default_is_the_digits_experiment() -> None:
    assert composed() == composed("experiment=digits_fc_lif")


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["model=alexnetf"], 3_709_515),
        (["model=alexnetf", "dataset.num_classes=100"], 5_184_165),
        (["model=cifarnetf"], 11_840_011),
        (["model=cifarnetf", "dataset.num_classes=100"], 14_789_221),
    ],
)
def test_the_multilayer_networks(overrides: list[str], count: int) -> None:
    net = build_model(load_config([*overrides, "dataset.input_shape=[3,32,32]"]))
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("turn", range(max(map(len, GROUPS.values()))))
def test_every_member_of_every_group_composes(turn: int) -> None:
    chosen = {group: members[turn % len(members)] for group, members in GROUPS.items()}
    config = composed(*(f"{group}={member}" for group, member in chosen.items()))
    for group, member in chosen.items():
        if group != "trainer":
            # a file of one's own images is a member too
            assert getattr(config, group).name == ("image_folder" if member == "cifar10_jpeg" else member)


def test_groups_and_registries_have_the_same_members() -> None:
    groups = {
        "solver": SOLVERS,
        "gradient": GRADIENTS,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "dataset": DATASETS,
    }
    for group, registry in groups.items():
        assert set(GROUPS[group]) - {"cifar10_jpeg"} == set(registry)


@pytest.mark.parametrize(
    ("group", "name", "cls"), [("solver", *s) for s in SOLVERS.items()] + [("gradient", *g) for g in GRADIENTS.items()]
)
def test_the_files_hold_the_defaults_of_the_classes(group: str, name: str, cls: type) -> None:
    assert options(getattr(load_config([f"{group}={name}"]), group)) == dataclasses.asdict(cls())


def test_knobs_as_users_write_them() -> None:
    config = load_config(
        ["neuron=if", "solver=broyden", "time_steps=30", "seed=3", "device=cpu", "trainer.epochs=2", "data_dir=/d"]
    )
    assert config.name == "digits_fc_if"
    assert (config.time_steps, config.seed, config.trainer.epochs, config.data_dir) == (30, 3, 2, "/d")
    net = build_model(config)
    assert isinstance(net.block.solver, ide_snn.Broyden)
    leaky = load_config(["neuron=lif", "neuron.leak=0.9", "solver.tol=1e-5"])
    assert build_neuron(leaky).leak == 0.9
    assert build_solver(leaky).tol == 1e-5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("solver=gmrs", ["gmrs", "anderson", "broyden", "fixed_point", "gmres"]),
        ("experiment=mnist", ["mnist_f400_if", "digits_fc_lif"]),
        ("trainer.epoch=3", ["trainer.epoch", "trainer.epochs", "trainer.batch_size"]),
        ("solver.tool=1e-3", ["solver.tool", "solver.tol", "solver.max_steps"]),
        ("solvr=gmres", ["solvr", "did you mean solver", "time_steps"]),
        ("+solver.tool=1e-3", ["solver.tool", "solver.tol", "solver.max_steps"]),
        ("constraint=frobenius", ["unknown option constraint (did you mean model.constraint?)"]),
        ("bptt.bn=frozen", ["unknown option bptt (did you mean method=..., method.<option>=...?)"]),
        ("encoder=delta", ["encoder/delta", "bernoulli", "ide_snn.encoding.Delta"]),
        ("dataset.input_shape=3", ["dataset.input_shape", "A list is written as dataset.input_shape=[1,2]"]),
        ("+colour=red", ["colour", "data_dir", "resume"]),
        ("solver.name=broyden", ["solver=..."]),
        ("time_steps=many", ["time_steps", "many", "Integer"]),
        ("model.hidden=1.5", ["model.hidden", "1.5", "Integer"]),
        ("trainer.epochs=-1", ["trainer.epochs", "-1"]),
        ("trainer.batch_size=0", ["trainer.batch_size", "0"]),
        ("trainer.accumulation=0", ["trainer.accumulation"]),
        ("trainer.gradient_clip=0", ["trainer.gradient_clip"]),
        ("trainer.threads=0", ["trainer.threads"]),
        ("seed=-1", ["seed", "-1"]),
        ("resume=yes", ["resume", "none, auto"]),
        ("seed", ["seed"]),
    ],
)
def test_a_mistake_is_one_error_with_the_valid_names(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("neuron.leak=1.5", ["neuron", "leak", "1.5"]),
        ("neuron.v_threshold=0", ["neuron", "v_threshold"]),
        ("model=f64c5 model.padding=-1", ["model", "padding must not be negative, got -1"]),
        ("time_steps=0", ["time_steps", "0"]),
        ("solver.tol=0", ["solver", "tol"]),
        ("model.constraint=spectral", ["constraint", "spectral_matrix", "frobenius"]),
        ("model.dropout=1", ["model", "dropout"]),
        ("gradient.jacobian_bn=runing", ["jacobian_bn", "running", "batch"]),
        ("dataset.input_shape=[2,-1]", ["dataset.input_shape"]),
        ("dataset.name=mine", ["dataset", "there is no 'mine'", "fashion_mnist"]),
        ("dataset.name=mnist", ["choose a member of the group with dataset=..."]),
    ],
)
def test_a_value_out_of_range_is_named_with_its_group(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(load_config(override.split()))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_other_builders_name_their_group_too() -> None:
    for override, message in {
        "optimizer.lr=nan": r"optimizer.lr must be finite, got nan",
        "optimizer.weight_decay=inf": r"optimizer.weight_decay must be finite",
        "optimizer=adam optimizer.betas=[0.9]": r"optimizer.betas are two numbers, got \[0.9\]",
        "optimizer=adamw optimizer.betas=[0.9,nan]": r"optimizer.betas must be finite",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build_optimizer(load_config(override.split()), torch.nn.Linear(1, 1))
    config = load_config(["optimizer.lr=-1", "schedule=step", "schedule.milestones=[0]"])
    with pytest.raises(ConfigError, match=r"optimizer: .*-1"):
        build_optimizer(config, torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"schedule: .*milestones"):
        build_schedule(config)
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        resolve_device("gpu")


def test_a_misspelt_assignment_is_an_error() -> None:
    config = load_config()
    with pytest.raises(AttributeError):
        config.trainer.epoch = 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        config.solver.tool = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["fc", "f64c5", "alexnetf"])
def test_plain_containers_and_back(model: str) -> None:
    config = load_config([f"model={model}", "trainer.gradient_clip=1", "solver=anderson", "schedule=none"])
    content = config_to_dict(config)
    assert config_from_dict(content) == config
    assert type(content["dataset"]["mean"]) is list
    assert "leak" in to_yaml(config)


@pytest.mark.parametrize("dataset", GROUPS["dataset"])
def test_every_kind_of_data_set_there_and_back(dataset: str) -> None:
    config = composed(f"dataset={dataset}")
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist"])
def test_what_was_saved_before_an_option_existed_can_be_read(dataset: str) -> None:
    config = composed(f"dataset={dataset}")
    content = config_to_dict(config)
    for later in ("crop_padding", "flip", "download"):
        content["dataset"].pop(later, None)
    assert config_from_dict(content) == config


def test_foreign_containers_are_refused() -> None:
    content = config_to_dict(load_config())
    with pytest.raises(ConfigError, match="section"):
        config_from_dict({**content, "solver": 3})
    with pytest.raises(ConfigError, match=r"solver.name.*gmres"):
        config_from_dict({**content, "solver": {"name": "lu"}})
    with pytest.raises(ConfigError, match=r"solver.tool"):
        config_from_dict({**content, "solver": {**content["solver"], "tool": 1}})
    with pytest.raises(ConfigError, match=r"required.*seed"):
        config_from_dict({key: value for key, value in content.items() if key != "seed"})


def test_the_initial_weights_depend_on_the_seed_only() -> None:
    first, torch_moved, other = (
        build_model(composed("seed=1")),
        (torch.rand(3), build_model(composed("seed=1")))[1],
        build_model(composed("seed=2")),
    )
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), torch_moved.parameters(), strict=True)]
    differs = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert any(differs)


def test_the_data_are_checked_against_the_configuration(tmp_path: Path) -> None:
    config = load_config(["dataset.validation_size=100", "dataset.train_limit=200", "trainer.batch_size=64"])
    dataset = build_dataset(config)
    loaders = build_loaders(config, dataset, torch.device("cpu"))
    assert (len(loaders.train), loaders.train.samples) == (4, 200)
    assert loaders.validation is not None
    assert loaders.validation.samples == 100
    with pytest.raises(ConfigError, match=r"dataset.num_classes is 11.* 10"):
        build_dataset(load_config(["dataset.num_classes=11"]))
    with pytest.raises(ConfigError, match=r"dataset.input_shape"):
        build_dataset(load_config(["dataset.input_shape=[1,28,28]"]))
    with pytest.raises(DataError, match="data_dir"):
        build_dataset(load_config(["dataset=mnist"]))
    with pytest.raises(DataError, match=str(tmp_path)):
        build_dataset(load_config(["dataset=mnist", f"data_dir={tmp_path}"]))


def test_the_help_text_lists_every_member() -> None:
    text = (CONFIG_DIR / "hydra" / "default.yaml").read_text(encoding="utf-8")
    listed = {line.split()[0]: line.replace(",", " ").split()[1:] for line in text.splitlines() if line.split()}
    for group, members in GROUPS.items():
        assert sorted(listed[group]) == members


def test_no_python_is_named_in_a_configuration_file() -> None:
    for path in (PROJECT / "configs").rglob("*.yaml"):
        assert "_target_" not in path.read_text(encoding="utf-8")
