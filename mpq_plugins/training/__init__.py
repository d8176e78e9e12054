"""Repairing and training quantized modules."""

from mpq_plugins.quantizers.batch_norm import reestimate_batch_norm as reestimate_batch_norm
from mpq_plugins.quantizers.duq import DuQ as DuQ
from mpq_plugins.quantizers.duq import duq as duq
from mpq_plugins.training.epochs import TrainingData as TrainingData
from mpq_plugins.training.instability import Instability as Instability
from mpq_plugins.training.instability import output_shift as output_shift
from mpq_plugins.training.loop import Trained as Trained
from mpq_plugins.training.loop import train as train
from mpq_plugins.training.loss import soft_cross_entropy as soft_cross_entropy
from mpq_plugins.training.metrics import EpochRecord as EpochRecord
from mpq_plugins.training.negative_padding import HARDSWISH_OFFSET as HARDSWISH_OFFSET
from mpq_plugins.training.negative_padding import Shifted as Shifted
from mpq_plugins.training.negative_padding import folded_offset as folded_offset
from mpq_plugins.training.negative_padding import negatively_padded as negatively_padded
from mpq_plugins.training.negative_padding import with_offset_in_bias as with_offset_in_bias
from mpq_plugins.training.padded_models import NegativelyPadded as NegativelyPadded
from mpq_plugins.training.padded_models import with_negative_padding as with_negative_padding
from mpq_plugins.training.parameter_groups import parameter_groups as parameter_groups
from mpq_plugins.training.profit import Freezing as Freezing
from mpq_plugins.training.profit import Profit as Profit
from mpq_plugins.training.recipe import TrainingRecipe as TrainingRecipe
from mpq_plugins.training.schedule import ProfitSchedule as ProfitSchedule
from mpq_plugins.training.schedule import Stage as Stage
from mpq_plugins.training.schedule import stage_at as stage_at
