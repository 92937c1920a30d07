import json
import random
import shutil
import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equalize.checkpoint.load import ModelName
from equalize.commands.evaluate import Evaluating, evaluate
from equalize.commands.finetune.config import Recipe
from equalize.commands.finetune.finetune import finetune
from equalize.distributed import is_main, leave
from equalize.errors import CheckpointError, DataError, InputError, NumericsError, OutputError, ResourceError
from tests.support.scenes import write_scenes
from tests.support.side_by_side import in_two_processes, start

QUICK = Recipe(
    max_steps=8,
    batch_size=4,
    lr=3e-3,
    warmup=0.0,
    scale=(1.0, 1.0),
    flip=0.0,
    photometric=False,
    cat_max_ratio=1.0,
    size=(48, 64),
    device="cpu",
    samples=4,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def five_classes(tmp_path_factory) -> Path:
    """Eight pairs to train on (two batches an epoch), three to score. Read only."""
    return write_scenes(tmp_path_factory.mktemp("five"), 5, counts={"train": 8, "val": 3})


def named(path, **flags) -> ModelName:
    return ModelName(source=str(path), **flags)


def falls(done) -> bool:
    losses = [loss for _, loss in done.losses]
    return sum(losses[-2:]) < 0.9 * sum(losses[:2])


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# every family trains and comes back in its own format


def test_transformers(segformer_dir, five_classes, tmp_path):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    done = finetune(named(segformer_dir), five_classes, tmp_path / "out", replace(QUICK, lr=0.02))
    assert falls(done)
    model, info = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert SegformerImageProcessor.from_pretrained(segformer_dir).do_reduce_labels
    assert not SegformerImageProcessor.from_pretrained(tmp_path / "out").do_reduce_labels  # as it was trained
    written = state(tmp_path / "out")
    both = [key for key in model.state_dict() if key in written]  # others have another name on disk
    assert {"decode_head.linear_fuse.weight", "decode_head.classifier.bias"} <= set(both)
    assert all(torch.equal(model.state_dict()[key], written[key]) for key in both)
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert all(set(line) == {"step", "epoch", "loss", "lr"} for line in lines if "loss" in line)
    scored = [line for line in lines if "mIoU" in line]
    assert [line["step"] for line in scored] == [2, 4, 6, 8]
    assert done.best == max(scored, key=lambda line: line["mIoU"])
    again = evaluate(named(tmp_path / "out"), five_classes, Evaluating(size=(48, 64), device="cpu", batch_size=4))
    assert again.mIoU == pytest.approx(done.best["mIoU"], abs=1e-6)


def test_upernet_with_its_auxiliary_head_in_shards(upernet_dir, tmp_path):
    from transformers import UperNetForSemanticSegmentation

    root = write_scenes(tmp_path / "data", 7, counts={"train": 4, "val": 1}, size=(64, 64))
    recipe = replace(QUICK, max_steps=6, size=(64, 64), lr=0.03)
    done = finetune(named(upernet_dir), root, tmp_path / "out", recipe)
    assert falls(done)
    before = UperNetForSemanticSegmentation.from_pretrained(upernet_dir).state_dict()
    after, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    key = "auxiliary_head.classifier.weight"
    assert not torch.equal(before[key], after.state_dict()[key])
    without = finetune(named(upernet_dir), root, tmp_path / "no_aux", replace(recipe, aux_weight=0.0, max_steps=1))
    assert without.losses[0][1] < done.losses[0][1]


def test_smp(smp_dir, tmp_path):
    import segmentation_models_pytorch as smp

    root = write_scenes(tmp_path / "data", 2, counts={"train": 4, "val": 1}, size=(64, 64))
    (root / "classes.txt").write_text("sky\nroad\n")
    done = finetune(named(smp_dir), root, tmp_path / "out", replace(QUICK, max_steps=4, eval_every=4, size=(64, 64)))
    assert falls(done)
    model = smp.from_pretrained(str(tmp_path / "out"))
    assert same(model.state_dict(), state(tmp_path / "out"))
    (root / "classes.txt").unlink()
    score = evaluate(named(tmp_path / "out"), root, Evaluating(device="cpu"))
    assert [row.name for row in score.classes] == ["sky", "road"]


def test_torchvision(lraspp_state, tmp_path):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.save({"model": lraspp_state, "epoch": 3}, tmp_path / "lraspp.pth")
    root = write_scenes(tmp_path / "data", 4, counts={"train": 4}, size=(64, 64))
    done = finetune(
        named(tmp_path / "lraspp.pth"), root, tmp_path / "out", replace(QUICK, max_steps=4, eval_every=4, size=(64, 64))
    )
    assert falls(done)
    assert done.best is None
    content = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert content["epoch"] == 3
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.load_state_dict(content["model"], strict=True)
    assert not torch.equal(
        content["model"]["classifier.low_classifier.weight"], lraspp_state["classifier.low_classifier.weight"]
    )


FACTORY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
            self.fuse = nn.Conv2d(16, 8, 1)
            self.classify = nn.Conv2d(8, num_classes, 1)
            self.auxiliary = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            low = self.backbone(x)
            high = nn.functional.interpolate(self.deep(low), scale_factor=2, mode="bilinear")
            out = self.classify(self.fuse(torch.cat([low, high], 1)))
            return {"out": out, "aux": self.auxiliary(low)}
"""


@pytest.fixture(scope="session")
def custom(tmp_path_factory) -> ModelName:
    """A network of nobody's library, with dropout, BatchNorm, an auxiliary head and one resampled fusion layer."""
    directory = tmp_path_factory.mktemp("custom")
    (directory / "tiny_net.py").write_text(textwrap.dedent(FACTORY))
    sys.path.insert(0, str(directory))
    import tiny_net

    sys.path.remove(str(directory))
    torch.manual_seed(11)
    torch.save(tiny_net.Net().state_dict(), directory / "net.pth")
    return named(directory / "net.pth", arch=f"{directory / 'tiny_net.py'}:Net")


def test_any_network(custom, five_classes, tmp_path):
    done = finetune(custom, five_classes, tmp_path / "out", replace(QUICK, report_to=("tensorboard",)))
    assert falls(done)
    assert torch.load(tmp_path / "out/model.pth", weights_only=True).keys() == torch.load(custom.source).keys()
    reported = EventAccumulator(str(next((tmp_path / "out/last/runs").iterdir()))).Reload()
    losses = [(event.step, event.value) for event in reported.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in done.losses]
    assert [event.value for event in reported.Scalars("eval/mIoU")][-1] == pytest.approx(done.last["mIoU"])


# resuming


class Killed(BaseException):
    pass


def kill_at(pairs: int):
    def progress(done: int, of: int) -> None:
        if done == pairs:
            raise Killed

    return progress


STEADY = replace(QUICK, max_steps=7, log_every=1, eval_every=3, scale=(0.7, 1.4), flip=0.5, photometric=True)


def newest(out: Path) -> dict:
    (checkpoint,) = (out / "last").glob("checkpoint-*")
    return {
        "weights": torch.load(checkpoint / "pytorch_model.bin", weights_only=True),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "random": torch.load(checkpoint / "rng_state.pth", weights_only=False)["cpu"],
    }


def assert_same_run(first: Path, second: Path, file="model.pth"):
    a, b = newest(first), newest(second)
    assert same(a["weights"], b["weights"])
    assert torch.equal(a["random"], b["random"])
    for index, slots in a["optimizer"]["state"].items():
        assert same(slots, b["optimizer"]["state"][index])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert same(torch.load(first / file, weights_only=True), torch.load(second / file, weights_only=True))
    assert metrics(first) == metrics(second)


@pytest.fixture(scope="session")
def uninterrupted(custom, five_classes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    finetune(custom, five_classes, out, STEADY)
    return out


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_killed_and_resumed_ends_with_the_same_bits(custom, five_classes, tmp_path, uninterrupted, steps):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY, progress=kill_at(4 * steps))
    random.seed(99)
    torch.manual_seed(99)
    said = []
    finetune(custom, five_classes, out, STEADY, resume=True, say=said.append)
    assert_same_run(uninterrupted, out)
    assert ("going on after step 3" in said) == (3 < steps < 7)


def test_killed_twice_while_saving(custom, five_classes, tmp_path, uninterrupted, monkeypatch):
    from transformers import TrainerState

    out = tmp_path / "out"
    write = TrainerState.save_to_json

    def cut_off(self, path):
        if self.global_step == 6:
            Path(path).write_text('{"epoch": 1.')
            raise Killed
        write(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", cut_off)
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY)
    assert len(list((out / "last").glob("checkpoint-*"))) == 2
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY, resume=True)
    monkeypatch.undo()
    finetune(custom, five_classes, out, STEADY, resume=True)
    assert_same_run(uninterrupted, out)


