"""What a model must be before anything else is asked of it: a plain module in floating point, with finite weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpq_plugins.errors import ModelError

# The module inside is all there is.
_WHOLE = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
_SHARDED = frozenset(("FullyShardedDataParallel", "FSDPModule"))  # told by name: importing them needs a distributed torch
_FLOATS = (torch.float32, torch.float64)


def plain_model(model: Any, *, with_values: bool = True) -> nn.Module:
    """The module inside `torch.compile`'s, DataParallel's and DistributedDataParallel's wrappers, checked.

    Raises `ModelError` for what cannot be searched: no module, scripted, sharded or quantized ones, parts that were compiled,
    parameters without values, half precision, and, `with_values`, weights that are not finite.
    """
    plain = unwrapped(model)
    if not isinstance(plain, nn.Module):
        hint = " Call its module()." if hasattr(plain, "module") else ""
        raise ModelError(f"a {type(plain).__name__} is no torch.nn.Module.{hint} Give the model itself.")
    for name, module in plain.named_modules():
        reason = _refusal(module)
        if reason is not None:
            raise ModelError(f"{name or 'the model'} ({type(module).__name__}) {reason}")
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        _check_tensor(name, tensor, with_values)
    return plain


def unwrapped(model: Any) -> Any:
    """The module inside wrappers that only compile or distribute it; anything else as it is."""
    while True:
        if isinstance(model, _WHOLE):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def model_for_adapter(model: Any) -> nn.Module:
    """`plain_model` in single precision, which is all that quantization frameworks take. Raises `ModelError`."""
    plain = plain_model(model)
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            raise ModelError(
                f"{name} is of type {_named(tensor)}; adapters quantize float32 models only. Call model.float(), and give "
                "batches of float32 too."
            )
    return plain


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted or traced, which hides its layers. Give the module that it was made from."
    if "_orig_mod" in module._modules:
        return "is a part that was compiled by itself. Compile the whole model, or none of it, and prepare before that."
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "was compiled in place by compile(). Give a model that is not, and compile what prepare() returns."
    if _SHARDED & {base.__name__ for base in type(module).__mro__}:
        return "holds a shard of its weights only. Give the model that it wraps."
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return "is quantized already. Give the float model."
    return None


def _check_tensor(name: str, tensor: torch.Tensor, with_values: bool) -> None:
    if is_lazy(tensor):
        raise ModelError("the model holds lazy parameters that have no shape yet. Run it once on real data first.")
    if tensor.is_meta:
        raise ModelError(f"{name} is on the meta device and has no values. Load the weights first.")
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in _FLOATS:
        raise ModelError(f"{name} is of type {_named(tensor)}, too coarse to measure losses in. Call model.float().")
    if not with_values or not isinstance(tensor, nn.Parameter):
        return  # buffers may be masks that are infinite on purpose
    finite = tensor.detach().isfinite()
    if not bool(finite.all()):
        n_bad = int((~finite).sum())
        raise ModelError(f"{name} holds {n_bad} values that are not finite, of {tensor.numel()}. Load another checkpoint.")


def _named(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
