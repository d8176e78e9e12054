"""The models of benchmarks/coverage.py: one of each family, from their own constructors, without weights or downloads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

Inputs = Callable[[int, int], Any]  # number of images, seed -> inputs as the model takes them


@dataclass(frozen=True)
class Subject:
    """A model to try: `build` makes it with random weights, `inputs` what it takes; `package` must be installed."""

    name: str
    group: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    package: str | None = None
    activations: tuple[int, ...] = (8,)

    @property
    def missing(self) -> str | None:
        """The package that has to be installed first, or None."""
        return self.package if self.package and importlib.util.find_spec(self.package) is None else None


def images(size: int, channels: int = 3) -> Inputs:
    """Smooth random images [n, channels, size, size]."""

    def made(n: int, seed: int) -> torch.Tensor:
        coarse = torch.randn(n, channels, 8, 8, generator=_generator(seed))
        return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.1 * normal(channels, size, size)(n, seed + 100)

    return made


def normal(*shape: int) -> Inputs:
    """Standard normal numbers [n, *shape]."""
    return lambda n, seed: torch.randn(n, *shape, generator=_generator(seed))


def tokens(length: int, vocabulary: int) -> Inputs:
    """Whole numbers below `vocabulary` [n, length]."""
    return lambda n, seed: torch.randint(1, vocabulary, (n, length), generator=_generator(seed))


def named(**inputs: Inputs) -> Inputs:
    """A dict of keyword arguments."""
    return lambda n, seed: {name: made(n, seed + index) for index, (name, made) in enumerate(inputs.items())}


def several(*inputs: Inputs) -> Inputs:
    """A tuple of positional arguments."""
    return lambda n, seed: tuple(made(n, seed + index) for index, made in enumerate(inputs))


def ones(*shape: int) -> Inputs:
    """An attention mask that hides nothing."""
    return lambda n, seed: torch.ones(n, *shape, dtype=torch.long)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# torchvision ----------------------------------------------------------------------------------------------------------


def _of_torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def _torchvision_class(name: str, **options: Any) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(**options)


def _small_convnext() -> nn.Module:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 1)], num_classes=10)


def _small_efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    shapes = ((1, 3, 1, 16, 16), (6, 3, 2, 16, 24), (6, 5, 2, 24, 40), (6, 3, 2, 40, 80))  # expansion, kernel, stride, in, out
    return EfficientNet([MBConvConfig(*shape, 1, 1.0, 1.0) for shape in shapes], dropout=0.2, num_classes=10)


def _small_video_resnet() -> nn.Module:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    return VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=10)


def _segmentation(name: str) -> Callable[[], nn.Module]:
    return partial(_of_torchvision, name, weights_backbone=None, num_classes=3)


class Detector(nn.Module):
    """A detector without what chooses boxes: from random weights, rounding alone decides which of equal scores are kept."""

    def __init__(self) -> None:
        super().__init__()
        whole = _of_torchvision("ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=5)
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head(list(self.backbone(x).values()))


_TORCHVISION: Mapping[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "resnet18": (partial(_of_torchvision, "resnet18", num_classes=10), images(64)),
    "squeezenet1_1": (partial(_of_torchvision, "squeezenet1_1", num_classes=10), images(64)),
    "shufflenet_v2_x0_5": (partial(_of_torchvision, "shufflenet_v2_x0_5", num_classes=10), images(64)),
    "mobilenet_v2": (partial(_of_torchvision, "mobilenet_v2", width_mult=0.35, num_classes=10), images(64)),
    "mobilenet_v3_small": (partial(_of_torchvision, "mobilenet_v3_small", num_classes=10), images(64)),
    "mnasnet0_5": (partial(_of_torchvision, "mnasnet0_5", num_classes=10), images(64)),
    "efficientnet": (_small_efficientnet, images(64)),
    "densenet": (partial(_torchvision_class, "DenseNet", growth_rate=8, block_config=(2, 3, 3)), images(64)),
    "convnext": (_small_convnext, images(64)),
    "swin": (
        partial(
            _torchvision_class, "SwinTransformer", patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4],
            window_size=[4, 4], num_classes=10,
        ),
        images(64),
    ),
    "vit": (
        partial(
            _torchvision_class, "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32,
            mlp_dim=64, num_classes=10,
        ),
        images(32),
    ),
    "maxvit": (
        partial(
            _torchvision_class, "MaxVit", input_size=(64, 64), stem_channels=16, partition_size=2, block_channels=[16, 32],
            block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=10,
        ),
        images(64),
    ),
    "lraspp_mobilenet_v3_large": (_segmentation("lraspp_mobilenet_v3_large"), images(64)),
    "deeplabv3_mobilenet_v3_large": (_segmentation("deeplabv3_mobilenet_v3_large"), images(64)),
    "ssdlite320_mobilenet_v3_large, heads": (Detector, images(64)),
    "video resnet": (_small_video_resnet, normal(3, 4, 32, 32)),
    "raft_small": (partial(_of_torchvision, "raft_small"), several(images(128), images(128))),
}  # fmt: skip


# timm -----------------------------------------------------------------------------------------------------------------


def _of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def timm_model(name: str, size: int = 64, *, sized: bool = False, **options: Any) -> tuple[Callable[[], nn.Module], Inputs]:
    """A timm model for images of `size`; `sized` ones are told the size when they are built."""
    return partial(_of_timm, name, **({"img_size": size} if sized else {}), **options), images(size)


_TIMM: Mapping[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "resnet10t": timm_model("resnet10t"),
    "test_nfnet": timm_model("test_nfnet"),
    "test_byobnet": timm_model("test_byobnet"),
    "test_efficientnet": timm_model("test_efficientnet"),
    "test_efficientnet_gn": timm_model("test_efficientnet_gn"),
    "test_efficientnet_evos": timm_model("test_efficientnet_evos"),
    "tf_mobilenetv3_small_minimal_100": timm_model("tf_mobilenetv3_small_minimal_100"),
    "mobilenetv4_conv_small_035": timm_model("mobilenetv4_conv_small_035"),
    "lcnet_035": timm_model("lcnet_035"),
    "ghostnet_050": timm_model("ghostnet_050"),
    "fasternet_t0": timm_model("fasternet_t0"),
    "starnet_s050": timm_model("starnet_s050"),
    "ese_vovnet19b_slim_dw": timm_model("ese_vovnet19b_slim_dw"),
    "dla46_c": timm_model("dla46_c"),
    "test_convnext": timm_model("test_convnext"),
    "test_convnext2": timm_model("test_convnext2"),
    "inception_next_atto": timm_model("inception_next_atto"),
    "test_mambaout": timm_model("test_mambaout"),
    "edgenext_xx_small": timm_model("edgenext_xx_small"),
    "mobilevit_xxs": timm_model("mobilevit_xxs"),
    "efficientvit_b0": timm_model("efficientvit_b0"),
    "levit_128s": timm_model("levit_128s", 64, sized=True),
    "pvt_v2_b0": timm_model("pvt_v2_b0"),
    "test_vit": timm_model("test_vit", 96, sized=True),
    "vit_relpos_small_patch16_224": timm_model("vit_relpos_small_patch16_224", 64, sized=True, depth=2),
    "test_maxvit": timm_model("test_maxvit", 64, sized=True),
    "swinv2_tiny_window8_256": timm_model("swinv2_tiny_window8_256", 64, sized=True, depths=(1, 1), embed_dim=24),
    "eva02_tiny_patch14_224": timm_model("eva02_tiny_patch14_224", 56, sized=True, depth=2),
    "cait_xxs24_224": timm_model("cait_xxs24_224", 64, sized=True, depth=2),
    "xcit_nano_12_p16_224": timm_model("xcit_nano_12_p16_224", 64, sized=True, depth=2),
    "convit_tiny": timm_model("convit_tiny", 64, sized=True, depth=3),
    "resmlp_12_224": timm_model("resmlp_12_224", 64, sized=True),
    "sequencer2d_s": timm_model("sequencer2d_s", 56, sized=True, layers=(1, 1, 1, 1)),
    "halonet26t": timm_model("halonet26t", 256),
}  # fmt: skip


# transformers ---------------------------------------------------------------------------------------------------------


def _of_transformers(config: str, model: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_SMALL, "vocab_size": 100, "max_position_embeddings": 32}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "use_cache": False}
_IDS = tokens(8, 100)
_MASKED = named(input_ids=_IDS, attention_mask=ones(8))


def _tiny(config: str, model: str, inputs: Inputs, **options: Any) -> tuple[Callable[[], nn.Module], Inputs]:
    return partial(_of_transformers, config, model, **options), inputs


_TRANSFORMERS: Mapping[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "bert": _tiny("BertConfig", "BertForSequenceClassification", _MASKED, **_TEXT),
    "albert": _tiny("AlbertConfig", "AlbertForMaskedLM", _MASKED, embedding_size=16, **_TEXT),
    "distilbert": _tiny(
        "DistilBertConfig", "DistilBertForSequenceClassification", _MASKED, vocab_size=100, dim=32, n_layers=2, n_heads=2,
        hidden_dim=64, max_position_embeddings=32,
    ),
    "gpt2": _tiny(
        "GPT2Config", "GPT2LMHeadModel", _MASKED, vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        use_cache=False,
    ),
    "llama": _tiny("LlamaConfig", "LlamaForCausalLM", named(input_ids=_IDS), **_DECODER),
    "qwen2": _tiny("Qwen2Config", "Qwen2ForCausalLM", _MASKED, tie_word_embeddings=True, **_DECODER),
    "mixtral": _tiny(
        "MixtralConfig", "MixtralForCausalLM", _MASKED, num_local_experts=4, num_experts_per_tok=2,
        experts_implementation="batched_mm", **_DECODER,
    ),
    "t5": _tiny(
        "T5Config", "T5ForConditionalGeneration", named(input_ids=_IDS, decoder_input_ids=tokens(4, 100)), vocab_size=100,
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, use_cache=False, decoder_start_token_id=0,
    ),
    "whisper": _tiny(
        "WhisperConfig", "WhisperForConditionalGeneration",
        named(input_features=normal(16, 64), decoder_input_ids=tokens(4, 100)), vocab_size=100, num_mel_bins=16, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=32, max_target_positions=16, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    ),
    "vit": _tiny("ViTConfig", "ViTForImageClassification", images(32), image_size=32, patch_size=8, **_SMALL),
    "segformer": _tiny(
        "SegformerConfig", "SegformerForSemanticSegmentation", images(64), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=32, num_labels=5,
    ),
    "wav2vec2": _tiny(
        "Wav2Vec2Config", "Wav2Vec2ForCTC", normal(400), vocab_size=30, conv_dim=(16, 16), conv_stride=(5, 2),
        conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **_SMALL,
    ),
    "clip": _tiny(
        "CLIPVisionConfig", "CLIPVisionModelWithProjection", images(32), image_size=32, patch_size=8, projection_dim=8, **_SMALL
    ),
    "mamba": _tiny(
        "MambaConfig", "MambaForCausalLM", named(input_ids=_IDS), vocab_size=100, hidden_size=32, state_size=4,
        num_hidden_layers=2, use_cache=False,
    ),
}  # fmt: skip


# recurrent nets and oddities ------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.recurrent, self.head = nn.Linear(8, 16), kind(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.before(x))[0][:, -1])


class Cell(nn.Module):
    """A recurrent cell, called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.cell, self.head = nn.Linear(8, 16), nn.LSTMCell(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = (x.new_zeros(len(x), 16), x.new_zeros(len(x), 16))
        for step in range(x.shape[1]):
            state = self.cell(self.before(x[:, step]), state)
        return self.head(state[0])


class CRNN(nn.Module):
    """Convolutions, a bidirectional LSTM and a classifier per column, as text recognisers are."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, None)),
        )  # fmt: skip
        self.lstm, self.head = nn.LSTM(16, 16, bidirectional=True, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.features(x).squeeze(2).transpose(1, 2))[0])


class Shared(nn.Module):
    """One module called twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.again = self.shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.shared(torch.relu(self.first(x))))
        return self.head(torch.relu(self.again(x)).mean((2, 3)))