def test_killed_by_the_system(custom, five_classes, tmp_path, uninterrupted):
    """SIGKILL from outside as soon as step 4 is on disk, which may hit any moment after it."""
    out = tmp_path / "out"
    process = start(finetune, custom, five_classes, out, STEADY)
    while process.is_alive():
        if (out / "metrics.jsonl").is_file() and '"step": 4' in (out / "metrics.jsonl").read_text():
            process.kill()
            process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    finetune(custom, five_classes, out, STEADY, resume=True)
    assert_same_run(uninterrupted, out)


def test_resuming_what_is_complete_changes_nothing(custom, five_classes, tmp_path, uninterrupted):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    said = []
    done = finetune(custom, five_classes, out, STEADY, resume=True, say=said.append)
    assert "the training was complete after step 7" in said
    assert done.steps == 7
    assert_same_run(uninterrupted, out)


def test_resuming_from_nothing_starts(custom, five_classes, tmp_path, uninterrupted):
    finetune(custom, five_classes, tmp_path / "out", STEADY, resume=True)
    assert_same_run(uninterrupted, tmp_path / "out")


def test_another_run_is_not_resumed(custom, five_classes, tmp_path, uninterrupted):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    with pytest.raises(InputError, match="cannot be resumed as another run: recipe"):
        finetune(custom, five_classes, out, replace(STEADY, lr=1e-3), resume=True)
    with pytest.raises(InputError, match="cannot be resumed as another run: train"):
        finetune(custom, write_scenes(tmp_path / "data", 5, counts={"train": 9, "val": 3}), out, STEADY, resume=True)
    with pytest.raises(OutputError, match="exists"):
        finetune(custom, five_classes, out, STEADY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(OutputError, match="holds no training to resume"):
        finetune(custom, five_classes, tmp_path / "other", STEADY, resume=True)


def test_runs_in_one_process_do_not_touch_each_other(custom, five_classes, tmp_path, uninterrupted):
    """What `compare` relies on: same arguments, same bits, whatever ran before; random numbers stay the caller's."""
    finetune(custom, five_classes, tmp_path / "other", replace(STEADY, seed=5, precision="bf16", max_steps=1))
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    finetune(custom, five_classes, tmp_path / "out", STEADY)
    assert_same_run(uninterrupted, tmp_path / "out")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    other = finetune(custom, five_classes, tmp_path / "seed", replace(STEADY, seed=1))
    assert [loss for _, loss in other.losses] != [line["loss"] for line in metrics(uninterrupted) if "loss" in line]


# equalization


def test_preserve_trains_explicitly_and_leaves_plain_weights(custom, five_classes, tmp_path):
    from equalize.commands.calibrate import embed
    from equalize.commands.images import Measuring

    how = Measuring(size=(48, 64), device="cpu")
    embed(custom, five_classes, tmp_path / "equal", strategy="preserve", how=how)
    equal = replace(custom, source=str(tmp_path / "equal"))
    sgd = replace(QUICK, optimizer="sgd", lr=0.05)
    explicit = finetune(equal, five_classes, tmp_path / "explicit", sgd)
    folded = finetune(equal, five_classes, tmp_path / "folded", replace(sgd, train_as="folded"))
    plain = finetune(custom, five_classes, tmp_path / "plain", sgd)
    assert (explicit.train_as, folded.train_as, plain.train_as) == ("explicit", "folded", None)
    assert explicit.losses[0] == pytest.approx(folded.losses[0], rel=1e-5)
    weights = {
        each: torch.load(tmp_path / each / "model.pth", weights_only=True) for each in ("explicit", "folded", "plain")
    }
    assert weights["explicit"].keys() == weights["plain"].keys()
    assert same(weights["folded"], weights["plain"])
    assert not torch.allclose(weights["explicit"]["fuse.weight"], weights["plain"]["fuse.weight"], rtol=1e-3)
    receipt = json.loads((tmp_path / "explicit/equalize.json").read_text())
    assert receipt["strategy"] == "preserve"
    assert receipt["finetuned"]["train_as"] == "explicit"
    assert not (tmp_path / "plain/equalize.json").exists()


def test_calibrate_first_is_calibrating_before(custom, five_classes, tmp_path):
    from equalize.commands.calibrate import embed
    from equalize.commands.images import Measuring

    recipe = replace(QUICK, samples=8, max_steps=3)
    embed(
        custom,
        five_classes,
        tmp_path / "equal",
        strategy="rescale",
        how=Measuring(size=(48, 64), device="cpu", batch_size=4),
    )
    finetune(replace(custom, source=str(tmp_path / "equal")), five_classes, tmp_path / "two", recipe)
    done = finetune(custom, five_classes, tmp_path / "one", replace(recipe, calibrate="rescale"))
    assert done.strategy == "rescale"
    assert done.train_as == "folded"
    first, second = (torch.load(tmp_path / each / "model.pth", weights_only=True) for each in ("two", "one"))
    assert same(first, second)


def test_calibrated_run_resumes_with_the_scales_it_measured(custom, five_classes, tmp_path):
    recipe = replace(STEADY, calibrate="preserve")
    finetune(custom, five_classes, tmp_path / "whole", recipe)
    with pytest.raises(Killed):
        finetune(custom, five_classes, tmp_path / "out", recipe, progress=kill_at(4 * 5))
    finetune(custom, five_classes, tmp_path / "out", recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def measure_and_rescale(checkpoint):
    from equalize import calibrate

    return calibrate(checkpoint.model, [torch.randn(2, 3, 48, 64)], strategy="rescale")


def test_prepare_gives_the_plan(custom, five_classes, tmp_path):
    def silence(checkpoint):
        torch.nn.init.zeros_(checkpoint.model.fuse.weight)

    done = finetune(custom, five_classes, tmp_path / "out", replace(QUICK, max_steps=1), prepare=silence)
    ordinary = finetune(custom, five_classes, tmp_path / "plain", replace(QUICK, max_steps=1))
    assert done.losses[0][1] != ordinary.losses[0][1]
    rescale = replace(QUICK, max_steps=1, train_as="explicit")
    assert (
        finetune(custom, five_classes, tmp_path / "plan", rescale, prepare=measure_and_rescale).train_as == "explicit"
    )
    with pytest.raises(InputError, match="no equalization to train through"):
        finetune(custom, five_classes, tmp_path / "no", replace(QUICK, train_as="explicit"))


# classes


def test_other_classes_draw_the_classifier_and_nothing_else(segformer_dir, tmp_path):
    from transformers import SegformerForSemanticSegmentation

    root = write_scenes(tmp_path / "data", 3, counts={"train": 4, "val": 2})
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    said = []
    done = finetune(named(segformer_dir), root, tmp_path / "out", replace(QUICK, max_steps=1, lr=1e-9), say=said.append)
    assert done.drawn == ("decode_head.classifier.weight", "decode_head.classifier.bias")
    assert any("drawn anew" in line and "decode_head.classifier.weight" in line for line in said)
    model = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "sky", 1: "road", 2: "car"}
    old = SegformerForSemanticSegmentation.from_pretrained(segformer_dir).state_dict()
    for key, value in model.state_dict().items():
        if "classifier" not in key and "running" not in key and "num_batches" not in key:
            assert torch.allclose(value, old[key], atol=1e-6), key


def test_a_decoder_is_drawn_only_if_asked(segformer_encoder_dir, five_classes, tmp_path):
    recipe = replace(QUICK, max_steps=1, num_classes=5)
    with pytest.raises(CheckpointError, match="--init-missing"):
        finetune(named(segformer_encoder_dir), five_classes, tmp_path / "out", recipe)
    done = finetune(named(segformer_encoder_dir, init_missing=True), five_classes, tmp_path / "out", recipe)
    assert "decode_head.linear_fuse.weight" in done.drawn


# settings


def test_frozen_parts_do_not_move(custom, five_classes, tmp_path):
    before = torch.load(custom.source, weights_only=True)
    finetune(custom, five_classes, tmp_path / "backbone", replace(QUICK, freeze_backbone=True, max_steps=3))
    after = torch.load(tmp_path / "backbone/model.pth", weights_only=True)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith("backbone.") for key in moved)
    assert {"fuse.weight", "deep.1.running_mean", "deep.1.weight"} <= moved
    finetune(custom, five_classes, tmp_path / "norms", replace(QUICK, freeze_norms=True, max_steps=3))
    after = torch.load(tmp_path / "norms/model.pth", weights_only=True)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(("backbone.1", "deep.1")) for key in moved)
    assert "backbone.0.weight" in moved


