"""Post-training quantization, in one vocabulary for all frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, final

from mpq_plugins.common.values import Bounds, Count, check_values
from mpq_plugins.errors import AdapterError

WeightRange = Literal["mse", "max"]
ActivationRange = Literal["default", "percentile", "max", "mse"]
Equalization = Literal["none", "cross-layer", "smooth-quant"]
Rounding = Literal["nearest", "gptq", "gpfq", "qronos", "learned"]
BatchNorm = Literal["corrected", "re-estimated", "kept"]


@final
@dataclass(frozen=True)
class PTQ:
    """How a float model becomes a quantized one without training; an adapter refuses what its framework lacks.

    Args:
        weight_range: of least squared error ("mse"), or the largest magnitude ("max").
        activation_range: of least squared error at the quantizer's width ("mse"; "default" is this wherever the adapter's
            scales allow it), a high percentile, or the largest magnitude.
        batch_norm: running statistics: "corrected" moves the trained ones by what quantization did to the calibration images;
            "re-estimated" takes those of the images, which must then look like the training data; "kept" leaves them.
        bias_correction: biases before no batch normalisation take back what quantization adds to their layer's mean.
        equalization: move ranges between layers ("cross-layer", Nagel et al. 2019) or from activations into weights
            ("smooth-quant", Xiao et al. 2023).
        rounding: to the "nearest" code, by "gptq" (Frantar et al. 2023), "gpfq" (Lybrand and Saab 2021) or "qronos" (Zhang et
            al. 2025), or "learned" layer by layer (AdaRound, Nagel et al. 2020).
        rounding_steps: of learned rounding, per layer.
        held_out: images, at most an eighth of the calibration images, that judge `batch_norm`, `bias_correction`,
            `equalization` and `rounding` by the float network's outputs; what does not help there is not kept. With 0, or
            fewer than 16 calibration images, everything is kept.

    Raises `AdapterError` for values that there are not.

    Example:
        >>> mpq.PTQ.of({"weight_range": "max"}).weight_range
        'max'
    """

    weight_range: WeightRange = "mse"
    activation_range: ActivationRange = "default"
    batch_norm: BatchNorm = "corrected"
    bias_correction: bool = True
    equalization: Equalization = "none"
    rounding: Rounding = "nearest"
    rounding_steps: Annotated[int, Bounds(least=1)] = 500
    held_out: Count = 32

    def __post_init__(self) -> None:
        check_values(PTQ, vars(self), AdapterError)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PTQ:
        """From keyword options; raises `AdapterError` for one that does not exist.

        `bn_reestimation`, the switch that `batch_norm` replaces, is still read.
        """
        options = with_batch_norm(options)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise AdapterError(
                f"post-training quantization has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
            )
        return cls(**options)


def with_batch_norm(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with `batch_norm` in place of `bn_reestimation`, the switch that it was until release 0.1."""
    if not isinstance(options.get("bn_reestimation"), bool) or "batch_norm" in options:
        return dict(options)
    rest = {name: value for name, value in options.items() if name != "bn_reestimation"}
    return {**rest, "batch_norm": "re-estimated" if options["bn_reestimation"] else "kept"}
