"""Repairing what quantization does to means and variances: batch-normalisation statistics and biases."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from mpq_plugins.model.run import batch_size, batches_of, call, evaluating, tensors

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_JOINED_IMAGES = 32
_MOST_RATIO = 10.0  # of variances: what quantization is believed to do to one
_CHANNEL_AXIS = {"Linear": -1, "Conv1d": -2, "Conv2d": -3, "Conv3d": -4}


def has_statistics(module: nn.Module) -> bool:
    """Whether a module normalises by running statistics: any class that holds `running_mean` and `running_var`."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.shape == variance.shape and mean.dim() == 1


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel.  # [channel] both"""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Tensor, axis: int) -> Moments:
        """Over all axes but `axis`; the variance is that of the values at hand (biased)."""
        values = values.detach().float()
        axis %= values.dim()
        if values.device.type == "cpu" and values.numel() and values.dim() > 1 and axis in (1, values.dim() - 1):
            # A pass without a copy in either memory order: 3 to 8 times faster than the means below.
            rows = values if axis == 1 else values.flatten(0, -2)
            return cls(*torch.batch_norm_update_stats(rows, None, None, 0.0))
        others = [other for other in range(values.dim()) if other != axis]
        mean = values.mean(others, keepdim=True)
        # Several times faster than `torch.var_mean` over these axes.
        spread = torch.linalg.vector_norm(values - mean, dim=others)
        return cls(mean.flatten(), spread.square() / max(1, values.numel() // max(1, mean.numel())))


def is_of_tokens(values: Tensor, axis: int) -> bool:
    """Whether the output of a layer has a row per token: a linear layer's with more axes than image and channel.

    Single tokens of transformers have huge values, whose error a mean would spread over all the others: with such biases
    corrected a MiniLM at 4 bits was farther from the float network on the very images of the correction.
    """
    return axis == -1 and values.dim() > 2


@dataclass(frozen=True)
class Shift:
    """What quantization did to every channel: `mean` was added, the variance was multiplied by exp(`log_ratio`)."""

    mean: Tensor  # [channel]
    log_ratio: Tensor  # [channel]

    @classmethod
    def between(cls, reference: Moments, found: Moments) -> Shift:
        """From the moments of the float network to those of the quantized one, on the same images."""
        usable = (reference.variance > 0) & (found.variance > 0)
        ratio = torch.where(usable, found.variance / reference.variance.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        log_ratio = ratio.clamp(1 / _MOST_RATIO, _MOST_RATIO).log()
        return cls((found.mean - reference.mean).nan_to_num(0.0, 0.0, 0.0), log_ratio.nan_to_num(0.0, 0.0, 0.0))

    def towards(self, other: Shift, share: float) -> Shift:
        """The mean of both, `other` having this share."""
        return Shift(torch.lerp(self.mean, other.mean, share), torch.lerp(self.log_ratio, other.log_ratio, share))


class AbstractSite(abc.ABC):
    """A place whose moments quantization shifts, and where the shift is taken back.

    `shift` is the mean over the batches so far, weighted by their images; None before the first.
    """

    of_input: ClassVar[bool] = False  # whether the moments are those of the module's input, else of its output
    axis: int  # of the channels

    def __init__(self) -> None:
        self.shift: Shift | None = None
        self._n_images = 0

    def correct(self, values: Tensor, expected: Moments, n_images: int) -> Tensor:
        """Learn from one call, and give what takes the place of `values`."""
        if not self.of_input and is_of_tokens(values, self.axis):
            return values
        shift = Shift.between(expected, Moments.of(values, self.axis))
        self._n_images += n_images
        self.shift = shift if self.shift is None else self.shift.towards(shift, n_images / self._n_images)
        return self.corrected(values, self.shift)

    @abc.abstractmethod
    def corrected(self, values: Tensor, shift: Shift) -> Tensor:
        """`values` with the shift taken back, or as they are where the module itself does so."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Let the module do for good what `corrected` did to values."""

    @abc.abstractmethod
    def undo(self) -> None:
        """Bring the module back to what it was."""


@final
class NormSite(AbstractSite):
    """A normalisation with running statistics: they move, so that what it returns does not."""

    of_input = True
    axis = 1

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._norm = norm
        self._trained = (norm.running_mean.clone(), norm.running_var.clone())

    def corrected(self, values: Tensor, shift: Shift) -> Tensor:
        """See `AbstractSite.corrected`: the statistics move at once."""
        self._move(shift)
        return values

    def finish(self) -> None:
        """See `AbstractSite.finish`."""
        if self.shift is not None:
            self._move(self.shift)

    def undo(self) -> None:
        """See `AbstractSite.undo`."""
        self._norm.running_mean.copy_(self._trained[0])
        self._norm.running_var.copy_(self._trained[1])

    def _move(self, shift: Shift) -> None:
        mean, variance = self._trained
        self._norm.running_mean.copy_(mean + shift.mean.to(mean))
        self._norm.running_var.copy_(variance * shift.log_ratio.exp().to(variance))


@final
class BiasSite(AbstractSite):
    """A layer that no normalisation reads: its bias takes the shift of the mean back, but for layers of tokens."""

    def __init__(self, layer: Any, kind: str) -> None:
        super().__init__()
        self.axis = _CHANNEL_AXIS[kind.replace("ConvTranspose", "Conv")]
        self._layer = layer
        self._trained = layer.bias.detach().clone()

    def corrected(self, values: Tensor, shift: Shift) -> Tensor:
        """See `AbstractSite.corrected`."""
        return values - shift.mean.to(values).reshape(-1, *[1] * (-1 - self.axis))

    def finish(self) -> None:
        """See `AbstractSite.finish`."""
        if self.shift is not None:
            self._layer.bias.copy_(self._trained - self.shift.mean.to(self._trained))

    def undo(self) -> None:
        """See `AbstractSite.undo`."""
        self._layer.bias.copy_(self._trained)


def norm_sites(module: nn.Module, *, held: Collection[str] = ()) -> dict[str, NormSite]:
    """Every normalisation with running statistics but those in `held`, by name."""
    return {name: NormSite(norm) for name, norm in module.named_modules() if has_statistics(norm) and name not in held}


def bias_sites(module: nn.Module, layers: Mapping[str, str]) -> dict[str, BiasSite]:
    """Those of `layers` (name -> kind, such as "Conv2d") that are modules with a bias, by name."""
    modules = dict(module.named_modules())
    return {
        name: BiasSite(modules[name], kind)
        for name, kind in layers.items()
        if isinstance(getattr(modules.get(name), "bias", None), Tensor)
    }


Recorded = list[dict[str, list[Moments]]]  # of each forward pass: by site, for each of its calls


@torch.no_grad()
def correct_by_difference(
    reference: nn.Module,
    module: nn.Module,
    batches: Iterable[Any],
    sites: Mapping[str, AbstractSite],
    *,
    expected: Recorded | None = None,
) -> int:
    """Take back what quantization does to means and variances at `sites`, in place; returns the number of batches.

    Every batch runs through the float `reference` and then through the quantized `module`. At every site, in the order of the
    forward pass and with those before it already corrected, the moments per channel are compared. A trained mean moves by the
    difference of the means, a trained variance by the ratio of the variances (held within 0.1 .. 10), a bias by the difference
    of the means. Differences are averaged over batches, ratios in the logarithm. What the images differ in from the training
    data cancels: where quantization changes nothing, nothing changes.

    `batches` are items that `Batch.of` reads, held one at a time. `reference` has the sites' modules under the same names; it
    does not run where `expected` has its moments on the same batches. An interruption puts everything back.
    """
    n_batches = 0
    if not sites:
        return n_batches
    try:
        with _correcting(module, sites) as correct:
            for batch in batches_of(batches):
                moments = _moments(reference, sites, batch.inputs) if expected is None else expected[n_batches]
                correct(batch.inputs, moments)
                n_batches += 1
        for site in sites.values():
            site.finish()
    except BaseException:
        for site in sites.values():
            site.undo()
        raise
    return n_batches


@contextlib.contextmanager
def corrected_around(
    module: nn.Module, batches: Iterable[Any], sites: Callable[[], Mapping[str, AbstractSite]]
) -> Iterator[None]:
    """Correct by difference what a change of `module` in place, made inside, does at `sites`; gone sites are left out.

    The module as it was is the reference; only moments are kept of it. `batches` are read twice.
    """
    with torch.no_grad():
        before = sites()
        expected = [_moments(module, before, batch.inputs) for batch in batches_of(batches)] if before else []
    yield
    with torch.no_grad():
        after = {name: site for name, site in sites().items() if name in before}
        with _correcting(module, after) as correct:
            for batch, moments in zip(batches_of(batches), expected, strict=False):
                correct(batch.inputs, moments)
        for site in after.values():
            site.finish()


def _moments(reference: nn.Module, sites: Mapping[str, AbstractSite], inputs: Any) -> dict[str, list[Moments]]:
    """The moments at every site, one for each of its calls."""
    with recorded(reference, sites) as passes, evaluating(reference):
        call(reference, inputs)
    return passes[0]


@contextlib.contextmanager
def recorded(module: nn.Module, sites: Mapping[str, AbstractSite]) -> Iterator[Recorded]:
    """The moments at every site in each forward pass of `module` that is made inside."""
    passes: Recorded = []

    def start(_module: nn.Module, _args: Any) -> None:
        passes.append({name: [] for name in sites})

    def see(name: str, values: Tensor) -> Tensor:
        passes[-1][name].append(Moments.of(values, sites[name].axis))
        return values

    handle = module.register_forward_pre_hook(start)
    try:
        with _watched(module, sites, see):
            yield passes
    finally:
        handle.remove()


@contextlib.contextmanager
def _correcting(
    module: nn.Module, sites: Mapping[str, AbstractSite]
) -> Iterator[Callable[[Any, Mapping[str, list[Moments]]], None]]:
    """A function that runs inputs through `module`, and lets `sites` learn from the moments expected on them."""
    left: dict[str, Iterator[Moments]] = {}
    n_images = 0

    def see(name: str, values: Tensor) -> Tensor:
        moments = next(left[name], None)
        return values if moments is None else sites[name].correct(values, moments, n_images)

    def correct(inputs: Any, expected: Mapping[str, list[Moments]]) -> None:
        nonlocal n_images
        n_images = batch_size(inputs)
        left.update({name: iter(expected[name]) for name in sites})
        call(module, inputs)

    with _watched(module, sites, see), evaluating(module):
        yield correct


@contextlib.contextmanager
def _watched(module: nn.Module, sites: Mapping[str, AbstractSite], see: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """In forward passes `see` gets the values of every site, and gives what takes the place of outputs."""
    modules = dict(module.named_modules())

    def before(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # what hooks compute is not part of the model that others watch
            see(name, next(tensors((args, kwargs))))

    def after(name: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return see(name, output)

    with contextlib.ExitStack() as stack:
        for name in (name for name in sites if name in modules):
            if sites[name].of_input:
                handle = modules[name].register_forward_pre_hook(partial(before, name), with_kwargs=True)
            else:
                handle = modules[name].register_forward_hook(partial(after, name))
            stack.callback(handle.remove)
        yield


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Any], *, held: Collection[str] = ()) -> int:
    """Replace the running statistics of every batch normalisation but those in `held` by their mean over `batches`, in place.

    Quantized weights and activations shift the statistics that the float model was trained with; this repairs
    them without labels or gradients. `batches` are items that `Batch.of` reads; where one has a single image, plain tensors
    are joined to larger batches.
    Only the statistics change: the other modules run in evaluation mode, modes come back afterwards.
    Returns the number of batches used; with none, or without batch normalisation, nothing changes.
    """
    norms = [norm for name, norm in module.named_modules() if name not in held and isinstance(norm, _NORMS)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return 0
    modes = [(child, child.training) for child in module.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    n_batches = 0
    try:
        module.eval()
        for norm in norms:
            norm.train()
            # Fresh buffers, so that an interrupted run can put the old ones back.
            norm.running_mean, norm.running_var, norm.num_batches_tracked = (
                None if buffer is None else torch.zeros_like(buffer)
                for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            )
            norm.momentum = None  # torch's cumulative average
        with torch.no_grad():
            for inputs in _whole_batches([batch.inputs for batch in batches_of(batches)]):
                call(module, inputs)
                n_batches += 1
    except BaseException:
        n_batches = 0
        raise
    finally:
        for norm, momentum, (mean, variance, count) in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if n_batches == 0:
                norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
        for child, training in modes:
            child.training = training
    return n_batches


def _whole_batches(inputs: list[Any]) -> Sequence[Any]:
    """Inputs, single images joined to batches of equal size when they are plain tensors."""
    if all(isinstance(item, Tensor) for item in inputs) and any(len(item) < 2 for item in inputs):
        n_images = sum(len(item) for item in inputs)
        return torch.cat(inputs).tensor_split(math.ceil(n_images / _JOINED_IMAGES))
    return inputs


def copy_statistics(source: nn.Module, module: nn.Module, names: Iterable[str]) -> None:
    """Give the named batch normalisations of `module` the running statistics they have in `source`; other names are left."""
    theirs, ours = dict(source.named_modules()), dict(module.named_modules())
    for name in names:
        if name in theirs and name in ours and has_statistics(theirs[name]) and has_statistics(ours[name]):
            for key, buffer in theirs[name].named_buffers(recurse=False):
                with torch.no_grad():
                    ours[name].get_buffer(key).copy_(buffer)
