"""What training does to a module, through both adapters."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import training_cases as cases
from mpq_brevitas import BrevitasAdapter
from torch import nn
from training_cases import PROFIT, QAT, data, run, tensors

from mpq_plugins.errors import DataError, TrainingError
from mpq_plugins.training import TrainingRecipe, parameter_groups, reestimate_batch_norm

ADAPTERS = ("brevitas", "nncf")
SHORT = TrainingRecipe(epochs=1, learning_rate=0.05, warm_up=0.0)


class InList(cases.Net):
    """The network with a list of logits and something else as its result."""

    def forward(self, images):
        return [super().forward(images), images]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_falls(name, precision):
    """Twelve epochs over the same images end well below the first, in bfloat16 too, and weights stay float32."""
    model = cases.net(dropout=0.0)
    trained = run(name, TrainingRecipe(epochs=12, learning_rate=0.2, mixed_precision=precision), model=model)
    assert trained.history[-1].loss < trained.history[0].loss - 0.15
    assert {parameter.dtype for parameter in trained.module.parameters() if parameter.requires_grad} == {torch.float32}
    assert not trained.module.training


def test_half_precision_needs_a_gpu():
    """On a CPU fp16 is refused with what to use instead."""
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TrainingError, match=r"fp16.* is for GPUs.* Use bf16 or no"):
        run("brevitas", replace(SHORT, mixed_precision="fp16"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_step_is_that_of_plain_torch(name):
    """One step moves every parameter as SGD does whose groups were put together by name."""
    model, adapter, batches = cases.net(dropout=0.0), cases.adapter(name), data()
    recipe = replace(SHORT, momentum=0.5, weight_decay=0.1, range_factor=0.25, clip_norm=0.5, label_smoothing=0.1)
    trained = run(name, recipe, model=model, data=batches[:1])
    module = adapter.prepare(model, cases.bits_for(model), batches[0].inputs, batches, weight_range="max").train()
    weights, others, ranges = [], [], []
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_range = key.endswith(("_scale_param_storage", "scaling_impl.value"))
            is_weight = key in ("stem.weight", "depthwise.weight", "fc.weight")
            (ranges if is_range else weights if is_weight else others).append(parameter)
    assert (len(weights), len(others), len(ranges)) == (3, 6, 6)  # two norms and two biases; a range on both sides of a layer
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others}, {"params": ranges, "lr": 0.05 * 0.25}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.5, nesterov=True)
    F.cross_entropy(module(batches[0].inputs), batches[0].labels, label_smoothing=0.1).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    optimizer.step()
    own = dict(trained.module.named_parameters())
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(own[key], parameter, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_trainable_parameter_is_in_one_group(name):
    """None is left out, none stands twice."""
    model = cases.net()
    module = cases.adapter(name).prepare(model, cases.bits_for(model), data()[0].inputs, data(), weight_range="max")
    groups = parameter_groups(module, learning_rate=1.0, weight_decay=1.0)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted({id(parameter) for parameter in module.parameters() if parameter.requires_grad})


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_the_user_holds_still_stays_still(name):
    """Frozen parameters and statistics of normalisation held in evaluation mode do not move; the others do."""
    model = cases.net()
    model.bn.eval()
    for parameter in (model.stem.weight, *model.bn.parameters()):
        parameter.requires_grad_(False)
    trained = run(name, replace(SHORT, ema_decay=0.5, batch_norm="re-estimated"), model=model)
    own = dict(tensors(trained.module))
    for key in ("stem.weight", "bn.running_mean", "bn.running_var", "bn.weight"):
        assert torch.equal(own[key], dict(tensors(model))[key]), key
    for key in ("depthwise.weight", "bn2.running_mean", "bn2.weight"):
        assert not torch.equal(own[key], dict(tensors(model))[key]), key


def test_nothing_to_train_is_told(monkeypatch):
    """A module without a trainable parameter, and whose quantizers learn nothing either, is an error."""
    prepare = BrevitasAdapter.prepare
    monkeypatch.setattr(BrevitasAdapter, "prepare", lambda *given, **named: prepare(*given, **named).requires_grad_(False))
    with pytest.raises(TrainingError, match="no parameter of the module is trainable"):
        run("brevitas", SHORT)


def test_evaluation_data_that_would_fail_are_told_before_training():
    """A generator, which the second epoch would find empty, and batches without labels."""
    for evaluation, fact in ((iter(data()), "can be read once"), ([data()[0].inputs], "carries no labels")):
        with pytest.raises(DataError, match=fact):
            run("brevitas", SHORT, evaluation=evaluation, data=lambda number: pytest.fail("an epoch was begun"))


def test_a_teacher_may_return_plain_logits():
    """The student's output is named; the teacher is its own network."""
    teacher, wrapped = cases.net(), InList()
    taught = run("brevitas", SHORT, model=wrapped, output=0, teacher=teacher, data=data(1))
    assert taught.history[0].loss > run("brevitas", SHORT, model=wrapped, output=0, data=data(1)).history[0].loss


