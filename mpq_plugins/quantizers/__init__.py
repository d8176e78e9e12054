"""Quantizers and what corrects them: steps of least squared error, batch normalisation, DuQ."""

from mpq_plugins.quantizers.batch_norm import reestimate_batch_norm as reestimate_batch_norm
from mpq_plugins.quantizers.duq import DuQ as DuQ
from mpq_plugins.quantizers.uniform import mse_range as mse_range
from mpq_plugins.quantizers.uniform import mse_scale as mse_scale
from mpq_plugins.quantizers.uniform import mse_scales as mse_scales
from mpq_plugins.quantizers.uniform import quantize as quantize
