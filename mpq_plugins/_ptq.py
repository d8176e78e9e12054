"""Post-training quantization, in one vocabulary for all frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, final, get_args

from mpq_plugins._errors import AdapterError

WeightRange = Literal["mse", "max"]
ActivationRange = Literal["default", "percentile", "max", "mse"]
Equalization = Literal["none", "cross-layer", "smooth-quant"]
Rounding = Literal["nearest", "gptq", "gpfq", "qronos", "learned"]


@final
@dataclass(frozen=True)
class PTQ:
    """How a float model becomes a quantized one without training; an adapter refuses what its framework lacks.

    `weight_range`: of least squared error, or the largest magnitude. `activation_range`: of least squared error at the
    quantizer's own width (the default wherever the adapter's scales allow it), a high percentile, or the largest magnitude.
    `bias_correction`: add to biases what quantization takes from a layer's mean output. `bn_reestimation`: new
    batch-normalisation statistics. `equalization`: move ranges between layers ("cross-layer", Nagel et al. 2019) or from
    activations into weights ("smooth-quant", Xiao et al. 2023). `rounding`: to the nearest code; by GPTQ (Frantar et al.
    2023), GPFQ (Lybrand and Saab 2021) or Qronos (Zhang et al. 2025); or learned layer by layer in `rounding_steps` steps
    (AdaRound, Nagel et al. 2020).
    """

    weight_range: WeightRange = "mse"
    activation_range: ActivationRange = "default"
    bias_correction: bool = True
    bn_reestimation: bool = True
    equalization: Equalization = "none"
    rounding: Rounding = "nearest"
    rounding_steps: int = 500

    def __post_init__(self) -> None:
        allowed = {
            "weight_range": get_args(WeightRange),
            "activation_range": get_args(ActivationRange),
            "equalization": get_args(Equalization),
            "rounding": get_args(Rounding),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise AdapterError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        for name in ("bias_correction", "bn_reestimation"):
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        if not isinstance(self.rounding_steps, int) or isinstance(self.rounding_steps, bool) or self.rounding_steps < 1:
            raise AdapterError(f"rounding_steps must be a whole number of at least 1, not {self.rounding_steps!r}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PTQ:
        """From keyword options; raises `AdapterError` for one that does not exist."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise AdapterError(
                f"post-training quantization has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
            )
        return cls(**options)
