"""NNCF to OpenVINO: allocate, quantize, export the IR, read the bits back from it."""

import sys
from pathlib import Path

import mpq_plugins as mpq
from mpq_plugins.digits import digits, trained_digits_net


def main(folder: Path) -> None:
    model, calibration, test = trained_digits_net(), digits(train=True), digits(train=False)

    # As small as 4-bit weights everywhere; the menu is what the IR can store.
    q = mpq.quantize(model, calibration, budgets="size=w4", adapter="nncf")
    print(q.report)
    q.bits.save(folder / "bits.json")

    exported = q.export(folder / "digits.xml", format="openvino-compact")
    report = exported.verify(test[0].inputs)
    print(f"{exported.path.name}: {len(report.layers)} layers hold the bits asked for")
    print(f"accuracy {exported.accuracy(test):.3f} of the file, {q.accuracy(test):.3f} of the module")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
