"""Solvers: one file, one method. None of them imports torch."""

from mpq_plugins.solvers.auto import Auto as Auto
from mpq_plugins.solvers.exhaustive import Exhaustive as Exhaustive
from mpq_plugins.solvers.knapsack import Knapsack as Knapsack
from mpq_plugins.solvers.milp import MILP as MILP
from mpq_plugins.solvers.pairwise import BranchAndBound as BranchAndBound
from mpq_plugins.solvers.pairwise import LocalSearch as LocalSearch
