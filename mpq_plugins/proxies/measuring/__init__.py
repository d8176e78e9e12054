"""Sensitivity: what quantizing a unit does to the model's output and loss, measured with as few layer runs as possible."""

from mpq_plugins.proxies.measuring.cache import keeping_measurements as keeping_measurements
from mpq_plugins.proxies.measuring.effects import Effects as Effects
from mpq_plugins.proxies.measuring.effects import MeasurementOptions as MeasurementOptions
from mpq_plugins.proxies.measuring.effects import SensitivityRun as SensitivityRun
from mpq_plugins.proxies.measuring.effects import described as described
from mpq_plugins.proxies.measuring.effects import sensitivity_set as sensitivity_set
from mpq_plugins.proxies.measuring.engine import Engine as Engine
from mpq_plugins.proxies.measuring.gradients import CallGradient as CallGradient
from mpq_plugins.proxies.measuring.gradients import backward as backward
from mpq_plugins.proxies.measuring.gradients import first_order_effects as first_order_effects
from mpq_plugins.proxies.measuring.weights import QuantizedWeights as QuantizedWeights
