"""What is measured on the model's output: losses, their slopes and their curvature."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor

from mpq_plugins.errors import DataError, PluginError
from mpq_plugins.model.run import Batch, are_class_logits, are_logits, labels_of

UserLoss = Callable[[Tensor, Batch], Tensor]
"""Takes the model's output and the batch; gives one loss per image [N], or their mean."""

Loss = Literal["auto", "cross_entropy", "kl", "squared_error"] | UserLoss
_NAMES = ("auto", "cross_entropy", "kl", "squared_error")
_IGNORED = -100  # torch's label for positions that do not count
_MOST_FEATURES = 2**14  # numbers per image and variant up to which the curvature is kept whole


class AbstractMeasure(abc.ABC):
    """A loss around one base output [N, ...] of a piece of a batch.

    The loss of an output near the base is `losses(base) + slopes + |features|^2 / 2` to second order, image by image.
    """

    @abc.abstractmethod
    def losses(self, output: Tensor) -> Tensor:  # [N], float64
        """The loss of every image."""

    has_slope: bool = True

    def probe(self, output: Tensor, generator: torch.Generator) -> Tensor:  # [N]
        """A differentiable number per image whose squared derivative is the curvature, on average."""
        return self.losses(output)

    def slopes(self, output: Tensor) -> Tensor:  # [N], float64
        """First-order change of the loss of every image when the output moves from the base to `output`; 0 without slope."""
        return torch.zeros(output.shape[0], dtype=torch.float64, device=output.device)

    @abc.abstractmethod
    def features(self, output: Tensor) -> Tensor:  # [N, feature], float32
        """Square root of the curvature times the change of the output; inner products are second-order terms."""


def measure(
    loss: Loss, base: Tensor, batch: Batch, *, n_samples: int = 0, generator: torch.Generator | None = None
) -> AbstractMeasure:
    """The measure of `loss` around `base`.

    `auto` is cross-entropy with labels, KL divergence from the base for outputs [N, class] without labels, and squared
    error of the output for anything else: probabilities and embeddings too, which are no logits. With `n_samples` > 0
    (chosen alone for outputs too large to keep), the curvature of cross-entropy and KL is an average over labels drawn from
    the base's own distribution.
    Raises `DataError` for outputs that are not finite and labels that do not fit.
    """
    if not bool(base.isfinite().all()):
        n_bad = int((~base.isfinite()).sum())
        raise DataError(
            f"the output of the float model is not finite: {n_bad} of {base.numel()} values. Look for NaN in the images and "
            "the weights, or run the model in float32."
        )
    if not isinstance(loss, str):
        return _UserMeasure(loss, base, batch)
    if loss not in _NAMES:
        raise PluginError(f"loss must be one of {', '.join(_NAMES)} or a function, not {loss!r}.")
    if loss == "auto":
        if batch.labels is not None and are_logits(base):
            loss = "cross_entropy"
        else:
            loss = "kl" if batch.labels is None and are_class_logits(base) else "squared_error"
    if loss == "squared_error":
        return _SquaredError(base)
    if loss == "cross_entropy" and batch.labels is None:
        raise DataError('cross-entropy needs labels. Give batches of (inputs, labels), or loss="kl".')
    return _Classes(base, labels_of(batch) if loss == "cross_entropy" else None, n_samples, generator)


