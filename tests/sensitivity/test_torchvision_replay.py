"""Replays of torchvision's networks at a small size against whole passes of them; all of these can be replayed."""

import pytest
import torch
import torchvision
from naive_loops import NaiveLoop

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.proxies.measuring import Engine

NETS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=10),
    "convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(16, 32, 2), torchvision.models.convnext.CNBlockConfig(32, None, 2)],
        num_classes=10,
    ),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10),
}


@pytest.mark.parametrize("name", NETS)
def test_replays_equal_whole_passes(name):
    """Outputs with one of six units quantized, spread over the network, differ from whole passes by rounding only."""
    torch.manual_seed(0)
    model = NETS[name]().eval()
    if name == "vit":
        torch.nn.init.normal_(model.heads.head.weight)  # zero at the start
    images = torch.randn(2, 3, 32, 32)
    layers = [layer.name for layer in find_layers(model, images[:1])]
    chosen = layers[:: max(1, len(layers) // 6)]
    space = Space.build(find_layers(model, images[:1], include=chosen), menu((2, 3), (8,)))
    engine = Engine.start(model, space, Batch(images))
    assert engine.player is not None, engine.why_plain
    naive = NaiveLoop(model, space, [(images, None)])
    run = engine.run(Batch(images))
    for unit in range(len(space.units)):
        for choice, output in enumerate(run.single(unit, (0, 1))):
            expected = naive.logits((unit, choice))
            assert (output - expected).abs().max() < 1e-4 * expected.std()
