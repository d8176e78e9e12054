"""Where the errors of other libraries become ours: each stage of an adapter says what failed and what to do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from mpq_plugins.adapter.record import prepared_inside, record
from mpq_plugins.common.files import disk_refusal
from mpq_plugins.errors import AdapterError, FormatError, MPQError, VerificationError, WriteError

_LONGEST = 300
_PLACES = ("Exception from ", "Check ", "FrontEnd API failed", "Summary:")
# stage -> (what was done, what to do about it, the error)
_STAGES: dict[str, tuple[str, str, type[MPQError]]] = {
    "unconvertible": (
        "looking at the model",
        "Give an example as forward takes it, or leave the adapter out to search without it",
        AdapterError,
    ),
    "activation_groups": ("tracing the model", "Try the other adapter, or its layerwise profile", AdapterError),
    "prepare": (
        "quantizing the model",
        "Exclude the layers that the message is about, or try the other adapter",
        AdapterError,
    ),
    "set_bits": ("switching the bits", "Prepare the model anew at these bits", AdapterError),
    "use_float_weights": ("switching the weights", "Prepare the model anew", AdapterError),
    "export": ("exporting the module", "Try another format or the other adapter; nothing was written", AdapterError),
    "read_bits": ("reading the file", "Export it again, or read it with the adapter that wrote it", FormatError),
    "read_codes": ("reading the file", "Export it again, or read it with the adapter that wrote it", FormatError),
    "codes": ("reading the weight codes", "Give a module that prepare() or load() returned", AdapterError),
    "run": ("running the file", "Give inputs of the kinds and sizes that the model was exported with", VerificationError),
    "save": ("writing the checkpoint", "Give a module that prepare() or load() returned", AdapterError),
    "load": ("loading the checkpoint", "Give the model, the options and the example it was prepared with", FormatError),
}
_OF_MODELS = frozenset(("unconvertible", "activation_groups", "prepare", "load"))  # the others take prepared modules
_OF_MODULES = frozenset(("set_bits", "use_float_weights", "export", "codes", "save"))


@contextlib.contextmanager
def telling(what: str, advice: str, error_type: type[MPQError] = AdapterError) -> Iterator[None]:
    """Tell whatever another library raises as `error_type`, and a full disk as a `WriteError`; our own errors pass."""
    try:
        yield
    except MPQError:
        raise
    except Exception as error:
        reason = disk_refusal(error) if isinstance(error, OSError) else None
        if reason is not None and error_type is AdapterError:
            raise WriteError(f"{what} failed: {reason}. Choose a folder that you may write to, with space left.") from error
        raise error_type(f"{what} failed: {told(error)}. {advice}.") from error


def told(error: BaseException) -> str:
    """Kind and text of an error in one line; tracers append whole graphs to theirs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(_PLACES):  # OpenVINO: where in its source, then what, then the reason
        kept = [line.lstrip("- ").rstrip(".:; ") for line in lines if not line.startswith(_PLACES)]
        lines = ["; ".join(line for line in kept if not line.endswith("with a message"))]
    line = lines[0] if lines else ""
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return f"{type(error).__name__}: {line}".rstrip(": .")


def guard_stages(adapter: type) -> None:
    """Let the stages that a class of adapters defines tell what other libraries raise.

    Models are checked, and modules taken out of their wrappers, before a stage sees them.
    """
    for stage in _STAGES.keys() & vars(adapter).keys():
        setattr(adapter, stage, _guarded(stage, vars(adapter)[stage]))


def _guarded(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
    what, advice, error_type = _STAGES[stage]

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **options: Any) -> Any:
        import torch

        from mpq_plugins.model.check import model_for_adapter

        # What is made under inference mode can neither be trained nor told to have changed.
        usual = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with usual, telling(f"{getattr(self, 'name', type(self).__name__)}: {what}", advice, error_type):
            for stages, key, ready in ((_OF_MODELS, "model", model_for_adapter), (_OF_MODULES, "module", prepared_inside)):
                if stage in stages and args:
                    args = (ready(args[0]), *args[1:])
                elif stage in stages and key in options:
                    options = {**options, key: ready(options[key])}
            made = method(self, *args, **options)
        return record(made, adapter=self) if stage in ("prepare", "load") else made

    return guarded
