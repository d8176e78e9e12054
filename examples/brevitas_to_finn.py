"""Brevitas to QONNX for FINN: weights and activations searched together under two budgets."""

import sys
from pathlib import Path

from mpq_brevitas import BrevitasAdapter

import mpq_plugins as mpq
from mpq_plugins.digits import digits, trained_digits_net


def main(folder: Path) -> None:
    model, calibration, test = trained_digits_net(), digits(train=True), digits(train=False)

    # FINN takes every width. Layers that read one quantized activation are tied before the solve.
    q = mpq.quantize(
        model,
        calibration,
        budgets={"size": "w4", "bops": "w4a5"},
        adapter=BrevitasAdapter(profile="finn"),
        proxy="csmpq",
        choices=mpq.menu(weight=range(2, 9), activation=range(3, 9)),
    )
    print(q.report)
    q.bits.save(folder / "bits.json")

    report = q.export(folder / "digits.onnx", format="qonnx").verify(test[0].inputs)
    for budget in report.budgets:
        print(f"{budget.name}: {budget.found:.0f} of {budget.limit:.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
