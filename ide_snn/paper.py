"""The results of Xiao et al., NeurIPS 2021 (arXiv 2109.14247), as data: one row per network, neuron, T and data set.

    row = row_of("cifar10_alexnetf_lif_t100")
    row.mean, row.std, row.best  # test accuracy in %: mean and standard deviation over runs, and the best run

Source: section 5, the table of results on each data set. `configs/experiment/<row.experiment>.yaml` is the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ROWS", "STAND_INS", "TITLES", "PaperRow", "row_of"]

# dataset.name in the configuration -> what people call it
TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "nmnist": "N-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}
NETWORKS = {"f400": "F400", "f64c5": "F64C5", "alexnetf": "AlexNet-F", "cifarnetf": "CIFARNet-F"}
# images or recordings for training and for the test
SIZES = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "nmnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
# Other data that may stand beside a row, by dataset.title, but are never the row's: title -> dataset.name
STAND_INS = {"CIFAR-10 (JPEG copy)": "cifar10"}


@dataclass(frozen=True)
class PaperRow:
    """One result of the paper, in % of the test set.

    Attributes:
        experiment: name of the recipe here.
        data, model, neuron: names of the members of the config groups dataset, model and neuron.
        time_steps: T.
        mean, std, best: over the paper's runs.
        neurons: input, populations and classes, counted here; the paper rounds to thousands.
        parameters: trainable ones, counted here.
    """

    experiment: str
    data: str
    model: str
    neuron: str
    time_steps: int
    mean: float
    std: float
    best: float
    neurons: int
    parameters: int

    @property
    def data_title(self) -> str:
        return TITLES[self.data]

    @property
    def train_samples(self) -> int:
        return SIZES[self.data][0]

    @property
    def test_samples(self) -> int:
        return SIZES[self.data][1]

    @property
    def source(self) -> str:
        return f"Xiao et al., NeurIPS 2021, section 5, results on {self.data_title}"


# data, network -> neurons, parameters
_COUNTS = {
    ("mnist", "f64c5"): (13_338, 229_643),
    ("fashion_mnist", "f400"): (1_194, 478_811),
    ("nmnist", "f64c5"): (20_818, 290_763),
    ("cifar10", "alexnetf"): (158_730, 3_709_515),
    ("cifar10", "cifarnetf"): (232_458, 11_840_011),
    ("cifar100", "alexnetf"): (158_820, 5_184_165),
    ("cifar100", "cifarnetf"): (232_548, 14_789_221),
}
# data, network, neuron, T, mean, std, best
_RESULTS = (
    ("mnist", "f64c5", "if", 30, 99.49, 0.04, 99.55),
    ("mnist", "f64c5", "lif", 30, 99.53, 0.04, 99.59),
    ("fashion_mnist", "f400", "if", 5, 90.04, 0.09, 90.14),
    ("fashion_mnist", "f400", "lif", 5, 90.07, 0.10, 90.25),
    ("nmnist", "f64c5", "if", 30, 99.30, 0.04, 99.35),
    ("nmnist", "f64c5", "lif", 30, 99.42, 0.04, 99.47),
    ("cifar10", "alexnetf", "if", 30, 91.73, 0.13, 91.85),
    ("cifar10", "alexnetf", "lif", 30, 91.74, 0.09, 91.92),
    ("cifar10", "alexnetf", "if", 100, 92.25, 0.27, 92.53),
    ("cifar10", "alexnetf", "lif", 100, 92.03, 0.07, 92.15),
    ("cifar10", "cifarnetf", "if", 30, 91.94, 0.14, 92.12),
    ("cifar10", "cifarnetf", "lif", 30, 92.08, 0.15, 92.23),
    ("cifar10", "cifarnetf", "if", 100, 92.33, 0.15, 92.57),
    ("cifar10", "cifarnetf", "lif", 100, 92.52, 0.17, 92.82),
    ("cifar100", "alexnetf", "if", 100, 72.02, 0.16, 72.23),
    ("cifar100", "cifarnetf", "if", 30, 71.56, 0.31, 72.10),
    ("cifar100", "cifarnetf", "lif", 30, 71.72, 0.22, 72.03),
    ("cifar100", "cifarnetf", "if", 100, 73.07, 0.21, 73.43),
    ("cifar100", "cifarnetf", "lif", 100, 72.98, 0.13, 73.12),
)


def _row(data: str, model: str, neuron: str, time_steps: int, mean: float, std: float, best: float) -> PaperRow:
    # the networks for CIFAR have two T; the longer one is in the name
    suffix = "_t100" if time_steps == 100 else ""
    counts = _COUNTS[data, model]
    return PaperRow(f"{data}_{model}_{neuron}{suffix}", data, model, neuron, time_steps, mean, std, best, *counts)


ROWS: tuple[PaperRow, ...] = tuple(_row(*result) for result in _RESULTS)


def row_of(experiment: str) -> PaperRow:
    """The row of an experiment.

    Raises:
        KeyError: the paper has no such row; the message lists those it has.
    """
    for row in ROWS:
        if row.experiment == experiment:
            return row
    raise KeyError(f"the paper has no {experiment!r}; its rows are {', '.join(row.experiment for row in ROWS)}")
