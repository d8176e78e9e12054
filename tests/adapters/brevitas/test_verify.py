"""`verify` on Brevitas files: what passes, what is named, and what rounding may do."""

import copy

import numpy as np
import pytest
import torch
from mpq_brevitas import BrevitasAdapter

from mpq_plugins import BitConfig, Precision, verify
from mpq_plugins._errors import VerificationError


@pytest.mark.parametrize(("name", "profile"), [("residual", "layerwise"), ("residual", "finn"), ("odd", "layerwise")])
def test_whole(prepared, exported, name, profile):
    """Bits, codes and outputs of an untouched file pass, the outputs within 1e-5."""
    case = prepared(name, profile)
    found = verify(
        case.adapter, exported(name, profile), case.bits, module=case.module, inputs=case.example, tolerance=1e-5
    ).check()
    assert found.outputs.mean_relative < 1e-5


def test_other_bits(prepared, exported):
    """A configuration with one other width is reported by layer, and `check` raises."""
    case = prepared("cnn")
    other = BitConfig({**case.bits.layers, "fc": Precision(8, 8)}, case.bits.fingerprint)
    report = verify(case.adapter, exported("cnn"), other)
    assert [check.name for check in report.layers if not check.ok] == ["fc"]
    with pytest.raises(VerificationError, match="fc: asked for w8a8"):
        report.check()


def test_other_weights_and_outputs(prepared, exported):
    """A module whose last layer changed after the export is reported for its codes and for its outputs."""
    case = prepared("cnn")
    changed = copy.deepcopy(case.module)
    with torch.no_grad():
        changed.fc.weight.mul_(-1)
    report = verify(BrevitasAdapter(), exported("cnn"), case.bits, module=changed, inputs=case.example)
    assert [check.name for check in report.layers if check.n_different] == ["fc"]
    assert not report.outputs.ok
    assert np.isfinite(report.outputs.own_difference)
