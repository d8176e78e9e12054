"""The tables: one row enrols a proxy, cost, solver or adapter in its whole contract suite."""

from mpq_brevitas import BrevitasAdapter
from mpq_nncf import NNCFAdapter
from papers import PublishedCSMPQ, PublishedOMPQ, PublishedRounding

from mpq_plugins.proxies import (
    CLADO,
    CSMPQ,
    OMPQ,
    Constant,
    Fisher,
    HessianTrace,
    KLDivergence,
    LossIncrease,
    OutputError,
    Projection,
    Random,
    RankEnsemble,
    Uniform,
    WeightError,
)
from mpq_plugins.solvers import MILP, Auto, Knapsack, LocalSearch

# Scores that grow with what quantization does to weights, by construction: more bits never lose more.
ORDERED = [
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
    WeightError(),
    WeightError(normalised=True, per_channel=False),
    HessianTrace(n_probes=4, n_images=8),
]
# Measured on the network: a few images may like fewer bits.
MEASURED = [
    CLADO(),
    CLADO(tier="exact", clip=True, n_images=4),
    CLADO(tier="fisher", cross=False, loss="kl"),
    LossIncrease(),
    LossIncrease(loss="squared_error", per_channel=False),
    KLDivergence(),
    OutputError(),
    OutputError(measure="sqnr"),
    Fisher(),
    Fisher(of="weights", loss="kl"),
    RankEnsemble(),
    RankEnsemble(members=("loss-increase", "weight-error"), n_images=8),
]
PROXIES = [*ORDERED, *MEASURED]

SOLVERS = [Auto(), Knapsack(), MILP(), MILP(backend="cbc")]

HEURISTICS = (LocalSearch, PublishedRounding)  # these prove no optimum

ADAPTERS = [
    BrevitasAdapter(),
    BrevitasAdapter("finn"),
    BrevitasAdapter(quantizer="duq"),
    BrevitasAdapter("finn", scales="power-of-two"),
    NNCFAdapter(),
    NNCFAdapter(merge_branches=False, asymmetric=True),
]
