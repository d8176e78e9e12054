"""The command line: one verb per stage. Nothing heavy is imported before a verb runs.

Exit codes: 0 done; 1 verification failed; 2 wrong use, bad input or a missing extra; 3 infeasible budget; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mpq_plugins import __version__
from mpq_plugins.errors import FormatError, InfeasibleBudgetError, MPQError, UsageError, VerificationError

_REPEATABLE = frozenset(
    ("budget", "pin", "tie", "include", "exclude", "adapter-option", "proxy-option", "solver-option", "ptq")
)
_SWITCHES = frozenset(("pin-first-last",))  # the options that also exist as --no-...
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INFEASIBLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    try:
        options = _parser().parse_args(_with_config(list(sys.argv[1:] if arguments is None else arguments)))
        return _run(options)
    except InfeasibleBudgetError as error:
        return _fail(error, EXIT_INFEASIBLE)
    except VerificationError as error:
        return _fail(error, EXIT_FAILED)
    except MPQError as error:
        return _fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        print("interrupted; files that were complete are kept", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    from mpq_plugins.cli import verbs
    from mpq_plugins.cli.options import check_outputs
    from mpq_plugins.common.allocator import keeping_memory
    from mpq_plugins.common.progress import reporting_to, showing_progress

    verb = getattr(verbs, options.verb)
    with _logging(options.verbose), keeping_memory(), reporting_to(None) if options.quiet else showing_progress():
        check_outputs(options)
        code: int = verb(options)
    return code


@contextlib.contextmanager
def _logging(is_verbose: bool) -> Iterator[None]:
    """Our log lines on stderr, and warnings as one line each."""
    logger, handler = logging.getLogger("mpq_plugins"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s" if is_verbose else "%(message)s"))
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if is_verbose else logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _fail(error: MPQError, code: int) -> int:
    print(f"mpq: error: {error}", file=sys.stderr)
    return code


def _with_config(arguments: list[str]) -> list[str]:
    """`--config FILE` replaced by the options in that JSON or TOML file, less those that the command line gives itself."""
    found, rest = _taken_out(arguments, "--config")
    if not found:
        return arguments
    if len(found) > 1:
        raise UsageError(f"--config is given {len(found)} times ({', '.join(found)}). Put all options into one file.")
    if not rest:
        raise UsageError("--config comes after a verb: mpq VERB --config FILE.")
    document = _read_config(Path(found[0]))
    given = {word.removeprefix("--no-").lstrip("-").partition("=")[0] for word in rest if word.startswith("--")}
    unknown, words = [], []
    positional, options = _options_of(rest[0])
    for name, value in document.items():
        if name in positional:
            words += [] if _positional_of(rest, options) else [_as_text(name, value)]
        elif name not in options or name == "config":
            unknown.append(name)
        elif name not in given:
            words += _as_options(name, value)
    if unknown:
        raise UsageError(
            f"{found[0]} has options that `mpq {rest[0]}` does not take: {', '.join(unknown)}. It takes "
            f"{', '.join(sorted({*positional, *options} - {'help', 'config'}))}."
        )
    return [rest[0], *words, *rest[1:]]


def _taken_out(arguments: list[str], option: str) -> tuple[list[str], list[str]]:
    """The values of an option, and the arguments without it."""
    values, rest = [], []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        elif word == option:
            values += list(islice(words, 1)) or [""]
        else:
            rest.append(word)
    return values, rest


def _read_config(path: Path) -> dict[str, Any]:
    """Option names, with dashes, and their values; raises `UsageError`."""
    from mpq_plugins.common.files import parse_json, read_bytes

    try:
        text = read_bytes(path)
        document = _parse_toml(text) if path.suffix.lower() == ".toml" else parse_json(text, where=str(path))
        if not isinstance(document, dict):
            raise FormatError(f"{path} must hold one object of option names and values.")
    except (FormatError, ValueError, RecursionError) as error:
        told = str(error).rstrip(".")
        raise UsageError(
            f'cannot read the configuration: {told}. Give a JSON object such as {{"data": "digits"}}, or TOML (.toml).'
        ) from error
    named = {name.removeprefix("--").replace("_", "-"): value for name, value in document.items()}
    if len(named) < len(document):
        raise UsageError(f"{path} names an option twice, with dashes and with underscores. Leave one of them out.")
    return named


def _parse_toml(text: bytes) -> Any:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError as error:
        raise FormatError("TOML needs Python 3.11 or later. Write the options as JSON") from error
    return tomllib.loads(text.decode("utf-8-sig"))


def _options_of(verb: str) -> tuple[list[str], dict[str, argparse.Action]]:
    """Names of a verb's positional arguments, and its options by name; raises `UsageError` for a verb that is none."""
    verbs = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    if verb not in verbs.choices:
        raise UsageError(f"{verb!r} is no verb. There are {', '.join(verbs.choices)}.")
    actions = verbs.choices[verb]._actions
    positional = [action.dest.replace("_", "-") for action in actions if not action.option_strings]
    options = {text.removeprefix("--"): action for action in actions for text in action.option_strings if text.startswith("--")}
    return positional, options


