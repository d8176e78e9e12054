"""Fisher: squared gradients weigh the squared errors that quantization makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from mpq_plugins.common.progress import track
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, Loss, by_unit, weight_losses
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpq_plugins.model.run import Batch
    from mpq_plugins.proxies.measuring import CallGradient, SensitivityRun


@final
@dataclass(frozen=True)
class Fisher(AbstractSensitivity):
    """Diagonal empirical Fisher information, 1/2 E[sum_k g_k^2 d_k^2], from one forward and one backward pass.

    `of="outputs"`: k runs over the outputs of the unit's layers, d is their change when the unit is quantized; the `gradient`
    score of NVIDIA ModelOpt's AutoQuantize. `of="weights"`: k runs over the weights, d is their quantization error; the
    FIT of Zandonati et al. (arXiv 2210.08502) with every weight's own error in place of the layer's noise power.
    Gradients g are those of each image's own loss; without labels, of a label drawn from the model's own predictions.

    With `correction` d is what is left of the change once the normalisation behind the layer, or its own bias, is corrected
    as in a prepared network; ModelOpt has no such thing. It does not count with `of="weights"`.

    A diagonal forgets that errors of one layer add up or cancel, and the linear term.
    `CLADO(tier="fisher", cross=False)` keeps both: E[g.d] + 1/2 E[(g.d)^2], whose second term is MPQCO's (Chen et al.,
    arXiv 2110.06554). With `of="outputs"` activations are quantized with the weights where the space searches their bits; with
    `of="weights"` they do not count (`weight_losses` in `_sensitivity` says how ties are settled).
    """

    name: ClassVar[str] = "fisher"
    of: Literal["outputs", "weights"] = "outputs"
    loss: Loss = "auto"
    correction: bool = True

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Half the weighted squared errors; `facts` holds the float model's loss."""
        from mpq_plugins.proxies.measuring import SensitivityRun

        lab = SensitivityRun(model, space, batches, replace(self.setup(), replay=False))
        base, total = 0.0, np.zeros(int(lab.start[-1]))
        for index, batch in enumerate(track(lab.pieces(), "images forward and back")):
            key = f"piece{index:05d}-fisher-{self.of}"
            arrays = lab.journal.kept(key, partial(self._of_piece, lab, batch, index))
            base, total = base + float(arrays["base"]), total + arrays["row"]
        facts = {"base_loss": base / lab.n_images, "n_images": lab.n_images}
        return Scores(space, by_unit(space, 0.5 * total / lab.n_images), self.recipe(), facts)

    def _of_piece(self, lab: SensitivityRun, batch: Batch, index: int) -> dict[str, np.ndarray]:
        """Sums over the images of one piece: their losses, and the weighted squared error of every choice."""
        from mpq_plugins.proxies.measuring import backward

        done = backward(lab, batch, index)
        row = _of_outputs(lab, done.calls) if self.of == "outputs" else _of_weights(lab, done.calls, len(batch))
        return {"base": np.asarray(done.base), "row": row}


def _of_outputs(lab: SensitivityRun, calls: Sequence[CallGradient]) -> np.ndarray:  # [choice]
    import torch

    row = np.zeros(int(lab.start[-1]))
    with torch.no_grad():
        for made in calls:
            for unit, choice in lab.choices_of(made.layer):
                moved = made.changed(lab, unit, choice).mul_(made.gradient)
                row[lab.start[unit] + choice] += float(moved.square_().sum(dtype=torch.float64))
    return row


def _of_weights(lab: SensitivityRun, calls: Sequence[CallGradient], n_images: int) -> np.ndarray:  # [choice]
    fisher: dict[str, Tensor] = {}
    for of_image in range(n_images):
        for weight, gradient in _weight_gradients(lab, calls, of_image, n_images).items():
            squared = gradient.double().square_()
            fisher[weight] = fisher[weight].add_(squared) if weight in fisher else squared

    def error(layer: str, delta: Tensor) -> float:
        weight = lab.space.layer(layer).weight_name
        return float((fisher[weight] * delta.square()).sum()) if weight in fisher else 0.0

    return np.concatenate(weight_losses(lab.space, lab.engine.variants, error))


def _weight_gradients(lab: SensitivityRun, calls: Sequence[CallGradient], of_image: int, n_images: int) -> dict[str, Tensor]:
    """The gradient of one image's loss by every weight, over all calls that read it."""
    found: dict[str, Tensor] = {}
    for made in calls:
        weight = lab.space.layer(made.layer).weight_name
        gradient = _weight_gradient(lab, made, of_image, n_images)
        found[weight] = found[weight] + gradient if weight in found else gradient
    return found


def _weight_gradient(lab: SensitivityRun, made: CallGradient, of_image: int, n_images: int) -> Tensor:
    import torch

    from mpq_plugins.model.watch import input_argument
    from mpq_plugins.proxies.measuring.perturbation import Perturbation, run_changed

    def rows(tensor: Tensor) -> Tensor:  # of one image; a linear layer may have had images and positions in one axis
        return tensor.reshape(n_images, -1, *tensor.shape[1:])[of_image]

    args = (rows(input_argument(made.args, made.kwargs)), *made.args[1:])
    with torch.enable_grad():
        leaf = lab.engine.variants.own(made.layer).requires_grad_(True)
        output = run_changed(made.function, args, made.kwargs, [Perturbation(leaf)])
        [gradient] = torch.autograd.grad(output, leaf, rows(made.gradient))
    return gradient
