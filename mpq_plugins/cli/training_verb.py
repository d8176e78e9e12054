"""`mpq train`."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_plugins.cli.known import bits_and_command, command_of
from mpq_plugins.cli.options import adapter_of, model_of
from mpq_plugins.common.console import console as make_console
from mpq_plugins.common.text import values_of
from mpq_plugins.errors import DataError

if TYPE_CHECKING:
    from mpq_plugins.training import EpochRecord, TrainingRecipe


def train(options: Namespace) -> int:
    """`mpq train`."""
    from mpq_plugins.adapter.evaluate import accuracy
    from mpq_plugins.cli.sources import image_size, load_data, load_model, parse_shape
    from mpq_plugins.cli.training_sources import calibration_data, training_data
    from mpq_plugins.model.discover import find_layers
    from mpq_plugins.reports import plot_training
    from mpq_plugins.training import train as run

    bits = bits_and_command(options)
    if options.data is None:
        raise DataError("training needs data. Add --data: digits, imagefolder:DIR, file.py:LOADER or module:LOADER.")
    adapter, recipe = adapter_of(options), _recipe(options)
    shape = parse_shape(options.input) if options.input else None
    source: dict[str, Any] = {"batch_size": options.batch_size}
    if options.data.startswith("imagefolder:"):
        source["size"] = image_size(shape)
    calibration = calibration_data(options.data, options.images, **source)
    model, example = model_of(options, calibration[0].inputs)
    evaluation = None
    if options.eval_data:
        evaluation = load_data(options.eval_data, input_shape=shape, batch_size=options.batch_size)
    data = training_data(options.data, workers=options.workers, **source)
    console = make_console(stderr=options.json)
    if options.dry_run:
        inventory = find_layers(model, example)
        bits.check(inventory)
        console.print(f"{len(bits.layers)} of {len(inventory)} layers, {recipe.epochs} epochs of {recipe.method}")
        console.print(f"dry run: {options.out} is not written")
        return 0
    teacher = model if options.teacher == "float" else None
    if options.teacher not in (None, "float"):
        teacher = load_model(options.teacher, options.teacher_weights)
    trained = run(
        model,
        bits,
        data,
        adapter=adapter,
        recipe=recipe,
        example=example,
        calibration=calibration,
        evaluation=evaluation,
        teacher=teacher,
        output=options.output,
        options=values_of(options.ptq),
        folder=options.out,
        tensorboard=options.tensorboard,
        command=command_of(options),
        on_epoch=lambda record: console.print(_line(record, recipe.epochs)),
    )
    if int(os.environ.get("RANK", "0")):  # of several processes the first one reports
        return 0
    if options.plot:
        plot_training(trained.history, options.plot)
    result: dict[str, Any] = {
        "module": str(Path(options.out) / "module.pt"),
        "metrics": str(Path(options.out) / "metrics.jsonl"),
        "epochs": [asdict(record) for record in trained.history],
        "instability": dict(trained.instability),
    }
    if evaluation is not None:
        # Not the last epoch's: a run that was finished before may have been evaluated on other data.
        result["accuracy"] = accuracy(trained.module, evaluation, output=options.output)
        result["float_accuracy"] = accuracy(model, evaluation, output=options.output)
    if options.json:
        print(json.dumps(result, indent=2, sort_keys=True))
        return 0
    if evaluation is not None:
        console.print(f"accuracy {result['accuracy']:.4f}, float {result['float_accuracy']:.4f}")
    console.print(f"wrote {result['module']}; metrics in {result['metrics']}")
    return 0


def _recipe(options: Namespace) -> TrainingRecipe:
    """The recipe of the file, with what the command line says itself."""
    from mpq_plugins.training import TrainingRecipe

    recipe = TrainingRecipe() if options.recipe is None else TrainingRecipe.load(options.recipe)
    names = ("method", "epochs", "learning_rate", "seed", "mixed_precision")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(recipe, **given)


def _line(record: EpochRecord, n_epochs: int) -> str:
    accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.4f}"
    frozen = f", {record.n_frozen} layers frozen" if record.n_frozen else ""
    speed = record.n_images / record.seconds if record.seconds else 0.0
    return f"epoch {record.epoch}/{n_epochs} ({record.stage}): loss {record.loss:.4f}{accuracy}{frozen}, {speed:.0f} images/s"
