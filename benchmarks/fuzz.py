"""Mutated inputs for every reader of what users write: each must be taken, or refused by an error of ours.

    python benchmarks/fuzz.py [--count 3000] [--seed 0]

Prints how many mutations of each reader's input were taken, how many refused by an `MPQError`, and how many ended in an error
of another kind, which is a fault; the exit code is 1 if there are any. What a reader takes is written again, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq_plugins import BitConfig, Precision, Scores, allocate, solve_scores
from mpq_plugins.cli.parser import _parser, _with_config
from mpq_plugins.costs.budgets import as_budgets
from mpq_plugins.errors import MPQError

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 9, 10**25, 1.5, -0.0, 1e300, "", "w4a8", "w99", "x" * 300, "\ud800", "ä\0", [], {}, [[]],
    {"a": {}}, [None], [1, 2], {"weight": 4}, "9" * 5000, float("inf"), float("nan"),
)  # fmt: skip
PIECES = (
    "w", "a", "4", "8", "=", "?", "&", ".", "-", "+", "e", "9" * 400, "9" * 5000, "%", "bits", "x", "k", "Mi", "B", "BOPs",
    "us", " ", "\t", "\n", "\0", "٤", "½", "∞", "nan", "inf", "size", "bops", "latency", "compression", "#", "[/b]", "{", "}",
    "[", '"', ":", ",", "true", "\ufeff", "\ud800", "1e999", "-0",
)  # fmt: skip


@dataclass
class Counts:
    """What became of the mutations of one reader's input."""

    taken: int = 0
    refused: int = 0
    raw: int = 0
    examples: list[str] = field(default_factory=list)

    def try_(self, use: Callable[[], object], described: str) -> None:
        """Use one mutation and count it."""
        try:
            use()
        except (MPQError, SystemExit):  # argparse tells wrong use by the latter
            self.refused += 1
        except Exception as error:
            self.raw += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.examples.append(
                f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}) {described[:200]}"
            )
        else:
            self.taken += 1


def mutated_text(text: str, chance: random.Random) -> str:
    """`text` with some characters dropped, doubled, exchanged or replaced by awkward pieces."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randint(0, len(text))
        stop = min(len(text), start + chance.choice((0, 0, 1, 1, 2, 5, 50)))
        text = text[:start] + chance.choice(("", chance.choice(PIECES), text[start:stop] * 2)) + text[stop:]
    return text


def mutated_document(document: Any, chance: random.Random) -> Any:
    """A copy of a JSON document with some values replaced, dropped, doubled or renamed."""
    document = json.loads(json.dumps(document))
    for _ in range(chance.randint(1, 3)):
        places = list(_places(document))
        holder, key = chance.choice(places)
        kind = chance.randrange(4)
        if kind == 0:
            holder[key] = chance.choice(STRANGE)
        elif kind == 1:
            del holder[key]
        elif kind == 2 and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == 2:
            holder[mutated_text(str(key), chance)] = holder[key]
        else:
            other, name = chance.choice(places)
            with contextlib.suppress(LookupError, TypeError):
                holder[key] = json.loads(json.dumps(other[name]))
        if not document:
            break
    return document


def _places(document: Any) -> Any:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield document, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def as_bytes(document: Any, chance: random.Random) -> bytes:
    """A mutation of a document as a file holds it: of its values, of its text, or of its bytes."""
    kind = chance.randrange(3)
    text = json.dumps(mutated_document(document, chance) if kind == 0 else document)
    if kind == 1:
        text = mutated_text(text, chance)
    data = bytearray(text.encode(errors="surrogatepass"))
    if kind == 2 and data:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        data = data[: chance.choice((len(data), len(data), chance.randint(0, len(data))))]
    return bytes(data)


def fuzz(count: int, seed: int = 0) -> dict[str, Counts]:
    """Mutations of the inputs of all readers, `count` each."""
    chance = random.Random(seed)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    allocation = allocate(net, torch.randn(2, 8), budgets="size=w4", proxy="constant")
    found: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory() as directory:
        path, other = Path(directory) / "file.json", Path(directory) / "other.json"

        def of_document(name: str, document: Any, use: Callable[[], object]) -> None:
            counts = found[name] = Counts()
            for _ in range(count):
                data = as_bytes(document, chance)
                path.write_bytes(data)
                counts.try_(use, repr(data))

        def of_texts(name: str, texts: tuple[str, ...], use: Callable[[str], object]) -> None:
            counts = found[name] = Counts()
            for _ in range(count):
                text = mutated_text(chance.choice(texts), chance)
                counts.try_(lambda text=text: use(text), repr(text))

        bits = json.loads(allocation.bits.save(path).read_text())
        of_document("BitConfig.load, save", bits, lambda: BitConfig.load(path).save(other))
        scores = json.loads(allocation.scores.save(path).read_text())

        def solved() -> None:
            read = Scores.load(path)
            read.save(other)
            solve_scores(read, "size=w5").bits.save(other)

        of_document("Scores.load, save, solve", scores, solved)
        config = {"model": "a:b", "data": "digits", "budget": ["size=w4"], "bits": [2, 4], "pin-first-last": True, "top-k": 2}
        of_document("--config", config, lambda: _parsed(["allocate", "--config", str(path)]))
        toml = Path(directory) / "file.toml"

        def from_toml(text: str) -> None:
            toml.write_bytes(text.encode(errors="surrogatepass"))
            _parsed(["allocate", "--config", str(toml)])

        of_texts("--config, TOML", ('model = "a:b"\nbudget = ["size=w4", "bops=75G"]\nimages = 64\n',), from_toml)
        of_texts(
            "budgets",
            ("size=w4", "size=6.7MiB", "bops=75G", "size=w4.5a8", "bits=3.5", "compression=8", "bops=60%",
             "stored_size?target=openvino-fast=1MiB", "size=3.5 bits", "activation_memory=1e3"),
            lambda text: [budget.resolve(allocation.space) for budget in as_budgets(text)],
        )  # fmt: skip
        of_texts("Precision.parse", ("w4a8", "w4", "8", " W2A4 "), lambda text: (Precision.parse(text), Precision.of(text)))
    return found


def _parsed(words: list[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        _parser().parse_args(_with_config(words))


def main() -> int:
    """Print the counts; 1 if an error of another kind came through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="mutations for each reader (3000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = fuzz(options.count, options.seed)
    print("| reader | taken | refused | raw errors |\n|---|---|---|---|")
    for name, counts in found.items():
        print(f"| {name} | {counts.taken} | {counts.refused} | {counts.raw} |")
    for counts in found.values():
        for example in counts.examples[:10]:
            print(example.encode(errors="backslashreplace").decode(), file=sys.stderr)
    return int(any(counts.raw for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