@final
class _Classes(AbstractMeasure):
    """Cross-entropy with labels, KL divergence from the base without; averaged over the positions of an image."""

    def __init__(self, base: Tensor, labels: Tensor | None, n_samples: int, generator: torch.Generator | None) -> None:
        self._axis = _class_axis(base, labels)
        logits = self._flat(base)  # [N, position, class]
        self._base = logits
        self._log_p = logits.double().log_softmax(-1)
        self._labels = None if labels is None else _checked_labels(labels, logits).to(logits.device)
        counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        counted = counted if self._labels is None else self._labels != _IGNORED
        self._share = counted.double() / counted.sum(1, keepdim=True).clamp_min(1)  # [N, position]
        self.has_slope = self._labels is not None
        _, n_positions, n_classes = logits.shape
        if n_samples == 0 and n_positions * n_classes > _MOST_FEATURES:
            n_samples = max(1, 1024 // n_positions)
        self._drawn = self._drawn_from(n_samples, generator) if n_samples else None

    def probe(self, output: Tensor, generator: torch.Generator) -> Tensor:
        if self._labels is not None:
            return self.losses(output)
        at_positions = -self._flat(output).double().log_softmax(-1).gather(-1, self._drawn_from(1, generator))[..., 0]
        # Labels of positions are drawn independently, so derivatives add up in the square.
        return (at_positions * self._share.sqrt()).sum(1)

    def _flat(self, output: Tensor) -> Tensor:
        return output.movedim(self._axis, -1).reshape(output.shape[0], -1, output.shape[self._axis])

    def _drawn_from(self, n_samples: int, generator: torch.Generator | None) -> Tensor:  # [N, position, sample]
        """Labels of the base's own distribution."""
        p = self._log_p.exp().float().flatten(0, 1).cpu()
        drawn = torch.multinomial(p, n_samples, replacement=True, generator=generator)
        return drawn.reshape(*self._base.shape[:2], n_samples).to(self._base.device)

    def losses(self, output: Tensor) -> Tensor:
        log_q = self._flat(output).double().log_softmax(-1)
        if self._labels is None:
            at_positions = (self._log_p.exp() * (self._log_p - log_q)).sum(-1)
        else:
            at_positions = -log_q.gather(-1, self._labels.clamp_min(0)[..., None])[..., 0]
        return (at_positions * self._share).sum(1)

    def slopes(self, output: Tensor) -> Tensor:
        if self._labels is None:
            return super().slopes(output)
        change = (self._flat(output) - self._base).double()
        expected = (self._log_p.exp() * change).sum(-1)
        return ((expected - change.gather(-1, self._labels.clamp_min(0)[..., None])[..., 0]) * self._share).sum(1)

    def features(self, output: Tensor) -> Tensor:
        change = self._flat(output) - self._base
        p = self._log_p.exp().to(change.dtype)
        centred = change - (p * change).sum(-1, keepdim=True)
        weight = self._share.to(change.dtype).sqrt()[..., None]
        if self._drawn is None:
            return (p.sqrt() * centred * weight).flatten(1)
        return (centred.gather(-1, self._drawn) * weight / math.sqrt(self._drawn.shape[-1])).flatten(1)


@final
class _SquaredError(AbstractMeasure):
    """Mean squared change of the output."""

    has_slope = False

    def __init__(self, base: Tensor) -> None:
        self._base = base.flatten(1)

    def losses(self, output: Tensor) -> Tensor:
        return (output.flatten(1) - self._base).double().square().mean(1)

    def probe(self, output: Tensor, generator: torch.Generator) -> Tensor:
        direction = torch.randn(self._base.shape, generator=generator).to(self._base)
        return (output.flatten(1) * direction).sum(1) * math.sqrt(2 / max(1, self._base.shape[1]))

    def features(self, output: Tensor) -> Tensor:
        return (output.flatten(1) - self._base) * math.sqrt(2 / max(1, self._base.shape[1]))


@final
class _UserMeasure(AbstractMeasure):
    """A user's loss; its curvature is that of the empirical Fisher information, the square of its slope."""

    def __init__(self, loss: UserLoss, base: Tensor, batch: Batch) -> None:
        self._loss, self._batch, self._base = loss, batch, base
        with torch.enable_grad():
            leaf = base.detach().clone().requires_grad_(True)
            losses = self._per_image(loss(leaf, batch))
            if not losses.requires_grad:
                raise DataError("the loss does not depend on the model's output. Compute it from the tensor that it is given.")
            [self._gradient] = torch.autograd.grad(losses.sum(), leaf)

    def _per_image(self, value: Any) -> Tensor:
        n_images = self._base.shape[0]
        if isinstance(value, Tensor) and value.dim() == 0:
            return value.expand(n_images) / 1
        if not isinstance(value, Tensor) or value.shape != (n_images,):
            form = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"the loss returned a {form} for {n_images} images. Return one number per image, shape ({n_images},), "
                "or their mean."
            )
        return value

    def losses(self, output: Tensor) -> Tensor:
        with torch.set_grad_enabled(output.requires_grad):  # the loss may have parameters of its own
            return self._per_image(self._loss(output, self._batch)).double()

    def slopes(self, output: Tensor) -> Tensor:
        return ((output - self._base) * self._gradient).flatten(1).sum(1).double()

    def features(self, output: Tensor) -> Tensor:
        return self.slopes(output).float()[:, None]


def _class_axis(output: Tensor, labels: Tensor | None) -> int:
    """The axis of the classes: the one that the labels lack; without labels 1, or the last of [N, position, class]."""
    if output.dim() < 2:
        raise DataError(
            f"the output has shape {tuple(output.shape)}, but classes need [N, class]. Select another output or loss."
        )
    if labels is None:
        return -1 if output.dim() == 3 else 1
    if tuple(labels.shape) == (output.shape[0], *output.shape[2:]):
        return 1
    if tuple(labels.shape) == tuple(output.shape[:-1]):
        return -1
    raise DataError(
        f"labels of shape {tuple(labels.shape)} do not fit an output of shape {tuple(output.shape)}. Give one class index per "
        "image or position, or another loss."
    )


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:  # [N, position]
    flat = labels.reshape(logits.shape[0], -1)
    if flat.is_floating_point() or flat.is_complex():
        raise DataError(f"labels are {flat.dtype}, not class indices. Convert them, or give a loss of your own.")
    counted = flat[flat != _IGNORED]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= logits.shape[2]):
        raise DataError(
            f"labels run from {int(counted.min())} to {int(counted.max())}, but the output has {logits.shape[2]} classes. "
            "Check the data set and the model's head."
        )
    return flat.long()
