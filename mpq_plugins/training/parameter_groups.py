"""Three kinds of parameters, which train at different rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# Classes of these packages that are no torch layer hold ranges of quantizers; nothing is imported to tell.
_QUANTIZER_PACKAGES = ("brevitas", "nncf", "mpq_brevitas", "mpq_nncf", "mpq_plugins.training")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def is_quantizer(module: nn.Module) -> bool:
    """Whether the parameters that `module` itself holds are ranges of a quantizer of ours, of Brevitas or of NNCF."""
    package = type(module).__module__
    ours = any(package == name or package.startswith(f"{name}.") for name in _QUANTIZER_PACKAGES)
    # Brevitas' layers derive from torch's, and their weight is a weight.
    return ours and not any(base.__module__.startswith("torch.nn.modules.") for base in _ancestors(module))


def _ancestors(module: nn.Module) -> list[type]:
    return [base for base in type(module).__mro__ if base is not nn.Module]


def parameter_groups(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    range_factor: float = 0.01,
    is_quantizer: Callable[[nn.Module], bool] = is_quantizer,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, named "weights", "norms and biases" and "ranges"; any of them may be empty.

    Weights decay; normalisation parameters, biases and other vectors do not; ranges of quantizers do not, and learn at
    `range_factor` of the rate (PROFIT, section 5). Every trainable parameter is in exactly one group; parameters that are
    not trainable are in none.
    """
    members: dict[str, list[nn.Parameter]] = {"weights": [], "norms and biases": [], "ranges": []}
    for owner, parameter in _owned(module):
        if is_quantizer(owner):
            members["ranges"].append(parameter)
        elif parameter.dim() > 1 and not isinstance(owner, _NORMS):
            members["weights"].append(parameter)
        else:
            members["norms and biases"].append(parameter)
    rates = {"weights": 1.0, "norms and biases": 1.0, "ranges": range_factor}
    decays = {"weights": weight_decay, "norms and biases": 0.0, "ranges": 0.0}
    return [
        {"name": name, "params": own, "lr": learning_rate * rates[name], "weight_decay": decays[name]}
        for name, own in members.items()
    ]


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Every trainable parameter once, with the first module that holds it."""
    seen: set[int] = set()
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield owner, parameter
