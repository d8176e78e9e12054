"""What may be decided: precisions, units of layers, bit configurations."""

from mpq_plugins.space.bits import BitConfig as BitConfig
from mpq_plugins.space.precision import Precision as Precision
from mpq_plugins.space.precision import menu as menu
from mpq_plugins.space.space import Space as Space
from mpq_plugins.space.space import Unit as Unit
