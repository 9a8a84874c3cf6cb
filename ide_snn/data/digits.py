"""The handwritten digits bundled with scikit-learn: small, and there without any download."""

from pathlib import Path

import numpy as np
import torch

from ide_snn.data.base import Dataset, Normalization, Split

INPUT_SCALE = 16.0

# of the training part, after the division by INPUT_SCALE
MEAN = 0.3054
STD = 0.3761


def load_digits(data_dir: Path | None) -> Dataset:  # noqa: ARG001 - all loaders are called alike
    """1,797 digits [1, 8, 8] with values 0..16, as 1,437 for training and 360 for the test.

    The split is stratified and the same for everyone, whatever the seed of a run. `data_dir` is not needed.
    """
    # importing scikit-learn takes about a second, which only users of this data set should wait for
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    train_index, test_index = model_selection.train_test_split(
        np.arange(len(digits.target)), stratify=digits.target, test_size=0.2, random_state=0
    )
    whole = Split(
        torch.from_numpy(digits.images.astype(np.uint8))[:, None],
        torch.from_numpy(digits.target.astype(np.int64)),
    )
    return Dataset(
        name="digits",
        title="digits",
        train=whole.subset(torch.from_numpy(train_index)),
        test=whole.subset(torch.from_numpy(test_index)),
        validation=None,
        num_classes=10,
        class_names=tuple(str(digit) for digit in range(10)),
        normalization=Normalization(INPUT_SCALE, (MEAN,), (STD,)),
    )
