"""Cross-layer sensitivities (CLADO): measured once and kept, then solved at several budgets, the best plans re-measured."""

import sys
from pathlib import Path

import mpq_plugins as mpq
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.proxies import CLADO


def main(folder: Path) -> None:
    model, batches = trained_digits_net(), digits(train=True, batch_size=256)
    example = batches[0].inputs[:1]

    for width in (2.5, 3, 4):  # The second and third budget need no new measurement of the layers.
        allocation = mpq.allocate(
            model,
            example,
            batches,
            proxy=CLADO(n_images=256),
            choices=mpq.menu(weight=(2, 3, 4, 8)),
            budgets={"size": f"w{width}"},
            top_k=8,
            cache=folder / "measurements",
        )
        solution, selection = allocation.solution, allocation.selection
        print(f"w{width}: {solution.solver}, bound {solution.bound:.5g}, plan {solution.objective:.5g}")
        print(f"  true loss of the best 8 plans: {', '.join(f'{loss:.4f}' for loss in selection.measured)}")
        allocation.bits.save(folder / f"bits-w{width}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
