"""Features of a frozen backbone, stored once, in place of running it."""

import shutil
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.checkpoint.loading import load
from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.finetune import backbone_cache
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.loss import backbone_of
from equalize.commands.finetune.stored_backbone import StoredBackbone
from equalize.errors import DataError, InputError
from tests.support.networks import save_code
from tests.support.scenes import write_scenes
from tests.support.training import FACTORY, QUICK, Killed, metrics, same, trained_weights

CACHED = replace(QUICK, flip=0.5, freeze_backbone=True, cache_backbone=True, eval_every=4, log_every=1)


def train(name, data, out, config, **options) -> dict[str, torch.Tensor]:
    finetune(name, data, out, config, **options)
    return trained_weights(out)


def test_flips_alone_give_the_weights_of_an_uncached_training(custom, five_classes, tmp_path, monkeypatch):
    """With dropout, BatchNorms, and an auxiliary head that reads the backbone; and again, without running it."""
    plain = train(custom, five_classes, tmp_path / "plain", replace(CACHED, cache_backbone=False))
    config, said = replace(CACHED, cache_dir=str(tmp_path / "cache")), []
    cached = train(custom, five_classes, tmp_path / "cached", config, notify=said.append)
    before = torch.load(custom.source)
    assert not torch.equal(cached["fuse.weight"], before["fuse.weight"])
    assert torch.equal(cached["backbone.0.weight"], before["backbone.0.weight"])
    for key, value in plain.items():  # the backbone ran on other batches, after which eight steps of AdamW came
        torch.testing.assert_close(cached[key], value, rtol=1e-3, atol=1e-4)
    assert sum("computing what the backbone gives" in line for line in said) == 2
    scores = [[line["mIoU"] for line in metrics(tmp_path / out) if "mIoU" in line] for out in ("plain", "cached")]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)  # a pixel on the edge between two classes

    def never(*_):
        raise AssertionError("the backbone was run")

    monkeypatch.setattr(StoredBackbone, "run", never)
    again = train(custom, five_classes, tmp_path / "again", config)
    assert same(again, cached)  # the same kernels on the same numbers


def test_batches_can_be_pinned(custom, five_classes, tmp_path, monkeypatch):
    """For CUDA a batch is copied to memory of the same strides: expanded tensors cannot be written to."""
    items, read = [], backbone_cache.CachedPairs.__getitems__
    monkeypatch.setattr(
        backbone_cache.CachedPairs, "__getitems__", lambda *given: items.append(read(*given)) or items[-1]
    )
    train(custom, five_classes, tmp_path / "out", replace(CACHED, max_steps=1, eval_every=1))
    for name, tensor in items[0].items():
        pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        assert torch.equal(pinned, tensor), name


def test_scores_of_turned_images_of_four_bands_that_are_padded(custom, tmp_path):
    """Images have an EXIF orientation, their masks are drawn on them as stored; the network takes multiples of 4."""
    data = write_scenes(tmp_path / "data", 5, counts={"train": 4, "val": 3})
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in data.glob("images/*/*.png"):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(path, exif=exif)
    name = save_code(FACTORY.replace("nn.Conv2d(3, 8", "nn.Conv2d(4, 8"), tmp_path)
    train(name, data, tmp_path / "out", replace(CACHED, size=(62, 46), max_steps=2, eval_every=2))
    (scored,) = [line for line in metrics(tmp_path / "out") if "mIoU" in line]
    name = replace(name, source=str(tmp_path / "out"))
    score = evaluate(name, data, EvalConfig(size=(62, 46), device="cpu", batch_size=2))
    assert score.mIoU == pytest.approx(scored["mIoU"], abs=0.2)  # a pixel on the edge between two classes
    assert score.aAcc == pytest.approx(scored["aAcc"], abs=0.2)
    assert (tmp_path / "out/last/features").is_dir()


def test_sizes_that_are_padded_and_other_bands(tmp_path):
    """A network of four bands whose sides must be multiples of 4, on images of 50x61; `custom`'s reads its backbone."""
    code = FACTORY.replace("Conv2d(3, 8", "Conv2d(4, 8").replace("low = ", "low = self.even(x) or ")
    even = "    def even(self, x):\n        assert x.shape[2] % 4 == x.shape[3] % 4 == 0, 'odd'\n"
    name = save_code(code + even, tmp_path)
    data = write_scenes(tmp_path / "data", 5, counts={"train": 4, "val": 2}, size=(50, 61))
    for path in data.glob("images/*/*.png"):
        pixels = np.asarray(Image.open(path))
        np.save(path.with_suffix(".npy"), np.concatenate([pixels, pixels[..., :1]], axis=-1))
        path.unlink()
    config = replace(CACHED, size=(50, 61), batch_size=2, flip=0.0)  # a mirrored image would be padded on the left
    weights = {
        cached: train(name, data, tmp_path / str(cached), replace(config, cache_backbone=cached))
        for cached in (False, True)
    }
    for key, value in weights[False].items():
        torch.testing.assert_close(weights[True][key], value, rtol=1e-3, atol=1e-4)
    scores = [[line["mIoU"] for line in metrics(tmp_path / str(each)) if "mIoU" in line] for each in (False, True)]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)


def test_masks_are_turned_as_their_images_are(custom, five_classes, tmp_path):
    """Images with an EXIF orientation, masks drawn on the stored pixels: as in an uncached training."""
    data = write_scenes(tmp_path / "data", 5, counts={"train": 4, "val": 2})
    for path in data.glob("images/*/*.png"):
        exif = Image.Exif()
        exif[0x0112] = 6  # upright after a quarter turn, 64x48
        Image.open(path).save(path, exif=exif)
    config = replace(CACHED, masks_drawn_on="stored", batch_size=2, max_steps=4)
    lines = []
    for cached in (False, True):
        train(custom, data, tmp_path / str(cached), replace(config, cache_backbone=cached))
        lines.append([line["mIoU"] for line in metrics(tmp_path / str(cached)) if "mIoU" in line])
    assert lines[0] == pytest.approx(lines[1], abs=0.5)


