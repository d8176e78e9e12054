"""The comparison of a file with a module: what it allows and what it does not."""

import numpy as np
import pytest
import torch
import torchvision

from mpq_plugins import AbstractAdapter, BitConfig, Precision, find_layers, verify
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.verify import OutputCheck, compare_outputs
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import VerificationError


def test_outputs_are_compared_in_standard_deviations():
    """Differences of 0.1 on outputs of deviation 1 are 0.1; top-1 agreement is by row."""
    expected = np.asarray([[1.0, -1.0], [-1.0, 1.0]])
    check = compare_outputs([expected + np.full((2, 2), 0.1)], [expected], tolerance=0.05)
    assert np.isclose(check.mean_relative, 0.1)
    assert np.isclose(check.max_absolute, 0.1)
    assert (check.top1_agreement, check.ok) == (1.0, False)
    assert compare_outputs([-expected], [expected], tolerance=0.05).top1_agreement == 0.0


def test_outputs_that_are_not_numbers_never_pass():
    """NaN in the file or in both is no agreement, however much the module differs from itself."""
    good, bad = np.ones((2, 2)), np.full((2, 2), np.nan)
    for found, expected in ((bad, good), (good, bad), (bad, bad)):
        check = compare_outputs([found], [expected], tolerance=1e-2)
        assert not check.ok
        worst = OutputCheck(check.mean_relative, check.max_absolute, 0.0, 1e-2, own_difference=check.mean_relative)
        assert not worst.ok


def test_a_file_of_another_model_is_told(tmp_path):
    """Equal layers and bits are not enough: a file that says it is of another model does not pass, a silent one does."""
    bits = BitConfig({"fc": Precision(4, 8)}, "sha256:mine")

    def verified(fingerprint):
        stub = _Stub(None, None, held=BitConfig(bits.layers, fingerprint))
        return verify(stub, tmp_path / "file", bits)

    assert verified("sha256:mine").ok
    assert verified("").ok
    with pytest.raises(
        VerificationError, match=r"fingerprint sha256:other\.\.\., the bit configuration of one with sha256:mine"
    ):
        verified("sha256:other").check()


def test_what_is_allowed_is_bounded():
    """The tolerance, or three times the module's own difference, never more than a quarter of a standard deviation."""
    allowed = [OutputCheck(1.0, 1.0, 0.0, 1e-3, own_difference=own).allowed for own in (0.0, 0.01, 10.0)]
    assert allowed == pytest.approx([1e-3, 0.03, 0.25])


class _Stub(AbstractAdapter):
    """An adapter whose file computes `exactly` or, as deployed, `by_default`; inputs that are not of `only` are refused."""

    name = "stub"

    def __init__(self, exactly, by_default, only=None, held=None):
        self._exactly, self._by_default, self._only = exactly, by_default, only
        self._held = held or BitConfig({}, "")

    def read_bits(self, path):
        return self._held

    def codes(self, module):
        return {}

    def read_codes(self, path):
        return {}

    def run(self, path, inputs, *, exact=True):
        if self._only not in (None, len(inputs)):
            raise VerificationError("wrong batch")
        return [(self._exactly if exact else self._by_default)(inputs).numpy()]


_Stub.__abstractmethods__ = frozenset()  # the rest of an adapter is not asked for


def _verified(stub, n_images=4):
    module = torch.nn.Identity()
    attach_bits(module, BitConfig({}, ""))
    images = torch.randn(n_images, 3, generator=torch.Generator().manual_seed(0))
    return verify(stub, "file", BitConfig({}, ""), module=module, inputs=images)


def test_what_the_runtime_does_by_default_is_a_second_figure():
    """The deployed difference is reported; it fails only where the outputs are not recognisable, 1 deviation off here."""
    near = _verified(_Stub(lambda x: x, lambda x: x + 0.01 * x.std(correction=0)))
    assert near.ok
    assert near.outputs.mean_relative == 0.0
    assert near.outputs.deployed == pytest.approx(0.01, rel=1e-3)
    far = _verified(_Stub(lambda x: x, lambda x: x + x.std(correction=0)))
    assert "as the runtime executes the file by default" in far.problems[0]


def test_another_batch_size_is_compared_where_the_file_allows_it():
    """A file that is wrong for one image alone fails with four; one made for four is told as not compared at one."""
    assert _verified(_Stub(lambda x: x, lambda x: x)).outputs.batch_sizes == (4, 1)
    assert _verified(_Stub(lambda x: x, lambda x: x), n_images=1).outputs.batch_sizes == (1, 2)
    wrong = _Stub(lambda x: x if len(x) > 1 else -x, lambda x: x)
    assert not _verified(wrong).outputs.ok
    fixed = _verified(_Stub(lambda x: x, lambda x: x, only=4))
    assert fixed.ok
    assert (fixed.outputs.batch_sizes, fixed.outputs.refused_batch) == ((4,), "1: VerificationError: wrong batch")


@pytest.mark.parametrize(("name", "suffix"), [("nncf", ".xml"), ("brevitas", ".onnx")])
def test_a_slightly_wrong_file_of_a_chaotic_network_is_told(tmp_path, name, suffix):
    """An untrained ResNet-18 at 3 bits differs from itself by rounding ties; a wrong batch norm still does not pass."""
    torch.manual_seed(0)
    net, images = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(8, 3, 64, 64)
    inventory = find_layers(net, images[:1])
    bits = BitConfig({layer.name: Precision(3, 3) for layer in inventory}, inventory.fingerprint)
    adapter = make("adapters", name)
    module = adapter.prepare(net, bits, images[:1], [images])
    path = adapter.export(module, tmp_path / f"net{suffix}", images[:1])
    verify(adapter, path, bits, module=module, inputs=images).check()
    with torch.no_grad():
        dict(module.named_parameters())["layer2.0.bn1.bias"] += 0.01
    with pytest.raises(VerificationError, match="outputs differ by"):
        verify(adapter, path, bits, module=module, inputs=images).check()
