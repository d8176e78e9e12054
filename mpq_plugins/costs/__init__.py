"""What a bit configuration costs: one file, one formula."""

from mpq_plugins.costs.activation_memory import ActivationMemory as ActivationMemory
from mpq_plugins.costs.base import AbstractCost as AbstractCost
from mpq_plugins.costs.bit_ops import BitOps as BitOps
from mpq_plugins.costs.stored_size import StoredSize as StoredSize
from mpq_plugins.costs.weight_size import WeightSize as WeightSize
