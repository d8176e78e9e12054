"""8-bit weights times 8-bit activations on CPUs without VNNI: told, measured and avoidable."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from mpq_nncf import NNCFAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, build_space, find_layers
from mpq_plugins.errors import AdapterError, FormatError

SCRIPT = """
    import json, sys
    import torch
    from torch import nn
    from mpq_nncf import NNCFAdapter
    from mpq_plugins import BitConfig, Precision, find_layers, verify

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    with torch.no_grad():
        [parameter.abs_() for parameter in net.parameters() if parameter.dim() > 1]  # sums as large as they come
    images, adapter, inventory, found = torch.rand(4, 3, 12, 12), NNCFAdapter(), find_layers(net, torch.rand(4, 3, 12, 12)), {}
    for bits in (7, 8):
        config = BitConfig({layer.name: Precision(bits, 8) for layer in inventory}, inventory.fingerprint)
        module = adapter.prepare(net, config, images, [images])
        path = adapter.export(module, sys.argv[1], images)
        report = verify(adapter, path, config, module=module, inputs=images)
        found[bits] = [report.outputs.mean_relative, report.outputs.deployed, report.ok]
    print(json.dumps(found))
"""


def test_the_deployed_difference_shows_saturation(tmp_path, monkeypatch):
    """Without VNNI w8a8 is wrong by default and right when executed exactly; w7a8 is right in both ways."""
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")  # as on a CPU that has no more
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "net.xml")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["7"][1] < 1e-3
    if found["8"][1] < 1e-3:
        pytest.skip("this machine's kernels do not saturate")
    assert found["8"][0] < 1e-3
    assert found["8"][2] == (found["8"][1] <= 0.25)


def test_advice_and_option():
    """w8a8 is advised about, w7a8 not; overflow_fix refuses w8a8 wherever it is asked for, and searches up to 7 bits."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), torch.rand(2, 3, 8, 8)
    inventory, fixed = find_layers(model, x), NNCFAdapter(overflow_fix=True)
    layer = inventory["0"]
    assert "without VNNI" in NNCFAdapter().advice(layer, Precision(8, 8))
    assert "VNNI" not in str(NNCFAdapter().advice(layer, Precision(7, 8)))
    assert NNCFAdapter().refuse(layer, Precision(8, 8)) is None
    assert "w7a8" in fixed.refuse(layer, Precision(8, 8))
    assert fixed.refuse(layer, Precision(8, 4)) is None
    widths = {choice.weight for unit in build_space(model, x, adapter=fixed).units for choice in unit.choices}
    assert widths == {2, 3, 4, 6, 7}
    assert NNCFAdapter().weight_bits == (2, 3, 4, 6, 8)
    bits = BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint)
    with pytest.raises(AdapterError, match="0 cannot be w8a8: overflow_fix=True"):
        fixed.prepare(model, bits, x, [x])


def test_a_checkpoint_keeps_its_options(tmp_path):
    """Asking for a zero point that the saved module has not, or against its w8a8, is refused; asking for nothing is not."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3)).eval(), torch.rand(2, 3, 8, 8)
    inventory = find_layers(model, x)
    bits = BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint)
    for asymmetric in (False, True):
        adapter = NNCFAdapter(asymmetric=asymmetric)
        path = adapter.save(adapter.prepare(model, bits, x, [x]), tmp_path / "module.pt")
        adapter.load(model, path, x)
        NNCFAdapter().load(model, path, x)
        if not asymmetric:
            with pytest.raises(AdapterError, match=r"asymmetric=True was asked for.*asymmetric=False"):
                NNCFAdapter(asymmetric=True).load(model, path, x)
    with pytest.raises(AdapterError, match="overflow_fix"):
        NNCFAdapter(overflow_fix=True).load(model, path, x)


def test_a_checkpoint_keeps_whether_branches_share_a_quantizer(tmp_path):
    """merge_branches=False against a module that merges them is refused; the options survive loading and copying."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), torch.rand(2, 3, 8, 8)
    inventory = find_layers(model, x)
    bits = BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint)
    for merge in (True, False):
        adapter = NNCFAdapter(merge_branches=merge, asymmetric=True)  # no activation here needs a zero point
        path = adapter.save(adapter.prepare(model, bits, x, [x]), tmp_path / "module.pt")
        again = adapter.save(copy.deepcopy(adapter.load(model, path, x)), tmp_path / "again.pt")
        assert NNCFAdapter().prepared_with(NNCFAdapter().load(model, again, x)) == {"merge_branches": merge, "asymmetric": True}
    NNCFAdapter(merge_branches=False).load(model, path, x)
    path = NNCFAdapter().save(NNCFAdapter().prepare(model, bits, x, [x]), path)
    with pytest.raises(AdapterError, match=r"merge_branches=False was asked for, but .* with merge_branches=True"):
        NNCFAdapter(merge_branches=False).load(model, path, x)


def test_a_checkpoint_without_options_is_asked_for_its_zero_points(tmp_path):
    """Files older than the record: only the kind of activations is known."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.rand(2, 3, 8, 8)
    inventory = find_layers(model, x)
    bits = BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint)
    path = NNCFAdapter().save(NNCFAdapter().prepare(model, bits, x, [x]), tmp_path / "module.pt")
    document = torch.load(path, weights_only=True)
    del document["options"]
    torch.save(document, path)
    NNCFAdapter(merge_branches=False).load(model, path, x)
    with pytest.raises(AdapterError, match="asymmetric=True was asked for"):
        NNCFAdapter(asymmetric=True).load(model, path, x)
    torch.save({**document, "options": '{"asymmetric": 1}'}, path)
    with pytest.raises(FormatError, match="its options: asymmetric must be true or false, not 1"):
        NNCFAdapter().load(model, path, x)
