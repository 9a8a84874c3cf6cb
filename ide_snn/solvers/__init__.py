"""Solvers for the implicit linear system and for the equilibrium itself."""

from ide_snn.solvers.anderson import Anderson
from ide_snn.solvers.base import (
    ADVICE,
    Outcome,
    Solution,
    Solver,
    SolverWarning,
    SolveStats,
    solve,
)
from ide_snn.solvers.broyden import Broyden
from ide_snn.solvers.fixed_point import FixedPoint
from ide_snn.solvers.gmres import Gmres
from ide_snn.solvers.problems import FixedPointProblem, LinearProblem, Problem, Rough

SOLVERS = {"fixed_point": FixedPoint, "anderson": Anderson, "broyden": Broyden, "gmres": Gmres}

__all__ = [
    "ADVICE",
    "SOLVERS",
    "Anderson",
    "Broyden",
    "FixedPoint",
    "FixedPointProblem",
    "Gmres",
    "LinearProblem",
    "Outcome",
    "Problem",
    "Rough",
    "Solution",
    "SolveStats",
    "Solver",
    "SolverWarning",
    "solve",
]
