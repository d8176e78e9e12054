"""What the bit menu, the repair and the score are worth.

    python benchmarks/menus.py [--networks 2] [--seeds 20]

The digits network, trained from several seeds; weights allocated at the size of uniform 3 and 2.5 bits, activations 8;
applied through Brevitas. Rows: score or control; columns: menu and repair. Accuracy on held-out digits, mean over the networks.
"""

import argparse
import statistics
from collections import defaultdict

import mpq_plugins as mpq
from mpq_plugins._evaluate import accuracy
from mpq_plugins._plugins import make
from mpq_plugins.digits import digits, trained_digits_net

MENUS = {"2,4,8": (2, 4, 8), "2..8": range(2, 9)}
REPAIRS = {
    "no repair": {"bias_correction": False, "batch_norm": "kept"},
    "repaired": {"bias_correction": True, "batch_norm": "re-estimated"},
}
WIDTHS = ("3", "2.5")


def proxies(n_seeds):
    """Scores and controls by label."""
    named = {name: make("proxies", name) for name in ("ompq", "csmpq", "ompq-published", "csmpq-published")}
    controls = {name: make("proxies", name) for name in ("uniform", "constant", "projection")}
    return named | controls | {f"random#{seed}": make("proxies", "random", {"seed": seed}) for seed in range(n_seeds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    adapter = make("adapters", "brevitas")
    calibration, test = digits(train=True, batch_size=256)[:1], digits(train=False, batch_size=300)
    example = test[0].inputs[:1]
    found = defaultdict(list)
    floats = []
    for seed in range(arguments.networks):
        net = trained_digits_net(seed=seed)
        floats.append(accuracy(net, test))
        for menu_name, widths in MENUS.items():
            space = mpq.build_space(net, example, choices=mpq.menu(widths, (8,)), adapter=adapter)
            cache = {}
            for label, proxy in proxies(arguments.seeds).items():
                scores = proxy.score(net, space, calibration)
                for width in WIDTHS:
                    bits = mpq.solve_scores(scores, {"size": f"w{width}"}).bits
                    for repair, options in REPAIRS.items():
                        if label.startswith("random") and repair != "repaired":
                            continue
                        if (bits, repair) not in cache:
                            module = adapter.prepare(net, bits, example, calibration, **options)
                            cache[bits, repair] = accuracy(module, test)
                        found[width, label.split("#")[0], menu_name, repair].append(cache[bits, repair])
    print(f"float accuracy {statistics.mean(floats):.3f} (mean of {arguments.networks} networks)")
    for width in WIDTHS:
        print(f"\n### size of uniform {width} bits\n")
        print("| score | " + " | ".join(f"{menu_name}, {repair}" for menu_name in MENUS for repair in REPAIRS) + " |")
        print("|---" * (1 + len(MENUS) * len(REPAIRS)) + "|")
        for family in dict.fromkeys(label.split("#")[0] for label in proxies(arguments.seeds)):
            cells = []
            for menu_name in MENUS:
                for repair in REPAIRS:
                    values = found.get((width, family, menu_name, repair), [])
                    cells.append(_cell(values, spread=family == "random"))
            print(f"| {family} | " + " | ".join(cells) + " |")


def _cell(values, *, spread):
    if not values:
        return ""
    if spread:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    return f"{statistics.mean(values):.3f}"


if __name__ == "__main__":
    main()