def test_stops_early_and_keeps_the_best(custom, five_classes, tmp_path):
    out = tmp_path / "out"
    recipe = replace(QUICK, max_steps=40, lr=0.5, clip=0.0, eval_every=1, patience=2)
    said = []
    done = finetune(custom, five_classes, out, recipe, say=said.append)
    scored = [line["mIoU"] for line in metrics(out) if "mIoU" in line]
    assert done.steps == len(scored) < 40
    assert scored.index(max(scored)) == len(scored) - 3
    assert any("stopped early" in line for line in said)
    how = Evaluating(size=(48, 64), device="cpu")
    best = evaluate(replace(custom, source=str(out)), five_classes, how)
    last = evaluate(replace(custom, source=str(out / "last/model")), five_classes, how)
    assert best.mIoU == pytest.approx(max(scored))
    assert last.mIoU == pytest.approx(scored[-1])
    again = finetune(custom, five_classes, out, recipe, resume=True)
    assert again.steps == done.steps


def test_accumulated_batches_are_a_larger_one(custom, five_classes, tmp_path):
    still = replace(QUICK, optimizer="sgd", lr=0.05, freeze_norms=True, max_steps=2, aux_weight=0.4)
    (quiet := tmp_path / "net.pth").write_bytes(Path(custom.source).read_bytes())
    source = textwrap.dedent(FACTORY).replace("nn.Dropout(0.2)", "nn.Identity()")
    (tmp_path / "calm_net.py").write_text(source)
    name = named(quiet, arch=f"{tmp_path / 'calm_net.py'}:Net")
    small = finetune(name, five_classes, tmp_path / "small", replace(still, batch_size=2, accumulate=2))
    large = finetune(name, five_classes, tmp_path / "large", still)
    assert [step for step, _ in small.losses] == [1, 2]
    # not exactly: each batch is a mean over its own labelled pixels, as in torch
    assert small.losses[-1][1] == pytest.approx(large.losses[-1][1], rel=0.02)


