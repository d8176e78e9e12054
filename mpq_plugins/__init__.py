"""Mixed-precision bit allocation for established quantization frameworks.

Names are imported on first use, so that `import mpq_plugins` costs nothing and needs no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq_plugins._adapter import AbstractAdapter as AbstractAdapter
    from mpq_plugins._allocate import Allocation as Allocation
    from mpq_plugins._allocate import allocate as allocate
    from mpq_plugins._allocate import build_space as build_space
    from mpq_plugins._allocate import solve_scores as solve_scores
    from mpq_plugins._bits import BitConfig as BitConfig
    from mpq_plugins._cost import AbstractCost as AbstractCost
    from mpq_plugins._cost import Budget as Budget
    from mpq_plugins._discover import find_layers as find_layers
    from mpq_plugins._errors import AdapterError as AdapterError
    from mpq_plugins._errors import BudgetError as BudgetError
    from mpq_plugins._errors import DataError as DataError
    from mpq_plugins._errors import FewImagesWarning as FewImagesWarning
    from mpq_plugins._errors import FingerprintError as FingerprintError
    from mpq_plugins._errors import FloatLayersWarning as FloatLayersWarning
    from mpq_plugins._errors import FormatError as FormatError
    from mpq_plugins._errors import InfeasibleBudgetError as InfeasibleBudgetError
    from mpq_plugins._errors import MissingExtraError as MissingExtraError
    from mpq_plugins._errors import ModelError as ModelError
    from mpq_plugins._errors import MPQError as MPQError
    from mpq_plugins._errors import PluginError as PluginError
    from mpq_plugins._errors import PrecisionError as PrecisionError
    from mpq_plugins._errors import SolverError as SolverError
    from mpq_plugins._errors import SpaceError as SpaceError
    from mpq_plugins._errors import TrainingError as TrainingError
    from mpq_plugins._errors import UnknownLayerError as UnknownLayerError
    from mpq_plugins._errors import UsageError as UsageError
    from mpq_plugins._errors import VerificationError as VerificationError
    from mpq_plugins._errors import WriteError as WriteError
    from mpq_plugins._layers import Inventory as Inventory
    from mpq_plugins._layers import Layer as Layer
    from mpq_plugins._model import Batch as Batch
    from mpq_plugins._precision import Precision as Precision
    from mpq_plugins._precision import menu as menu
    from mpq_plugins._problem import Limit as Limit
    from mpq_plugins._problem import Problem as Problem
    from mpq_plugins._problem import build_problem as build_problem
    from mpq_plugins._proxy import AbstractProxy as AbstractProxy
    from mpq_plugins._ptq import PTQ as PTQ
    from mpq_plugins._repairs import Repair as Repair
    from mpq_plugins._repairs import repairs_of as repairs_of
    from mpq_plugins._scores import Scores as Scores
    from mpq_plugins._solution import Plan as Plan
    from mpq_plugins._solution import Solution as Solution
    from mpq_plugins._solution import Status as Status
    from mpq_plugins._solve import solve as solve
    from mpq_plugins._solver import AbstractSolver as AbstractSolver
    from mpq_plugins._space import Space as Space
    from mpq_plugins._space import first_and_last as first_and_last
    from mpq_plugins._space import residual_ties as residual_ties
    from mpq_plugins._verify import Verification as Verification
    from mpq_plugins._verify import verify as verify

_HOME = {
    "AbstractAdapter": "_adapter",
    "AbstractCost": "_cost",
    "AbstractProxy": "_proxy",
    "AbstractSolver": "_solver",
    "AdapterError": "_errors",
    "Allocation": "_allocate",
    "Batch": "_model",
    "BitConfig": "_bits",
    "Budget": "_cost",
    "BudgetError": "_errors",
    "DataError": "_errors",
    "FewImagesWarning": "_errors",
    "FingerprintError": "_errors",
    "FloatLayersWarning": "_errors",
    "FormatError": "_errors",
    "InfeasibleBudgetError": "_errors",
    "Inventory": "_layers",
    "Layer": "_layers",
    "Limit": "_problem",
    "MPQError": "_errors",
    "MissingExtraError": "_errors",
    "ModelError": "_errors",
    "PTQ": "_ptq",
    "Plan": "_solution",
    "PluginError": "_errors",
    "Precision": "_precision",
    "PrecisionError": "_errors",
    "Problem": "_problem",
    "Repair": "_repairs",
    "Scores": "_scores",
    "Solution": "_solution",
    "SolverError": "_errors",
    "Space": "_space",
    "SpaceError": "_errors",
    "Status": "_solution",
    "TrainingError": "_errors",
    "UnknownLayerError": "_errors",
    "UsageError": "_errors",
    "Verification": "_verify",
    "VerificationError": "_errors",
    "WriteError": "_errors",
    "allocate": "_allocate",
    "build_problem": "_problem",
    "build_space": "_allocate",
    "find_layers": "_discover",
    "first_and_last": "_space",
    "menu": "_precision",
    "repairs_of": "_repairs",
    "residual_ties": "_space",
    "solve": "_solve",
    "solve_scores": "_allocate",
    "verify": "_verify",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"mpq_plugins.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mpq_plugins' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
