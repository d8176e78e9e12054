"""Bit configurations as Brevitas modules, QONNX and ONNX QCDQ files. Brevitas is imported on use."""

from mpq_brevitas.adapter import BrevitasAdapter as BrevitasAdapter
