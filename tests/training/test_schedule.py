"""The stages of PROFIT, worked out by hand."""

import pytest

from mpq_plugins import BitConfig, Precision
from mpq_plugins.errors import ModelError
from mpq_plugins.training import ProfitSchedule, stage_at
from mpq_plugins.training.schedule import apportion


def _bits(**layers):
    return BitConfig({name: Precision(*pair) for name, pair in layers.items()}, "sha256:0")


W4A4 = _bits(a=(4, 4), b=(4, 4), c=(4, 4))


def _widths(stage):
    return None if stage.bits is None else {name: (p.weight, p.activation) for name, p in stage.bits.layers.items()}


def test_the_published_schedule():
    """4-bit weights and activations give the published 200 epochs, stage by stage."""
    stages = ProfitSchedule().stages(W4A4)
    around = [5, 15, 5]
    assert [stage.epochs for stage in stages] == [15, *around * 3, *around * 2, 5, 5, 15, 15, 15, 5]
    assert sum(stage.epochs for stage in stages) == 200
    # float; activations 8, 5, 4 under float weights; weights 8, 5, and 4 for good
    expected = [None, *[(8, 8)] * 3, *[(8, 5)] * 3, *[(8, 4)] * 3, *[(8, 4)] * 3, *[(5, 4)] * 3, *[(4, 4)] * 6]
    assert [None if stage.bits is None else _widths(stage)["a"] for stage in stages] == expected
    assert [stage.float_weights for stage in stages] == [False, *[True] * 9, *[False] * 12]
    assert [stage.trains_weights for stage in stages] == [True, *[False, True, False] * 5, False, True, True, True, True, False]
    assert [stage.name for stage in stages if stage.samples] == ["measuring AIWQ"]
    assert [stage.n_frozen for stage in stages[-6:]] == [0, 0, 0, 1, 2, 0]


def test_mixed_bits_go_down_to_their_own_target():
    """Every layer stops at its target: one of 6 bits passes 8 and 6, one of 8 stays, one of 2 passes 8 and 5."""
    target = _bits(first=(8, 8), middle=(6, 4), last=(2, 3))
    trained = [stage for stage in ProfitSchedule().stages(target) if stage.trains_weights and stage.bits is not None]
    seen = list(dict.fromkeys(tuple(_widths(stage).items()) for stage in trained))
    assert [dict(widths) for widths in seen] == [
        {"first": (8, 8), "middle": (8, 8), "last": (8, 8)},
        {"first": (8, 8), "middle": (8, 5), "last": (8, 5)},
        {"first": (8, 8), "middle": (8, 4), "last": (8, 3)},
        {"first": (8, 8), "middle": (6, 4), "last": (5, 3)},
        {"first": (8, 8), "middle": (6, 4), "last": (2, 3)},
    ]
    for stage in trained:
        assert all(stage.bits[name].weight >= target[name].weight for name in target.layers)
        assert all(stage.bits[name].activation >= target[name].activation for name in target.layers)
    assert trained[-1].bits == target


def test_widths_that_change_nothing_are_left_out():
    """With 5-bit targets there is no step from 5 to 5; with 8-bit ones only quantizing at all is a step."""
    names = [stage.name for stage in ProfitSchedule().stages(_bits(a=(5, 5))) if "settling" not in stage.name]
    assert names == [
        "float",
        "activations at 8 bits",
        "activations at target bits",
        "weights at 8 bits",
        "measuring AIWQ",
        "all layers",
        "1/3 of the layers frozen",
        "2/3 of the layers frozen",
    ]
    names = [stage.name for stage in ProfitSchedule().stages(_bits(a=(8, 8))) if "settling" not in stage.name]
    assert names[:3] == ["float", "activations at target bits", "measuring AIWQ"]


