"""What each verb of the command line does: read options, call the library, print."""

from __future__ import annotations

import difflib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from mpq_plugins.adapter.base import AbstractAdapter, bits_of, check_prepared_with
from mpq_plugins.adapter.record import Origin, record
from mpq_plugins.allocation import Allocation, Search, build_space, solve_scores
from mpq_plugins.cli.known import adapter_of_artifact, adapter_of_module, bits_and_command, command_of
from mpq_plugins.cli.options import adapter_of, cache_of, data_of, model_of, space_options, take
from mpq_plugins.cli.training_verb import train as train
from mpq_plugins.common.console import console
from mpq_plugins.common.plugins import KINDS, Kind, described, make, names
from mpq_plugins.common.text import values_of, words_of
from mpq_plugins.costs.base import Budget, format_amount
from mpq_plugins.costs.budgets import as_budgets
from mpq_plugins.errors import DataError, PluginError
from mpq_plugins.model.layers import skipped_layers
from mpq_plugins.model.left_in_float import LeftInFloat
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.space.bits import BitConfig

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.adapter.verify import Verification

_OK, _FAILED = 0, 1


def layers(options: Namespace) -> int:
    """`mpq layers`."""
    from mpq_plugins.model.discover import find_layers
    from mpq_plugins.reports import layer_table, skipped_table

    model, example = model_of(options)
    inventory = find_layers(model, example)
    refused = {} if options.adapter is None else adapter_of(options).unconvertible(model, inventory, example)
    kept = [layer for layer in inventory if layer.name not in refused]
    skipped = (*inventory.skipped, *skipped_layers(inventory, refused))
    left = LeftInFloat.of(kept, skipped)
    if options.json:
        facts = {"fingerprint": inventory.fingerprint, "layers": [layer.to_json() for layer in inventory]}
        _print_json({**facts, "skipped": {item.name: item.reason for item in skipped}, "left_in_float": left.to_json()})
    else:
        terminal = console()
        terminal.print(layer_table(inventory))
        _print_optional(terminal, skipped_table(skipped, kept))
    if options.strict:
        left.check()
    return _OK


def allocate(options: Namespace) -> int:
    """`mpq allocate`."""
    from mpq_plugins.proxies.measuring import keeping_measurements

    model, example = model_of(options)
    search = Search.of(
        model,
        example,
        list(take(data_of(options), options.images)) if options.data else [],
        budgets=options.budget,
        proxy=options.proxy,
        options=values_of(options.proxy_option),
        solver=make("solvers", options.solver, values_of(options.solver_option)),
        output=options.output,
        top_k=options.top_k,
        **space_options(options, model, example),
    )
    if options.dry_run:
        return _tell_dry_run(options, search)
    with keeping_measurements(cache_of(options)):
        scores = search.scores()
        if options.scores:
            scores.save(options.scores)
        return _report_allocation(options, search.allocation(scores), search.budgets)


def solve(options: Namespace) -> int:
    """`mpq solve`."""
    budgets, solver = as_budgets(options.budget), make("solvers", options.solver, values_of(options.solver_option))
    return _report_allocation(options, solve_scores(Scores.load(options.saved), budgets, solver=solver), budgets)


def apply(options: Namespace) -> int:
    """`mpq apply`."""
    from mpq_plugins.adapter.evaluate import accuracy
    from mpq_plugins.adapter.repairs import repairs_of
    from mpq_plugins.model.discover import find_layers
    from mpq_plugins.model.run import check_like

    bits = bits_and_command(options)
    adapter = adapter_of(options)
    model, example = model_of(options)
    calibration = list(take(data_of(options), options.images))
    inventory = find_layers(model, example)
    bits.check(inventory)
    for index, batch in enumerate(calibration):
        check_like(batch.inputs, example, where=f"calibration batch {index}")
    if options.dry_run:
        n_images = sum(map(len, calibration))
        return _dry_run(options, f"{len(bits.layers)} of {len(inventory)} layers on {n_images} images")
    result: dict[str, Any] = {"module": options.out}
    if options.evaluate:  # Before the long work, so that missing labels are told at once.
        result["float_accuracy"] = accuracy(model, data_of(options), output=options.output)
    module = adapter.prepare(model, bits, example, calibration, **values_of(options.ptq))
    adapter.save(record(module, origin=Origin.of(adapter, example, command_of(options))), options.out)
    result["repairs"] = [made.to_json() for made in repairs_of(module)]
    result["advice"] = _advice(adapter, model, example, bits)
    if options.evaluate:
        result["accuracy"] = accuracy(module, data_of(options), output=options.output)
    if options.json:
        return _print_json(result)
    terminal = console()
    for made in repairs_of(module):
        terminal.print(str(made))
    for text, n_layers in result["advice"].items():
        terminal.print(f"note: {text} ({n_layers} layers)")
    if options.evaluate:
        terminal.print(f"accuracy {result['accuracy']:.4f}, float {result['float_accuracy']:.4f}")
    terminal.print(f"wrote {options.out}")
    return _OK


