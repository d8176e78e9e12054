"""PROFIT on a Brevitas module with the float network as teacher, to QONNX; training that a stop only delays."""

import sys
from pathlib import Path

from mpq_brevitas import BrevitasAdapter

import mpq_plugins as mpq
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.reports import plot_training
from mpq_plugins.training import ProfitSchedule, TrainingRecipe, train


def main(folder: Path) -> None:
    model, data, test = trained_digits_net(), digits(train=True, batch_size=120), digits(train=False, batch_size=300)
    example = test[0].inputs[:1]
    adapter = BrevitasAdapter()
    allocation = mpq.allocate(
        model,
        example,
        proxy="weight-error",
        budgets={"size": "w3"},
        choices=mpq.menu(weight=(2, 3, 4, 6), activation=(4,)),
        adapter=adapter,
    )
    allocation.bits.save(folder / "bits.json")

    # The published schedule takes 200 epochs and lowers bits by way of 8 and 5; this one goes straight to the target.
    schedule = ProfitSchedule(widths=(), float_epochs=0, settle_epochs=0)
    recipe = TrainingRecipe(method="profit", epochs=5, learning_rate=0.02, profit=schedule)
    trained = train(
        model,
        allocation.bits,
        data,
        adapter=adapter,
        recipe=recipe,
        evaluation=test,
        teacher=model,
        folder=folder / "run",  # the same call goes on here after an interruption
        on_epoch=lambda record: print(f"{record.epoch} {record.stage}: loss {record.loss:.3f}, accuracy {record.accuracy:.3f}"),
    )
    plot_training(trained.history, folder / "training.png")

    path = adapter.export(trained.module, folder / "digits.onnx", example)
    mpq.verify(adapter, path, allocation.bits, module=trained.module, inputs=test[0].inputs, model=model).check()
    print("the file holds the bits that were trained")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
