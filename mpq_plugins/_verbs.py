"""What each verb of the command line does: read options, call the library, print."""

from __future__ import annotations

import errno
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mpq_plugins._adapter import AbstractAdapter
from mpq_plugins._allocate import as_budgets, build_space, solve_scores, true_loss, with_output
from mpq_plugins._bits import BitConfig
from mpq_plugins._cost import Budget
from mpq_plugins._errors import BudgetError, DataError, ModelError, PluginError
from mpq_plugins._plugins import KINDS, Kind, make, names
from mpq_plugins._precision import menu
from mpq_plugins._scores import Scores
from mpq_plugins._selection import Measure

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins._model import Batch
    from mpq_plugins._space import Space
    from mpq_plugins._verify import Verification

_OK, _FAILED = 0, 1


def layers(options: Namespace) -> int:
    """`mpq layers`."""
    from mpq_plugins._discover import find_layers
    from mpq_plugins.reports import layer_table, skipped_table

    model, example = _model(options)
    inventory = find_layers(model, example)
    refused = {} if options.adapter is None else _adapter(options).unconvertible(model, inventory)
    if options.json:
        skipped = {item.name: item.reason for item in inventory.skipped} | dict(refused)
        document = {"fingerprint": inventory.fingerprint, "layers": [layer.to_json() for layer in inventory]}
        return _print_json({**document, "skipped": skipped})
    console = _console()
    console.print(layer_table(inventory))
    _print_optional(console, skipped_table(inventory.skipped))
    for name, reason in refused.items():
        console.print(f"{options.adapter} keeps {name} in float: {reason}")
    return _OK


def allocate(options: Namespace) -> int:
    """`mpq allocate`."""
    from mpq_plugins._problem import check_reachable
    from mpq_plugins.sensitivity import keeping_measurements

    model, example = _model(options)
    space = _space(options, model, example)
    budgets = _budgets(options.budget)
    check_reachable(space, budgets)
    proxy = with_output(make("proxies", options.proxy, _options(options.proxy_option)), options.output)
    batches = list(_take(_data(options), options.images)) if options.data else []
    with keeping_measurements(_cache(options)):
        scores = proxy.score(model, space, batches)
        if options.scores:
            scores.save(options.scores)
        selects = options.top_k > 1
        measure = true_loss(model, scores.space, batches, proxy, output=options.output) if selects else None
        return _solve_and_report(options, scores, budgets, measure)


def solve(options: Namespace) -> int:
    """`mpq solve`."""
    return _solve_and_report(options, Scores.load(options.saved), _budgets(options.budget))


def apply(options: Namespace) -> int:
    """`mpq apply`."""
    from mpq_plugins._evaluate import accuracy

    bits, adapter = BitConfig.load(options.bits_file), _adapter(options)
    model, example = _model(options)
    calibration = list(_take(_data(options), options.images))
    result: dict[str, Any] = {"module": options.out}
    if options.evaluate:  # Before the long work, so that missing labels are told at once.
        result["float_accuracy"] = accuracy(model, _data(options), output=options.output)
    module = adapter.prepare(model, bits, example, calibration)
    adapter.save(module, options.out)
    result["advice"] = _advice(adapter, model, example, bits)
    if options.evaluate:
        result["accuracy"] = accuracy(module, _data(options), output=options.output)
    if options.json:
        return _print_json(result)
    console = _console()
    for text, n_layers in result["advice"].items():
        console.print(f"note: {text} ({n_layers} layers)")
    if options.evaluate:
        console.print(f"accuracy {result['accuracy']:.4f}, float {result['float_accuracy']:.4f}")
    console.print(f"wrote {options.out}")
    return _OK


def export(options: Namespace) -> int:
    """`mpq export`."""
    from mpq_plugins._adapter import bits_of
    from mpq_plugins._verify import verify as verify_artifact

    adapter = _adapter(options)
    model, example = _model(options)
    module = adapter.load(model, options.module_file, example)
    path = adapter.export(module, options.out, example, format=options.format)
    inputs = example if options.data is None else next(iter(_take(_data(options), options.batch_size))).inputs
    report = verify_artifact(
        adapter, path, bits_of(module), module=module, inputs=inputs, model=model, tolerance=options.tolerance
    )
    return _report_verification(options, report)


def verify(options: Namespace) -> int:
    """`mpq verify`."""
    from mpq_plugins._verify import verify as verify_artifact

    report = verify_artifact(_adapter(options), options.artifact, BitConfig.load(options.bits_file))
    return _report_verification(options, report)


