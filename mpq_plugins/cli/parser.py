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
from pathlib import Path
from typing import Any

from mpq_plugins import __version__
from mpq_plugins.errors import FormatError, InfeasibleBudgetError, MPQError, UsageError, VerificationError

EXIT_FAILED, EXIT_USAGE, EXIT_INFEASIBLE, EXIT_INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    try:
        options, rest = _parser().parse_known_args(_with_config(list(sys.argv[1:] if arguments is None else arguments)))
        if rest:
            raise UsageError(
                f"`mpq {options.verb}` does not take {' '.join(rest)}. Repeat an option for each of its values, such as "
                f"--budget size=w4 --budget bops=60%, and quote patterns. `mpq {options.verb} --help` lists all options."
            )
        return _run(options)
    except MPQError as error:
        print(f"mpq: error: {error}", file=sys.stderr)
        is_failed = isinstance(error, VerificationError)
        return EXIT_INFEASIBLE if isinstance(error, InfeasibleBudgetError) else EXIT_FAILED if is_failed else EXIT_USAGE
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
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def _with_config(arguments: list[str]) -> list[str]:
    """`--config FILE` replaced by the options in that JSON or TOML file, less those that the command line gives itself."""
    finder = argparse.ArgumentParser(prog="mpq", add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    known, rest = finder.parse_known_args(arguments)
    found: list[str] = known.config
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
            words += _as_options(name, value, options[name])
    if unknown:
        raise UsageError(
            f"{found[0]} has options that `mpq {rest[0]}` does not take: {', '.join(unknown)}. It takes "
            f"{', '.join(sorted({*positional, *options} - {'help', 'config'}))}."
        )
    return [rest[0], *words, *rest[1:]]


def _read_config(path: Path) -> dict[str, Any]:
    """Option names, with dashes, and their values; raises `UsageError`."""
    from mpq_plugins.common.files import parse_json, read_bytes

    try:
        text = read_bytes(path)
        if path.suffix.lower() == ".toml":
            document = importlib.import_module("tomllib").loads(text.decode("utf-8-sig"))
        else:
            document = parse_json(text, where=str(path))
        if not isinstance(document, dict):
            raise FormatError(f"{path} must hold one object of option names and values.")
    except (FormatError, ValueError, RecursionError, ImportError) as error:
        told = str(error).rstrip(".") if not isinstance(error, ImportError) else "TOML needs Python 3.11 or later; write JSON"
        raise UsageError(
            f'cannot read the configuration: {told}. Give a JSON object such as {{"data": "digits"}}, or TOML (.toml).'
        ) from error
    named = {name.removeprefix("--").replace("_", "-"): value for name, value in document.items()}
    if len(named) < len(document):
        raise UsageError(f"{path} names an option twice, with dashes and with underscores. Leave one of them out.")
    return named


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


def _as_options(name: str, value: Any, action: argparse.Action) -> list[str]:
    """A list is one option per item where the option can be repeated, else its items joined by commas."""
    words: list[str] = []
    if isinstance(value, list) and not isinstance(action, argparse._AppendAction):
        value = ",".join(_as_text(name, item) for item in value)
    for item in value if isinstance(value, list) else [value]:
        if item is True:
            words.append(f"--{name}")
        elif item is False and isinstance(action, argparse.BooleanOptionalAction):
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
    first, second = (_add_layers, _add_allocate, _add_solve, _add_apply, _add_train), (_add_export, _add_verify, _add_compare)
    for add in (*first, *second, _add_plugins, _add_demo):
        add(verbs)
    return parser


Options = argparse._ActionsContainer  # a parser or a group of options


def _verb(verbs: Any, name: str, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    _switch(parser, "--json", "print the result as JSON on stdout")
    _switch(parser, "--quiet", "no progress bars")
    _switch(parser, "--verbose", "log what is done and decided on the way, on stderr")
    parser.add_argument("--config", metavar="FILE", help="JSON or TOML file of options; the command line overrides it")
    return parser


def _count(text: str) -> int:
    """A whole number of at least 1; argparse words the error of a ValueError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return number


def _switch(options: Options, name: str, help: str) -> None:
    options.add_argument(name, action="store_true", help=help)


def _repeatable(options: Options, name: str, help: str, metavar: str = "KEY=VALUE") -> None:
    options.add_argument(name, action="append", default=[], metavar=metavar, help=help)


def _globs(options: Options, name: str, help: str, metavar: str = "GLOB") -> None:
    options.add_argument(name, action="extend", nargs="+", default=[], metavar=metavar, help=help)


def _add_model(parser: argparse.ArgumentParser, *, batch_size: int = 32, required: bool = True) -> None:
    group = parser.add_argument_group("model and data")
    about = "torchvision:NAME, timm:NAME, file.py:BUILD or module:BUILD; options after '?': NAME?num_classes=10"
    group.add_argument("--model", required=required, metavar="SPEC", help=about)
    group.add_argument("--weights", metavar="FILE", help="state dict (.pt, .pth, .safetensors) loaded into the model")
    about = "shift hard swishes so that they quantize unsigned, and pad with -3/8 (PROFIT); files remember it"
    _switch(group, "--negative-padding", about)
    group.add_argument("--data", metavar="SPEC", help="digits, imagefolder:DIR, file.py:LOADER or module:LOADER")
    group.add_argument("--input", metavar="SHAPE", help="input shape such as 1x3x224x224 (default: from the data)")
    about = f"images in a batch of built-in data ({batch_size})"
    group.add_argument("--batch-size", type=_count, default=batch_size, metavar="N", help=about)
    group.add_argument("--images", type=_count, default=256, metavar="N", help="images to score and calibrate with (256)")
    group.add_argument("--output", metavar="NAME", help="key, index or attribute of the model's output that counts")
    group.add_argument("--device", default="cpu", metavar="NAME", help="where the model runs, such as cuda or cuda:1 (cpu)")


def _add_adapter(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument("--adapter", required=required, metavar="NAME", help="target framework: nncf or brevitas")
    _repeatable(parser, "--adapter-option", "option of the adapter, e.g. profile=finn")


def _add_space(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decision space")
    about = "weight bits, e.g. 2 3 4 8 or 2,3,4,8 (default: what the adapter stores)"
    group.add_argument("--bits", nargs="+", default=[], metavar="N", help=about)
    about = "activation bits, e.g. 4 8 (default: the adapter's, or 8)"
    group.add_argument("--activation-bits", nargs="+", default=[], metavar="N", help=about)
    _globs(group, "--pin", "fix layers to a precision", "GLOB=w8a8")
    about = "hold the first and last layer at w8a8 (default: no, a measured score does better without)"
    group.add_argument("--pin-first-last", action=argparse.BooleanOptionalAction, default=False, help=about)
    group.add_argument("--tie", action="append", nargs="+", default=[], metavar="GLOB", help="layers that take one precision")
    _switch(group, "--tie-residual", "tie each down-sampling shortcut with its block's last layer, as OMPQ")
    _globs(group, "--include", "search only these layers")
    _globs(group, "--exclude", "keep these layers in float")
    _add_strict(group)


def _add_strict(options: Options) -> None:
    _switch(options, "--strict", "fail where more than 1 %% of the weights or MACs would stay in float without being excluded")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget and solver")
    about = "size=6.7MiB, bops=75G, or a uniform width: size=w4, bops=w4a8; repeat: all must hold together"
    _repeatable(group, "--budget", about, "COST=LIMIT")
    group.add_argument("--solver", default="auto", metavar="NAME", help="see `mpq plugins` (default auto)")
    _repeatable(group, "--solver-option", "option of the solver")


def _add_bits_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="bits.json", metavar="FILE", help="bit configuration to write (default bits.json)")


def _add_plot(options: Options, what: str) -> None:
    options.add_argument("--plot", metavar="FILE", help=f"also draw {what} (.png, .svg, .pdf)")


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    _switch(parser, "--dry-run", "check everything up to the long work, write nothing")


def _add_layers(verbs: Any) -> None:
    parser = _verb(verbs, "layers", "list the layers that can be quantized, and what is skipped and why")
    _add_model(parser)
    _add_adapter(parser)
    _add_strict(parser)


def _add_allocate(verbs: Any) -> None:
    parser = _verb(verbs, "allocate", "choose the bits of every layer under budgets")
    _add_model(parser)
    _add_adapter(parser)
    about = "score, see `mpq plugins` (default auto: kl-divergence of class logits, else output-error)"
    parser.add_argument("--proxy", default="auto", metavar="NAME", help=about)
    _repeatable(parser, "--proxy-option", "option of the proxy")
    _add_space(parser)
    _add_budget(parser)
    about = "measure the true loss of the best K plans by the score, keep the best of those (1: do not)"
    parser.add_argument("--top-k", type=_count, default=1, metavar="K", help=about)
    about = "keep measurements there: an interrupted run goes on, another budget is quick (default: the user's cache)"
    parser.add_argument("--cache", metavar="DIR", help=about)
    _switch(parser, "--no-cache", "keep no measurements")
    _add_bits_out(parser)
    parser.add_argument("--scores", metavar="FILE", help="also write the scores, for `mpq solve` at other budgets")
    _add_plot(parser, "the allocation")
    _add_dry_run(parser)


def _add_solve(verbs: Any) -> None:
    parser = _verb(verbs, "solve", "solve saved scores again at another budget: no model, no data")
    parser.add_argument("saved", metavar="SCORES", help="file that `mpq allocate --scores` wrote")
    _add_budget(parser)
    _add_bits_out(parser)
    _add_plot(parser, "the allocation")


def _add_prepared(parser: argparse.ArgumentParser, *, batch_size: int = 32) -> None:
    """What a module is prepared from and with."""
    parser.add_argument("bits_file", metavar="BITS", help="bit configuration")
    _add_model(parser, batch_size=batch_size, required=False)
    _add_adapter(parser)
    _repeatable(parser, "--ptq", "option of post-training quantization, e.g. rounding=gptq, weight_range=max (see docs/ptq.md)")


def _add_apply(verbs: Any) -> None:
    parser = _verb(verbs, "apply", "quantize the model as a bit configuration says: calibrate, correct biases and batch norm")
    _add_prepared(parser)
    parser.add_argument("--out", default="module.pt", metavar="FILE", help="quantized module to write (default module.pt)")
    _switch(parser, "--evaluate", "measure the accuracy on all of --data, before and after")
    _add_dry_run(parser)


def _add_train(verbs: Any) -> None:
    parser = _verb(verbs, "train", "quantization-aware training at the bits of a configuration, with or without PROFIT")
    _add_prepared(parser, batch_size=128)
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
    _switch(group, "--tensorboard", "also write metrics for TensorBoard")
    group.add_argument("--out", default="mpq-train", metavar="DIR", help="checkpoints, metrics, module.pt; resumed if begun")
    _add_plot(group, "loss, accuracy and AIWQ")
    _add_dry_run(parser)


def _add_export(verbs: Any) -> None:
    parser = _verb(verbs, "export", "export a quantized module, read the file back and verify it")
    parser.add_argument("module_file", metavar="MODULE", help="file that `mpq apply` or `mpq train` wrote")
    _add_model(parser, required=False)
    _add_adapter(parser)
    parser.add_argument("--format", metavar="NAME", help="see `mpq plugins ADAPTER` (default: the adapter's first)")
    parser.add_argument("--out", required=True, metavar="FILE", help="artifact to write")
    parser.add_argument("--report", metavar="FILE", help="verification report to write")
    _switch(parser, "--evaluate", "accuracy on all of --data: of the module, and of the file")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="mean output difference allowed, in standard deviations")
    _add_dry_run(parser)


def _add_verify(verbs: Any) -> None:
    parser = _verb(verbs, "verify", "read an exported file back and compare it with a bit configuration")
    parser.add_argument("artifact", metavar="ARTIFACT", help="exported file")
    parser.add_argument("bits_file", metavar="BITS", help="bit configuration that was asked for")
    _add_adapter(parser)
    parser.add_argument("--compiler", metavar="DIR", help="also ask the target's compiler, which is installed there (FINN)")
    parser.add_argument("--report", metavar="FILE", help="verification report to write")


def _add_compare(verbs: Any) -> None:
    parser = _verb(verbs, "compare", "apply several proxies and all controls at the same budgets and measure the accuracy")
    _add_model(parser)
    _add_adapter(parser, required=True)
    about = "proxies to compare (default ompq,csmpq)"
    parser.add_argument("--proxies", nargs="+", default=["ompq", "csmpq"], metavar="NAME", help=about)
    parser.add_argument("--seeds", type=_count, default=20, metavar="N", help="seeds of the random control (default 20)")
    _add_space(parser)
    _repeatable(parser, "--budget", "repeat: each is compared on its own", "COST=LIMIT")
    parser.add_argument("--out", metavar="FILE", help="comparison to write as JSON")
    _add_plot(parser, "the comparison")


def _add_plugins(verbs: Any) -> None:
    parser = _verb(verbs, "plugins", "list proxies, costs, solvers and adapters, and whether they can be used here")
    parser.add_argument("name", nargs="?", metavar="NAME", help="list the options of this one, and the formats of an adapter")


def _add_demo(verbs: Any) -> None:
    parser = _verb(verbs, "demo", "EfficientNet-Lite0 in 8, 4 and mixed bits, through both adapters, in minutes")
    parser.add_argument("--out", default="mpq-demo", metavar="DIR", help="folder for all files (default mpq-demo)")
    about = "adapters to go through (default both)"
    parser.add_argument("--adapters", nargs="+", default=["nncf", "brevitas"], metavar="NAME", help=about)
    about = "the ImageNet network (default), or a small one that is trained on scikit-learn's digits first"
    networks = ("efficientnet-lite0", "digits")
    parser.add_argument("--network", choices=networks, default=networks[0], help=about)
    parser.add_argument("--seeds", type=_count, metavar="N", help="also N random allocations of the same size (default none)")
