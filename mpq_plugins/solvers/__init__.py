"""Solvers: one file, one method. None of them imports torch."""

from mpq_plugins.solvers._auto import Auto as Auto
from mpq_plugins.solvers._branch_and_bound import BranchAndBound as BranchAndBound
from mpq_plugins.solvers._exhaustive import Exhaustive as Exhaustive
from mpq_plugins.solvers._knapsack import Knapsack as Knapsack
from mpq_plugins.solvers._linearized import Linearized as Linearized
from mpq_plugins.solvers._local_search import LocalSearch as LocalSearch
from mpq_plugins.solvers._milp import MILP as MILP
from mpq_plugins.solvers._published_rounding import PublishedRounding as PublishedRounding
