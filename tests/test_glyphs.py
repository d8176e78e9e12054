"""The rendered glyphs, and the small networks trained on them."""

import dataclasses
import sys

import pytest
import torch
from glyphs import (
    CLASSES,
    FONTS,
    HELD_OUT_FONTS,
    Distortion,
    Recipe,
    cached_path,
    glyphs,
    save_sheet,
    trained_glyph_net,
)
from glyphs.fonts import masters
from small_nets import SMALL_NETS, mobilenet_v2, mobilenet_v3, resnet20

from mpq_plugins import find_layers
from mpq_plugins.errors import DataError, FormatError, MissingExtraError, ModelError, WriteError

N_CLASSES = 72
SHORT = Recipe(n_rounds=1, images_per_round=64, batch_size=32)
STILL = Distortion(
    rotation_degrees=0,
    shear=0,
    aspect=1,
    scale=(0.75, 0.75),
    shift=0,
    bend=0,
    stroke=0,
    blur=0,
    clutter=0,
    contrast=1,
    shade=0,
    noise=0.02,
)


def stacked(batches):
    return torch.cat([batch.inputs for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.fixture(scope="module")
def train():
    return stacked(glyphs(train=True, n_images=2880))


@pytest.fixture(scope="module")
def test():
    return stacked(glyphs(train=False, n_images=1440))


def test_batches_have_the_shape_range_and_classes_that_are_documented(test):
    """1,440 images hold each of the 72 classes 20 times, in [-1, 1], and batches have the size asked for."""
    images, labels = test
    assert images.shape == (1440, 1, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.bincount().tolist() == [20] * N_CLASSES
    assert len(set(CLASSES)) == len(CLASSES) == N_CLASSES
    assert [len(batch) for batch in glyphs(train=True, n_images=70, batch_size=32)] == [32, 32, 6]


def test_the_same_seed_gives_the_same_images():
    """Rendering again gives every pixel again, whatever the global random state; another seed gives others."""
    first = stacked(glyphs(train=True, n_images=100, seed=3))
    torch.rand(5)
    again = stacked(glyphs(train=True, n_images=100, seed=3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], stacked(glyphs(train=True, n_images=100, seed=4))[0])


def test_rendering_leaves_the_global_random_state_alone():
    """What the caller draws afterwards does not depend on having rendered."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    glyphs(train=False, n_images=10)
    assert torch.equal(torch.rand(3), expected)


def test_train_and_test_share_no_image(train, test):
    """The closest pair across the parts is about as far apart as the closest pair of different test images."""
    across = torch.cdist(train[0].flatten(1), test[0].flatten(1)).min()
    within = torch.cdist(test[0].flatten(1), test[0].flatten(1)).fill_diagonal_(torch.inf).min()
    assert across > 0.5 * within
    assert across > 1


def test_held_out_fonts_are_for_testing_only(monkeypatch):
    """Training asks for no master of a held-out font, testing for those of all fonts."""
    asked = []
    monkeypatch.setattr("glyphs.data.masters", lambda fonts: asked.append(fonts) or masters(fonts))
    glyphs(train=True, n_images=1)
    glyphs(train=False, n_images=1)
    assert set(asked[0]) == set(FONTS) - set(HELD_OUT_FONTS)
    assert len(asked[0]) == len(FONTS) - len(HELD_OUT_FONTS)
    assert set(asked[1]) == set(FONTS)


def test_every_font_with_letters_has_the_latin_classes_and_greek_has_many_fonts():
    """All 21 fonts draw the 52 Latin characters; the 16 with Unicode Greek draw 72, so there are 16 x 72 + 5 x 52 masters."""
    inks, labels = masters(FONTS)
    assert len(inks) == 16 * 72 + 5 * 52
    assert labels.bincount().tolist() == [21] * 52 + [16] * 20
    assert inks.flatten(1).amax(1).min() > 0.9


def test_no_two_classes_look_the_same_in_one_font():
    """Undistorted, the ink of two characters of DejaVu Sans never overlaps by 90 % of what either covers."""
    inks, _ = masters(("DejaVuSans",))
    ink = (inks.flatten(1) > 0.5).float()
    both = ink @ ink.T
    overlap = both / (ink.sum(1)[:, None] + ink.sum(1) - both)
    assert overlap.fill_diagonal_(0).max() < 0.9


def test_ink_has_the_size_and_place_that_the_options_say():
    """At a fixed scale of 0.75 the longer side is 0.75 x 32 = 24 pixels, centred; noise and antialiasing blur it by one."""
    images, _ = stacked(glyphs(train=True, n_images=72, distortion=STILL))
    dark = images[:, 0] > 0
    rows, columns = dark.any(2), dark.any(1)
    longer = torch.maximum(rows.sum(1), columns.sum(1))
    assert longer.float().median() == pytest.approx(24, abs=1)
    positions = torch.arange(32.0)
    assert ((rows * positions).sum(1) / rows.sum(1)).median() == pytest.approx(15.5, abs=0.75)
    assert ((columns * positions).sum(1) / columns.sum(1)).median() == pytest.approx(15.5, abs=0.75)


def test_classes_can_be_told_apart_but_not_by_their_means(train, test):
    """The nearest class mean in pixels is five times better than chance (1.4 %), and far below the networks' 90 %."""
    images, labels = train
    means = torch.zeros(N_CLASSES, 1024).index_add_(0, labels, images.flatten(1)) / (len(labels) / N_CLASSES)
    found = torch.cdist(test[0].flatten(1), means).argmin(1)
    score = (found == test[1]).float().mean()
    assert 0.07 < score < 0.5


def test_each_class_is_legible_without_noise_and_clutter():
    """With mild distortion the nearest of 60 training images per class names most test images of every class."""
    mild = dataclasses.replace(
        Distortion(),
        rotation_degrees=6,
        shear=0.1,
        scale=(0.8, 0.85),
        shift=0.02,
        bend=0.01,
        clutter=0,
        noise=0.03,
        contrast=0.8,
    )
    known, names = stacked(glyphs(train=True, n_images=60 * N_CLASSES, distortion=mild))
    images, labels = stacked(glyphs(train=True, n_images=10 * N_CLASSES, distortion=mild, seed=1))
    found = names[torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)]
    right = torch.zeros(N_CLASSES).index_add_(0, labels, (found == labels).float()) / 10
    assert right.min() >= 0.5
    assert right.mean() > 0.85


def test_no_images_are_refused():
    """A data set of no images is an error that says so."""
    with pytest.raises(DataError, match="at least 1"):
        glyphs(train=True, n_images=0)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    """The error prints the command that installs matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib.ft2font", None)
    masters.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'mpq-plugins\[plots\]'"):
        glyphs(train=True, n_images=1)


def test_the_sheet_is_a_picture(tmp_path):
    """The sheet of samples is a PNG whose height has room for 36 rows of 32 pixels."""
    image_module = pytest.importorskip("PIL.Image")
    path = save_sheet(tmp_path / "sheet.png", per_class=2)
    with image_module.open(path) as image:
        assert image.format == "PNG"
        assert image.height > 36 * 32
    with pytest.raises(WriteError, match="png"):
        save_sheet(tmp_path / "sheet.txt", per_class=1)


@pytest.mark.parametrize(
    ("build", "n_layers", "n_depthwise"), [(resnet20, 22, 0), (mobilenet_v2, 26, 8), (mobilenet_v3, 34, 7)]
)
def test_networks_are_made_of_quantizable_layers(build, n_layers, n_depthwise):
    """Every weight matrix of the network belongs to a layer that `find_layers` reports, each called once."""
    net = build(N_CLASSES).eval()
    layers = find_layers(net, torch.zeros(1, 1, 32, 32))
    assert len(layers) == n_layers
    assert not layers.skipped
    assert sum(layer.groups > 1 for layer in layers) == n_depthwise
    assert sum(layer.n_weights for layer in layers) == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert all(layer.n_calls == 1 for layer in layers)
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, N_CLASSES)


def test_resnet20_has_the_published_cost_but_for_its_input_and_classes():
    """At stride 1 it costs the 40.55 M of the paper's CIFAR network plus what 1 channel, 1x1 shortcuts and 72 classes change.

    Less 2 x 9 x 16 x 32 x 32 in the stem, more 62 x 64 in the classifier, more 16 x 32 x 16 x 16 and 32 x 64 x 8 x 8
    in the shortcuts.
    """
    stages = 6 * 9 * 16 * 16 * 32**2 + 9 * (16 * 32 + 5 * 32 * 32) * 16**2 + 9 * (32 * 64 + 5 * 64 * 64) * 8**2
    stem, shortcuts, classifier = 9 * 16 * 32**2, 16 * 32 * 16**2 + 32 * 64 * 8**2, 64 * 72
    layers = find_layers(resnet20(N_CLASSES, stem_stride=1).eval(), torch.zeros(1, 1, 32, 32))
    assert sum(layer.macs for layer in layers) == stages + stem + shortcuts + classifier
    assert stages + 3 * stem + 64 * 10 == 40_551_040


@pytest.mark.parametrize("kind", SMALL_NETS)
def test_training_moves_every_parameter_and_leaves_the_random_state(kind, tmp_path):
    """Two steps change every tensor of the network; mode and random state are as the caller expects."""
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    net = trained_glyph_net(kind, 1, recipe=SHORT, cache_folder=tmp_path)
    assert torch.equal(torch.rand(2), expected)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        start = SMALL_NETS[kind](N_CLASSES)
    assert not net.training
    assert all(not torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters(), strict=True))


def test_training_is_repeatable(tmp_path):
    """The same kind, seed and recipe give the same weights in two empty caches; another seed gives others."""
    states = [
        trained_glyph_net("resnet20", seed, recipe=SHORT, cache_folder=tmp_path / folder).state_dict()
        for folder, seed in (("a", 0), ("b", 0), ("b", 1))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_a_trained_network_is_read_back_and_not_trained_again(tmp_path, monkeypatch):
    """The second call gives the same logits without training; another recipe or seed is another file."""
    net = trained_glyph_net("resnet20", recipe=SHORT, cache_folder=tmp_path)
    monkeypatch.setattr("glyphs.training._train", lambda *_: pytest.fail("trained again"))
    again = trained_glyph_net("resnet20", recipe=SHORT, cache_folder=tmp_path)
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(images), net(images))
    assert [path.name for path in tmp_path.iterdir()] == [cached_path("resnet20", recipe=SHORT).name]
    others = [cached_path("resnet20", 1, recipe=SHORT), cached_path("resnet20"), cached_path("mobilenet_v2", recipe=SHORT)]
    assert len({path.name for path in (*others, cached_path("resnet20", recipe=SHORT))}) == 4


def test_the_cache_follows_the_users_setting(tmp_path, monkeypatch):
    """`XDG_CACHE_HOME` wins over the home folder; empty counts as unset."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cached_path("resnet20").parent == tmp_path / "x" / "mpq-plugins"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_path("resnet20").parent == tmp_path / ".cache" / "mpq-plugins"


def test_an_interrupted_training_leaves_no_file(tmp_path, monkeypatch):
    """A failure while training is not taken for a trained network later."""
    monkeypatch.setattr("glyphs.training._step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained_glyph_net("resnet20", recipe=SHORT, cache_folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_kinds_and_damaged_files_are_named(tmp_path):
    """The errors name what there is, and which file to delete."""
    with pytest.raises(ModelError, match="resnet20, mobilenet_v2, mobilenet_v3"):
        trained_glyph_net("resnet21")
    path = cached_path("resnet20", recipe=SHORT, cache_folder=tmp_path)
    path.write_bytes(b"not weights")
    with pytest.raises(FormatError, match=path.name):
        trained_glyph_net("resnet20", recipe=SHORT, cache_folder=tmp_path)
