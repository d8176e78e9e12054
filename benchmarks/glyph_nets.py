"""The small networks trained on glyphs: size, cost, float accuracy on 4,000 test images, CPU seconds of training.

    python benchmarks/glyph_nets.py                                  # all three, seed 0: minutes each on one core
    python benchmarks/glyph_nets.py --kinds resnet20 --seeds 0 1 2
    python benchmarks/glyph_nets.py --sheet glyphs.png               # only a picture of the test images

Networks come from the user's cache folder when they were trained before; seconds are then those of that training.
"""

from __future__ import annotations

import argparse

import torch
from glyphs import CLASSES, glyphs, save_sheet, train_or_restore
from small_nets import SMALL_NETS

from mpq_plugins import find_layers
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.common.progress import showing_progress


def row(kind: str, seed: int) -> str:
    """One line of the table."""
    test = glyphs(train=False)
    trained = train_or_restore(kind, seed)
    layers = find_layers(trained.net, test[0].inputs[:1])
    n_parameters = sum(parameter.numel() for parameter in trained.net.parameters())
    macs = sum(layer.macs for layer in layers)
    return (
        f"| {kind} | {seed} | {n_parameters:,} | {macs / 1e6:.2f} M | {len(layers)} "
        f"| {accuracy(trained.net, test):.2%} | {trained.seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(SMALL_NETS), choices=list(SMALL_NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sheet", metavar="FILE", help="save samples of every class as a picture, and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sheet:
        print(save_sheet(args.sheet))
        return
    print(f"{len(CLASSES)} classes, one thread, torch {torch.__version__}")
    print("| network | seed | parameters | MACs | quantizable layers | float accuracy | training CPU s |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        for seed in args.seeds:
            with showing_progress():
                line = row(kind, seed)
            print(line, flush=True)


if __name__ == "__main__":
    main()
