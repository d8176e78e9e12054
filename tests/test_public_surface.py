"""The public names and how they are called: a change of any is seen in the difference of one file.

`python tests/test_public_surface.py` stores them anew; do that where the change is meant, and tell users in CHANGELOG.
"""

import functools
import importlib
import inspect
import pkgutil
from enum import Enum
from pathlib import Path

import mpq_plugins

STORED = Path(__file__).parent / "stored" / "public_surface.txt"


def packages():
    """The names of the package and of its folders."""
    return ["mpq_plugins", *(f"mpq_plugins.{part.name}" for part in pkgutil.iter_modules(mpq_plugins.__path__) if part.ispkg)]


def public_names(package):
    """What `__all__` lists, or what an `__init__` imports as itself: everything but modules and private names."""
    module = importlib.import_module(package)
    return getattr(module, "__all__", None) or sorted(
        name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)
    )


def default_of(value):
    """A default as it is written; an object by its class alone, since its text may hold an address or be of a version."""
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "<made anew>"
    plain = (bool, int, float, str, type(None))
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value)):
        return repr(value)
    return f"<{value.__name__ if isinstance(value, type) else type(value).__name__}>"


def annotation_of(value):
    """An annotation as it is written in the source; classes by their names."""
    return value if isinstance(value, str) else getattr(value, "__qualname__", str(value))


def signature_of(function):
    """`(a: int, *, b: str = 'x') -> None`, without what Python versions print differently."""
    signature, parts, star = inspect.signature(function), [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {annotation_of(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {default_of(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{kind}{default}")
    result = signature.return_annotation
    return f"({', '.join(parts)})" + ("" if result in (signature.empty, None) else f" -> {annotation_of(result)}")


def members_of(kind):
    """Public methods and properties that a class defines itself; fields stand in its signature."""
    for name, value in sorted(vars(kind).items()):
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if name.startswith("_"):
            continue
        if inspect.isfunction(function):
            yield f"    .{name}{signature_of(function)}"
        elif isinstance(value, (property, functools.cached_property)):
            yield f"    .{name}"


def lines():
    """One line for each public name, and one for each public member of a class."""
    for package in packages():
        module = importlib.import_module(package)
        for name in public_names(package):
            value = getattr(module, name)
            if inspect.isclass(value):
                is_called = issubclass(value, Exception) or inspect.isabstract(value) or issubclass(value, Enum)
                bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
                yield f"{package}.{name}" + (f" ({bases})" if is_called else signature_of(value.__init__))
                yield from members_of(value)
            elif callable(value):
                yield f"{package}.{name}{signature_of(value)}"
            else:
                yield f"{package}.{name} = {value!r}"


def test_the_public_surface_is_as_stored():
    """Names, parameters, annotations as written, defaults and members are those in the stored file."""
    assert list(lines()) == STORED.read_text(encoding="utf-8").splitlines()


def test_no_line_depends_on_the_run():
    """No addresses, and every name of the package is there."""
    text = STORED.read_text(encoding="utf-8")
    assert " at 0x" not in text
    assert all(f"\nmpq_plugins.{name}" in f"\n{text}" for name in mpq_plugins.__all__)


if __name__ == "__main__":
    STORED.write_text("\n".join(lines()) + "\n", encoding="utf-8")
