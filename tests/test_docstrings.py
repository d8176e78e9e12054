"""Docstrings of public names: every parameter is named, and every example runs."""

import doctest
import importlib
import inspect
import re

import pytest
import torch

import mpq_plugins
import mpq_plugins.reports
import mpq_plugins.testing
import mpq_plugins.training

RESULTS = {"Allocation", "Exported", "Inventory", "Layer", "Limit", "Plan", "Repair", "Solution", "Status", "Verification"}
# Adapters take a page (docs/writing-a-plugin.md); the other two take no explanation.
WITHOUT_EXAMPLE = RESULTS | {"AbstractAdapter", "example_network", "example_batches"}


def public_objects():
    """Functions and classes that users call, without errors."""
    modules = (mpq_plugins.training, mpq_plugins.reports, mpq_plugins.testing)
    found = {name: getattr(mpq_plugins, name) for name in mpq_plugins.__all__}
    found.update({name: value for module in modules for name, value in vars(module).items() if is_verb(name, value)})
    return {name: value for name, value in found.items() if not (inspect.isclass(value) and issubclass(value, Exception))}


def is_verb(name, value):
    """Whether the name is a verb of training and reports, or a function of `testing`."""
    is_called = name in ("train", "compare") or name.startswith("plot_")
    is_for_tests = inspect.isfunction(value) and value.__module__ == "mpq_plugins.testing" and not name.startswith("_")
    return is_called or is_for_tests


PUBLIC = public_objects()
MODULES = sorted({value.__module__ for value in PUBLIC.values()})


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, folder):
    """An example needs `torch` and `mpq`, as the package's docstring says, what its module has, and what it imports."""
    module = importlib.import_module(name)
    torch.manual_seed(0)
    told = []
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, extraglobs={"mpq": mpq_plugins, "torch": torch}):
        runner.run(test, out=told.append)
    assert not runner.failures, "".join(told)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_example_and_parameters(name):
    """Whoever reads `help(name)` sees an example, and what each argument is."""
    value = PUBLIC[name]
    text = inspect.getdoc(value) or ""
    assert text, "no docstring"
    has_example = bool(doctest.DocTestParser().get_examples(text))
    assert has_example != (name in WITHOUT_EXAMPLE), "an example, or a place in WITHOUT_EXAMPLE"
    if inspect.isfunction(value):
        assert set(inspect.signature(value).parameters) <= named_in(text)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_arguments_exist(name):
    """What stands under "Args" is an argument, also after one was renamed."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert listed_in(text) <= set(inspect.signature(PUBLIC[name]).parameters)


def listed_in(text):
    """The names under "Args", where several may share a line."""
    arguments = re.search(r"^Args:\n((?: +.*\n)+)", text, re.MULTILINE)
    lines = re.findall(r"^    ([a-z_, ]+): ", arguments[1], re.MULTILINE) if arguments else []
    return {name for line in lines for name in line.split(", ")}


def named_in(text):
    """The names under "Args", and those in backticks."""
    return listed_in(text) | set(re.findall(r"`(\w+)`", text))
