"""Recipes are plain values: a file gives back what was saved, and what cannot be meant is refused by name."""

import dataclasses
import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from mpq_plugins.errors import FormatError, MPQError, TrainingError
from mpq_plugins.training import ProfitSchedule, TrainingRecipe
from mpq_plugins.training.recipe import rate_factor

OTHERS = {
    "method": "profit",
    "epochs": 30,
    "learning_rate": 0.02,
    "weight_decay": 1e-4,
    "momentum": 0.8,
    "range_factor": 0.1,
    "warm_up": 0.2,
    "restarts": False,
    "label_smoothing": 0.05,
    "teacher_weight": 0.5,
    "temperature": 2.0,
    "clip_norm": 1.0,
    "ema_decay": 0.999,
    "batch_norm": "re-estimated",
    "mixed_precision": "bf16",
    "seed": 7,
    "profit": ProfitSchedule((8, 6, 4), parts=4),
}


def test_a_saved_recipe_comes_back(tmp_path):
    """Every field survives the file, the schedule of PROFIT included, and defaults fill what a file leaves out."""
    recipe = TrainingRecipe(**OTHERS)
    assert {field.name for field in dataclasses.fields(recipe)} == set(OTHERS)
    assert TrainingRecipe.load(recipe.save(tmp_path / "recipe.json")) == recipe
    (tmp_path / "short.json").write_text('{"format": "mpq-recipe/1", "epochs": 3, "profit": {"widths": [6]}}')
    assert TrainingRecipe.load(tmp_path / "short.json") == TrainingRecipe(epochs=3, profit=ProfitSchedule((6,)))


@pytest.mark.parametrize(("switch", "meant"), [(True, "re-estimated"), (False, "kept")])
def test_the_old_switch_is_read(switch, meant):
    """Recipes written before `batch_norm` have `bn_reestimation`; beside it that is an unknown key."""
    assert TrainingRecipe.from_json({"bn_reestimation": switch}) == TrainingRecipe(batch_norm=meant)
    with pytest.raises(FormatError, match="bn_reestimation"):
        TrainingRecipe.from_json({"bn_reestimation": switch, "batch_norm": "kept"})


WRONG = {
    "method": "sgd",
    "mixed_precision": "fp8",
    "epochs": 0,
    "learning_rate": -0.1,
    "temperature": 0,
    "weight_decay": -1e-4,
    "range_factor": "0.01",
    "teacher_weight": math.nan,
    "momentum": 1.0,
    "label_smoothing": True,
    "warm_up": 1.5,
    "ema_decay": "0.9",
    "clip_norm": math.inf,
    "restarts": 1,
    "batch_norm": True,
    "seed": 0.5,
}


@pytest.mark.parametrize("name", WRONG)
def test_values_out_of_bounds_are_refused_by_name(name):
    """A number out of its range, NaN, and text for a number are errors that name the field and the value."""
    with pytest.raises(TrainingError, match=f"^the training recipe: {name} must be .* not {WRONG[name]!r}"):
        TrainingRecipe(**{name: WRONG[name]})


@pytest.mark.parametrize(
    "document",
    [
        {"epoch": 3},
        {"profit": [8, 5]},
        {"profit": {"width": [4]}},
        {"profit": {"widths": 4}},
        {"profit": {"widths": [1]}},
        {"profit": {"parts": 0}},
        {"profit": {"train_epochs": "15"}},
        {"profit": {"settle_epochs": -1}},
    ],
    ids=json.dumps,
)
def test_files_that_cannot_be_meant_are_refused(document, tmp_path):
    """Unknown keys, and lengths that are none, are errors that name the key and the file."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"format": "mpq-recipe/1", **document}))
    with pytest.raises(FormatError) as error:
        TrainingRecipe.load(path)
    assert "recipe.json" in str(error.value)
    assert isinstance(error.value, MPQError)


def test_the_rate_by_hand():
    """Ten steps, two of them rising: 1/2, 1, then half a cosine over eight steps from its top."""
    cosine = [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [rate_factor(step, 10, 0.2) for step in range(10)] == pytest.approx([0.5, 1, *cosine])
    assert [rate_factor(step, 2, 0.0) for step in range(2)] == pytest.approx([1, 0.5])
    assert rate_factor(0, 1, 0.9) == 1


@pytest.mark.parametrize(("n_steps", "warm_up"), [(20, 0.25), (13, 0.3), (7, 0.0)])
def test_the_rate_is_that_of_torch(n_steps, warm_up):
    """torch's LinearLR, then its CosineAnnealingLR, give the same rates."""
    rising = math.floor(n_steps * warm_up)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    cosine = CosineAnnealingLR(optimizer, n_steps - rising)
    if rising:
        linear = LinearLR(optimizer, 1 / rising, 1.0, rising - 1)
        schedule = SequentialLR(optimizer, [linear, cosine], [rising])
    else:
        schedule = cosine
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [rate_factor(step, n_steps, warm_up) for step in range(n_steps)] == pytest.approx(rates)
