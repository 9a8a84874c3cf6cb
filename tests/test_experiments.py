"""The paper's rows and their recipes: every experiment composes, follows the paper and has its network's size."""

from __future__ import annotations

import functools

import pytest

from ide_snn.config import build_model, build_schedule, config_to_dict, load_config
from ide_snn.paper import ROWS, PaperRow, row_of
from ide_snn.schemas import Config

NAMES = [row.experiment for row in ROWS]
# neurons in thousands, input included, as the paper prints them (CIFARNet-F with 100 classes apart)
PAPER_NEURONS = {
    ("fashion_mnist", "f400"): 1.2,
    ("mnist", "f64c5"): 13,
    ("nmnist", "f64c5"): 21,
    ("cifar10", "alexnetf"): 159,
    ("cifar10", "cifarnetf"): 232,
    ("cifar100", "alexnetf"): 159,
    ("cifar100", "cifarnetf"): 233,  # 232,548; the paper prints one number, 232, which is that of 10 classes
}
ARCHITECTURES = sorted({(row.data, row.model) for row in ROWS})


@functools.cache
def recipe(name: str) -> Config:
    return load_config([f"experiment={name}"])


def first_of(data: str, model: str) -> PaperRow:
    return next(row for row in ROWS if (row.data, row.model) == (data, model))


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_the_rows(name: str) -> None:
    row, config = row_of(name), recipe(name)
    assert config.name == name
    assert (config.dataset.name, config.model.name, config.neuron.name) == (row.data, row.model, row.neuron)
    assert config.time_steps == row.time_steps
    cifar = row.data.startswith("cifar")
    leak = 1.0 if row.neuron == "if" else 0.99 if cifar else 0.95
    assert (config.neuron.v_threshold, config.neuron.leak) == (2.0, leak)
    assert (config.trainer.epochs, config.trainer.batch_size, config.model.dropout) == (100, 128, 0.2)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.05, 0.9, 5e-4)
    assert config.dataset.train_limit is None


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate(name: str) -> None:
    schedule = build_schedule(recipe(name))
    cifar = row_of(name).data.startswith("cifar")
    milestones = [50, 75] if cifar else [30, 60, 90]
    for epoch in range(100):
        decayed = 0.1 ** sum(epoch >= milestone for milestone in milestones)
        assert schedule(10_000, epoch) == pytest.approx(decayed)
    warmup = [schedule(step, 0) for step in (0, 199, 399, 400)]
    assert warmup == pytest.approx([1 / 400, 0.5, 1, 1] if cifar else [1, 1, 1, 1])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cifar")])
def test_the_cifar_images(name: str) -> None:
    dataset = recipe(name).dataset
    assert (dataset.input_shape, dataset.num_classes) == ([3, 32, 32], 100 if "cifar100" in name else 10)
    assert (dataset.mean, dataset.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    assert (dataset.crop_padding, dataset.flip) == (4, True)


def test_the_nmnist_network_sees_events_with_padding_two() -> None:
    config = recipe("nmnist_f64c5_if")
    assert config.dataset.input_shape == [2, 34, 34]
    assert (config.model.kernel_size, config.model.stride, config.model.padding) == (5, 2, 2)
    net = build_model(config)
    assert net.population_shapes == [(64, 17, 17)]
    assert net.block.input_has_time


@pytest.mark.parametrize(("data", "model"), ARCHITECTURES)
def test_sizes_are_the_papers(data: str, model: str) -> None:
    row = first_of(data, model)
    net = build_model(recipe(row.experiment))
    assert net.num_neurons == row.neurons
    assert sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad) == row.parameters
    digits = 1 if PAPER_NEURONS[data, model] < 10 else 0
    assert round(row.neurons / 1000, digits) == PAPER_NEURONS[data, model]


def test_one_architecture_has_one_size() -> None:
    for row in ROWS:
        same = first_of(row.data, row.model)
        assert (row.neurons, row.parameters) == (same.neurons, same.parameters)
        ours, first = (config_to_dict(recipe(name))["model"] for name in (row.experiment, same.experiment))
        assert ours == first


def test_the_table_is_complete_and_plausible() -> None:
    assert len(ROWS) == len(set(NAMES)) == 19
    for row in ROWS:
        assert row.best >= row.mean > 70
        assert 0 < row.std < 0.5
        assert row.data_title in row.source
    with pytest.raises(KeyError, match=r"mnist_f400_if.*fashion_mnist_f400_if"):
        row_of("mnist_f400_if")


def test_a_recipe_takes_a_stand_in_for_its_data() -> None:
    config = load_config(["experiment=cifar10_alexnetf_lif", "dataset=cifar10_jpeg"])
    assert (config.dataset.name, config.dataset.title) == ("image_folder", "CIFAR-10 (JPEG copy)")
    assert config.neuron.leak == 0.99
    assert config.schedule.warmup_steps == 400