def test_gradients_are_clipped_to_a_norm(custom, five_classes, tmp_path):
    """The first step of SGD is the rate times the gradient."""
    recipe = replace(QUICK, optimizer="sgd", lr=0.5, weight_decay=0.0, clip=0.01, max_steps=1)
    finetune(custom, five_classes, tmp_path / "out", recipe)
    before, after = (torch.load(each, weights_only=True) for each in (custom.source, tmp_path / "out/model.pth"))
    moved = [(after[key] - before[key]).norm() for key in before if "running" not in key and "num_" not in key]
    assert torch.stack(moved).norm() == pytest.approx(0.5 * 0.01, rel=1e-3)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@pytest.fixture(scope="module")
def calm(custom, tmp_path_factory) -> ModelName:
    """`custom` without dropout."""
    place = tmp_path_factory.mktemp("calm") / "calm_net.py"
    place.write_text(textwrap.dedent(FACTORY).replace("nn.Dropout(0.2)", "nn.Identity()"))
    return named(custom.source, arch=f"{place}:Net")


ALONE = replace(QUICK, freeze_norms=True, max_steps=3, batch_size=1, calibrate="preserve")


@pytest.fixture(scope="module")
def trained_alone(calm, five_classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, finetune(calm, five_classes, out, replace(ALONE, accumulate=2))


def train_beside(name, data, out, recipe, sharded):
    if sharded:  # Accelerate shards on accelerators only, torch on any device
        from accelerate import state
        from accelerate.utils import DistributedType

        begin = state.AcceleratorState.__init__

        def begin_sharded(self, *args, **kwargs):
            if state.PartialState._shared_state.get("distributed_type") is DistributedType.MULTI_CPU:
                state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            begin(self, *args, **kwargs)

        state.AcceleratorState.__init__ = begin_sharded
    done = finetune(name, data, out, recipe)
    if is_main():
        (out.parent / "done.json").write_text(json.dumps(done.to_json()))
    leave()


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_as_one_that_accumulates(five_classes, calm, trained_alone, tmp_path, sharded):
    """Each holds the whole network, or half of every parameter; the second has fewer images to score."""
    whole, one = trained_alone
    out = tmp_path / "two"
    in_two_processes(train_beside, calm, five_classes, out, ALONE, sharded, env=FSDP if sharded else None)
    two = json.loads((tmp_path / "done.json").read_text())
    assert two["steps"] == 3
    assert two["train_as"] == "explicit"
    assert two["best"]["images"] == 3
    assert two["loss"] == pytest.approx(one.losses[-1][1], rel=1e-4)
    first, second = (torch.load(each / "model.pth", weights_only=True) for each in (whole, out))
    assert list(first) == list(second)
    assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-5) for key in first)
    (state,) = (out / "last").glob("checkpoint-*")
    assert (state / "pytorch_model_fsdp.bin").is_file() == sharded


