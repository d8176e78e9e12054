"""Scores of the units, one file per published idea; torch is imported when one is computed, not before."""

from mpq_plugins._proxy import AbstractProxy as AbstractProxy
from mpq_plugins.proxies._clado import CLADO as CLADO
from mpq_plugins.proxies._controls import Constant as Constant
from mpq_plugins.proxies._controls import Projection as Projection
from mpq_plugins.proxies._controls import Random as Random
from mpq_plugins.proxies._controls import Uniform as Uniform
from mpq_plugins.proxies._csmpq import CSMPQ as CSMPQ
from mpq_plugins.proxies._csmpq import PublishedCSMPQ as PublishedCSMPQ
from mpq_plugins.proxies._fisher import Fisher as Fisher
from mpq_plugins.proxies._hessian_trace import HessianTrace as HessianTrace
from mpq_plugins.proxies._kl_divergence import KLDivergence as KLDivergence
from mpq_plugins.proxies._loss_increase import LossIncrease as LossIncrease
from mpq_plugins.proxies._ompq import OMPQ as OMPQ
from mpq_plugins.proxies._ompq import PublishedOMPQ as PublishedOMPQ
from mpq_plugins.proxies._output_error import OutputError as OutputError
from mpq_plugins.proxies._rank_ensemble import RankEnsemble as RankEnsemble
from mpq_plugins.proxies._weight_error import WeightError as WeightError
