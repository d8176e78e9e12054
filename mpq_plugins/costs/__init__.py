"""What a bit configuration costs: one file, one formula."""

from mpq_plugins._cost import AbstractCost as AbstractCost
from mpq_plugins.costs._activation_memory import ActivationMemory as ActivationMemory
from mpq_plugins.costs._bit_ops import BitOps as BitOps
from mpq_plugins.costs._published_size import PublishedSize as PublishedSize
from mpq_plugins.costs._stored_size import StoredSize as StoredSize
from mpq_plugins.costs._weight_size import WeightSize as WeightSize
