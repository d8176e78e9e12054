"""The tables: one row enrols a proxy, cost, solver or adapter in its whole contract suite."""

from mpq_brevitas import BrevitasAdapter

from mpq_plugins.proxies import CSMPQ, OMPQ, Constant, Projection, PublishedCSMPQ, PublishedOMPQ, Random, Uniform
from mpq_plugins.solvers import MILP, Auto, Knapsack

PROXIES = [
    Uniform(),
    Constant(),
    Constant(utility="linear"),
    Random(seed=3),
    Projection(),
    OMPQ(),
    OMPQ(estimator="biased", exponent="raw", utility="linear", suffix_mean=True),
    PublishedOMPQ(),
    CSMPQ(),
    CSMPQ(documents="classes", utility="linear"),
    PublishedCSMPQ(),
    PublishedCSMPQ(mode="ptq", balance=2.0),
]

SOLVERS = [Auto(), Knapsack(), MILP(), MILP(backend="cbc")]

ADAPTERS = [BrevitasAdapter(), BrevitasAdapter("finn")]
