"""Adapter to NNCF 3.x: per-layer bits through `nncf.quantize`, exported to OpenVINO IR and ONNX.

Importing this package imports neither nncf nor openvino.
"""

from mpq_nncf.adapter import NNCFAdapter as NNCFAdapter

__all__ = ["NNCFAdapter"]
