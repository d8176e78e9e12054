"""PROFIT driven by a plain loop: what is frozen when, and going on after a stop."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from mpq_plugins.errors import FormatError, ModelError
from mpq_plugins.training import Profit, ProfitSchedule, parameter_groups

# Two epochs to settle and to settle again, one for every other stage.
SCHEDULE = ProfitSchedule(widths=(), float_epochs=0, settle_epochs=1, train_epochs=1, sample_epochs=2)


def _stages(case):
    """The last stages, which run at the target bits that the module has."""
    return [stage for stage in SCHEDULE.stages(case.bits) if stage.bits == case.bits and not stage.float_weights]


def _run(module, profit, images, labels, *, first=(0, 0), optimizer=None, stop=None, on_epoch=lambda: None):
    """A plain loop with one optimizer for all stages; stops before (stage, epoch) `stop`; returns the optimizer."""
    optimizer = optimizer or torch.optim.SGD(parameter_groups(module, learning_rate=0.01, weight_decay=1e-3), momentum=0.9)
    for index in range(first[0], len(profit.stages)):
        stage = profit.on_stage(index, module)
        for epoch in range(first[1] if index == first[0] else 0, stage.epochs):
            if (index, epoch) == stop:
                return optimizer
            profit.on_epoch()
            for _ in range(3):
                optimizer.zero_grad()
                with profit.forward():
                    loss = F.cross_entropy(module(images), labels)
                loss.backward()
                profit.on_step()
                optimizer.step()
            on_epoch()
    return optimizer


def _values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", ["brevitas", "nncf"])
def test_layers_freeze_by_thirds_in_descending_instability(case, images, labels, kind):
    """Weights stay while settling; then the 4 and the 9 most unstable of 14 layers stay, and no others."""
    made = case("digits", kind)
    profit, layers = Profit(_stages(made)), list(made.bits.layers)
    before, still = _values(made.module), []

    def compare():
        nonlocal before
        after = _values(made.module)
        still.append({name for name in layers if torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])})
        assert not torch.equal(after["bn.bias"], before["bn.bias"])
        before = after

    _run(made.module, profit, images, labels, on_epoch=compare)
    values = profit.instability
    assert set(values) == set(layers)
    order = sorted(layers, key=lambda name: -values[name])
    assert [len(names) for names in still] == [14, 0, 0, 0, 4, 9, 14]
    assert still[4] == set(order[:4])
    assert still[5] == set(order[:9])
    assert profit.frozen == ()


@pytest.mark.parametrize("stop", [(1, 1), (2, 0), (4, 0)])
def test_a_resumed_run_ends_like_one_never_stopped(case, images, labels, stop):
    """Stopped while measuring, between stages and while layers are frozen, the final weights are the same bits."""
    made = case("digits", "nncf")
    stages, start = _stages(made), copy.deepcopy(made.module.state_dict())
    whole = Profit(stages)
    _run(made.module, whole, images, labels)
    expected = _values(made.module)
    made.module.load_state_dict(start)
    first = Profit(stages)
    optimizer = _run(made.module, first, images, labels, stop=stop)
    saved = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = Profit(stages)
    second.load_state_dict(saved)
    assert saved["stage"] == stop[0]
    _run(made.module, second, images, labels, first=stop, optimizer=optimizer)
    assert second.instability == whole.instability
    assert all(torch.equal(value, expected[name]) for name, value in _values(made.module).items())


def test_freezing_without_measuring_is_refused(case):
    """A frozen stage that nothing was measured for says what to call."""
    made = case("digits", "brevitas")
    profit = Profit(_stages(made))
    with pytest.raises(ModelError, match="none was measured"):
        profit.on_stage(3, made.module)


def test_a_stage_must_be_started(case):
    """Before `on_stage` there is no stage to be in."""
    with pytest.raises(ModelError, match="on_stage"):
        Profit(_stages(case("digits", "brevitas"))).on_step()


def test_the_state_of_another_schedule_is_refused(case):
    """Resuming with another number of epochs is refused, with the advice."""
    made = case("digits", "brevitas")
    state = Profit(SCHEDULE.stages(made.bits)).state_dict()
    with pytest.raises(FormatError, match="number of epochs of the first run"):
        Profit(SCHEDULE.stages(made.bits, epochs=20)).load_state_dict(state)
