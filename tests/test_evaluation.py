"""Figures of `evaluate` on answers that are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ide_snn.training import evaluate


def test_confusion_has_labels_as_rows_and_answers_as_columns() -> None:
    answers, labels = torch.tensor([0, 1, 1, 1, 2, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    logits = 4.0 * F.one_hot(answers, 4)
    found = evaluate(nn.Identity(), [(logits[:4], labels[:4]), (logits[4:], labels[4:])], confusion=True)
    assert found.confusion == [[1, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found.class_accuracy == [pytest.approx(1 / 3), pytest.approx(1 / 3), None, None]
    assert evaluate(nn.Identity(), [(logits, labels)]).confusion == []  # classes^2 numbers that nobody asked for
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)))