def _positional_of(rest: list[str], options: dict[str, argparse.Action]) -> list[str]:
    """The words after the verb that are neither options nor their values."""
    found, words = [], iter(rest[1:])
    for word in words:
        if not word.startswith("-"):
            found.append(word)
        elif "=" not in word and word.removeprefix("--") in options and options[word.removeprefix("--")].nargs is None:
            next(words, None)
    return found


def _as_options(name: str, value: Any) -> list[str]:
    """A list is one option per item where the option can be repeated, else its items joined by commas."""
    words: list[str] = []
    if isinstance(value, list) and name not in _REPEATABLE:
        value = ",".join(_as_text(name, item) for item in value)
    for item in value if isinstance(value, list) else [value]:
        if item is True:
            words.append(f"--{name}")
        elif item is False and name in _SWITCHES:
            words.append(f"--no-{name}")
        elif item is not False and item is not None:
            words.append(f"--{name}={_as_text(name, item)}")
    return words


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UsageError(f"{name} in the configuration is {str(value)[:60]!r}; it must be text or a number, or a list of them.")
    return str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpq",
        description="Mixed-precision bit allocation: score the layers, solve for the best bits, apply, export, verify.",
        allow_abbrev=False,
        epilog="Exit codes: 0 done, 1 verification failed, 2 wrong use or bad input, 3 infeasible budget, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"mpq-plugins {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_layers(verbs)
    _add_allocate(verbs)
    _add_solve(verbs)
    _add_apply(verbs)
    _add_train(verbs)
    _add_export(verbs)
    _add_verify(verbs)
    _add_compare(verbs)
    _add_plugins(verbs)
    _add_demo(verbs)
    return parser


def _verb(verbs: Any, name: str, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--verbose", action="store_true", help="log what is done and decided on the way, on stderr")
    parser.add_argument("--config", metavar="FILE", help="JSON or TOML file of options; the command line overrides it")
    return parser


def _count(text: str) -> int:
    """A whole number of at least 1; argparse words the error of a ValueError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return number


def _add_model(parser: argparse.ArgumentParser, *, batch_size: int = 32) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        required=True,
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME, file.py:BUILD or module:BUILD; options after '?': NAME?num_classes=10",
    )
    group.add_argument("--weights", metavar="FILE", help="state dict (.pt, .pth, .safetensors) loaded into the model")
    group.add_argument(
        "--negative-padding",
        action="store_true",
        help="shift hard swishes so that they quantize unsigned, and pad with -3/8 (PROFIT); give it to every verb",
    )
    group.add_argument("--data", metavar="SPEC", help="digits, imagefolder:DIR, file.py:LOADER or module:LOADER")
    group.add_argument("--input", metavar="SHAPE", help="input shape such as 1x3x224x224 (default: from the data)")
    group.add_argument(
        "--batch-size",
        type=_count,
        default=batch_size,
        metavar="N",
        help=f"images in a batch of built-in data ({batch_size})",
    )
    group.add_argument("--images", type=_count, default=256, metavar="N", help="images to score and calibrate with (256)")
    group.add_argument("--output", metavar="NAME", help="key, index or attribute of the model's output that counts")
    group.add_argument("--device", default="cpu", metavar="NAME", help="where the model runs, such as cuda or cuda:1 (cpu)")


def _add_adapter(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--adapter", required=required, metavar="NAME", help="target framework: nncf or brevitas")
    parser.add_argument(
        "--adapter-option", action="append", default=[], metavar="KEY=VALUE", help="option of the adapter, e.g. profile=finn"
    )


def _add_space(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decision space")
    group.add_argument("--bits", metavar="LIST", help="weight bits, e.g. 2,3,4,8 (default: what the adapter stores)")
    group.add_argument("--activation-bits", metavar="LIST", help="activation bits, e.g. 4,8 (default: the adapter's, or 8)")
    group.add_argument("--pin", action="append", default=[], metavar="GLOB=w8a8", help="fix layers to a precision")
    group.add_argument(
        "--pin-first-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="hold the first and last layer at w8a8 (default: no, a measured score does better without)",
    )
    group.add_argument("--tie", action="append", default=[], metavar="GLOB,GLOB", help="layers that take one precision")
    group.add_argument(
        "--tie-residual",
        action="store_true",
        help="tie each down-sampling shortcut with its block's last layer, as OMPQ",
    )
    group.add_argument("--include", action="append", default=[], metavar="GLOB", help="search only these layers")
    group.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="keep these layers in float")
    _add_strict(group)


def _add_strict(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail where more than 1 %% of the weights or MACs would stay in float without being excluded",
    )


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget and solver")
    group.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="COST=LIMIT",
        help="size=6.7MiB, bops=75G, or a uniform width: size=w4, bops=w4a8; repeat: all must hold together",
    )
    group.add_argument("--solver", default="auto", metavar="NAME", help="see `mpq plugins` (default auto)")
    group.add_argument("--solver-option", action="append", default=[], metavar="KEY=VALUE", help="option of the solver")


def _add_layers(verbs: Any) -> None:
    parser = _verb(verbs, "layers", "list the layers that can be quantized, and what is skipped and why")
    _add_model(parser)
    _add_adapter(parser, required=False)
    _add_strict(parser)


def _add_allocate(verbs: Any) -> None:
    parser = _verb(verbs, "allocate", "choose the bits of every layer under budgets")
    _add_model(parser)
    _add_adapter(parser, required=False)
    parser.add_argument(
        "--proxy",
        default="auto",
        metavar="NAME",
        help="score, see `mpq plugins` (default auto: kl-divergence of class logits, else output-error)",
    )
    parser.add_argument("--proxy-option", action="append", default=[], metavar="KEY=VALUE", help="option of the proxy")
    _add_space(parser)
    _add_budget(parser)
    parser.add_argument(
        "--top-k",
        type=_count,
        default=1,
        metavar="K",
        help="measure the true loss of the best K plans by the score, keep the best of those (1: do not)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="keep measurements there: an interrupted run goes on, another budget is quick (default: the user's cache)",
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no measurements")
    parser.add_argument("--out", default="bits.json", metavar="FILE", help="bit configuration to write (default bits.json)")
    parser.add_argument("--scores", metavar="FILE", help="also write the scores, for `mpq solve` at other budgets")
    parser.add_argument("--plot", metavar="FILE", help="also draw the allocation (.png, .svg, .pdf)")
    _add_dry_run(parser)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check everything up to the long work, write nothing")


def _add_solve(verbs: Any) -> None:
    parser = _verb(verbs, "solve", "solve saved scores again at another budget: no model, no data")
    parser.add_argument("saved", metavar="SCORES", help="file that `mpq allocate --scores` wrote")
    _add_budget(parser)
    parser.add_argument("--out", default="bits.json", metavar="FILE", help="bit configuration to write (default bits.json)")
    parser.add_argument("--plot", metavar="FILE", help="also draw the allocation (.png, .svg, .pdf)")


def _add_apply(verbs: Any) -> None:
    parser = _verb(verbs, "apply", "quantize the model as a bit configuration says: calibrate, correct biases and batch norm")
    parser.add_argument("bits_file", metavar="BITS", help="bit configuration")
    _add_model(parser)
    _add_adapter(parser, required=True)
    _add_ptq(parser)
    parser.add_argument("--out", default="module.pt", metavar="FILE", help="quantized module to write (default module.pt)")
    parser.add_argument("--evaluate", action="store_true", help="measure the accuracy on all of --data, before and after")
    _add_dry_run(parser)


def _add_ptq(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ptq",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of post-training quantization, e.g. rounding=gptq, weight_range=max (see docs/ptq.md)",
    )


def _add_train(verbs: Any) -> None:
    parser = _verb(verbs, "train", "quantization-aware training at the bits of a configuration, with or without PROFIT")
    parser.add_argument("bits_file", metavar="BITS", help="bit configuration")
    _add_model(parser, batch_size=128)
    _add_adapter(parser, required=True)
    _add_ptq(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", metavar="FILE", help="training recipe (JSON); what follows overrides it")
    group.add_argument("--method", choices=("qat", "profit"), help="train at the target bits, or by PROFIT's stages")
    group.add_argument("--epochs", type=_count, metavar="N", help="epochs of all stages together")
    group.add_argument("--learning-rate", type=float, metavar="X", help="peak learning rate of the weights")
    group.add_argument("--seed", type=int, metavar="N", help="seed of everything drawn at random")
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="arithmetic of the forward pass")
    group.add_argument("--eval-data", metavar="SPEC", help="data whose accuracy is printed after every epoch")
    group.add_argument("--teacher", metavar="SPEC", help="network to distil from: float (the model itself) or as --model")
    group.add_argument("--teacher-weights", metavar="FILE", help="weights of the teacher")
    group.add_argument("--workers", type=int, default=4, metavar="N", help="processes that load an image folder (4)")
    group.add_argument("--tensorboard", action="store_true", help="also write metrics for TensorBoard")
    group.add_argument("--out", default="mpq-train", metavar="DIR", help="checkpoints, metrics, module.pt; resumed if begun")
    group.add_argument("--plot", metavar="FILE", help="also draw loss, accuracy and AIWQ (.png, .svg, .pdf)")
    _add_dry_run(parser)


def _add_export(verbs: Any) -> None:
    parser = _verb(verbs, "export", "export a quantized module, read the file back and verify it")
    parser.add_argument("module_file", metavar="MODULE", help="file that `mpq apply` or `mpq train` wrote")
    _add_model(parser)
    _add_adapter(parser, required=True)
    parser.add_argument("--format", metavar="NAME", help="see `mpq plugins ADAPTER` (default: the adapter's first)")
    parser.add_argument("--out", required=True, metavar="FILE", help="artifact to write")
    parser.add_argument("--report", metavar="FILE", help="verification report to write")
    parser.add_argument("--evaluate", action="store_true", help="accuracy on all of --data: of the module, and of the file")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="mean output difference allowed, in standard deviations")
    _add_dry_run(parser)


def _add_verify(verbs: Any) -> None:
    parser = _verb(verbs, "verify", "read an exported file back and compare it with a bit configuration")
    parser.add_argument("artifact", metavar="ARTIFACT", help="exported file")
    parser.add_argument("bits_file", metavar="BITS", help="bit configuration that was asked for")
    _add_adapter(parser, required=True)
    parser.add_argument("--compiler", metavar="DIR", help="also ask the target's compiler, which is installed there (FINN)")
    parser.add_argument("--report", metavar="FILE", help="verification report to write")


def _add_compare(verbs: Any) -> None:
    parser = _verb(verbs, "compare", "apply several proxies and all controls at the same budgets and measure the accuracy")
    _add_model(parser)
    _add_adapter(parser, required=True)
    parser.add_argument("--proxies", default="ompq,csmpq", metavar="LIST", help="proxies to compare (default ompq,csmpq)")
    parser.add_argument("--seeds", type=_count, default=20, metavar="N", help="seeds of the random control (default 20)")
    _add_space(parser)
    parser.add_argument(
        "--budget", action="append", default=[], metavar="COST=LIMIT", help="repeat: each is compared on its own"
    )
    parser.add_argument("--out", metavar="FILE", help="comparison to write as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw the comparison (.png, .svg, .pdf)")


def _add_plugins(verbs: Any) -> None:
    parser = _verb(verbs, "plugins", "list proxies, costs, solvers and adapters, and whether they can be used here")
    parser.add_argument("name", nargs="?", metavar="NAME", help="list the options of this one, and the formats of an adapter")


def _add_demo(verbs: Any) -> None:
    parser = _verb(verbs, "demo", "EfficientNet-Lite0 in 8, 4 and mixed bits, through both adapters, in minutes")
    parser.add_argument("--out", default="mpq-demo", metavar="DIR", help="folder for all files (default mpq-demo)")
    parser.add_argument("--adapters", default="nncf,brevitas", metavar="LIST", help="adapters to go through (default both)")
    parser.add_argument(
        "--network",
        choices=("efficientnet-lite0", "digits"),
        default="efficientnet-lite0",
        help="the ImageNet network (default), or a small one that is trained on scikit-learn's digits first",
    )
    parser.add_argument("--seeds", type=_count, metavar="N", help="seeds of the digits' random control (default 5)")
