"""Trained networks for the glyphs, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from small_nets import SMALL_NETS, SmallNet
from torch import nn

from glyphs.data import glyphs
from glyphs.distortion import Distortion
from glyphs.fonts import CLASSES
from mpq_plugins.common.files import cache_folder as user_cache
from mpq_plugins.common.progress import track
from mpq_plugins.common.tensor_files import read_torch, write_torch
from mpq_plugins.errors import FormatError, ModelError
from mpq_plugins.model.run import Batch, labels_of

_FORMAT = "mpq-glyph-net/1"


@final
@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum and a one-cycle schedule, every image seen once.

    `version` counts changes of the networks and of the rendering, which the other fields do not show.
    """

    n_rounds: int = 7
    images_per_round: int = 12_800
    batch_size: int = 128
    peak_rate: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 2e-4
    label_smoothing: float = 0.05
    distortion: Distortion = field(default_factory=Distortion)
    version: int = 1


@dataclass(frozen=True)
class TrainedNet:
    """A trained network in evaluation mode, and the CPU seconds of all threads that its training took."""

    net: SmallNet
    seconds: float


def trained_glyph_net(
    kind: str = "resnet20", seed: int = 0, *, recipe: Recipe | None = None, cache_folder: str | Path | None = None
) -> SmallNet:
    """The network `kind` (a name in `SMALL_NETS`) trained on the glyphs, read from the cache when it is there.

    Training takes a few minutes of one core and is deterministic on one machine. The cache is `cache_folder`, or `mpq-plugins`
    in `$XDG_CACHE_HOME` or `~/.cache`; its key is the kind, the seed and the recipe.
    Raises `ModelError` for an unknown kind, `FormatError` for a cached file that cannot be read.
    """
    return train_or_restore(kind, seed, recipe=recipe, cache_folder=cache_folder).net


def train_or_restore(
    kind: str, seed: int = 0, *, recipe: Recipe | None = None, cache_folder: str | Path | None = None
) -> TrainedNet:
    """What `trained_glyph_net` does, with the seconds that the training took."""
    recipe = recipe or Recipe()
    net = _untrained(kind, seed)
    path = cached_path(kind, seed, recipe=recipe, cache_folder=cache_folder)
    if path.is_file():
        return TrainedNet(net, _restored(net, path))
    start = time.process_time()
    _train(net, recipe, seed)
    seconds = time.process_time() - start
    document = {"format": _FORMAT, "recipe": repr(recipe), "seconds": seconds, "state": net.state_dict()}
    write_torch(path, document)
    return TrainedNet(net, seconds)


def cached_path(kind: str, seed: int = 0, *, recipe: Recipe | None = None, cache_folder: str | Path | None = None) -> Path:
    """Where `trained_glyph_net` keeps the weights."""
    folder = Path(cache_folder) if cache_folder is not None else user_cache()
    digest = hashlib.sha256(repr(recipe or Recipe()).encode()).hexdigest()[:12]
    return folder / f"glyphs-{kind}-seed{seed}-{digest}.pt"


def _untrained(kind: str, seed: int) -> SmallNet:
    if kind not in SMALL_NETS:
        raise ModelError(f"no small network is named {kind!r}. There are {', '.join(SMALL_NETS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SMALL_NETS[kind](len(CLASSES)).eval()


def _restored(net: SmallNet, path: Path) -> float:
    try:
        document = read_torch(path)
        net.load_state_dict(document["state"])
        return float(document["seconds"])
    except Exception as error:
        raise FormatError(
            f"{path} is not a network that this version trained: {error}. Delete it to train the network again."
        ) from error


def _train(net: SmallNet, recipe: Recipe, seed: int) -> None:
    # Convolutions of few channels run up to 1.7 times faster in this layout.
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), recipe.peak_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    n_steps = recipe.n_rounds * -(-recipe.images_per_round // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_rate, total_steps=n_steps, pct_start=0.2)
    order = torch.Generator().manual_seed(seed)
    for number in track(range(recipe.n_rounds), "training on glyphs"):
        batches = glyphs(
            train=True,
            n_images=recipe.images_per_round,
            batch_size=recipe.batch_size,
            seed=number,
            distortion=recipe.distortion,
        )
        for index in track(torch.randperm(len(batches), generator=order).tolist(), f"round {number + 1}"):
            _step(net, optimizer, batches[index], recipe.label_smoothing)
            schedule.step()
    net.eval().to(memory_format=torch.contiguous_format)


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, label_smoothing: float) -> None:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(batch.inputs), labels_of(batch), label_smoothing=label_smoothing)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()
