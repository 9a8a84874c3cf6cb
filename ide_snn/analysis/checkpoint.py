"""The analysis of a checkpoint on the test set of its data: analysis.json, figures, a short summary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ide_snn.analysis.figures import require_matplotlib, save_figures
from ide_snn.analysis.model import Analysis, analyze_model
from ide_snn.bptt import Bptt
from ide_snn.config import ConfigError, build_dataset, build_loaders
from ide_snn.data_record import as_in_training
from ide_snn.implicit import Implicit
from ide_snn.models import FeedbackClassifier
from ide_snn.reporting import write_json
from ide_snn.run import model_from_checkpoint
from ide_snn.schemas import AnalyzeConfig, Config

__all__ = ["analyze_checkpoint"]

DEFAULT_SAMPLES = 512
RATE_BYTES = 256 * 10**6  # for the rates of one batch at every step


def analyze_checkpoint(request: AnalyzeConfig) -> dict[str, Any]:
    """Analyses a checkpoint, writes analysis.json and PNG figures, prints a summary; returns the JSON's content.

    Raises:
        CheckpointError, ConfigError, DataError: with a message that says what to change.
        ImportError: without matplotlib.
    """
    require_matplotlib()
    model, config, checkpoint = model_from_checkpoint(
        request.checkpoint, time_steps=request.time_steps, device=request.device
    )
    trained_steps = int(checkpoint.config["time_steps"])
    if request.data_dir is not None:
        config = replace(config, data_dir=request.data_dir)
    if not isinstance(model, FeedbackClassifier):
        raise ConfigError(
            f"{checkpoint.path} was trained with method={config.method.name}: analysis is of feedback networks, "
            "method=ide or method=bptt"
        )
    gradient = model.block.gradient
    if isinstance(gradient, Bptt):
        if gradient.reset != "soft":
            raise ConfigError(
                f"{checkpoint.path} was trained with method.reset={gradient.reset}: equilibrium and Jacobian are those "
                "of the soft reset"
            )
        model.block.gradient = Implicit()  # the same rates, and the solver is looked at
    _check(request, model)
    # of event recordings, another time_steps takes more or fewer of the frames that the network was trained on
    dataset = as_in_training(build_dataset(replace(config, time_steps=trained_steps)), checkpoint)
    chosen = _evenly_spaced(len(dataset.test), request.samples)
    dataset = replace(dataset, test=dataset.test.subset(chosen))
    config = _with_batch_size(config, request.batch_size, model, len(chosen))
    first_batch = min(config.trainer.evaluation_batch_size, len(chosen))
    for sample in request.trace_samples:
        if not 0 <= sample < first_batch:
            raise ConfigError(
                f"trace_samples: there is no sample {sample} in the first batch, which has {first_batch}"
                f" (0..{first_batch - 1})"
            )
    analysis = analyze_model(
        model,
        build_loaders(config, dataset, next(model.parameters()).device).test,
        thresholds=request.thresholds,
        trace_samples=request.trace_samples,
        neurons=request.neurons,
        spectrum_samples=request.spectrum_samples,
        progress=None,
    )
    folder = _output_folder(request)
    figures = save_figures(analysis, folder, title=f"{config.name}, T = {config.time_steps}")
    report = {
        "checkpoint": str(checkpoint.path),
        "experiment": config.name,
        "dataset": config.dataset.name,
        "epoch": checkpoint.progress["epoch"],
        "trained_time_steps": trained_steps,
        **analysis.as_dict(),
        "figures": [path.name for path in figures],
    }
    write_json(folder / "analysis.json", report)
    for line in _summary(analysis, config):
        print(line)
    print(f"{len(figures)} figures and analysis.json: {folder}")
    return report


def _check(request: AnalyzeConfig, model: FeedbackClassifier) -> None:
    """Bad requests fail before any data are read."""
    for name, least in (("samples", 1), ("batch_size", 1), ("spectrum_samples", 1)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    for threshold in request.thresholds:
        if not 0 < threshold <= 1:
            raise ConfigError(f"thresholds must lie in (0, 1], got {threshold}")
    if not request.thresholds or not request.trace_samples or request.neurons == []:
        raise ConfigError("thresholds, trace_samples and neurons need at least one entry each")
    for number, shape in enumerate(model.population_shapes, start=1):
        size = math.prod(shape)
        for neuron in request.neurons or ():
            if not 0 <= neuron < size:
                raise ConfigError(
                    f"neurons: there is no neuron {neuron} in population {number}, which has {size} (0..{size - 1})"
                )


def _evenly_spaced(available: int, samples: int | None) -> torch.Tensor:
    """Indices into the test set: evenly spaced, since some data sets are sorted by class."""
    if samples is not None and samples > available:
        raise ConfigError(f"samples={samples}, but the test set has {available}")
    count = min(DEFAULT_SAMPLES, available) if samples is None else samples
    return torch.arange(count) * available // count


def _with_batch_size(config: Config, batch_size: int | None, model: FeedbackClassifier, samples: int) -> Config:
    if batch_size is None:
        per_sample = 4 * config.time_steps * math.prod(model.population_shapes[-1])
        batch_size = max(1, min(samples, RATE_BYTES // per_sample))
    return replace(config, trainer=replace(config.trainer, evaluation_batch_size=batch_size))


def _output_folder(request: AnalyzeConfig) -> Path:
    if request.output is not None:
        return Path(request.output)
    folder = Path(request.checkpoint).resolve().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "analysis"


def _summary(analysis: Analysis, config: Config) -> Iterable[str]:
    accuracy = analysis.horizon.accuracy()
    yield f"{config.name}: {analysis.samples} test samples, T = {analysis.time_steps}"
    yield f"accuracy       {accuracy[-1]:.2%} at T, {accuracy[0]:.2%} after one step"
    rates = ", ".join(f"{rate.plain:.4f}" for rate in analysis.rates.result().values())
    yield f"firing rate    {rates} spikes per neuron and step, by population"
    cost = analysis.cost.result()
    ratio = cost.energy_pj / cost.ann_energy_pj
    yield f"operations     {cost.macs:,.0f} MACs and {cost.acs:,.0f} ACs per sample"
    yield (
        f"energy         {cost.energy_pj / 1e3:,.1f} nJ per sample; equivalent ANN {cost.ann_energy_pj / 1e3:,.1f} nJ "
        f"(ratio {ratio:.2f})"
    )
    for curve in analysis.convergence.result().values():
        if curve.samples:
            distances = f"{curve.to_equilibrium[-1]:.3g} of ||a*||; ||a - f(a)|| {curve.residual[-1]:.3g}"
            yield f"equilibrium    ||a[T] - a*|| {distances}"
        if curve.unsolved:
            yield f"               not solved for {curve.unsolved} of {analysis.samples} samples, which are left out"
    for spectrum in analysis.spectrum.result.values():
        eigenvalue, norm = max(spectrum.eigenvalue), max(spectrum.norm)
        yield f"Jacobian       largest |eigenvalue| {eigenvalue:.3f}, ||J||_2 {norm:.3f} ({len(spectrum.norm)} samples)"
        matrix = "" if spectrum.feedback.matrix is None else f", as a matrix {spectrum.feedback.matrix:.3f}"
        yield f"||W_fb||       as an operator {spectrum.feedback.operator:.3f}{matrix}"
