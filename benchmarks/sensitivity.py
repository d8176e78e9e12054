"""How much faster the sensitivity engine is than a loop of whole forward passes, and how much less it computes.

    python benchmarks/sensitivity.py [--models resnet18 mobilenet_v2] [--size 224] [--images 8] [--pairs]

Every unit at 2, 4 and 8 bits, one batch, random weights. The loop swaps quantized weights into the plain float32 model and
runs it whole; both sides find their quantized weights ready. CPU seconds of one thread: a busy machine disturbs them least.
A layer evaluation is one image through one layer. `start` is what the engine does once per model: it finds the quantizers'
scales, records the tape and checks a replay of every unit against a plain pass.
"""

import argparse
import contextlib
import itertools
import time

import torch
import torchvision

import mpq_plugins as mpq
from mpq_plugins.proxies.measuring import MeasurementOptions, SensitivityRun, first_order_effects

BITS = (2, 4, 8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="the least of so many runs counts")
    parser.add_argument("--pairs", action="store_true", help="every two units too: hours at 224, minutes at 64 with one image")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | what | forward s | start s | loop s | engine s | ratio | loop layers | engine layers | difference |")
    print("|---" * 10 + "|")
    for name in arguments.models:
        bench = Bench(name, arguments.size, arguments.images, arguments.repeats)
        bench.singles()
        bench.fisher()
        if arguments.pairs:
            bench.pairs()


class Bench:
    """One network, one batch, and the quantized weights for both sides."""

    def __init__(self, name, size, n_images, n_repeats):
        torch.manual_seed(0)
        self.name, self.n_repeats = name, n_repeats
        self.model = torchvision.models.get_model(name).eval()
        self.images = torch.randn(n_images, 3, size, size)
        labels = torch.randint(0, 1000, (n_images,))
        space = mpq.Space.build(mpq.find_layers(self.model, self.images[:1]), mpq.menu(BITS, (8,)))
        self.start, self.lab = least_seconds(1, lambda: self.lab_of(space, labels))
        self.forward, self.base = least_seconds(3, self.plain)
        self.modules = dict(self.model.named_modules())
        variants = self.lab.engine.variants
        self.weights = {(name, bits): variants.weight(name, bits) for name in self.names for bits in BITS}
        for unit in self.units:  # The engine keeps them, too.
            variants.changes(unit, range(len(BITS)), merged=self.lab.engine.player is not None)

    def lab_of(self, space, labels):
        """A laboratory with its engine started."""
        lab = SensitivityRun(self.model, space, [(self.images, labels)], MeasurementOptions(memory_mb=8192, correction=False))
        print(f"# {self.name}: {lab.engine.why_plain or 'replayed from a tape'}")
        return lab

    @property
    def units(self):
        """Their numbers."""
        return range(len(self.lab.space.units))

    @property
    def names(self):
        """The layers, one per unit."""
        return [unit.layers[0] for unit in self.lab.space.units]

    def plain(self):
        """The output of a whole forward pass."""
        with torch.no_grad():
            return self.model(self.images)

    def singles(self):
        """Every unit at every choice."""
        loop, expected = least_seconds(self.n_repeats, self.single_loop)
        self.lab.engine.counter.run = 0
        engine, found = least_seconds(self.n_repeats, self.single_engine)
        n_layers = len(self.names) * len(expected) * len(self.images)
        difference = float((found - expected).abs().max() / self.base.std())
        self.report("singles", loop, engine, n_layers, self.lab.engine.counter.run // self.n_repeats, f"{difference:.1e}")

    def single_loop(self):
        """[unit and choice, image, class] of whole passes."""
        outputs = []
        for name, bits in itertools.product(self.names, BITS):
            with self.swapped(name, bits):
                outputs.append(self.plain())
        return torch.stack(outputs)

    def single_engine(self):
        """The same from the engine."""
        run = self.lab.engine.run(self.lab.batches[0])
        return torch.stack([output for unit in self.units for output in run.single(unit, range(len(BITS)))])

    def pairs(self):
        """Every two units at every two choices."""
        n_loop = len(self.names) * (len(self.names) - 1) // 2 * len(BITS) ** 2
        loop, expected = least_seconds(1, self.pair_loop)
        self.lab.engine.counter.run = 0
        engine, found = least_seconds(1, lambda: self.lab.effects(pairs=True))
        difference = float(abs(found.pairs - expected.numpy()).max() / abs(found.pairs).max())
        n_layers = (n_loop + len(self.names) * len(BITS) + 1) * len(self.names) * len(self.images)
        self.report("exact pairs", loop, engine, n_layers, self.lab.engine.counter.run, f"{difference:.1e} of the largest")

    def pair_loop(self):
        """[choice, choice] of interactions from whole passes."""
        labels = self.lab.batches[0].labels
        options = list(itertools.product(self.names, BITS))

        def loss():
            return float(torch.nn.functional.cross_entropy(self.plain().double(), labels))

        base, single = loss(), []
        for option in options:
            with self.swapped(*option):
                single.append(loss())
        omega = torch.zeros(len(options), len(options), dtype=torch.float64)
        for (i, one), (j, other) in itertools.combinations(enumerate(options), 2):
            if one[0] != other[0]:
                with self.swapped(*one), self.swapped(*other):
                    omega[i, j] = omega[j, i] = loss() + base - single[i] - single[j]
        return omega

    def fisher(self):
        """All choices from one backward pass; its number is a gain over the loop of singles, which measures more."""
        seconds, _ = least_seconds(1, lambda: first_order_effects(self.lab))
        print(f"| {self.name} | fisher | {self.forward:.2f} | {self.start:.2f} | | {seconds:.2f} | | | | |", flush=True)

    @contextlib.contextmanager
    def swapped(self, name, bits):
        """The model with one layer quantized."""
        parameter = self.modules[name].weight
        own, parameter.data = parameter.data, self.weights[name, bits]
        try:
            yield
        finally:
            parameter.data = own

    def report(self, what, loop, engine, loop_layers, engine_layers, difference):
        """One row of the table."""
        times = f"{self.forward:.2f} | {self.start:.2f} | {loop:.2f} | {engine:.2f} | {loop / engine:.2f}"
        print(f"| {self.name} | {what} | {times} | {loop_layers:,} | {engine_layers:,} | {difference} |", flush=True)


def least_seconds(n, action):
    """CPU seconds of the quickest of `n` runs, and what the last returned."""
    seconds, result = [], None
    for _ in range(n):
        before = time.process_time()
        result = action()
        seconds.append(time.process_time() - before)
    return min(seconds), result


if __name__ == "__main__":
    main()