class Keywords(nn.Module):
    """Layers called by keyword, several inputs, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor, table: torch.Tensor, factor: float = 1.0) -> dict[str, torch.Tensor]:
        x = torch.relu(self.image(input=image)).mean((2, 3)) + factor * self.table(input=table)
        return {"logits": self.head(input=x), "hidden": x}


class Functional(nn.Module):
    """Weights that stand in no layer module, read by functions and operators."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(0.2 * torch.randn(8, 3, 3, 3)), nn.Parameter(0.3 * torch.randn(8, 8))
        self.mix, self.head = nn.Parameter(0.3 * torch.randn(8, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(F.conv2d(x, self.kernel)).mean((2, 3))
        x = torch.relu(F.linear(x, self.matrix))
        return self.head(torch.einsum("nc,cd->nd", x, self.mix) @ self.mix)


class Parametrized(nn.Module):
    """Weight and spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.second = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose weight is the classifier's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(self.embedding(ids))))


class Branching(nn.Module):
    """Control flow that depends on activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.one(x) if x.sum() > 1e6 else self.other(x)


class UNet(nn.Module):
    """Strided convolutions, transposed ones, and concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = self._block(3, 8, 1), self._block(8, 16, 2)
        self.up, self.merge, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), self._block(16, 8, 1), nn.Conv2d(8, 2, 1)

    @staticmethod
    def _block(n_in: int, n_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.stem(x)
        return self.last(self.merge(torch.cat([skip, self.up(self.down(skip))], 1)))


class Reshaping(nn.Module):
    """Folds images into another axis with sizes read in the forward pass, as windowed attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        x = torch.relu(self.first(x)).reshape(n * 2, length // 2, width).transpose(1, 2).reshape(n, length, width)
        return self.second(x).mean(1)


def _padded() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode) for mode in ("reflect",)]
    layers += [nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode) for mode in ("replicate", "circular")]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 4, 3, padding="same", dilation=2))


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        model[0].weight[2:5] = 0
        model[2].weight[:, 2:5] = 0
    return model


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4))


