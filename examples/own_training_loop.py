"""PROFIT inside a training loop of your own: four calls, here around an NNCF module."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from mpq_nncf import NNCFAdapter

import mpq_plugins as mpq
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.training import Profit, ProfitSchedule


def main(folder: Path) -> None:
    model, data, test = trained_digits_net(), digits(train=True, batch_size=120), digits(train=False, batch_size=300)
    example = test[0].inputs[:1]
    adapter = NNCFAdapter()
    inventory = mpq.find_layers(model, example)
    bits = mpq.BitConfig({layer.name: mpq.Precision(3, 4) for layer in inventory}, inventory.fingerprint)
    bits.save(folder / "bits.json")

    # Four epochs at the target bits: measure AIWQ, train all layers, freeze the most unstable third, then two thirds.
    schedule = ProfitSchedule(widths=(), float_epochs=0, settle_epochs=0, train_epochs=1, sample_epochs=1)
    profit = Profit([stage for stage in schedule.stages(bits) if stage.bits == bits and not stage.float_weights])
    module = adapter.prepare(model, bits, example, data[:4])
    for index, stage in enumerate(profit.stages):
        profit.on_stage(index, module)
        optimizer = torch.optim.SGD(
            profit.parameter_groups(module, learning_rate=0.01, weight_decay=4e-5), momentum=0.9, nesterov=True
        )
        for _ in range(stage.epochs):
            profit.on_epoch()
            module.train()
            for batch in data:
                optimizer.zero_grad()
                with profit.forward():
                    loss = F.cross_entropy(module(batch.inputs), batch.labels)
                loss.backward()
                profit.on_step()
                optimizer.step()
            print(f"{stage.name}: loss {loss.item():.3f}, {len(profit.frozen)} layers frozen")

    path = adapter.export(module.eval(), folder / "digits.xml", example)
    mpq.verify(adapter, path, bits, module=module, inputs=test[0].inputs, model=model).check()
    print("the file holds the bits that were trained")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
