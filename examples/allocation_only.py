"""Mixed precision for a pipeline you already have: the allocation alone, at many budgets, from one scoring pass."""

import sys
from pathlib import Path

import mpq_plugins as mpq
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.proxies import OMPQ


def main(folder: Path) -> None:
    model, batches = trained_digits_net(), digits(train=True)
    example = batches[0].inputs[:1]

    inventory = mpq.find_layers(model, example)
    space = mpq.Space.build(inventory, mpq.menu(weight=(2, 3, 4, 8)), pin=mpq.first_and_last(inventory))
    scores = OMPQ().score(model, space, batches)
    scores.save(folder / "scores.json")

    # Solving again needs neither the model nor the data: the whole front costs milliseconds.
    for width in (2.5, 3, 3.5, 4, 5, 6):
        allocation = mpq.solve_scores(scores, {"size": f"w{width}"})
        bits = [precision.weight for precision in allocation.bits.layers.values()]
        print(f"w{width}: {allocation.bits.costs['size']:7.0f} bytes, loss {allocation.solution.objective:.4g}, bits {bits}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
