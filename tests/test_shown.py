"""What people see in a console and in a notebook: short, with the decision and its cost, and safe to show."""

import html
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from mpq_plugins import BitConfig, Problem, Verification, allocate, solve
from mpq_plugins.adapter.verify import LayerCheck, OutputCheck
from mpq_plugins.common.html import html_table


@pytest.fixture(scope="module")
def allocation():
    """Forty layers of 64 weights; the first is pinned."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(40)))
    choices, budgets = {"*": (2, 4, 8), "3?": 4}, "size=w4,bops=60%"
    return allocate(model, torch.ones(1, 8), budgets=budgets, proxy="weight-error", choices=choices, pin={"0": 8})


def parts(allocation):
    layers = (LayerCheck("0", "w8a8", "w4a8", 64, 3), *(LayerCheck(str(i), "w4a8", "w4a8", 64, 0) for i in range(1, 40)))
    checked = Verification("m.onnx", "brevitas", layers, outputs=OutputCheck(1e-6, 1e-5, 1.0, 1e-3))
    bad = Verification("m.onnx", "brevitas", tuple(replace(one, found=None) for one in layers), ("a", "b"))
    space = allocation.space
    return {
        "Allocation": [allocation],
        "BitConfig": [allocation.bits, BitConfig({"a": 4}, "")],
        "Scores": [allocation.scores],
        "Solution": [allocation.solution, solve(Problem.of([[1.0]], [([[2]], 1)]), throw=False), solve(Problem.of([]))],
        "Verification": [checked, bad],
        "Space": [space],
    }


def test_every_text_is_a_few_lines(allocation):
    """At most five lines of at most 320 characters, however many layers; the first word says what it is."""
    for word, values in parts(allocation).items():
        for value in values:
            lines = str(value).splitlines()
            assert repr(value) == str(value)
            assert lines[0].startswith(word)
            assert len(lines) <= 5, value
            assert max(map(len, lines)) <= 320, value


def test_the_text_of_an_allocation_says_what_was_decided_and_what_it_costs(allocation):
    """The pinned layer by name and width, the ten that are held at 4 bits among the others, the costs beside their limits."""
    text = str(allocation)
    assert "weight-error" in text
    assert re.search(r"w8a8: 0\b", text)
    n_bits = sum(64 * precision.weight for precision in allocation.bits.layers.values())
    assert f"size {n_bits / 8 / 1024:.4g} KiB of " in text
    assert re.search(r"bops .*BOPs of .*BOPs", text)
    named = re.findall(r"w[248]a8: ([^;\n]*)", text)
    told = sum(len(re.findall(r"\b\d+\b(?! more)", words)) + sum(map(int, re.findall(r"(\d+) more", words))) for words in named)
    assert told == 40


def test_tables_are_well_formed_and_have_a_row_for_each_layer(allocation):
    """What a notebook shows can be parsed, names no colour of text or ground, and holds every layer."""
    for values in parts(allocation).values():
        for value in values:
            if not hasattr(value, "_repr_html_"):
                continue
            text = value._repr_html_()
            ElementTree.fromstring(text)
            assert "background" not in text
            assert not re.search(r"[^-]color:", text)
    rows = ElementTree.fromstring(allocation._repr_html_()).findall(".//tr")
    assert [row[0].text for row in rows] == ["layer", *(str(i) for i in range(40))]
    assert [int(row[2].text) for row in rows[1:]] == [bits.weight for bits in allocation.bits.layers.values()]


def test_names_of_layers_cannot_run_in_a_notebook():
    """A layer may be called anything."""
    bad = "<script>alert(1)</script>"
    text = html_table(bad, (bad,), [(bad,)], [bad])
    assert "<script" not in text
    assert text.count(html.escape(bad)) == 4
