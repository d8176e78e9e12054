"""NNCF to OpenVINO: allocate, quantize, export the IR, read the bits back from it."""

import sys
from pathlib import Path

from mpq_nncf import NNCFAdapter

import mpq_plugins as mpq
from mpq_plugins.cli.digits import digits, trained_digits_net


def main(folder: Path) -> None:
    model, calibration, test = trained_digits_net(), digits(train=True), digits(train=False)
    example = test[0].inputs[:1]
    adapter = NNCFAdapter()

    # As small as 4-bit weights everywhere, stem and classifier at 8; the menu is what the IR can store.
    allocation = mpq.allocate(model, example, calibration, proxy="ompq", budgets={"size": "w4"}, adapter=adapter)
    allocation.bits.save(folder / "bits.json")
    print({name: str(precision) for name, precision in allocation.bits.layers.items()})
    print(f"gap {allocation.solution.gap:.1e}, unused {allocation.solution.unused[0]:.0f} bytes")

    module = adapter.prepare(model, allocation.bits, example, calibration)
    path = adapter.export(module, folder / "digits.xml", example, format="openvino-compact")
    report = mpq.verify(adapter, path, allocation.bits, module=module, inputs=test[0].inputs, model=model).check()
    print(f"{path.name}: {len(report.layers)} layers hold the bits asked for")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
