"""State dicts of attached networks hold plain weights, whoever asks for them and whatever is done with them."""

import copy
import io

import pytest
import torch
from torch import nn

from equalize.plan.attach import attach, fold
from equalize.plan.plain_state import settle
from tests.plan.test_attach import LAYERS, OPTIMIZERS, drawn, planned, train

KEYS = ("body.fuse.weight", "body.fuse.bias")


def attached(name="bias", strategy="preserve"):
    """A network in training, the optimizer that trains it, a batch, and the keys that it had."""
    model, x, y = drawn(name)
    plan = planned(model, x, strategy)
    keys = list(model.state_dict())
    attach(plan, model)
    return model, OPTIMIZERS["AdamW"](model.parameters()), (x, y), keys


def folded(model):
    """What `fold` leaves, which `test_attach` compares with real equalizers."""
    twin = copy.deepcopy(model)
    fold(twin)
    return twin


def clones(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_saved_is_the_folded_network(name):
    """To the last bit: `fold` computes the same."""
    model, optimizer, batch, keys = attached(name)
    train(model, optimizer, *batch)
    plain, _, _ = drawn(name)
    assert list(model.state_dict()) == keys
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.state_dict(), folded(model).state_dict(), rtol=0, atol=0)
    assert not any(value.requires_grad for value in model.state_dict().values())
    assert list(model.body.state_dict()) == [key.removeprefix("body.") for key in keys if key.startswith("body.")]
    assert list(model.body.fuse.state_dict(prefix="x.")) == [f"x.{key}" for key in plain.body.fuse.state_dict()]


@pytest.mark.parametrize("name", LAYERS)
def test_plain_weights_are_loaded_as_they_are(name):
    """Saved again without a step they keep every bit, and training goes on with the optimizer that there was."""
    model, optimizer, batch, _ = attached(name)
    parameters = [id(each) for each in model.parameters()]
    other, _, _, _ = attached(name)
    train(other, OPTIMIZERS["SGD with momentum"](other.parameters()), *batch)
    state = clones(other)
    model.load_state_dict(state)
    torch.testing.assert_close(clones(model), state, rtol=0, atol=0)
    assert [id(each) for each in model.parameters()] == parameters
    model.eval(), other.eval()
    torch.testing.assert_close(model(batch[0]), other(batch[0]), rtol=1e-5, atol=1e-5)
    train(model, optimizer, *batch)
    assert not torch.equal(model.state_dict()[KEYS[0]], state[KEYS[0]])


def test_resumed_training_ends_where_the_uninterrupted_one_does():
    whole, optimizer, batch, _ = attached()
    train(whole, optimizer, *batch, steps=3)
    state, moments = clones(whole), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, *batch, steps=3)
    resumed, optimizer, _, _ = attached()
    resumed.load_state_dict(state)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, *batch, steps=3)
    # W -> V rounds, and Adam divides by gradients' sizes: a few units in the last place of the weights
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_settled_training_resumes_to_the_bit():
    """The same values, so the same kernels give the same bits."""
    whole, optimizer, batch, _ = attached()
    train(whole, optimizer, *batch, steps=3)
    state, moments = clones(whole), copy.deepcopy(optimizer.state_dict())
    settle(whole)
    train(whole, optimizer, *batch, steps=3)
    resumed, optimizer, _, _ = attached()
    resumed.load_state_dict(state)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, *batch, steps=3)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_channels_last_stays():
    model, _, _, _ = attached("bias, unpadded")
    model.to(memory_format=torch.channels_last)
    assert model.state_dict()["body.fuse.weight"].is_contiguous(memory_format=torch.channels_last)


def test_state_dicts_of_originals_are_loaded_too():
    model, optimizer, batch, _ = attached()
    train(model, optimizer, *batch)
    raw = {key: value.detach().clone() for key, value in model.named_parameters()}
    other, _, _, _ = attached()
    assert other.load_state_dict(raw, strict=False).unexpected_keys == []
    torch.testing.assert_close(dict(other.named_parameters()), raw, rtol=0, atol=0)


@pytest.mark.parametrize("missing", KEYS)
def test_parts_of_a_state_are_loaded(missing):
    """As shards of a checkpoint are: what is not in one stays what it was."""
    model, _, batch, _ = attached()
    other, optimizer, _, _ = attached()
    before = clones(model)
    train(other, optimizer, *batch)
    state = clones(other)
    kept = before[missing]
    del state[missing]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{missing}"\.'):
        copy.deepcopy(model).load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [missing]
    torch.testing.assert_close(model.state_dict()[missing], kept)
    torch.testing.assert_close({key: model.state_dict()[key] for key in state}, state, rtol=0, atol=0)