def test_the_teacher_stays_the_users():
    """Its mode, gradients and tensors are as before, it raises the loss it is added to, and may be the model itself."""
    model = cases.net(dropout=0.0)
    model.train()
    before = copy.deepcopy(model.state_dict())
    taught = run("brevitas", SHORT, model=model, teacher=model, data=data(1))
    alone = run("brevitas", SHORT, model=model, data=data(1))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        logits = model(data()[0].inputs)
    soft = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()
    # The first loss is taken before any step; the module is the teacher but for quantization and batch statistics.
    assert taught.history[0].loss - alone.history[0].loss == pytest.approx(soft, abs=0.2)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_teacher_is_enough_without_labels(name):
    """On bare images a module learns the answers of a teacher that differs from its own float network."""
    model, images = cases.net(dropout=0.0).eval(), [batch.inputs for batch in data()]
    teacher = copy.deepcopy(model)
    teacher.fc.weight.data *= 20.0
    module = cases.adapter(name).prepare(model, cases.bits_for(model), images[0], images, weight_range="max")
    recipe = TrainingRecipe(epochs=12, learning_rate=0.2, batch_norm="corrected")
    trained = run(name, recipe, model=model, teacher=teacher, data=images, calibration=images)

    def divergence(module):
        with torch.no_grad():
            pairs = [(module.eval()(batch).log_softmax(1), teacher(batch).log_softmax(1)) for batch in images]
        return sum(F.kl_div(own, taught, log_target=True, reduction="batchmean").item() for own, taught in pairs)

    assert divergence(trained.module) < 0.1 * divergence(module)


def test_the_average_is_what_is_kept_and_evaluated():
    """The module at the end is the average over the steps; its accuracy is the record's, and plain weights differ."""
    averaged = run("brevitas", replace(QAT, ema_decay=0.95), evaluation=data())
    plain = run("brevitas", replace(QAT, ema_decay=None), evaluation=data())
    assert [record.loss for record in averaged.history] == [record.loss for record in plain.history]
    assert not torch.equal(averaged.module.fc.weight, plain.module.fc.weight)
    with torch.no_grad():
        right = sum((averaged.module(batch.inputs).argmax(1) == batch.labels).sum().item() for batch in data())
    assert averaged.history[-1].accuracy == pytest.approx(right / 48)


def test_statistics_can_be_renewed_at_the_end():
    """With `batch_norm` re-estimated the statistics are those that the trained weights give on the calibration images."""
    trained = run("brevitas", replace(QAT, batch_norm="re-estimated"))
    kept = trained.module.bn2.running_var.clone()
    reestimate_batch_norm(trained.module, data())
    torch.testing.assert_close(trained.module.bn2.running_var, kept)
    assert not torch.allclose(run("brevitas", QAT).module.bn2.running_var, kept)


def mean_before(module, images):
    """The mean per channel of what the second normalisation is given."""
    seen = []
    with torch.no_grad():
        handle = module.bn2.register_forward_pre_hook(lambda _, given: seen.append(given[0].mean((0, 2, 3))))
        module.eval()(images)
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_corrected_statistics_move_with_bits_and_not_with_batches(name):
    """Through all stages of PROFIT means end where the float model's are, moved by what quantization did to the inputs.

    The rate is so low that nothing else changes; the trained statistics are far from those of the images.
    """
    model, images = cases.net(dropout=0.0).eval(), data(1)[0].inputs[:8]
    with torch.no_grad():
        model.bn.running_mean -= 0.2
        model.bn2.running_mean += 0.1
    recipe = replace(PROFIT, learning_rate=1e-12, batch_norm="corrected", ema_decay=None)
    trained = run(name, recipe, model=model, calibration=[images]).module
    expected = model.bn2.running_mean + mean_before(trained, images) - mean_before(model, images)
    torch.testing.assert_close(trained.bn2.running_mean, expected, rtol=0, atol=1e-5)
    assert not torch.equal(trained.bn2.running_mean, model.bn2.running_mean)


class Named(cases.Net):
    """Takes its images by name and gives several tensors."""

    def forward(self, images, scale=None):
        return {"logits": super().forward(images), "scale": scale}


def test_models_of_named_inputs_and_outputs_train():
    """Dict batches, an output by name, a loss of the user's own."""
    torch.manual_seed(0)
    model = Named()
    batches = [{"images": batch.inputs, "scale": torch.ones(1), "labels": batch.labels} for batch in data()]
    seen = []

    def loss(result, batch):
        seen.append(batch.labels.shape)
        return F.cross_entropy(result["logits"], batch.labels)

    common = {"model": model, "data": batches, "calibration": batches, "evaluation": batches, "output": "logits"}
    common["example"] = {key: value for key, value in batches[0].items() if key != "labels"}
    trained, own = run("brevitas", SHORT, **common), run("brevitas", SHORT, **common, loss=loss)
    assert trained.history[0].loss == own.history[0].loss
    assert seen == [(16,)] * 3


def test_no_graph_is_kept():
    """After training nothing holds gradients or a graph, so that memory is given back."""
    trained = run("brevitas", SHORT)
    assert all(parameter.grad is None and parameter.grad_fn is None for parameter in trained.module.parameters())
    assert all(not isinstance(record.loss, torch.Tensor) for record in trained.history)
