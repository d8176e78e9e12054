"""The wheel, and what importing it costs."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mpq_plugins
from mpq_plugins import errors

ROOT = Path(__file__).parent.parent
HEAVY = ("nncf", "brevitas", "openvino", "onnx", "matplotlib")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The built wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, capture_output=True)
    return wheel, folder / "site"


def run_in(site, code):
    """What a fresh interpreter prints that sees the installed wheel before the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=site, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_wheel_holds_three_packages_and_nothing_else(installed):
    """Both adapters travel in the wheel, typed, and no package named adapters shadows the one on PyPI."""
    names = zipfile.ZipFile(installed[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mpq_plugins", "mpq_nncf", "mpq_brevitas"}
    assert {f"{package}/py.typed" for package in ("mpq_plugins", "mpq_nncf", "mpq_brevitas")} <= set(names)


def test_every_entry_point_of_the_wheel_loads(installed):
    """Each plugin that the wheel registers can be imported and made from the installed files."""
    wheel, site = installed
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str
    parser.read_string(archive.read(name).decode())
    groups = {group: dict(parser[group]) for group in parser.sections()}
    assert set(groups) == {"console_scripts", *(f"mpq_plugins.{kind}" for kind in ("proxies", "costs", "solvers", "adapters"))}
    targets = [target for group in groups.values() for target in group.values()]
    code = "import importlib\n" + "\n".join(
        f"assert getattr(importlib.import_module({module!r}), {attribute!r})"
        for module, attribute in (target.split(":") for target in targets)
    )
    assert run_in(site, code + "\nimport mpq_nncf; print(mpq_nncf.__file__)").startswith(str(site))


def test_importing_the_core_imports_no_framework(installed):
    """`import mpq_plugins` and every public name of it need neither a framework nor a plotting library."""
    code = (
        "import sys, mpq_plugins\n"
        "[getattr(mpq_plugins, name) for name in mpq_plugins.__all__]\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert run_in(installed[1], code) == "[]"


def test_importing_an_adapter_imports_no_framework(installed):
    """A framework is imported when it is used, not when its adapter is listed."""
    code = (
        "import sys, mpq_nncf, mpq_brevitas\nmpq_nncf.NNCFAdapter(); mpq_brevitas.BrevitasAdapter()\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert run_in(installed[1], code) == "[]"


def test_help_imports_not_even_torch(installed):
    """`mpq --help` and a wrong option answer without torch."""
    code = (
        "import sys\nfrom mpq_plugins.cli.parser import main\n"
        "for words in (['--help'], ['allocate', '--help'], ['allocate', '--nonsense']):\n"
        "    try: main(words)\n    except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert run_in(installed[1], code).endswith("False False")


def test_public_names_are_sorted_and_exist():
    """`__all__` is what the package hands out, in order."""
    assert list(mpq_plugins.__all__) == sorted(mpq_plugins.__all__)
    assert all(getattr(mpq_plugins, name) is not None for name in mpq_plugins.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mpq_plugins.nonsense


def test_every_documented_error_can_be_imported():
    """Every class of the tree in `mpq_plugins.errors` is a public name, and all but the warning derive from `MPQError`."""
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes.keys() <= set(mpq_plugins.__all__)
    assert all(name in (errors.__doc__ or "") and getattr(mpq_plugins, name) is value for name, value in classes.items())
    others = [value for value in classes.values() if not issubclass(value, mpq_plugins.MPQError)]
    assert all(issubclass(value, UserWarning) for value in others)
