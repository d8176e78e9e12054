"""The best prices of the limits: the Lagrangian dual, whose value is that of the linear relaxation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.secants import Relaxation, by_secants

if TYPE_CHECKING:
    from mpq_plugins.solvers.program import Backend


def relax(blocks: Blocks, *, backend: Backend = "auto") -> Relaxation:
    """Maximise the Lagrangian bound over prices >= 0: by secants for one limit, by cutting planes for several."""
    free = blocks.minimum(np.zeros(len(blocks.limits)))
    if np.all(free.usage <= blocks.limits):
        return Relaxation(free.loss, np.zeros(len(blocks.limits)), free, free, (free,))
    if len(blocks.limits) == 1:
        return by_secants(blocks, free)
    from mpq_plugins.solvers.cutting_planes import by_cutting_planes

    return by_cutting_planes(blocks, free, backend)
