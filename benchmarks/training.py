"""What training recovers: PTQ alone, plain QAT, PROFIT, and both with the float network as teacher, at equal epochs.

    python benchmarks/training.py                    # measures what results/ lacks, then prints the table
    python benchmarks/training.py --nets mobilenet_v2 --bits w3a3 --adapters nncf --seeds 1
    python benchmarks/training.py --print-only

The float network is the same for all seeds; a seed draws the order of the batches. Ablations (--methods) keep PROFIT's stages
and their lengths and change one thing: "nothing frozen" freezes no layer, "target bits only" is at the target bits from the
first stage on, "one cosine" has no restarts, "longer warm-up" warms up over a fifth of a stage instead of a tenth. "freezing
alone" is plain QAT, with its one learning-rate curve, that measures AIWQ and freezes as PROFIT does. "file" is the accuracy
of the exported file (OpenVINO's or onnxruntime's) for the last method of the first seed. Accuracy in percent on held-out
images.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cells import BITS, NETS, RESULTS, Cells, bits_of_case, load_case, measured_accuracy
from glyphs import glyphs
from small_nets import SMALL_NETS

import mpq_plugins as mpq
from mpq_plugins.adapter.evaluate import exported_accuracy
from mpq_plugins.cli.training_sources import shifted_digits
from mpq_plugins.common.plugins import make
from mpq_plugins.training import ProfitSchedule, Stage, TrainingRecipe, train

METHODS = ("PTQ", "QAT", "PROFIT", "PROFIT + teacher")
ABLATIONS = ("QAT + teacher", "nothing frozen", "target bits only", "one cosine", "longer warm-up", "freezing alone")
PAIRS = (
    ("QAT", "PTQ"),
    ("PROFIT", "QAT"),
    ("PROFIT + teacher", "PROFIT"),
    ("PROFIT + teacher", "QAT"),
    ("PROFIT + teacher", "QAT + teacher"),
    ("QAT + teacher", "QAT"),
    ("nothing frozen", "PROFIT"),
    ("target bits only", "PROFIT"),
    ("one cosine", "PROFIT"),
    ("longer warm-up", "PROFIT"),
    ("freezing alone", "QAT"),
)
ADAPTERS = {
    "brevitas": ("brevitas", {}),
    "nncf": ("nncf", {}),
    "brevitas finn": ("brevitas", {"profile": "finn"}),
    "brevitas duq": ("brevitas", {"quantizer": "duq"}),
}


@dataclass(frozen=True)
class Budget:
    """How much training a network gets."""

    epochs: int
    images: int
    recipe: TrainingRecipe


@dataclass(frozen=True)
class EditedRecipe(TrainingRecipe):
    """A recipe whose stages are changed one by one, their number and lengths kept."""

    edit: Callable[[Stage, mpq.BitConfig], Stage] | None = None

    def stages(self, target):
        """Those of the recipe, edited."""
        return tuple(self.edit(stage, target) for stage in super().stages(target))


def at_target(stage, target):
    return replace(stage, bits=target, float_weights=False)


def recipe_of(method, budget, seed):
    """The recipe of a method; all share rate, decay and number of epochs."""
    recipe = replace(budget.recipe, epochs=budget.epochs, seed=seed)
    if method.startswith("QAT"):
        return recipe
    recipe = replace(recipe, method="profit", restarts=method not in ("one cosine", "freezing alone"))
    if method == "nothing frozen":
        return edited(recipe, lambda stage, _: replace(stage, n_frozen=0))
    if method == "target bits only":
        return edited(recipe, at_target)
    if method == "freezing alone":
        return edited(replace(recipe, profit=replace(recipe.profit, widths=(), settle_epochs=0)), at_target)
    return replace(recipe, warm_up=0.2) if method == "longer warm-up" else recipe


def edited(recipe, edit):
    return EditedRecipe(**vars(recipe), edit=edit)


def data_of(case, budget):
    """Training data of one epoch; glyphs are new ones in every epoch."""
    if case.name == "digits":
        return shifted_digits
    # The float networks saw the rounds up to 6.
    return lambda epoch: glyphs(train=True, n_images=budget.images, batch_size=64, seed=7 + epoch)


def cell(case, bits, adapter_name, method, budget, seed, *, exported):
    """Accuracy after one way to train, the losses on the way, and of the exported file when asked for."""
    adapter = make("adapters", *ADAPTERS[adapter_name])
    if method == "PTQ":
        module = adapter.prepare(case.net, bits, case.example, case.calibration)
        return {"accuracy": measured_accuracy(module, case.test)}
    trained = train(
        case.net,
        bits,
        data_of(case, budget),
        adapter=adapter,
        recipe=recipe_of(method, budget, seed),
        calibration=case.calibration,
        teacher=case.net if "teacher" in method else None,
    )
    result = {
        "accuracy": measured_accuracy(trained.module, case.test),
        "curve": [[record.stage, round(record.loss, 4)] for record in trained.history],
        "step_ms": round(1000 * sum(r.seconds for r in trained.history) / trained.history[-1].steps),
    }
    return {**result, **read_back(case, bits, adapter, trained.module)} if exported else result


def read_back(case, bits, adapter, module):
    """Export, verify, and the accuracy of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.export(module, Path(folder) / f"trained{adapter.suffix()}", case.example)
        report = mpq.verify(adapter, path, bits, module=module, inputs=case.test[0].inputs[:32], model=case.net)
        return {"file": round(100 * exported_accuracy(adapter, path, case.test), 2), "verified": report.ok}


