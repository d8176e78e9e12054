"""Images of a folder are as high and wide as the input says."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpq_plugins.cli.sources import image_size, load_data
from mpq_plugins.cli.training_sources import calibration_data, training_data
from mpq_plugins.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Two classes of gradients 60 pixels wide and 40 high: red grows from left to right, green from top to bottom."""
    rows, columns = np.mgrid[0:40, 0:60]
    pixels = np.stack([columns * 4, rows * 6, np.zeros_like(rows)], axis=2).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "image.png")
    return f"imagefolder:{tmp_path}"


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (32, 32), (96, 160)])
def test_evaluation_training_and_calibration(folder, height, width):
    """All three give [n, 3, height, width], for images that are smaller than the crop, too."""
    shape = (1, 3, height, width)
    assert next(iter(load_data(folder, input_shape=shape))).inputs.shape[1:] == shape[1:]
    assert calibration_data(folder, 2, size=(height, width), batch_size=2)[0].inputs.shape[1:] == shape[1:]
    assert next(iter(training_data(folder, size=(height, width), batch_size=2, workers=0)))[0].shape[1:] == shape[1:]


def test_proportions_are_kept(folder):
    """The image is scaled by one factor: red grows by 4 and green by 6 a source pixel, so their slopes stay as 2 to 3."""
    image = next(iter(load_data(folder, input_shape=(1, 3, 24, 60)))).inputs[0]
    red, green = image[0] * 0.229, image[1] * 0.224
    slopes = [float(red[12, 40] - red[12, 20]) / 20, float(green[20, 30] - green[4, 30]) / 16]
    assert slopes[1] / slopes[0] == pytest.approx(6 / 4, rel=0.1)


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (1, 3, 8), (1, 64)])
def test_inputs_that_are_no_colour_images_are_refused(shape):
    """What a folder of images cannot give is told before anything is read."""
    with pytest.raises(DataError, match="gives images of 3 channels"):
        image_size(shape)
    assert image_size(None) == (224, 224)
    assert torch.Size((1, 3, *image_size((1, 3, 96, 160)))) == (1, 3, 96, 160)
