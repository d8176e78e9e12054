"""Linear-cost CLADO against exact CLADO, its diagonal, other scores and the controls, by true loss and accuracy.

    python benchmarks/clado.py digits                # 12 convolutions, 3 seeds x 2 regimes x 4 budgets: 24 cells
    python benchmarks/clado.py resnet20 mobilenet_v2 # glyphs, weights {2, 3, 4, 8}
    python benchmarks/clado.py resnet20 --joint      # and activations {4, 8}
    python benchmarks/clado.py digits --corrected    # all losses with batch normalisation and biases corrected

True loss: cross-entropy of the quantized network on the images that the scores were measured on; accuracy on held-out
images, as it is and after re-estimating batch normalisation. Measurements are kept in --cache, so that a run can go on.
"""

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from glyphs import glyphs, trained_glyph_net
from small_nets import BasicBlock, ConvNorm, SmallNet
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.common.plugins import make, names
from mpq_plugins.common.progress import showing_progress
from mpq_plugins.digits import digits
from mpq_plugins.model.run import Batch
from mpq_plugins.proxies import CLADO
from mpq_plugins.proxies.measuring import SensitivityRun, keeping_measurements
from mpq_plugins.training import reestimate_batch_norm

RIVALS = ("ompq", "csmpq", "hessian-trace", "fisher", "output-error", "kl-divergence", "weight-error", "rank-ensemble")
CONTROLS = ("uniform", "constant", "projection")
DIGITS_BUDGETS = tuple({"size": f"w{width}"} for width in (2.5, 3, 3.5, 4))
GLYPH_BUDGETS = tuple({"size": f"w{width}"} for width in (2.5, 3, 4))
JOINT_BUDGETS = ({"size": "w3", "bops": "w3a6"}, {"size": "w4", "bops": "w4a6"})


def digits_net():
    """A residual network of 12 searchable convolutions for 8x8 images."""
    blocks = [BasicBlock(*shape) for shape in ((8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2))]
    return SmallNet(ConvNorm(1, 8, 3), blocks, nn.Identity(), nn.Linear(32, 10))


def digits_case(seed, noisy, n_images):
    """Network, sensitivity set and test set; `noisy` digits leave the network unsaturated."""
    data = [batch for part in (True, False) for batch in digits(train=part, batch_size=2000, noise=0.0)]
    images, labels = torch.cat([batch.inputs for batch in data]), torch.cat([batch.labels for batch in data])
    generator = torch.Generator().manual_seed(100 + seed)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], labels[order]
    if noisy:
        images = images + 0.45 * torch.randn(images.shape, generator=generator)
    net = train_digits(seed, images[:1000], labels[:1000], noisy)
    return net, [Batch(images[:n_images], labels[:n_images])], [Batch(images[1000:], labels[1000:])]


