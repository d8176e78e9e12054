"""Every private name of NNCF that this adapter touches, checked against the installed version, and its noise.

Only `nncf_setup` (what NNCF plans) and `nncf_quantizers` (what it has placed) use the names; the rest of the adapter sees the
functions and values of those two.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from mpq_nncf.fake_quantize import spare_compiling
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError

_MARK = "_mpq_takes_tuples"
_LOGGERS = ("nncf", "openvino", "torch.onnx", "torch.utils.cpp_extension")
SUPPORTED = ((3, 0), (4, 0))  # from, below
TESTED = "3.4"

_MIN_MAX = "nncf.quantization.algorithms.min_max.algorithm"
_HOOKS = "nncf.torch.function_hook"
_STRUCTS = "nncf.common.quantization"
# name -> module that holds it; a dot reaches into the class.
_NAMES = {
    "MinMaxQuantization": _MIN_MAX,
    "MinMaxQuantization.find_quantization_setup": _MIN_MAX,
    "MinMaxQuantization.apply": _MIN_MAX,
    "MinMaxQuantization._set_backend_entity": _MIN_MAX,
    "wrap_model": _HOOKS,
    "get_hook_storage": _HOOKS,
    "FunctionHookMode": f"{_HOOKS}.hook_executor_mode",
    "FunctionHookMode.process_parameters": f"{_HOOKS}.hook_executor_mode",
    "decode_hook_name": f"{_HOOKS}.hook_storage",
    "GraphModelWrapper": f"{_HOOKS}.nncf_graph.nncf_graph_builder",
    "get_const_node": "nncf.torch.model_graph_manager",
    "get_weight_tensor_port_ids": "nncf.torch.model_graph_manager",
    "BaseQuantizer": "nncf.torch.quantization.layers",
    "AsymmetricQuantizer": "nncf.torch.quantization.layers",
    "DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT": "nncf.torch.quantization.default_quantization",
    "QuantizationTrait": f"{_STRUCTS}.quantizer_propagation.structs",
    "QuantizerPropagationRule": f"{_STRUCTS}.quantizer_propagation.structs",
    "QuantizationScheme": f"{_STRUCTS}.structs",
    "QuantizerConfig": f"{_STRUCTS}.structs",
    "SingleConfigQuantizationPoint": f"{_STRUCTS}.quantizer_setup",
    "ActivationQuantizationInsertionPoint": f"{_STRUCTS}.quantizer_setup",
    "WeightQuantizationInsertionPoint": f"{_STRUCTS}.quantizer_setup",
    "OverflowFix": "nncf.quantization.advanced_parameters",
    "AdvancedSmoothQuantParameters": "nncf.quantization.advanced_parameters",
    "AdvancedQuantizationParameters": "nncf.quantization.advanced_parameters",
    "track": "nncf.common.logging.track_progress",
    "QuantizedFunctionsCPU": "nncf.torch.quantization.extensions",
    "QuantizedFunctionsCPU._loaded_namespace": "nncf.torch.quantization.extensions",
    "QuantizedFunctionsCUDA": "nncf.torch.quantization.extensions",
}


@functools.cache
def private() -> dict[str, Any]:
    """The private names, found and checked once; raises `AdapterError` and `MissingExtraError`."""
    nncf = require("nncf", "nncf")
    version = nncf.__version__
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise AdapterError(
            f"NNCF {version} is installed; this adapter works with 3.0 up to, not including, 4 (tested: {TESTED}). "
            "Install one of these: pip install 'nncf>=3.0,<4'."
        )
    found, missing = {}, []
    for name, module in _NAMES.items():
        try:
            found[name] = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    if missing:
        raise AdapterError(
            f"NNCF {version} has no {', '.join(missing)}, which this adapter builds on (tested with NNCF {TESTED}). "
            f"Install the tested version: pip install 'nncf=={TESTED}.*'."
        )
    # Here, because nothing of this adapter reaches a quantizer of NNCF without asking for these names.
    take_tuples(found["FunctionHookMode"])
    spare_compiling(found["QuantizedFunctionsCPU"], found["QuantizedFunctionsCUDA"])
    return found


def take_tuples(mode: Any) -> None:
    """Let NNCF's `mode` see parameters in a tuple as it sees those in a list; else its trace ends in an error.

    `torch.cat((self.q_bias, self.v_bias))` stands in timm's attention. The whole process is affected, with equal numbers.
    """
    process = mode.process_parameters
    if hasattr(process, _MARK):
        return

    @functools.wraps(process)
    def process_tuples(self: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        found, named = process(self, [_as_list(value) for value in args], {key: _as_list(kwargs[key]) for key in kwargs})
        return (
            [_as_given(one, given) for one, given in zip(found, args, strict=True)],
            {key: _as_given(named[key], kwargs[key]) for key in named},
        )

    setattr(process_tuples, _MARK, True)
    mode.process_parameters = process_tuples


def _as_list(value: Any) -> Any:
    return list(value) if type(value) is tuple and any(isinstance(item, nn.Parameter) for item in value) else value


def _as_given(found: Any, given: Any) -> Any:
    return tuple(found) if type(given) is tuple and isinstance(found, list) else found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log lines below errors; filters and levels come back afterwards."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
