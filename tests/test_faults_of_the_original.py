"""Faults of the original implementation, each with the test that catches it; two of them are here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from networks import example_input, small_block, warmed_up

from ide_snn import Gmres, Implicit, Record, SNNIDEConvMultiLayerNet, Unrolled
from ide_snn.evaluation import evaluate
from ide_snn.normalization import batch_norms

CAUGHT_BY = {
    "batch norm's statistics are 'restored' from an alias": "test_block.test_evaluation_is_idempotent",
    "batch norm sees f more than once": "test_every_gradient_updates_running_statistics_once",
    "LIF with spikes as input overwrites the last frame": "test_block.test_nothing_mutates_its_input",
    "the weighted mean wraps around to the last frame": "test_neurons.test_time_average_weights_the_frames_in_order",
    "rates of single layers crash for LIF": "test_block.test_simulation_equals_a_plain_loop_over_the_modules",
    "firing rates are several times too small": "test_evaluated_firing_rates_are_means_of_the_spike_trains",
    "power iteration runs in evaluation": "test_optimizations.test_evaluation_changes_nothing",
    "norms of transposed convolutions flatten the wrong dimension": (
        "test_optimizations.test_a_transposed_convolution_flattens_its_output_channels"
    ),
    "a resumed run loses its learning rate": "test_training_resume.test_other_optimisers_and_schedules",
    "the tolerance is absolute": "test_implicit.test_scale_of_the_loss_only_scales_the_gradient",
    "the tolerance is for the whole batch": "test_implicit.test_other_samples_do_not_change_a_samples_gradient",
    "NaN becomes 0": "test_implicit.test_nan_stays_visible",
    "loading a checkpoint executes what is in it": "test_checkpoint.test_loading_executes_nothing",
}
GRADIENTS = [Implicit(), Implicit("batch"), Implicit(jacobian_at="f"), Implicit("batch", "f"), Unrolled(5)]


@pytest.mark.parametrize("fault", CAUGHT_BY)
def test_every_fault_has_a_test(fault: str) -> None:
    module, _, name = CAUGHT_BY[fault].rpartition(".")
    path = Path(__file__).with_name(f"{module}.py") if module else Path(__file__)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
def test_every_gradient_updates_running_statistics_once(gradient: Implicit | Unrolled) -> None:
    block = warmed_up(small_block("multilayer", gradient=gradient, solver=Gmres(1e-6, max_steps=200))).train()
    seen = [int(norm.num_batches_tracked) for norm in batch_norms(block)]
    block(example_input("multilayer")).square().sum().backward()
    assert [int(norm.num_batches_tracked) for norm in batch_norms(block)] == [count + 1 for count in seen]


def test_evaluated_firing_rates_are_means_of_the_spike_trains() -> None:
    """Of several populations, and batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    net = SNNIDEConvMultiLayerNet((1, 8, 8), 3, channels=(2, 3, 4), strides=(2, 1, 1), time_steps=6).eval()
    batches = [4 * torch.randn(samples, 1, 8, 8, generator=generator) for samples in (5, 2)]
    found = evaluate(net, [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]).firing_rate
    trains = net.block.simulate(torch.cat(batches), Record(spikes=True)).spikes
    expected = [float(train.float().mean()) for train in trains]
    assert expected[0] > 0
    assert list(found.values()) == pytest.approx(expected)
