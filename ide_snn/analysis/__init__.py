"""Analysis of trained networks: where they spike, what they cost, how close to the equilibrium, how few steps.

Everything takes any `nn.Module` that contains one or several `FeedbackSNN` blocks:

    rates, cost, horizon = FiringRates(), SynapticCost(), Horizon()
    measure(model, batches, rates, cost, horizon)          # one simulation per batch
    rates.result(), cost.result().energy_pj, accuracy_over_time(horizon.logits, horizon.labels)

`analyze_model` does all at once, `save_figures` draws it, `scripts/analyze.py` does both for a checkpoint.
"""

from ide_snn.analysis.checkpoint import analyze_checkpoint
from ide_snn.analysis.convergence import Convergence, ConvergenceCurve
from ide_snn.analysis.cost import Cost, Operations, SynapticCost, UncountableError, energy_pj, fan_out
from ide_snn.analysis.figures import save_figures
from ide_snn.analysis.horizon import EarlyExit, Horizon, accuracy_over_time, early_exit, logits_over_time
from ide_snn.analysis.model import Analysis, analyze_model
from ide_snn.analysis.observe import Meter, Observation, Site, measure, observe
from ide_snn.analysis.rates import FiringRates, PopulationRate, Trace, trace
from ide_snn.analysis.residuals import SolverTrace, residual_per_step, solver_residuals
from ide_snn.analysis.spectrum import BlockSpectra, FeedbackNorms, Spectrum, block_spectrum, feedback_norms

__all__ = [
    "Analysis",
    "BlockSpectra",
    "Convergence",
    "ConvergenceCurve",
    "Cost",
    "EarlyExit",
    "FeedbackNorms",
    "FiringRates",
    "Horizon",
    "Meter",
    "Observation",
    "Operations",
    "PopulationRate",
    "Site",
    "SolverTrace",
    "Spectrum",
    "SynapticCost",
    "Trace",
    "UncountableError",
    "accuracy_over_time",
    "analyze_checkpoint",
    "analyze_model",
    "block_spectrum",
    "early_exit",
    "energy_pj",
    "fan_out",
    "feedback_norms",
    "logits_over_time",
    "measure",
    "observe",
    "residual_per_step",
    "save_figures",
    "solver_residuals",
    "trace",
]
