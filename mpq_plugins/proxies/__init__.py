"""Scores of the units, one file per published idea; torch is imported when one is computed, not before."""

from mpq_plugins._proxy import AbstractProxy as AbstractProxy
from mpq_plugins.proxies._clado import CLADO as CLADO
from mpq_plugins.proxies._controls import Constant as Constant
from mpq_plugins.proxies._controls import Projection as Projection
from mpq_plugins.proxies._controls import Random as Random
from mpq_plugins.proxies._controls import Uniform as Uniform
from mpq_plugins.proxies._csmpq import CSMPQ as CSMPQ
from mpq_plugins.proxies._csmpq import PublishedCSMPQ as PublishedCSMPQ
from mpq_plugins.proxies._ompq import OMPQ as OMPQ
from mpq_plugins.proxies._ompq import PublishedOMPQ as PublishedOMPQ
