"""Small cases of the benchmarks, for the tests of their logic."""

from __future__ import annotations

import functools

import torch
from cases import Batches, Ours, Setting

from ide_snn.schemas import Config

CPU = torch.device("cpu")
SMALL = {
    "f400": ("model.hidden=16",),
    "f64c5": ("model.channels=4", "time_steps=3"),
    "alexnetf": ("model.channels=[4,6,8,6,5]", "time_steps=3"),
}


@functools.cache
def config_of(case: str, *more: str) -> Config:
    return Setting(case, batch=6, overrides=(*SMALL[case], *more)).config()


def small(case: str, *more: str) -> Ours:
    torch.manual_seed(0)
    return Ours(config_of(case, *more))


def example(ours: Ours) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(Batches(ours.config)))
