"""Accuracy of post-training quantization, by method: both adapters, three networks, 4, 3 and mixed bits.

    python benchmarks/ptq.py                       # measures what results/ lacks, then prints the table
    python benchmarks/ptq.py --nets resnet20 --bits w4a4 --adapters brevitas

Each column changes the adapter's default (MSE weight ranges, bias correction, re-estimated batch normalisation) in what its
name says; "nothing" has neither repair. A dash is what the framework refuses or was not run. Accuracy in percent on held-out
glyphs.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from cells import BITS, NETS, RESULTS, Cells, bits_of_case, load_case, measured_accuracy
from small_nets import SMALL_NETS

from mpq_plugins.common.plugins import make
from mpq_plugins.errors import AdapterError, MissingExtraError

METHODS = {
    "nothing": {"bias_correction": False, "batch_norm": "kept"},
    "bias correction": {"batch_norm": "kept"},
    "BN": {"bias_correction": False},
    "default": {},
    "max weights": {"weight_range": "max"},
    "max activations": {"activation_range": "max"},
    "percentile": {"activation_range": "percentile"},
    "MSE activations": {"activation_range": "mse"},
    "smooth-quant": {"equalization": "smooth-quant"},
    "cross-layer": {"equalization": "cross-layer"},
    "gptq": {"rounding": "gptq"},
    "gpfq": {"rounding": "gpfq"},
    "qronos": {"rounding": "qronos"},
    "learned": {"rounding": "learned", "rounding_steps": 200},
}
ADAPTERS = {"brevitas": ("brevitas", {}), "brevitas finn": ("brevitas", {"profile": "finn"}), "nncf": ("nncf", {})}


def cell(case, bits, adapter_name, method):
    """Accuracy of one way to quantize, or the reason why it is refused."""
    kind, own = ADAPTERS[adapter_name]
    torch.manual_seed(0)
    try:
        module = make("adapters", kind, own).prepare(case.net, bits, case.example, case.calibration, **METHODS[method])
    except MissingExtraError:
        raise
    except AdapterError as error:
        return {"refused": str(error)}
    return {"accuracy": measured_accuracy(module, case.test)}


def table(cells, nets, widths, adapters, methods):
    """Markdown: a row per network, bits and adapter."""
    lines = ["| network | bits | adapter | " + " | ".join(methods) + " |", "|---" * (3 + len(methods)) + "|"]
    for net in nets:
        for text in widths:
            for adapter in adapters:
                found = [cells.found.get(f"{net}/{text}/{adapter}/{method}", {}).get("accuracy") for method in methods]
                if all(value is None for value in found):
                    continue
                best = max(value for value in found if value is not None)
                shown = ["-" if value is None else f"**{value:.1f}**" if value == best else f"{value:.1f}" for value in found]
                lines.append(f"| {net} | {text} | {adapter} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="measured cells and bit configurations")
    parser.add_argument("--nets", nargs="+", default=list(SMALL_NETS), choices=NETS)
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--print-only", action="store_true", help="print the table of what was measured")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.folder / "ptq.json")
    for net in [] if options.print_only else options.nets:
        case = load_case(net, options.test_images, options.calibration_images)
        print(f"{net}: float {measured_accuracy(case.net, case.test)}", flush=True)
        for text in options.bits:
            bits = bits_of_case(case, text, options.folder)
            for adapter in options.adapters:
                for method in options.methods:
                    cells.get(f"{net}/{text}/{adapter}/{method}", partial(cell, case, bits, adapter, method))
    print(table(cells, options.nets, options.bits, options.adapters, options.methods))


if __name__ == "__main__":
    main()