@pytest.mark.slow
def test_other_weights_data_or_size_are_stored_apart(custom, five_classes, tmp_path):
    cache = tmp_path / "cache"
    config = replace(CACHED, max_steps=1, eval_every=1, cache_dir=str(cache))
    train(custom, five_classes, tmp_path / "one", config)
    first = {path.name for path in cache.iterdir()}
    train(custom, five_classes, tmp_path / "two", replace(config, lr=0.1))
    assert {path.name for path in cache.iterdir()} == first
    train(custom, five_classes, tmp_path / "three", replace(config, size=(32, 64)))
    state = torch.load(custom.source)
    torch.save({**state, "backbone.0.bias": state["backbone.0.bias"] + 1}, tmp_path / "moved.pth")
    train(replace(custom, source=str(tmp_path / "moved.pth")), five_classes, tmp_path / "four", config)
    shutil.copytree(five_classes, tmp_path / "data")  # by names and sizes the same: other arrays would be as well
    train(custom, tmp_path / "data", tmp_path / "five", config)
    assert len(list(cache.iterdir())) == 4 * len(first)


def test_interrupted_it_goes_on_with_the_parts_that_are_there(custom, five_classes, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(backbone_cache, "_PART", 3)  # three parts to train on, one to score
    config = replace(CACHED, cache_dir=str(cache))
    whole = train(custom, five_classes, tmp_path / "whole", replace(config, cache_dir=str(tmp_path / "other")))
    run, calls = StoredBackbone.run, []

    def killed(self, model, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise Killed
        return run(self, model, images)

    monkeypatch.setattr(StoredBackbone, "run", killed)
    with pytest.raises(Killed):
        finetune(custom, five_classes, tmp_path / "out", config)
    assert len(list(cache.glob("*/0*"))) == 1  # an image and its mirror image a call
    assert same(train(custom, five_classes, tmp_path / "out", config, resume=True), whole)
    assert sorted(path.name for path in cache.glob("*/[.0]*")) == ["00000", "00000", "00001", "00002"]
    damaged = next(cache.glob("*/00002"))
    np.save(damaged / "features.npy", np.load(damaged / "features.npy")[1:])
    with pytest.raises(DataError, match="is not whole; remove it"):
        finetune(custom, five_classes, tmp_path / "third", config)


# what the network reads


@pytest.mark.parametrize("place", ["smp_dir", "segformer_dir", "upernet_dir"])
def test_libraries_give_the_same_from_what_they_read(place, request):
    checkpoint = load(request.getfixturevalue(place))
    model, heads = checkpoint.model, checkpoint.adapter.heads
    x_NCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    path = backbone_of(checkpoint)
    stored = StoredBackbone.of(checkpoint, path, x_NCHW)
    before = model.get_submodule(path).forward
    with torch.no_grad():
        features_NF = stored.run(model, x_NCHW)
        expected = heads(model, x_NCHW)
        with stored.returning(features_NF):
            found = heads(model, torch.zeros_like(x_NCHW))
    assert [*found] == [*expected]
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    assert model.get_submodule(path).forward == before
    if place == "smp_dir":  # its encoder returns the image as well, which the decoder drops
        assert 0 not in stored.read
    if place == "segformer_dir":  # the last level comes twice
        assert len(stored.read) == 4


BODY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Conv2d(3, 8, 3, 1, 1)
            self.classify = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            return self.classify({features})
"""


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("self.backbone(x) + x.mean(1, keepdim=True)", "reads its images outside"),
        ("self.backbone(x) + self.backbone(2 * x)", "runs its backbone 2 times an image"),
        ("self.backbone(torch.cat([x, x]))[: len(x)]", "something else than features of each image"),
    ],
)
def test_networks_whose_backbone_cannot_be_stored(features, said, five_classes, tmp_path):
    name = save_code(textwrap.dedent(BODY).replace("{features}", features), tmp_path)
    with pytest.raises(InputError, match=f"--cache-backbone: .*{said}"):
        finetune(name, five_classes, tmp_path / "out", CACHED)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"freeze_backbone": False}, "add --freeze-backbone"),
        ({"crop": (32, 32)}, "--crop: cannot stand with --cache-backbone"),
        ({"random_resize": (0.5, 1.5)}, "--random-resize: cannot stand with --cache-backbone"),
    ],
)
def test_settings_that_stored_features_do_not_allow(changed, said):
    with pytest.raises(InputError, match=said):
        replace(CACHED, **changed)


def test_without_a_size_nothing_can_be_stored(custom, five_classes, tmp_path):
    with pytest.raises(InputError, match="--cache-backbone: needs one size for all images; give --size"):
        finetune(custom, five_classes, tmp_path / "out", replace(CACHED, size=None))


def test_default_augmentation_is_left_away():
    config = TrainConfig(freeze_backbone=True, cache_backbone=True).resolved()
    assert (config.random_resize, config.photometric, config.flip) == ((1.0, 1.0), False, 0.5)


def test_a_rate_for_fusion_layers_needs_fusion_layers(five_classes, tmp_path):
    name = save_code(textwrap.dedent(BODY).replace("{features}", "self.backbone(x)"), tmp_path)
    with pytest.raises(InputError, match="--fusion-lr-mult: the network has no fusion layer"):
        finetune(name, five_classes, tmp_path / "out", replace(QUICK, fusion_lr_mult=3.0))
