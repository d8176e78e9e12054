"""Sensitivity: what quantizing a unit does to the model's output and loss, measured with as few layer runs as possible."""

from mpq_plugins.sensitivity._criteria import AbstractMeasure as AbstractMeasure
from mpq_plugins.sensitivity._criteria import Loss as Loss
from mpq_plugins.sensitivity._criteria import measure as measure
from mpq_plugins.sensitivity._effects import Effects as Effects
from mpq_plugins.sensitivity._effects import Lab as Lab
from mpq_plugins.sensitivity._effects import Setup as Setup
from mpq_plugins.sensitivity._effects import described as described
from mpq_plugins.sensitivity._effects import sensitivity_set as sensitivity_set
from mpq_plugins.sensitivity._engine import Engine as Engine
from mpq_plugins.sensitivity._gradients import CallGradient as CallGradient
from mpq_plugins.sensitivity._gradients import backward as backward
from mpq_plugins.sensitivity._gradients import first_order_effects as first_order_effects
from mpq_plugins.sensitivity._journal import keeping_measurements as keeping_measurements
from mpq_plugins.sensitivity._variants import Variants as Variants
