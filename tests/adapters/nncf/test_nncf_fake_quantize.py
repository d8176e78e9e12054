"""NNCF's fake quantization without its compiled extension."""

import os
import subprocess
import sys

import pytest
import torch
from mpq_nncf.fake_quantize import TorchFunctions, spare_compiling

# 4 levels from -1 to 0.5: codes -2, -1, 0, 1 in steps of 0.5.
LOW, EXTENT = torch.tensor([-1.0]), torch.tensor([1.5])
VALUES = torch.tensor([-2.0, -0.6, 0.24, 0.26, 3.0])


def test_values_go_to_the_nearest_code():
    """Hand-worked: steps of 0.5, clipped to the range."""
    assert TorchFunctions.Quantize_forward(VALUES, LOW, EXTENT, 4).tolist() == [-1.0, -0.5, 0.0, 0.5, 0.5]


def test_gradients_pass_inside_the_range_and_go_to_its_ends_outside():
    """Hand-worked: the extent gets the rounding error over the extent, -2 below the range and 1 above it."""
    of_values, of_low, of_extent = TorchFunctions.Quantize_backward(torch.ones(5), VALUES, LOW, EXTENT, 4, -2, 1, True)
    assert of_values.tolist() == [0, 1, 1, 1, 0]
    assert of_low.tolist() == [2]
    torch.testing.assert_close(of_extent, torch.tensor([-2 + (0.1 - 0.24 + 0.24) / 1.5 + 1]))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (6, 1, 1, 1)])
@pytest.mark.parametrize("levels", [4, 15, 256])
def test_equals_the_reference_of_nncf(shape, levels):
    """NNCF's own reference in numpy gives the same values to the bit, and the same gradients."""
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize, torch_executor

    in_numpy = ReferenceQuantize(ReferenceBackendType.NUMPY)

    generator = torch.Generator().manual_seed(levels)
    values, gradient = torch.randn((6, 5, 3, 3), generator=generator), torch.randn((6, 5, 3, 3), generator=generator)
    low = -torch.rand(shape, generator=generator) - 0.1
    extent = torch.rand(shape, generator=generator) + 0.5
    ours = TorchFunctions.Quantize_forward(values, low, extent, levels)
    assert (ours.numpy() == in_numpy.forward(values.numpy(), low.numpy(), extent.numpy(), levels)).all()
    arguments = (gradient, values, low, extent, levels, -(levels // 2), levels // 2 - 1)
    expected = torch_executor.backward(*arguments)
    found = TorchFunctions.Quantize_backward(*arguments, True)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2].reshape(shape), rtol=1e-4, atol=1e-5)


class _Namespace:
    """Stands for NNCF's holder of compiled functions."""

    def __init__(self, folder, loaded=None):
        self._loaded_namespace, self._loader = loaded, self
        self._folder, self.n_loads = folder, 0

    def get_build_dir(self):
        return str(self._folder)

    def load(self):
        self.n_loads += 1


def test_an_extension_that_is_loaded_stays(tmp_path):
    """What the user's own code compiled before is not taken away."""
    mine = _Namespace(tmp_path, loaded="compiled")
    spare_compiling(mine, None if not torch.cuda.is_available() else _Namespace(tmp_path))
    assert mine._loaded_namespace == "compiled"


def test_compiling_for_cuda_is_told_before(tmp_path, monkeypatch, caplog):
    """One warning before the first build, none where a build lies ready."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = _Namespace(tmp_path)
    spare_compiling(_Namespace(tmp_path), cuda)
    cuda._loader.load()
    assert "compiles" in caplog.text
    caplog.clear()
    (tmp_path / "kernels.so").touch()
    cuda._loader.load()
    assert not caplog.text
    assert cuda.n_loads == 2


def test_nothing_is_compiled_on_the_cpu(tmp_path):
    """A fresh process quantizes through NNCF's own function, forward and backward, and its build folder stays empty."""
    code = """
import torch
from mpq_nncf.internals import private
private()
from nncf.torch.quantization.quantize_functions import QuantizeSymmetric
values, scale = torch.randn(8, requires_grad=True), torch.ones(1, requires_grad=True)
QuantizeSymmetric.apply(values, scale, -128, 127, 256).sum().backward()
assert values.grad is not None and scale.grad is not None
"""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert not list(tmp_path.rglob("*.so"))