def compare(options: Namespace) -> int:
    """`mpq compare`."""
    from mpq_plugins.reports import compare as run_comparison
    from mpq_plugins.reports import comparison_table, plot_comparison

    if options.data is None:
        raise DataError("comparing needs labelled data. Add --data.")
    model, example = _model(options)
    comparison = run_comparison(
        model,
        _space(options, model, example),
        example=example,
        calibration=list(_take(_data(options), options.images)),
        test=_data(options),  # type: ignore[arg-type]  # any re-iterable serves
        budgets={text: _budgets([text]) for text in options.budget or ["size=w4"]},
        adapters={options.adapter: _adapter(options)},
        proxies=_words(options.proxies),
        n_seeds=options.seeds,
        output=options.output,
    )
    if options.out:
        comparison.save(options.out)
    if options.plot:
        plot_comparison(comparison, options.plot)
    if options.json:
        return _print_json(comparison.to_json())
    _console().print(comparison_table(comparison))
    return _OK


def plugins(options: Namespace) -> int:
    """`mpq plugins`."""
    found: dict[Kind, dict[str, str]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name in names(kind):
            try:
                plugin = make(kind, name)
                found[kind][name] = _first_sentence(plugin)
            except (PluginError, ImportError) as error:
                found[kind][name] = f"not usable here: {error}"
    if options.json:
        return _print_json(found)
    console = _console()
    for kind, entries in found.items():
        console.print(f"[bold]{kind}[/bold]")
        for name, text in entries.items():
            console.print(f"  {name:20} {text}", highlight=False)
    return _OK


def demo(options: Namespace) -> int:
    """`mpq demo`."""
    from mpq_plugins._demo import run_demo

    return run_demo(Path(options.out), n_seeds=options.seeds, adapters=_words(options.adapters), as_json=options.json)


def _solve_and_report(options: Namespace, scores: Scores, budgets: Sequence[Budget], measure: Measure | None = None) -> int:
    from mpq_plugins.reports import allocation_table, certificate_lines, plot_allocation, skipped_table

    solver = make("solvers", options.solver, _options(options.solver_option))
    top_k = options.top_k if measure is not None else 1
    allocation = solve_scores(scores, budgets, solver=solver, top_k=top_k, measure=measure)
    allocation.bits.save(options.out)
    if options.plot:
        plot_allocation(allocation, options.plot)
    if options.json:
        layers = {name: str(precision) for name, precision in allocation.bits.layers.items()}
        return _print_json({"layers": layers, "costs": allocation.bits.costs, **allocation.bits.origin})
    console = _console()
    console.print(allocation_table(allocation))
    _print_optional(console, skipped_table(allocation.space.skipped))
    for line in certificate_lines(allocation, budgets, top_k=top_k):
        console.print(line, highlight=False)
    console.print(f"wrote {options.out}")
    return _OK


def _cache(options: Namespace) -> Path | None:
    """Where measurements are kept: the folder asked for, or the user's cache where that can be written."""
    from mpq_plugins._files import cache_folder

    if options.no_cache or options.cache:
        return None if options.no_cache else Path(options.cache)
    folder = cache_folder() / "measurements"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        print(f"note: no measurements are kept in {folder}: {error.strerror}. See --cache.", file=sys.stderr)
        return None
    return folder


def _report_verification(options: Namespace, report: Verification) -> int:
    if options.report:
        report.save(options.report)
    if options.json:
        _print_json(report.to_json())
        return _OK if report.ok else _FAILED
    console = _console()
    report.check()
    compared = sum(check.n_codes or 0 for check in report.layers)
    codes = f", {compared:,} weight codes equal" if compared else ""
    console.print(f"{report.artifact}: {len(report.layers)} layers hold the bits asked for{codes}", highlight=False)
    if report.outputs is not None:
        console.print(
            f"outputs: mean difference {report.outputs.mean_relative:.1e} standard deviations, "
            f"largest {report.outputs.max_absolute:.1e}, same top-1 in {report.outputs.top1_agreement:.1%}",
            highlight=False,
        )
        if report.outputs.own_difference:
            console.print(
                "note: that is above the tolerance, and so is what the module differs from itself when torch sums in "
                f"another order ({report.outputs.own_difference:.1e}): it amplifies rounding, as untrained networks do",
                highlight=False,
            )
    for check in report.budgets:
        console.print(f"budget {check.name}: {check.found:g} of {check.limit:g}", highlight=False)
    return _OK


def _model(options: Namespace) -> tuple[nn.Module, Any]:
    """The model and one example input."""
    from mpq_plugins._sources import example_input, load_model, parse_shape

    model = load_model(options.model, options.weights)
    if options.weights is None and options.model.startswith(("torchvision:", "timm:")):
        print("note: no --weights given, so the weights are random", file=sys.stderr)
    if options.input:
        return model, example_input(parse_shape(options.input))
    if options.data:
        return model, next(iter(_take(_data(options), 1))).inputs
    if options.model.startswith(("torchvision:", "timm:")):
        return model, example_input((1, 3, 224, 224))
    raise ModelError("the input shape is not known. Add --input, such as 1x3x32x32, or --data.")


def _data(options: Namespace) -> Iterable[Any]:
    from mpq_plugins._sources import load_data, parse_shape

    if options.data is None:
        raise DataError("this needs data. Add --data: digits, imagefolder:DIR, file.py:LOADER or module:LOADER.")
    shape = parse_shape(options.input) if options.input else None
    return load_data(options.data, input_shape=shape, batch_size=options.batch_size)


def _take(loader: Iterable[Any], n_images: int) -> Iterable[Batch]:
    """Batches from the start of `loader` until they hold at least `n_images`."""
    from mpq_plugins._model import batches_of, first_batch

    first_batch(loader, purpose="this verb")
    taken = 0
    for batch in batches_of(loader):
        if taken >= n_images:
            return
        yield batch
        taken += len(batch)


def _adapter(options: Namespace) -> AbstractAdapter:
    adapter: AbstractAdapter = make("adapters", options.adapter, _options(options.adapter_option))
    return adapter


def _space(options: Namespace, model: nn.Module, example: Any) -> Space:
    from mpq_plugins._discover import find_layers
    from mpq_plugins._space import residual_ties

    adapter = _adapter(options) if options.adapter else None
    ties: list[Sequence[str]] = [_words(text) for text in options.tie]
    if options.tie_residual:
        ties += residual_ties(find_layers(model, example))
    choices = None
    if options.bits or options.activation_bits:
        weight = _numbers(options.bits) if options.bits else (adapter.weight_bits if adapter else range(2, 9))
        activation = (
            _numbers(options.activation_bits) if options.activation_bits else (adapter.activation_bits if adapter else (8,))
        )
        choices = menu(weight, activation)
    return build_space(
        model,
        example,
        choices=choices,
        adapter=adapter,
        pin=_pairs(options.pin),
        pin_first_last=options.pin_first_last,
        tie=ties,
        include=options.include or ("*",),
        exclude=options.exclude,
    )


def _budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """`size=w4`, or with options of the cost `stored_size?target=openvino-fast=1MiB`."""
    budgets = []
    for text in texts:
        left, equals, limit = text.rpartition("=")
        if not equals:
            raise BudgetError(f"{text!r} is no budget. Write COST=LIMIT, such as size=w4, size=6.7MiB or bops=75G.")
        name, _, query = left.partition("?")
        budgets.append(Budget(make("costs", name, _options(query.split("&") if query else [])), limit))
    return as_budgets(budgets)


def _advice(adapter: AbstractAdapter, model: nn.Module, example: Any, bits: BitConfig) -> Mapping[str, int]:
    """What to know before deploying, with the number of layers it is about."""
    from mpq_plugins._discover import find_layers

    found: dict[str, int] = {}
    for layer in find_layers(model, example):
        text = adapter.advice(layer, bits[layer.name]) if layer.name in bits.layers else None
        if text:
            found[text] = found.get(text, 0) + 1
    return found


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise PluginError(f"{text!r} must be KEY=VALUE.")
        pairs[key] = value
    return pairs


def _options(texts: Sequence[str]) -> dict[str, Any]:
    from mpq_plugins._text import literal

    return {key.replace("-", "_"): literal(value) for key, value in _pairs(texts).items()}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    from mpq_plugins._errors import PrecisionError

    try:
        return tuple(int(word) for word in _words(text))
    except ValueError as error:
        raise PrecisionError(f"{text!r} is no list of bits. Write whole numbers joined by commas, such as 2,3,4,8.") from error


def _first_sentence(plugin: Any) -> str:
    return (type(plugin).__doc__ or "").strip().split("\n")[0]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _print_optional(console: Console, table: Any) -> None:
    if table is not None:
        console.print(table)


def _print_json(document: Any) -> int:
    print(json.dumps(document, indent=2, sort_keys=True))
    return _OK
