"""Every private name of NNCF that this adapter touches, checked against the installed version.

Only `_nncf_setup` (what NNCF plans) and `_nncf_quantizers` (what it has placed) use them; the rest of the adapter sees the
functions and values of those two.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from mpq_nncf.fake_quantize import spare_compiling
from mpq_nncf.tuples import take_tuples
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError

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