def export(options: Namespace) -> int:
    """`mpq export`."""
    from mpq_plugins.adapter.evaluate import accuracy, exported_accuracy, output_index
    from mpq_plugins.adapter.verify import verify as verify_artifact

    adapter, example = adapter_of_module(options)
    model, example = model_of(options, example)
    module = adapter.load(model, options.module_file, example)
    # An option that is given is meant, be it the default.
    check_prepared_with(adapter.prepared_with(module), values_of(options.adapter_option), options.module_file)
    inputs = example if options.data is None else next(iter(take(data_of(options), options.batch_size))).inputs
    if options.dry_run:
        told = f"{len(bits_of(module).layers)} layers of {options.module_file}, format {adapter.format_of(options.format)}"
        return _dry_run(options, told)
    index = output_index(module, example, options.output) if options.evaluate else None
    path = adapter.export(module, options.out, example, format=options.format)
    report = verify_artifact(
        adapter, path, bits_of(module), module=module, inputs=inputs, model=model, tolerance=options.tolerance
    )
    accuracies = {}
    if options.evaluate:
        accuracies["accuracy"] = accuracy(module, data_of(options), output=options.output)
        accuracies["exported_accuracy"] = exported_accuracy(adapter, path, data_of(options), output=index)
    return _report_verification(options, report, accuracies)


def verify(options: Namespace) -> int:
    """`mpq verify`."""
    from mpq_plugins.adapter.verify import verify as verify_artifact

    adapter = adapter_of_artifact(options)
    report = verify_artifact(adapter, options.artifact, BitConfig.load(options.bits_file))
    compiled = adapter.compiler_report(options.artifact, environment=options.compiler) if options.compiler else None
    return _report_verification(options, report, compiled=compiled)


def compare(options: Namespace) -> int:
    """`mpq compare`."""
    from mpq_plugins.reports import compare as run_comparison
    from mpq_plugins.reports import comparison_table, plot_comparison

    if options.data is None:
        raise DataError("comparing needs labelled data. Add --data.")
    model, example = model_of(options)
    comparison = run_comparison(
        model,
        build_space(model, example, **space_options(options, model, example)),
        example=example,
        calibration=list(take(data_of(options), options.images)),
        test=data_of(options),  # type: ignore[arg-type]  # any re-iterable serves
        budgets={text: as_budgets([text]) for text in options.budget or ["size=w4"]},
        adapters={options.adapter: adapter_of(options)},
        proxies=words_of(options.proxies),
        n_seeds=options.seeds,
        output=options.output,
    )
    if options.out:
        comparison.save(options.out)
    if options.plot:
        plot_comparison(comparison, options.plot)
    if options.json:
        return _print_json(comparison.to_json())
    console().print(comparison_table(comparison))
    return _OK


