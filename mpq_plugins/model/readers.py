"""Which operations read the weights that no layer holds, and how many multiply-accumulates they spend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from mpq_plugins.model.run import tensors
from mpq_plugins.model.watch import function_name

# Each weight is used once per row of the first input.
_PER_ROW = frozenset(
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell multi_head_attention_forward bilinear".split()
)


@final
class Readers:
    """Follows the parameters of two or more dimensions through one forward pass, also what is computed from them alone.

    `operations` maps a parameter's name to the operations that combine it with other data, in the order of their calls;
    `macs` to their multiply-accumulates over the whole batch, as far as they are known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.operations: dict[str, list[str]] = {}
        self.macs: dict[str, int] = {}
        self._origins: dict[int, tuple[str, ...]] = {}
        self._held: list[Tensor] = []  # what was computed from parameters alone; holding it keeps its id unique
        for name, parameter in model.named_parameters():
            self._origins[id(parameter)] = (name,) if parameter.dim() > 1 else ()
        for buffer in model.buffers():
            self._origins.setdefault(id(buffer), ())

    def origins(self, tensor: Any) -> tuple[str, ...]:
        """Names of the parameters that `tensor` is, or was computed from and from nothing else."""
        return self._origins.get(id(tensor), ())

    def on_call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take note of an operation that is no call of a layer."""
        outputs = list(tensors(output))
        if not outputs:
            return  # reading a shape is no use of the values
        inputs = list(tensors((args, kwargs)))
        names = dict.fromkeys(name for tensor in inputs for name in self.origins(tensor))
        if not names:
            return
        if all(id(tensor) in self._origins for tensor in inputs):
            for tensor in outputs:
                if id(tensor) not in self._origins:
                    self._origins[id(tensor)] = tuple(names)
                    self._held.append(tensor)
            return
        operation = function_name(function).strip("_")
        weights = {name: tensor for tensor in inputs for name in self.origins(tensor)}
        for name, weight in weights.items():
            self.read(name, operation, _macs(operation, args, kwargs, output, weight))

    def read(self, name: str, operation: str, macs: int) -> None:
        """Add one call of `operation`, which reads the parameter `name`."""
        known = self.operations.setdefault(name, [])
        if operation not in known:
            known.append(operation)
        self.macs[name] = self.macs.get(name, 0) + macs


def _macs(operation: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, weight: Tensor) -> int:
    """Multiply-accumulates of one call; 0 for operations that multiply no matrices, and for forms not known here."""
    operands = list(tensors((args, kwargs)))
    if operation in _PER_ROW:
        return weight.numel() * (operands[0].numel() // max(operands[0].shape[-1], 1))
    if not isinstance(output, Tensor) or len(operands) < 2:
        return 0
    if operation in ("matmul", "mm", "bmm", "mv", "grouped_mm"):
        return output.numel() * operands[0].shape[-1]
    if operation == "rmatmul":
        return output.numel() * operands[1].shape[-1]
    if operation in ("addmm", "baddbmm", "addbmm") and len(operands) > 2:
        return operands[1].numel() * operands[2].shape[-1]
    if operation == "tensordot":
        return math.isqrt(operands[0].numel() * operands[1].numel() * output.numel())
    if operation == "einsum" and isinstance(args[0], str):
        return _einsum_macs(args[0], operands)
    return 0


def _einsum_macs(equation: str, operands: Sequence[Tensor]) -> int:
    """The product of all index lengths; an ellipsis counts with the most elements it stands for."""
    lengths: dict[str, int] = {}
    rest = 1
    for term, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=False):
        before, dots, after = term.partition("...")
        stop = operand.dim() - len(after) if dots else len(before)
        lengths.update(zip(before, operand.shape, strict=False))
        lengths.update(zip(after, operand.shape[stop:], strict=False))
        rest = max(rest, math.prod(operand.shape[len(before) : stop])) if dots else rest
    return rest * math.prod(lengths.values())
