"""What an adapter is written with: its interface, checkpoints, files, and running a user's model.

Names are imported on first use: the command line needs no torch to show its help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpq_plugins.common.lazy import lazy

if TYPE_CHECKING:
    from mpq_plugins.adapter.base import AbstractAdapter as AbstractAdapter
    from mpq_plugins.adapter.base import attach_bits as attach_bits
    from mpq_plugins.adapter.base import bits_of as bits_of
    from mpq_plugins.adapter.base import check_switch as check_switch
    from mpq_plugins.adapter.base import parameters_of as parameters_of
    from mpq_plugins.adapter.checkpoint import read_checkpoint as read_checkpoint
    from mpq_plugins.adapter.checkpoint import write_checkpoint as write_checkpoint
    from mpq_plugins.adapter.ptq import PTQ as PTQ
    from mpq_plugins.common.files import write_whole as write_whole
    from mpq_plugins.model.run import calibration_batches as calibration_batches
    from mpq_plugins.model.run import call as call
    from mpq_plugins.model.run import evaluating as evaluating
    from mpq_plugins.model.run import tensors as tensors

_HOME = {
    "AbstractAdapter": "adapter.base",
    "PTQ": "adapter.ptq",
    "attach_bits": "adapter.base",
    "bits_of": "adapter.base",
    "calibration_batches": "model.run",
    "call": "model.run",
    "check_switch": "adapter.base",
    "evaluating": "model.run",
    "parameters_of": "adapter.base",
    "read_checkpoint": "adapter.checkpoint",
    "tensors": "model.run",
    "write_checkpoint": "adapter.checkpoint",
    "write_whole": "common.files",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy(__name__, _HOME)
