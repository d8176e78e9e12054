"""Scores of the units, one file per published idea; torch is imported when one is computed, not before."""

from mpq_plugins.proxies.base import AbstractProxy as AbstractProxy
from mpq_plugins.proxies.clado import CLADO as CLADO
from mpq_plugins.proxies.controls import Constant as Constant
from mpq_plugins.proxies.controls import Projection as Projection
from mpq_plugins.proxies.controls import Random as Random
from mpq_plugins.proxies.controls import Uniform as Uniform
from mpq_plugins.proxies.csmpq import CSMPQ as CSMPQ
from mpq_plugins.proxies.fisher import Fisher as Fisher
from mpq_plugins.proxies.hessian_trace import HessianTrace as HessianTrace
from mpq_plugins.proxies.ompq import OMPQ as OMPQ
from mpq_plugins.proxies.one_by_one import KLDivergence as KLDivergence
from mpq_plugins.proxies.one_by_one import LossIncrease as LossIncrease
from mpq_plugins.proxies.one_by_one import OutputError as OutputError
from mpq_plugins.proxies.rank_ensemble import RankEnsemble as RankEnsemble
from mpq_plugins.proxies.weight_error import WeightError as WeightError
