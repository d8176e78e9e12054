"""What weight ranges, bias correction and BN re-estimation are worth in each adapter.

    python benchmarks/repair.py [--networks 2]

The digits network, all layers at one precision but the first and last at w8a8. Accuracy on held-out digits, mean over networks.
"""

import argparse
import statistics

import mpq_plugins as mpq
from mpq_plugins import BitConfig, Precision
from mpq_plugins._evaluate import accuracy
from mpq_plugins._plugins import make
from mpq_plugins.digits import digits, trained_digits_net

ROUTES = {"nncf": ("nncf", {}), "brevitas": ("brevitas", {}), "brevitas, finn": ("brevitas", {"profile": "finn"})}
REPAIRS = {
    "no repair": {"bias_correction": False, "batch_norm": "kept"},
    "bias correction": {"bias_correction": True, "batch_norm": "kept"},
    "BN": {"bias_correction": False, "batch_norm": "re-estimated"},
    "both (default)": {"bias_correction": True, "batch_norm": "re-estimated"},
}
PRECISIONS = ("w4a4", "w3a4", "w2a8", "w2a4")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=2)
    n_networks = parser.parse_args().networks
    nets = [trained_digits_net(seed=seed) for seed in range(n_networks)]
    calibration, test = digits(train=True, batch_size=256)[:1], digits(train=False, batch_size=300)
    print(f"float accuracy {statistics.mean(accuracy(net, test) for net in nets):.3f}, mean of {n_networks} networks\n")
    print("| adapter | weight range | repair | " + " | ".join(PRECISIONS) + " |")
    print("|---" * (3 + len(PRECISIONS)) + "|")
    inventory = mpq.find_layers(nets[0], test[0].inputs[:1])
    for route, (name, options) in ROUTES.items():
        adapter = make("adapters", name, options)
        for weight_range in ("max", "mse"):
            for repair, switches in REPAIRS.items():
                cells = []
                for text in PRECISIONS:
                    layers = {layer.name: Precision.parse(text) for layer in inventory}
                    layers |= dict.fromkeys((inventory.layers[0].name, inventory.layers[-1].name), Precision(8, 8))
                    bits = BitConfig(layers, inventory.fingerprint)
                    found = [
                        accuracy(
                            adapter.prepare(net, bits, test[0].inputs[:1], calibration, weight_range=weight_range, **switches),
                            test,
                        )
                        for net in nets
                    ]
                    cells.append(f"{statistics.mean(found):.3f}")
                print(f"| {route} | {weight_range} | {repair} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
