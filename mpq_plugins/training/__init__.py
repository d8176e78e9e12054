"""Repairing and training quantized modules."""

from mpq_plugins.training._batch_norm import reestimate_batch_norm as reestimate_batch_norm
