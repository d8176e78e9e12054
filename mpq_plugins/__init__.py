"""Mixed-precision bit allocation for established quantization frameworks.

Names are imported on first use, so that `import mpq_plugins` costs nothing and needs no framework.
Examples in docstrings take `import torch` and `import mpq_plugins as mpq` for granted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpq_plugins.common.lazy import imported_names, lazy

if TYPE_CHECKING:
    from mpq_plugins.adapter.base import AbstractAdapter as AbstractAdapter
    from mpq_plugins.adapter.ptq import PTQ as PTQ
    from mpq_plugins.adapter.repairs import Repair as Repair
    from mpq_plugins.adapter.repairs import repairs_of as repairs_of
    from mpq_plugins.adapter.verify import Verification as Verification
    from mpq_plugins.adapter.verify import verify as verify
    from mpq_plugins.allocation import Allocation as Allocation
    from mpq_plugins.allocation import allocate as allocate
    from mpq_plugins.allocation import build_space as build_space
    from mpq_plugins.allocation import solve_scores as solve_scores
    from mpq_plugins.costs.base import AbstractCost as AbstractCost
    from mpq_plugins.costs.base import Budget as Budget
    from mpq_plugins.errors import AdapterError as AdapterError
    from mpq_plugins.errors import BudgetError as BudgetError
    from mpq_plugins.errors import DataError as DataError
    from mpq_plugins.errors import FewImagesWarning as FewImagesWarning
    from mpq_plugins.errors import FingerprintError as FingerprintError
    from mpq_plugins.errors import FloatLayersWarning as FloatLayersWarning
    from mpq_plugins.errors import FormatError as FormatError
    from mpq_plugins.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from mpq_plugins.errors import MissingExtraError as MissingExtraError
    from mpq_plugins.errors import ModelError as ModelError
    from mpq_plugins.errors import MPQError as MPQError
    from mpq_plugins.errors import PluginError as PluginError
    from mpq_plugins.errors import PrecisionError as PrecisionError
    from mpq_plugins.errors import SolverError as SolverError
    from mpq_plugins.errors import SpaceError as SpaceError
    from mpq_plugins.errors import TrainingError as TrainingError
    from mpq_plugins.errors import UnknownLayerError as UnknownLayerError
    from mpq_plugins.errors import UsageError as UsageError
    from mpq_plugins.errors import VerificationError as VerificationError
    from mpq_plugins.errors import WriteError as WriteError
    from mpq_plugins.model.discover import find_layers as find_layers
    from mpq_plugins.model.layers import Inventory as Inventory
    from mpq_plugins.model.layers import Layer as Layer
    from mpq_plugins.model.run import Batch as Batch
    from mpq_plugins.proxies.base import AbstractProxy as AbstractProxy
    from mpq_plugins.proxies.scores import Scores as Scores
    from mpq_plugins.quantized import Exported as Exported
    from mpq_plugins.quantized import QuantizedModel as QuantizedModel
    from mpq_plugins.quantized import quantize as quantize
    from mpq_plugins.solvers.base import AbstractSolver as AbstractSolver
    from mpq_plugins.solvers.problem import Limit as Limit
    from mpq_plugins.solvers.problem import Problem as Problem
    from mpq_plugins.solvers.problem import build_problem as build_problem
    from mpq_plugins.solvers.solution import Plan as Plan
    from mpq_plugins.solvers.solution import Solution as Solution
    from mpq_plugins.solvers.solution import Status as Status
    from mpq_plugins.solvers.solve import solve as solve
    from mpq_plugins.space.bits import BitConfig as BitConfig
    from mpq_plugins.space.precision import Precision as Precision
    from mpq_plugins.space.precision import menu as menu
    from mpq_plugins.space.space import Space as Space
    from mpq_plugins.space.space import first_and_last as first_and_last
    from mpq_plugins.space.space import residual_ties as residual_ties

_HOME = imported_names(__file__)
__all__ = sorted(_HOME)
__version__ = "0.1.0"
__getattr__, __dir__ = lazy(__name__, _HOME)