def _channels_last() -> nn.Module:
    return UNet().to(memory_format=torch.channels_last)


def _one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.ConvTranspose1d(8, 6, 3, groups=2), nn.ReLU(),
        nn.Conv1d(6, 3, 1),
    )  # fmt: skip


def _scaled_input() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, groups=2))


_RECURRENT: Mapping[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "LSTM": (partial(Recurrent, nn.LSTM), normal(6, 8)),
    "GRU": (partial(Recurrent, nn.GRU), normal(6, 8)),
    "LSTMCell": (Cell, normal(6, 8)),
    "CRNN": (CRNN, images(32, 1)),
}
_ODDITIES: Mapping[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "shared module": (Shared, images(16)),
    "keywords, dict output": (Keywords, named(image=images(16), table=normal(5))),
    "functional weights": (Functional, images(16)),
    "parametrizations": (Parametrized, images(16)),
    "tied embedding": (Tied, tokens(6, 50)),
    "half precision": (lambda: UNet().half(), lambda n, seed: images(16)(n, seed).half()),
    "double precision": (lambda: UNet().double(), lambda n, seed: images(16)(n, seed).double()),
    "channels last": (_channels_last, lambda n, seed: images(16)(n, seed).contiguous(memory_format=torch.channels_last)),
    "control flow": (Branching, normal(8)),
    "zero channels": (_pruned, images(16)),
    "padding modes": (_padded, images(16)),
    "transposed, concatenated": (UNet, images(16)),
    "reshaped batches": (Reshaping, normal(6, 8)),
    "TransformerEncoder": (_transformer_encoder, normal(6, 8)),
    "MultiheadAttention": (lambda: _SelfAttention(), normal(6, 8)),
    "one dimension": (_one_dimensional, normal(4, 33)),
    "scaled input, PReLU, groups": (_scaled_input, images(16)),
    "torch.compile": (lambda: torch.compile(UNet(), backend="eager"), images(16)),
}


class _SelfAttention(nn.Module):
    """torch's own attention, which reads one weight for three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention, self.after = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def _group(
    group: str, models: Mapping[str, tuple[Callable[[], nn.Module], Inputs]], package: str | None = None
) -> list[Subject]:
    return [Subject(name, group, build, inputs, package) for name, (build, inputs) in models.items()]


SUBJECTS: tuple[Subject, ...] = (
    *(replace(subject, activations=(4, 8)) for subject in _group("oddities", _ODDITIES)),
    *(replace(subject, activations=(4, 8)) for subject in _group("recurrent", _RECURRENT)),
    *_group("transformers", _TRANSFORMERS, "transformers"),
    *_group("torchvision", _TORCHVISION, "torchvision"),
    *_group("timm", _TIMM, "timm"),
)
