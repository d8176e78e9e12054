"""Operations spelled in those that file formats have: the same values, and torch's own answers at the edges."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mpq_plugins.adapter.spelled import Spelled
from mpq_plugins.model.parametrized import without_parametrizations

VALUES = [torch.arange(6.0).square().reshape(2, 3), torch.tensor([True, False, False]), torch.arange(2), torch.zeros(0)]


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("value", VALUES, ids=["matrix", "truth", "two", "none"])
def test_differences_are_those_of_torch(value, n):
    """Of any order, also where nothing is left to subtract."""
    expected = torch.diff(value, n)
    with Spelled():
        found = torch.diff(value, n)
    assert torch.equal(found, expected)
    assert found.shape == expected.shape


def test_a_negative_order_is_refused_as_by_torch():
    """The spelling does not turn an error into an answer."""
    with pytest.raises(RuntimeError, match="order"), Spelled():
        torch.diff(torch.arange(3), -1)


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value


def test_parametrized_buffers_stay_buffers():
    """Of parameters come parameters, of buffers buffers, whole numbers too."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2))
    module.register_buffer("mean", torch.ones(2))
    module.register_buffer("count", torch.ones(2, dtype=torch.long))
    for name in ("weight", "mean", "count"):
        parametrize.register_parametrization(module, name, Doubled())
    without_parametrizations(module)
    assert set(dict(module.named_parameters())) == {"weight"}
    assert set(dict(module.named_buffers())) == {"mean", "count"}
    assert all(torch.equal(value.detach(), torch.full((2,), 2).to(value)) for value in module.state_dict().values())