def test_lengths_scale_to_the_epochs_given():
    """At 100 epochs every length is halved, the last halves rounded up so that the sum is right."""
    stages = ProfitSchedule().stages(W4A4, epochs=100)
    # 9 stages of 15 have the share 7.5 and 13 of 5 the share 2.5: 89 are whole, the 11 missing go to the last eleven.
    early = [7, 2, 7, 2, 2, 7, 2, 2, 7, 2, 2]
    late = [8, 3, 3, 8, 3, 3, 3, 8, 8, 8, 3]
    assert [stage.epochs for stage in stages] == early + late


@pytest.mark.parametrize("epochs", range(3, 60))
def test_few_epochs(epochs):
    """Any number of epochs from 3 is met exactly, no stage is empty, and measuring comes before freezing."""
    stages = ProfitSchedule().stages(W4A4, epochs=epochs)
    assert sum(stage.epochs for stage in stages) == epochs
    assert min(stage.epochs for stage in stages) >= 1
    samples = [index for index, stage in enumerate(stages) if stage.samples]
    frozen = [index for index, stage in enumerate(stages) if stage.n_frozen]
    assert len(samples) == 1
    assert len(frozen) == 2
    assert samples[0] < frozen[0]


def test_what_is_left_out_first():
    """At 3 epochs what measures and freezes is left; at 9 each trained width but the first; at 11 float is back."""

    def names(epochs):
        return [stage.name for stage in ProfitSchedule().stages(W4A4, epochs=epochs)]

    last = ["1/3 of the layers frozen", "2/3 of the layers frozen"]
    assert names(3) == ["measuring AIWQ", *last]
    assert names(4) == ["measuring AIWQ", "all layers", *last]
    assert names(5) == ["weights at 5 bits", "measuring AIWQ", "all layers", *last]
    assert names(9)[0] == "activations at 8 bits"
    assert names(10)[:2] == ["float", "activations at 8 bits"]
    assert names(11)[-1] == "target bits: settling again"
    assert len(names(22)) == 22


def test_too_few_epochs_are_refused():
    """Two epochs cannot hold measuring and two frozen stages; the error says how many can."""
    with pytest.raises(ModelError, match="at least 3 epochs"):
        ProfitSchedule().stages(W4A4, epochs=2)


def test_another_recipe():
    """Lengths of 0 leave stages out; parts of 4 freeze quarters; other widths are passed through."""
    recipe = ProfitSchedule(widths=(6,), parts=4, float_epochs=0, settle_epochs=0)
    stages = recipe.stages(_bits(a=(4, 4), b=(4, 4), c=(4, 4), d=(4, 4), e=(2, 2)))
    assert [_widths(stage)["e"] for stage in stages[:3]] == [(8, 6), (8, 2), (6, 2)]
    assert [stage.n_frozen for stage in stages[-3:]] == [1, 2, 3]
    assert all(stage.trains_weights for stage in stages)


@pytest.mark.parametrize(
    ("lengths", "total", "expected"),
    [
        ([15, 5], 4, [3, 1]),
        ([15, 5, 5], 4, [2, 1, 1]),  # 2.4, 0.8, 0.8: the small ones get their 1 first
        ([1, 1, 1], 4, [1, 1, 2]),  # equal remainders: the later
        ([10, 10, 1], 3, [1, 1, 1]),
        ([3, 2, 2], 10, [4, 3, 3]),  # 4.29, 2.86, 2.86
    ],
)
def test_apportionment_by_hand(lengths, total, expected):
    """Whole numbers in proportion, at least 1, by largest remainders."""
    assert apportion(lengths, total) == expected


def test_stage_of_an_epoch():
    """Epochs are counted over all stages; one beyond the schedule is refused."""
    stages = ProfitSchedule().stages(W4A4)
    assert stage_at(stages, 0) == (0, 0)
    assert stage_at(stages, 14) == (0, 14)
    assert stage_at(stages, 15) == (1, 0)
    assert stage_at(stages, 199) == (len(stages) - 1, 4)
    with pytest.raises(IndexError, match="200 epochs"):
        stage_at(stages, 200)
