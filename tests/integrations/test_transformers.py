"""`EqualizeTrainerCallback` in transformers' own `Trainer`."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import SegformerForSemanticSegmentation, Trainer, TrainerCallback, TrainingArguments

import equalize
from equalize.integrations import EqualizeTrainerCallback
from tests.plan.test_attach import drawn

FUSED = "decode_head.linear_fuse.weight"
LR = 0.05


def examples():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 48, 64, generator=generator)
    labels = torch.randint(0, 5, (4, 48, 64), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def loaded(directory):
    """A checkpoint as its library loads it: strictly, in eval mode, so that no dropout is drawn."""
    model, info = SegformerForSemanticSegmentation.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


def trainer(directory, out, *callbacks, optimizer=None, **options):
    model = loaded(directory)
    values = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": LR, **options}
    args = TrainingArguments(str(out), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **values)
    optimizers = (optimizer(model.parameters()) if optimizer else None, None)
    made = Trainer(
        model, args, train_dataset=examples(), eval_dataset=examples(), callbacks=list(callbacks),
        optimizers=optimizers,
    )  # fmt: skip
    made.model.train = lambda mode=True: made.model  # no dropout: the steps are those of a plain loop
    return made


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=10)  # its gradients are small


def test_trains_as_a_loop_of_ones_own(equalized_dir, tmp_path):
    """Against `attach` by hand, and not as without it; every checkpoint loads strictly."""
    made = trainer(
        equalized_dir, tmp_path, EqualizeTrainerCallback(), optimizer=sgd, lr_scheduler_type="constant", max_grad_norm=0
    )
    made.train()
    expected, plain = loaded(equalized_dir), loaded(equalized_dir)
    equalize.attach(equalized_dir, expected)
    batch = {key: torch.stack([each[key] for each in examples()]) for key in ("pixel_values", "labels")}
    for model in (expected, plain):
        optimizer = sgd(model.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    assert not parametrize.is_parametrized(made.model.decode_head.linear_fuse)
    saved = loaded(tmp_path / "checkpoint-4")
    start = loaded(equalized_dir).state_dict()[FUSED]
    way = {model: model.state_dict()[FUSED] - start for model in (made.model, saved, expected, plain)}
    size = way[expected].abs().max()
    for trained in (made.model, saved):
        # the examples come in another order within the batch: sums round otherwise
        assert (way[trained] - way[expected]).abs().max() < 1e-3 * size
        assert (way[trained] - way[plain]).abs().max() > 0.1 * size
    assert not torch.equal(loaded(tmp_path / "checkpoint-2").state_dict()[FUSED], saved.state_dict()[FUSED])


def test_the_best_model_is_loaded_at_the_end(equalized_dir, tmp_path):
    made = trainer(
        equalized_dir, tmp_path, EqualizeTrainerCallback(), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=2, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    scores = {2: 1.0, 4: 0.0}
    inner = made.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        done = inner(*args, **kwargs)
        return done._replace(metrics={**done.metrics, "eval_score": scores[made.state.global_step]})

    made.evaluation_loop = evaluation_loop
    made.train()
    best = loaded(tmp_path / "checkpoint-2").state_dict()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    torch.testing.assert_close(made.model.state_dict(), best, rtol=0, atol=0)  # the same bytes were read
    made.save_model(tmp_path / "best")
    torch.testing.assert_close(loaded(tmp_path / "best").state_dict(), best, rtol=0, atol=0)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_resumes_to_the_bit(equalized_dir, tmp_path, optim):
    """The optimizer's moments are those of V, which the resumed training has to have, too.

    Adafactor makes whole steps of rounding, where a gradient is nothing else: that of a bias of attention's keys.
    """
    whole = trainer(equalized_dir, tmp_path / "whole", EqualizeTrainerCallback(), optim=optim)
    whole.train()
    again = trainer(equalized_dir, tmp_path / "whole", EqualizeTrainerCallback(), optim=optim)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_interrupted_and_called_again(equalized_dir, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            raise KeyboardInterrupt

    made = trainer(equalized_dir, tmp_path, EqualizeTrainerCallback(), Stop())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.save_model(tmp_path / "stopped")
    stopped = loaded(tmp_path / "stopped").state_dict()
    torch.testing.assert_close(made.model.state_dict(), stopped, rtol=0, atol=0)
    made.remove_callback(Stop)
    made.train()
    assert not parametrize.is_parametrized(made.model.decode_head.linear_fuse)


def test_where_the_plan_comes_from(segformer_dir, equalized_dir, tmp_path, caplog):
    without = trainer(segformer_dir, tmp_path, EqualizeTrainerCallback())
    with pytest.raises(equalize.EqualizeError, match=r"holds no equalize\.json; give plan=DIRECTORY"):
        without.train()
    plan = equalize.Plan.read(equalized_dir)
    for given in (plan, equalized_dir, str(equalized_dir)):
        made = trainer(segformer_dir, tmp_path / "out", EqualizeTrainerCallback(given), max_steps=1)
        made.train()
    nothing = replace(plan, sites=tuple(replace(site, strategy="none") for site in plan.sites))
    trainer(segformer_dir, tmp_path / "out", EqualizeTrainerCallback(nothing), max_steps=1).train()
    assert "the plan equalizes no layer; the network is trained as it is" in caplog.text
    other = copy.deepcopy(plan)
    other = replace(other, sites=tuple(replace(site, weight="head.weight") for site in plan.sites))
    with pytest.raises(equalize.EqualizeError, match=r"head\.weight: is in the plan but not in this model"):
        trainer(segformer_dir, tmp_path / "out", EqualizeTrainerCallback(other), max_steps=1).train()


def test_a_save_pretrained_of_ones_own_stays(equalized_dir):
    model, callback = loaded(equalized_dir), EqualizeTrainerCallback()
    callback.on_train_begin(None, None, None, model=model)
    callback.on_train_end(None, None, None, model=model)
    assert "save_pretrained" not in vars(model)
    own = model.save_pretrained = lambda directory: None
    callback.on_train_begin(None, None, None, model=model)
    callback.on_train_end(None, None, None, model=model)
    assert model.save_pretrained is own


def test_layers_within_the_network_that_have_names_of_the_plan(plan):
    """They are no fusion layers; those of an average that the network keeps of itself are."""
    model, _, _ = drawn("bias")
    model.average = copy.deepcopy(model)
    model.part = nn.ModuleDict({"body": nn.ModuleDict({"fuse": nn.Conv2d(6, 5, 1)})})
    callback = EqualizeTrainerCallback(plan)
    callback.on_train_begin(None, None, None, model=nn.ModuleDict({"network": model}))
    attached = [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]
    assert attached == ["body.fuse", "average.body.fuse"]