def test_launches_that_are_not_served(custom, five_classes, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_version: is not served, got 1, expected 2"):
        finetune(custom, five_classes, tmp_path / "out", QUICK)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="mixed_precision: is not served, got fp8"):
        QUICK.resolved()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert QUICK.resolved().precision == "bf16"
    assert replace(QUICK, precision="fp32").resolved().precision == "fp32"


def test_workers_and_sgd_and_weights_and_bf16(custom, five_classes, tmp_path):
    recipe = replace(
        QUICK,
        optimizer="sgd",
        lr=0.05,
        workers=1,
        class_weights=(1, 2, 1, 1, 0.5),
        precision="bf16",
        label_smoothing=0.1,
    )
    assert falls(finetune(custom, five_classes, tmp_path / "out", replace(recipe, head_lr_mult=2.0)))


def test_bad_input_is_refused_before_the_first_step(custom, five_classes, tmp_path, segformer_dir):
    def refuses(error, message, recipe=QUICK, data=five_classes, name=custom):
        with pytest.raises(error, match=message):
            finetune(name, data, tmp_path / "never", recipe)
        assert not (tmp_path / "never/last").exists()

    refuses(InputError, "--class-weights: is not one a class, got 2, expected 5", replace(QUICK, class_weights=(1, 2)))
    refuses(InputError, "--report-to: is unknown, got nowhere", replace(QUICK, report_to=("nowhere",)))
    refuses(DataError, "no split 'training2'", replace(QUICK, train_split="training2"))
    refuses(ResourceError, "fp16 cannot be trained on a CPU", replace(QUICK, precision="fp16"))
    refuses(CheckpointError, "no such file", name=named(tmp_path / "missing.pth"))
    refuses(DataError, "without masks", data=five_classes / "images")
    flat = write_scenes(tmp_path / "flat", 5, counts={None: 3})
    refuses(InputError, "--patience: needs a validation split", replace(QUICK, patience=1), data=flat)
    many = write_scenes(tmp_path / "many", 9, counts={"train": 4, "val": 1}, seed=3)
    refuses(DataError, "has label .* expected 0 to 4", data=many)
    (tmp_path / "bare.py").write_text("from torch import nn\ndef Net(): return nn.Conv2d(3, 5, 1)\n")
    torch.save(torch.nn.Conv2d(3, 5, 1).state_dict(), tmp_path / "bare.pth")
    bare = named(tmp_path / "bare.pth", arch=f"{tmp_path / 'bare.py'}:Net")
    refuses(InputError, "--head-lr-mult: the network has no part", replace(QUICK, head_lr_mult=10.0), name=bare)
    with pytest.raises(OutputError, match="is the model itself or lies inside it"):
        finetune(named(segformer_dir), five_classes, segformer_dir / "out", QUICK)