def train_digits(seed, images, labels, noisy):
    """SGD with a one-cycle schedule, shifted and noisy images."""
    torch.manual_seed(seed)
    net, n_epochs = digits_net(), 20 if noisy else 25
    decay = 1e-3 if noisy else 5e-4
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=n_epochs * 16)
    for _ in range(n_epochs):
        for index in torch.randperm(len(images)).split(64):
            batch = torch.roll(images[index], torch.randint(-1, 2, (2,)).tolist(), (2, 3))
            batch = batch + (0.25 if noisy else 0.1) * torch.randn_like(batch)
            optimizer.zero_grad()
            F.cross_entropy(net(batch), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def glyph_case(kind, seed, n_images):
    """Network trained on glyphs, sensitivity set from the training distribution, test set."""
    calibration = glyphs(train=True, n_images=n_images, batch_size=128, seed=999)
    return trained_glyph_net(kind, seed), calibration, glyphs(train=False, batch_size=250)


def scores_of(net, space, calibration, options):
    """Scores by label: the forms of CLADO, then rivals, then controls."""
    found = {}
    form = partial(CLADO, n_images=options.images, correction=options.corrected)
    clado = {
        "gram": form(),
        "gram, KL": form(loss="kl"),
        "gram, sampled": form(n_samples=4),
        "gram, expansion": form(expansion=True),
        "measured + gram": form(shrinkage=1.0),
        "diagonal": form(cross=False),
        "one backward": form(tier="fisher"),
        "one backward, expansion": form(tier="fisher", expansion=True),
        "one backward, diagonal": form(tier="fisher", cross=False),
    }
    if not options.no_exact:
        clado["exact"] = form(tier="exact")
        clado["exact, clipped"] = form(tier="exact", clip=True)
    for label, proxy in clado.items():
        start = time.process_time()
        found[label] = proxy.score(net, space, calibration)
        print(f"  {label}: {time.process_time() - start:.1f} CPU s", flush=True)
    for name in RIVALS:
        if name in names("proxies"):
            start = time.process_time()
            proxy = make("proxies", name)
            if hasattr(proxy, "correction"):
                proxy = replace(proxy, correction=options.corrected)
            found[name] = proxy.score(net, space, calibration)
            print(f"  {name}: {time.process_time() - start:.1f} CPU s", flush=True)
    for name in CONTROLS:
        found[name] = make("proxies", name).score(net, space, calibration)
    for seed in range(options.seeds):
        found[f"random#{seed}"] = make("proxies", "random", {"seed": seed}).score(net, space, calibration)
    return found


class Judge:
    """True loss and accuracies of plans, each plan judged once."""

    def __init__(self, net, space, calibration, test, options):
        self.lab = SensitivityRun(net, space, calibration, CLADO(n_images=options.images, correction=options.corrected).setup())
        self.net, self.space, self.test, self.calibration = net, space, test, calibration
        self._known = {}

    def __call__(self, bits):
        """True loss, test accuracy, test accuracy with batch normalisation re-estimated."""
        choice = [unit.choices.index(bits.layers[unit.layers[0]]) for unit in self.space.units]
        key = tuple(choice)
        if key not in self._known:
            quantized = self._quantized(bits)
            plain = accuracy(quantized, self.test)
            reestimate_batch_norm(quantized, self.calibration)
            self._known[key] = (self.lab.losses_at([choice])[0], plain, accuracy(quantized, self.test))
        return self._known[key]

    def _quantized(self, bits):
        quantized, variants = copy.deepcopy(self.net), self.lab.engine.variants
        modules = dict(quantized.named_modules())
        for name, precision in bits.layers.items():
            modules[name].weight.data.copy_(variants.weight(name, precision.weight))
            steps = variants.activations.get((name, precision.activation))
            if steps is not None:
                modules[name].register_forward_pre_hook(lambda module, inputs, steps=steps: (steps(inputs[0]),))
        return quantized


def run_case(label, case, options, rows, top):
    """Score, solve at every budget, judge; adds to `rows` and `top`."""
    net, calibration, test = case
    print(f"{label}: float accuracy {accuracy(net, test):.4f}", flush=True)
    example = calibration[0].inputs[:1]
    joint = options.joint
    space = mpq.build_space(net, example, choices=mpq.menu((2, 3, 4, 8), (4, 8) if joint else (8,)), pin_first_last=True)
    judge = Judge(net, space, calibration, test, options)
    scored = scores_of(net, space, calibration, options)
    budgets = DIGITS_BUDGETS if label.startswith("digits") else JOINT_BUDGETS if joint else GLYPH_BUDGETS
    for budget in budgets:
        cell = f"{label} " + " ".join(f"{cost}={limit}" for cost, limit in budget.items())
        for name, scores in scored.items():
            allocation = mpq.solve_scores(scores, budget)
            loss, plain, repaired = judge(allocation.bits)
            solution = allocation.solution
            rows.append((cell, name, loss, plain, repaired, solution.gap, solution.seconds))
        for name in ("gram", "one backward", "diagonal", "exact", "constant"):
            if name in scored:
                chosen = mpq.solve_scores(scored[name], budget, top_k=options.top_k, measure=judge.lab.losses_at)
                _, plain, repaired = judge(chosen.bits)
                rows.append((cell, f"{name}, top {options.top_k}", judge(chosen.bits)[0], plain, repaired, 0.0, 0.0))
                top[name].append(chosen.selection)
    return judge


def print_tables(rows, top, options):
    """Means over cells, and the cells that a form wins, ties and loses against others."""
    by_cell = defaultdict(dict)
    for cell, name, loss, plain, repaired, _, seconds in rows:
        by_cell[cell][name] = (loss, plain, repaired, seconds)
    print("\n| score | true loss | accuracy | repaired | worst s to solve |\n|---|---|---|---|---|")
    families = dict.fromkeys(name.split("#")[0] for cell in by_cell.values() for name in cell)
    for family in families:
        values = [value for cell in by_cell.values() for name, value in cell.items() if name.split("#")[0] == family]
        loss, plain, repaired = (statistics.mean(value[at] for value in values) for at in range(3))
        print(f"| {family} | {loss:.4f} | {plain:.4f} | {repaired:.4f} | {max(value[3] for value in values):.2f} |")
    print("\nwins / ties / losses by true loss, row against column\n")
    judged = [
        name
        for name in ("gram", "gram, expansion", "one backward", "one backward, expansion", "exact", "measured + gram")
        if name in families
    ]
    against = [
        name for name in ("exact", "diagonal", "gram", "one backward", "constant", "projection", "uniform") if name in families
    ]
    print("| | " + " | ".join(against) + " |\n|" + "---|" * (len(against) + 1))
    for name in judged:
        print(f"| {name} | " + " | ".join(_record(by_cell, name, other) for other in against) + " |")
    print(
        f"\n| top {options.top_k} of | plans raised | mean gain in true loss | mean true loss of the first |\n|---|---|---|---|"
    )
    for name, selections in top.items():
        gains = [selection.gain for selection in selections]
        first = statistics.mean(selection.measured[0] for selection in selections)
        print(f"| {name} | {sum(gain < 0 for gain in gains)} | {statistics.mean(gains):.4f} | {first:.4f} |")


def _record(by_cell, name, other):
    if name == other:
        return "-"
    pairs = [(cell[name][0], cell[other][0]) for cell in by_cell.values()]
    wins = sum(a < b - 1e-9 for a, b in pairs)
    losses = sum(a > b + 1e-9 for a, b in pairs)
    return f"{wins} / {len(pairs) - wins - losses} / {losses}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=("digits", "resnet20", "mobilenet_v2", "mobilenet_v3"))
    parser.add_argument("--joint", action="store_true", help="search activation bits {4, 8} too")
    parser.add_argument("--images", type=int, default=256, help="sensitivity set")
    parser.add_argument("--seeds", type=int, default=5, help="of the random control")
    parser.add_argument("--net-seeds", type=int, default=1, help="trained glyph networks of each kind")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument("--corrected", action="store_true", help="scores and true losses see the correction")
    parser.add_argument("--cache", help="folder for measurements")
    parser.add_argument("--out", help="JSON of all rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, top = [], defaultdict(list)
    with showing_progress(), keeping_measurements(options.cache):
        for kind in options.networks:
            if kind == "digits":
                for seed in range(3):
                    for noisy in (False, True):
                        case = digits_case(seed, noisy, options.images)
                        run_case(f"digits seed {seed} {'noisy' if noisy else 'clean'}", case, options, rows, top)
            else:
                for seed in range(options.net_seeds):
                    run_case(f"{kind} seed {seed}", glyph_case(kind, seed, options.images), options, rows, top)
    print_tables(rows, top, options)
    if options.out:
        Path(options.out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
