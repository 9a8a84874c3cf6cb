"""Feedback spiking neural networks trained by implicit differentiation on the equilibrium state (IDE).

Xiao et al., "Training Feedback Spiking Neural Networks by Implicit Differentiation on the Equilibrium
State", NeurIPS 2021 (arXiv 2109.14247).
"""

from ide_snn.block import FeedbackSNN
from ide_snn.bptt import Bptt
from ide_snn.implicit import Implicit, Unrolled
from ide_snn.layers import Connection
from ide_snn.models import FeedbackClassifier, NetworkOptions, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet
from ide_snn.neurons import NeuronParams
from ide_snn.optimizations import constrain, remove_constraint
from ide_snn.record import Rates, Record
from ide_snn.simulation import Step
from ide_snn.solvers import (
    Anderson,
    Broyden,
    FixedPoint,
    FixedPointProblem,
    Gmres,
    LinearProblem,
    Outcome,
    Solution,
    Solver,
    SolverWarning,
    SolveStats,
    solve,
)

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "Bptt",
    "Broyden",
    "Connection",
    "FeedbackClassifier",
    "FeedbackSNN",
    "FixedPoint",
    "FixedPointProblem",
    "Gmres",
    "Implicit",
    "LinearProblem",
    "NetworkOptions",
    "NeuronParams",
    "Outcome",
    "Rates",
    "Record",
    "SNNIDEConvMultiLayerNet",
    "SNNIDEConvNet",
    "SNNIDEFCNet",
    "Solution",
    "SolveStats",
    "Solver",
    "SolverWarning",
    "Step",
    "Unrolled",
    "__version__",
    "constrain",
    "remove_constraint",
    "solve",
]