def test_a_label_that_the_sample_missed_names_its_file(custom, tmp_path):
    root = write_scenes(tmp_path / "data", 5, counts={"train": 70})
    from PIL import Image

    seen = set()
    recipe = replace(QUICK, batch_size=10, workers=0)
    import equalize.data.label_check as check

    read = check._read_pair
    mask = root / "masks/train/033.png"
    Image.fromarray(np.full((48, 64), 6, np.uint8)).save(mask)
    try:
        check._read_pair = lambda image, path, rule: {0} if path == mask else seen.add(path) or read(image, path, rule)
        with pytest.raises(DataError, match=r"033\.png: has label 6"):
            finetune(custom, root, tmp_path / "out", recipe)
    finally:
        check._read_pair = read


def test_a_loss_that_is_not_finite_ends_the_training(custom, five_classes, tmp_path):
    with pytest.raises(NumericsError, match=r"step \d+: the loss is not finite.*smaller --lr"):
        finetune(custom, five_classes, tmp_path / "out", replace(QUICK, lr=1e30, clip=0.0, optimizer="sgd"))


def test_what_was_trained_trains_on(custom, five_classes, tmp_path):
    """OUT is a MODEL: its state for resuming is not copied along."""
    finetune(custom, five_classes, tmp_path / "one", replace(QUICK, max_steps=2))
    name = replace(custom, source=str(tmp_path / "one"))
    finetune(name, five_classes, tmp_path / "two", replace(QUICK, max_steps=1))
    assert len(metrics(tmp_path / "two")) == 2
    assert [path.name for path in (tmp_path / "two/last").glob("checkpoint-*")] == ["checkpoint-1"]