def test_weights_of_another_shape_are_refused_by_their_name():
    model, _, _, _ = attached()
    state = clones(model)
    state[KEYS[0]] = state[KEYS[0]][:, :2]
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.fuse\.weight: got \(5, 2, 1, 1\), expected"):
        model.load_state_dict(state)


def test_assigned_weights_are_plain_as_well():
    model, _, _, _ = attached()
    state = {key: value.double() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(clones(model), state, rtol=0, atol=0)


@pytest.mark.parametrize("average", ["in a state dict", "in a state dict that is kept", "torch", "timm"])
def test_averages_of_weights(average):
    """Each against the average of plain weights, which is what they are of a network without equalization."""
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, optimizer, batch, _ = attached()
    expected = clones(model)
    ema = {
        "torch": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        "timm": lambda: ModelEmaV3(model, decay=0.5),
    }.get(average, lambda: copy.deepcopy(model))()
    kept = ema.state_dict()
    if average == "torch":
        ema.update_parameters(model)  # the first call copies
    for _ in range(3):
        train(model, optimizer, *batch, steps=1)
        now = clones(model)
        expected = {key: value.lerp(now[key], 0.5) for key, value in expected.items()}
        if average == "torch":
            ema.update_parameters(model)
        elif average == "timm":
            ema.update(model)
        else:
            state = kept if "kept" in average else ema.state_dict()
            for key, value in state.items():
                value *= 0.5
                value += 0.5 * model.state_dict()[key]
    result = getattr(ema, "module", ema)
    torch.testing.assert_close(folded(result).state_dict(), expected)
    torch.testing.assert_close(result.state_dict(), expected)
    plain, _, _ = drawn("bias")
    plain.load_state_dict(expected)
    torch.testing.assert_close(result.eval()(batch[0]), plain.eval()(batch[0]), rtol=1e-5, atol=1e-5)


def test_what_was_written_into_a_state_dict_is_computed_with():
    model, _, batch, _ = attached()
    plain = folded(model)
    for value in model.state_dict().values():
        value.mul_(2)
    for value in plain.state_dict().values():
        value.mul_(2)
    torch.testing.assert_close(model.eval()(batch[0]), plain.eval()(batch[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", ["loaded", "saved after an evaluation"])
def test_a_state_dict_kept_without_copying_is_of_the_last_step(use):
    """As `best = model.state_dict()` is of any network: never the fusion layer of one step and the rest of another."""
    model, optimizer, batch, _ = attached()
    kept = model.state_dict()
    train(model, optimizer, *batch)
    expected = folded(model).state_dict()
    if use == "loaded":
        model.load_state_dict(kept)
    else:
        model.eval()(batch[0])
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    torch.testing.assert_close(clones(model), expected, rtol=0, atol=0)


def test_a_network_that_is_pickled_whole_is_plain():
    model, optimizer, batch, _ = attached()
    train(model, optimizer, *batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again.body.fuse) is nn.Conv2d
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert "parametrizations" in dict(model.body.fuse.named_children())


def test_saved_in_inference_mode_and_trained_on():
    """Lightning saves at the end of a validation."""
    model, optimizer, batch, _ = attached()
    with torch.inference_mode():
        state = model.state_dict()
        model(batch[0])
    train(model, optimizer, *batch)
    assert not state[KEYS[0]].is_inference()
    torch.testing.assert_close(clones(model), folded(model).state_dict(), rtol=0, atol=0)


def test_compiled_and_wrapped_networks():
    model, optimizer, batch, keys = attached()
    train(model, optimizer, *batch)
    compiled = torch.compile(model, backend="eager")
    assert list(compiled.state_dict()) == [f"_orig_mod.{key}" for key in keys]
    assert list(nn.DataParallel(model).state_dict()) == [f"module.{key}" for key in keys]
    state = clones(compiled)
    compiled.load_state_dict(state)
    torch.testing.assert_close(clones(compiled), state, rtol=0, atol=0)


def test_folding_leaves_no_hook():
    model, _, _, keys = attached()
    copied = folded(model)
    fold(model)
    for each in (model, copied):
        assert not each.body.fuse._state_dict_hooks
        assert not each.body.fuse._load_state_dict_pre_hooks
        assert list(each.state_dict()) == keys