def plugins(options: Namespace) -> int:
    """`mpq plugins`."""
    if options.name is not None:
        return _plugin(options)
    found: dict[Kind, dict[str, str]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name in names(kind):
            try:
                found[kind][name] = described(make(kind, name))["about"].split("\n")[0]
            except (PluginError, ImportError) as error:
                found[kind][name] = f"not usable here: {error}"
    if options.json:
        return _print_json(found)
    terminal = console()
    for kind, entries in found.items():
        terminal.print(Text(kind, style="bold"))
        for name, text in entries.items():
            terminal.print(f"  {name:20} {text}")
    terminal.print("`mpq plugins NAME` lists the options of one, and the formats of an adapter")
    return _OK


def _plugin(options: Namespace) -> int:
    """`mpq plugins NAME`: what a plug-in of that name says of itself."""
    kinds = [kind for kind in KINDS if options.name in names(kind)]
    if not kinds:
        listed = [name for kind in KINDS for name in names(kind)]
        close = difflib.get_close_matches(options.name, listed, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise PluginError(f"no plugin is named {options.name!r}.{hint} `mpq plugins` lists them all.")
    found = {kind: described(make(kind, options.name)) for kind in kinds}
    if options.json:
        return _print_json(found)
    terminal = console()
    for kind, facts in found.items():
        terminal.print(Text(f"{options.name} ({kind})", style="bold"))
        terminal.print(facts["about"])
        for fact in ("formats", "weight_bits", "activation_bits", "unit"):
            if fact in facts:
                value = facts[fact]
                terminal.print(f"{fact.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
        terminal.print("options:" if facts["options"] else "no options")
        for name, option in facts["options"].items():
            terminal.print(f"  {name} = {option['default']!r}  ({option['takes']})")
    return _OK


def demo(options: Namespace) -> int:
    """`mpq demo`."""
    from mpq_plugins.cli.demo import run_demo

    adapters, n_random = words_of(options.adapters), options.seeds or 0
    return run_demo(Path(options.out), options.network, adapters=adapters, n_random=n_random, as_json=options.json)


def _tell_dry_run(options: Namespace, search: Search) -> int:
    """What `mpq allocate` would do."""
    space, batches = search.space, list(search.batches)
    n_choices = sum(len(unit.choices) for unit in space.units)
    counts = f"{len(space.layers)} layers, {len(space.units)} units, {n_choices} choices, {sum(map(len, batches))} images"
    limits = [(own, format_amount(own.resolve(space), own.cost.unit)) for own in search.budgets]
    budgets = [f"budget {own.cost.name}: {limit} ({own.limit})" for own, limit in limits]
    return _dry_run(options, counts, *budgets, f"proxy {search.proxy.name}, solver {options.solver}")


def _dry_run(options: Namespace, *lines: str) -> int:
    for line in (*lines, f"dry run: {options.out} is not written"):
        console().print(line)
    return _OK


def _report_allocation(options: Namespace, allocation: Allocation, budgets: Sequence[Budget]) -> int:
    from mpq_plugins.reports import allocation_table, certificate_lines, plot_allocation, skipped_table

    bits = allocation.bits
    command = command_of(options)
    (replace(bits, origin={**bits.origin, "command": command}) if command else bits).save(options.out)
    if options.plot:
        plot_allocation(allocation, options.plot)
    if options.json:
        layers = {name: str(precision) for name, precision in allocation.bits.layers.items()}
        return _print_json({"layers": layers, "costs": allocation.bits.costs, **allocation.bits.origin})
    terminal = console()
    terminal.print(allocation_table(allocation))
    _print_optional(terminal, skipped_table(allocation.space.skipped, allocation.space.layers))
    for line in certificate_lines(allocation, budgets, top_k=getattr(options, "top_k", 1)):
        terminal.print(line)
    terminal.print(f"wrote {options.out}")
    return _OK


def _report_verification(
    options: Namespace, report: Verification, accuracies: Mapping[str, float] | None = None, compiled: Any = None
) -> int:
    if options.report:
        report.save(options.report)
    if options.json:
        _print_json({**report.to_json(), **(accuracies or {}), **({"compiler": compiled.to_json()} if compiled else {})})
        return _OK if report.ok and (compiled is None or compiled.ok) else _FAILED
    terminal = console()
    report.check()
    compared = sum(check.n_codes or 0 for check in report.layers)
    codes = f", {compared:,} weight codes equal" if compared else ""
    terminal.print(f"{report.artifact}: {len(report.layers)} layers hold the bits asked for{codes}")
    if report.outputs is not None:
        terminal.print(
            f"outputs: mean difference {report.outputs.mean_relative:.1e} standard deviations, "
            f"largest {report.outputs.max_absolute:.1e}, same top-1 in {report.outputs.top1_agreement:.1%}"
        )
        if report.outputs.deployed is not None:
            sizes = " and ".join(map(str, report.outputs.batch_sizes))
            terminal.print(f"executed by default: mean difference {report.outputs.deployed:.1e}; compared at batch {sizes}")
        if report.outputs.refused_batch is not None:
            terminal.print(f"note: not compared at batch {report.outputs.refused_batch}")
        if report.outputs.own_difference:
            terminal.print(
                "note: that is above the tolerance, and so is what the module differs from itself when its sums are rounded "
                f"otherwise ({report.outputs.own_difference:.1e}): it amplifies rounding, as deep networks of few bits do"
            )
    if accuracies:
        terminal.print(
            f"accuracy {accuracies['exported_accuracy']:.4f} of the file, {accuracies['accuracy']:.4f} of the module"
        )
    for check in report.budgets:
        terminal.print(str(check))
    if compiled is not None:
        terminal.print(str(compiled.check()))
    return _OK


def _advice(adapter: AbstractAdapter, model: nn.Module, example: Any, bits: BitConfig) -> Mapping[str, int]:
    """What to know before deploying, with the number of layers it is about."""
    from mpq_plugins.model.discover import find_layers

    layers = [layer for layer in find_layers(model, example) if layer.name in bits.layers]
    return Counter(text for layer in layers if (text := adapter.advice(layer, bits[layer.name])))


def _print_optional(terminal: Console, table: Any) -> None:
    if table is not None:
        terminal.print(table)


def _print_json(document: Any) -> int:
    print(json.dumps(document, indent=2, sort_keys=True))
    return _OK