def table(cells, options):
    """Markdown: a row per network, bits and adapter; mean over seeds, with the range where there are several."""
    lines = ["| network | bits | adapter | seeds | " + " | ".join(options.methods) + " | file |"]
    lines.append("|---" * (5 + len(options.methods)) + "|")
    for net in options.nets:
        for text in options.bits:
            for adapter in options.adapters:
                keys = {m: [f"{net}/{text}/{adapter}/{m}/{s}" for s in range(options.seeds)] for m in options.methods}
                found = {m: [cells.found[k] for k in own if k in cells.found] for m, own in keys.items()}
                if not any(found.values()):
                    continue
                n_seeds = max(len(own) for m, own in found.items() if m != "PTQ")
                files = [(c["accuracy"], c["file"]) for own in found.values() for c in own if "file" in c]
                file = "-" if not files else "; ".join(f"{exported:.2f} (module {own:.2f})" for own, exported in files[-1:])
                shown = " | ".join(_shown([c["accuracy"] for c in found[m]]) for m in options.methods)
                lines.append(f"| {net} | {text} | {adapter} | {n_seeds} | {shown} | {file} |")
    return "\n".join(lines)


def _shown(values):
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def summary(cells, options):
    """How often and by how much one method ends above another, cell by cell."""
    lines = []
    for first, second in PAIRS:
        differences = [
            cells.found[key]["accuracy"] - cells.found[other]["accuracy"]
            for key in cells.found
            if key.split("/")[3] == first and (other := _other(key, second)) in cells.found
        ]
        if differences:
            wins = sum(value > 0 for value in differences)
            mean = statistics.mean(differences)
            lines.append(
                f"{first} against {second}: better in {wins} of {len(differences)} cells, by {mean:+.2f} points on average"
            )
    return "\n".join(lines)


def _other(key, method):
    net, text, adapter, _, seed = key.split("/")
    return f"{net}/{text}/{adapter}/{method}/{0 if method == 'PTQ' else seed}"


def budget_of(net, options):
    """Epochs, images and recipe for a network."""
    # Glyph networks get few steps: one width on the way to the target instead of two.
    profit = ProfitSchedule(widths=(8, 5) if net == "digits" else (5,), float_epochs=0)
    recipe = TrainingRecipe(learning_rate=options.learning_rate, range_factor=options.range_factor, profit=profit)
    return Budget(options.epochs, options.images, recipe)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="measured cells and bit configurations")
    parser.add_argument("--nets", nargs="+", default=["digits", *SMALL_NETS], choices=NETS)
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--adapters", nargs="+", default=["brevitas", "nncf"], choices=list(ADAPTERS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=(*METHODS, *ABLATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1600, help="training images of an epoch (glyphs)")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--range-factor", type=float, default=0.1)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--print-only", action="store_true", help="print the table of what was measured")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cells = Cells(options.folder / "training.json")
    for net in [] if options.print_only else options.nets:
        case, budget = load_case(net, options.test_images), budget_of(net, options)
        print(f"{net}: float {measured_accuracy(case.net, case.test)}", flush=True)
        for seed in range(options.seeds):
            for text in options.bits:
                bits = bits_of_case(case, text, options.folder)
                for adapter in options.adapters:
                    for method in options.methods:
                        if method == "PTQ" and seed:
                            continue
                        exported = seed == 0 and method == options.methods[-1]
                        key = f"{net}/{text}/{adapter}/{method}/{seed}"
                        cells.get(key, partial(cell, case, bits, adapter, method, budget, seed, exported=exported))
    print(table(cells, options))
    print(summary(cells, options))


if __name__ == "__main__":
    main()