def test_networks_that_match_masks_are_refused():
    from equalize.commands.finetune.loss import Criterion, Trained

    class Matcher(torch.nn.Conv2d):
        def forward(self, x, mask_labels=None):
            return x

    checkpoint = type("Stub", (), {"model": Matcher(3, 3, 1), "architecture": "Matcher", "family": "custom"})()
    with pytest.raises(InputError, match="Matcher: is trained by matching masks"):
        Trained(checkpoint, Criterion())


def test_loss_is_the_mean_over_labelled_pixels():
    from equalize.commands.finetune.loss import Criterion

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 6, 6), torch.randint(0, 4, (2, 6, 6))
    labels[:, :2] = 11
    options = {"label_smoothing": 0.1, "ignore_index": 11}
    weights = (1.0, 2.0, 0.5, 3.0)
    for weight in (None, weights):
        given = None if weight is None else torch.tensor(weight)
        expected = torch.nn.functional.cross_entropy(logits, labels, weight=given, **options)
        found = Criterion(class_weights=weight, aux_weight=0.25, **options)([logits, logits], labels)
        assert found == pytest.approx(1.25 * float(expected), rel=1e-5)
    assert float(Criterion(ignore_index=11)([logits], torch.full((2, 6, 6), 11))) == 0.0


def test_a_full_disk_is_said_to_be_one(custom, tmp_path, monkeypatch):
    root = write_scenes(tmp_path / "data", 5, counts={None: 4})

    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr("equalize.commands.finetune.trainer.torch.save", full)
    with pytest.raises(ResourceError, match="the state cannot be written"):
        finetune(custom, root, tmp_path / "out", replace(QUICK, max_steps=1))
