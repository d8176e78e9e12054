"""Brevitas to QONNX for FINN: weights and activations searched together under two budgets."""

import sys
from pathlib import Path

from mpq_brevitas import BrevitasAdapter

import mpq_plugins as mpq
from mpq_plugins.cli.digits import digits, trained_digits_net


def main(folder: Path) -> None:
    model, calibration, test = trained_digits_net(), digits(train=True), digits(train=False)
    example = test[0].inputs[:1]
    adapter = BrevitasAdapter(profile="finn")

    # FINN takes every width. Layers that read one quantized activation are tied before the solve.
    allocation = mpq.allocate(
        model,
        example,
        calibration,
        proxy="csmpq",
        budgets={"size": "w4", "bops": "w4a5"},
        choices=mpq.menu(weight=range(2, 9), activation=range(3, 9)),
        adapter=adapter,
    )
    allocation.bits.save(folder / "bits.json")
    print({name: str(precision) for name, precision in allocation.bits.layers.items()})

    module = adapter.prepare(model, allocation.bits, example, calibration)
    path = adapter.export(module, folder / "digits.onnx", example, format="qonnx")
    report = mpq.verify(adapter, path, allocation.bits, module=module, inputs=test[0].inputs, model=model).check()
    for budget in report.budgets:
        print(f"{budget.name}: {budget.found:.0f} of {budget.limit:.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
