"""What FINN's compiler makes of an exported file: run in its own environment, told step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpq_brevitas.read import BrevitasGraph, read_codes
from mpq_brevitas.run import run
from mpq_plugins.errors import AdapterError, VerificationError
from mpq_plugins.model.run import call, tensors

ENVIRONMENT = "MPQ_FINN"
TOLERANCE = 1e-5  # of outputs, by which `run` may differ as well
_HOW = f".ci/finn-environment FOLDER makes it; then give FOLDER, or set {ENVIRONMENT}=FOLDER."


@dataclass(frozen=True)
class Step:
    """One of FINN's build steps.

    `difference` is the largest of the outputs, None where the graph needs Vivado to run. A step that failed tells FINN's
    `error`, the `node` of the graph that it names, and the `layer` at or in front of that node.
    """

    name: str
    ok: bool
    difference: float | None = None
    cpu_seconds: float = 0.0
    error: str | None = None
    node: str | None = None
    layer: str | None = None


@dataclass(frozen=True)
class HardwareNode:
    """FINN's estimate for one node of the accelerator; `layer` is set where it multiplies by that layer's weights."""

    operation: str
    layer: str | None
    cycles: int
    lut: float
    dsp: float
    bram18: float
    uram: float


@dataclass(frozen=True)
class Report:
    """The steps up to the first that failed, and FINN's estimates where none did.

    `host` names the nodes at the ends of the graph that are left to the host. `total` holds lut, dsp, bram18, uram,
    max_cycles (of the slowest node, an image's interval), critical_path_cycles and fps.
    """

    path: Path
    part: str
    steps: tuple[Step, ...]
    host: tuple[str, ...]
    nodes: Mapping[str, HardwareNode]
    total: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether FINN takes the file and computes what was expected wherever its graph can be run."""
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each step that failed or computes something else."""
        found = []
        for step in self.steps:
            where = f" at {step.node}" if step.node else ""
            where += f" (layer {step.layer})" if step.layer else ""
            if not step.ok:
                found.append(f"FINN refuses {self.path} in {step.name}{where}: {step.error}")
            elif step.difference is not None and not step.difference <= TOLERANCE:
                found.append(f"outputs differ by {step.difference:.1e} after FINN's {step.name}, over {TOLERANCE:.0e}")
        return tuple(found)

    def check(self) -> Report:
        """Raise `VerificationError` unless `ok`; returns the report."""
        if self.problems:
            raise VerificationError("\n".join(self.problems))
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "path": str(self.path), "ok": self.ok}

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(self.problems)
        total = self.total
        return (
            f"FINN takes {self.path} for {self.part}: {total['lut']:,.0f} LUT, {total['dsp']:.0f} DSP, "
            f"{total['bram18']:.0f} BRAM18, {total['uram']:.0f} URAM, {total['max_cycles']:,} cycles an image "
            f"(outputs within {max(step.difference or 0 for step in self.steps):.0e})"
        )


def judge(
    path: str | Path,
    module: nn.Module | None = None,
    inputs: Any = None,
    *,
    environment: str | Path | None = None,
    part: str = "xc7z020clg400-1",
    fps: int = 1000,
    clock_ns: float = 5.0,
) -> Report:
    """Run FINN's build steps up to its estimates on a QONNX file of the finn profile, as far as they go without Vivado.

    Outputs are compared with those of `module` on `inputs` [image, ...]; without a module with the file's own in
    onnxruntime, without inputs on two images drawn at random. `environment` is the folder that `.ci/finn-environment`
    made, or else the variable MPQ_FINN. `part` names the FPGA; layers are unfolded to reach `fps` images a second at
    `clock_ns`. Raises `AdapterError` without the environment, or where FINN does not start in it.

    Example:
        judge("net.onnx", module, images, environment="finn").check().total["lut"]
    """
    folder = _environment(environment)
    path = Path(path)
    images = _images(path) if inputs is None else np.asarray(inputs, dtype=np.float32)
    outputs = [_outputs(path, module, image[None]) for image in images]
    codes = {f"codes/{name}": array for name, array in read_codes(path).items()}
    with tempfile.TemporaryDirectory() as working:
        request, arrays, answer = (Path(working) / name for name in ("request.json", "arrays.npz", "report.json"))
        np.savez(arrays, inputs=images, outputs=np.stack(outputs), **codes)
        asked = {"path": str(path.resolve()), "arrays": str(arrays), "part": part, "fps": fps, "clock_ns": clock_ns}
        request.write_text(json.dumps(asked))
        own = folder / "bin" / "python"
        process = subprocess.run(
            [str(own if own.exists() else sys.executable), str(Path(__file__).with_name("finn_judge.py")), request, answer],
            cwd=working,
            env={**os.environ, "PYTHONPATH": str(folder), "FINN_BUILD_DIR": working},
            capture_output=True,
            text=True,
        )
        if not answer.exists():
            told = process.stderr.strip().splitlines()[-1:] or ["no message"]
            raise AdapterError(f"FINN in {folder} ended with {process.returncode}: {told[0]}. Make it anew: {_HOW}")
        found = json.loads(answer.read_text())
    return Report(
        path,
        part,
        tuple(Step(**step) for step in found["steps"]),
        tuple(found["host"]),
        {name: HardwareNode(**node) for name, node in found["nodes"].items()},
        found["total"],
    )


def _environment(environment: str | Path | None) -> Path:
    given = environment or os.environ.get(ENVIRONMENT)
    if not given:
        raise AdapterError(f"FINN's compiler needs an environment of its own. {_HOW}")
    folder = Path(given).resolve()
    if not (folder / "finn").is_dir() and not (folder / "bin" / "python").exists():
        raise AdapterError(f"{folder} holds no FINN. {_HOW}")
    return folder


def _images(path: Path) -> np.ndarray:
    inputs = BrevitasGraph.load(path).model.graph.input
    if len(inputs) != 1:
        raise AdapterError(f"{path} has {len(inputs)} inputs. FINN's compiler is asked about files of one.")
    shape = [size.dim_value for size in inputs[0].type.tensor_type.shape.dim]
    if not all(shape):
        raise AdapterError(f'{path} leaves sizes open. Export it with profile="finn", which fixes them.')
    return np.random.default_rng(0).standard_normal((2, *shape[1:]), dtype=np.float32)


def _outputs(path: Path, module: nn.Module | None, image: np.ndarray) -> np.ndarray:
    if module is None:
        return run(path, image)[0]
    with torch.no_grad():
        return next(tensors(call(module, torch.from_numpy(image)))).numpy()
