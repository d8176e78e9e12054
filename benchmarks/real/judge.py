"""How a quantized network is judged: by what it was made for, against the float network on inputs it was not calibrated on.

`judge.of(module)` judges a module, `judge.of_file(adapter, path)` an exported file in its own runtime.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any], Tensor]


class Judge(abc.ABC):
    """Figures of a network; `main` is the one that tables compare, `lower_is_better` says how."""

    main: str
    lower_is_better: bool = True

    @abc.abstractmethod
    def figures(self, run: Run) -> dict[str, float]:
        """What `run` (inputs -> outputs) is worth."""

    def of(self, module: nn.Module) -> dict[str, float]:
        """Figures of a module, in evaluation mode."""
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                return self.figures(lambda inputs: called(module, inputs))
        finally:
            for child, training in modes:
                child.training = training

    def of_file(self, adapter: Any, path: str | Path) -> dict[str, float]:
        """Figures of an exported file."""
        return self.figures(lambda inputs: torch.as_tensor(adapter.run(path, inputs)[0]))


class Classes(Judge):
    """KL(float || quantized) and agreement on unlabelled images; how many of the labelled ones are right."""

    main = "kl"

    def __init__(self, net: nn.Module, test: Sequence[Any], images: Tensor | None = None, labels: Tensor | None = None) -> None:
        self._test, self._images, self._labels = test, images, labels
        self._float = _outputs(net, test).log_softmax(dim=-1)

    def figures(self, run: Run) -> dict[str, float]:
        """`kl` in nats, `agreement` as a share, `right` of the labelled images."""
        found = torch.cat([run(inputs) for inputs in self._test]).log_softmax(dim=-1)
        kl = (self._float.exp() * (self._float - found)).sum(dim=-1).mean()
        agreement = (found.argmax(dim=-1) == self._float.argmax(dim=-1)).float().mean()
        figures = {"kl": round(float(kl), 4), "agreement": round(float(agreement), 4)}
        if self._images is not None:
            answers = torch.cat([run(part) for part in self._images.split(len(self._test[0]))]).argmax(dim=-1)
            figures["right"] = int((answers == self._labels).sum())
        return figures


class Words(Judge):
    """Character error rate on rendered words; KL to the float network over the steps."""

    main = "cer"

    def __init__(self, net: nn.Module, test: Sequence[Any], words: Sequence[str], alphabet: str) -> None:
        self._test, self._words, self._alphabet = test, words, alphabet
        self._float = _outputs(net, test).log_softmax(dim=-1)

    def figures(self, run: Run) -> dict[str, float]:
        """`cer` in percent (edits per letter of the true words), `kl` in nats per step."""
        found = torch.cat([run(inputs) for inputs in self._test]).log_softmax(dim=-1)
        read = [read_steps(row, self._alphabet) for row in found.argmax(dim=-1).tolist()]
        edits = sum(edit_distance(ours, word) for ours, word in zip(read, self._words, strict=True))
        kl = (self._float.exp() * (self._float - found)).sum(dim=-1).mean()
        return {"cer": round(100 * edits / sum(map(len, self._words)), 2), "kl": round(float(kl), 4)}


class Embeddings(Judge):
    """One minus the cosine to the float embedding."""

    main = "distance"

    def __init__(self, net: nn.Module, test: Sequence[Any]) -> None:
        self._test = test
        self._float = _outputs(net, test)

    def figures(self, run: Run) -> dict[str, float]:
        """`distance`: the mean of 1 - cosine; `cosine_least`: the smallest cosine of all inputs."""
        found = torch.cat([run(inputs) for inputs in self._test])
        cosine = torch.nn.functional.cosine_similarity(found, self._float, dim=-1)
        return {"distance": round(1 - float(cosine.mean()), 5), "cosine_least": round(float(cosine.min()), 4)}


def called(module: nn.Module, inputs: Any) -> Tensor:
    """The output of a module on a tensor or a tuple of them."""
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _outputs(net: nn.Module, test: Sequence[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([called(net, inputs) for inputs in test])


def read_steps(classes: Sequence[int], alphabet: str) -> str:
    """Letters of the most likely classes: repeats count once, class 0 is no letter."""
    kept = [c for c, before in zip(classes, [0, *classes], strict=False) if c != before and c != 0]
    return "".join(alphabet[c - 1] for c in kept)


def edit_distance(first: str, second: str) -> int:
    """The least number of letters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
