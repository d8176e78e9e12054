"""The running average, against its formula worked out apart."""

import pytest
import torch
from torch import nn

from mpq_plugins.training.average import Averaged


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()


def steps(module: nn.Module, n_steps: int, average: Averaged) -> list[dict[str, torch.Tensor]]:
    """Train, and give the state before the first and after every step."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    states = [{name: tensor.clone() for name, tensor in module.state_dict().items()}]
    for _ in range(n_steps):
        optimizer.zero_grad()
        module(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        average.update()
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    return states


def test_the_average_is_its_formula():
    """After 12 steps every tensor is the sum of all states by weights that are worked out from the decays backwards."""
    module = net()
    average = Averaged(module, 0.4)
    states = steps(module, 12, average)
    decays = [min(0.4, (1 + n) / (10 + n)) for n in range(12)]
    weights, rest = [], 1.0
    for decay in reversed(decays):
        weights.insert(0, rest * (1 - decay))
        rest *= decay
    assert sum(weights) + rest == pytest.approx(1)
    average.settle()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            parts = zip([rest, *weights], states, strict=True)
            expected = sum(weight * state[name].double() for weight, state in parts)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert tensor.item() == 12  # counts are counts


def test_swapped_in_values_go_away_again():
    """Inside the block the module holds the average, after it its own values bit for bit, errors or not."""
    module = net()
    average = Averaged(module, 0.9)
    last = steps(module, 3, average)[-1]
    inside = {}

    def interrupted():
        with average.in_place():
            inside.update({name: tensor.clone() for name, tensor in module.state_dict().items()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(tensor, last[name]) for name, tensor in module.state_dict().items())
    average.settle()
    assert all(torch.equal(tensor, inside[name]) for name, tensor in module.state_dict().items())
    assert not torch.equal(inside["0.weight"], last["0.weight"])


def test_a_saved_average_goes_on():
    """State taken to another average of the same module gives the same values from there on."""
    module = net()
    first, second = Averaged(module, 0.99), Averaged(module, 0.99)
    steps(module, 2, first)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        module[0].weight.add_(1)
    first.update()
    second.update()
    assert first.n_steps == second.n_steps == 3
    own, other = first.state_dict()["average"], second.state_dict()["average"]
    assert all(torch.equal(own[name], other[name]) for name in own)
