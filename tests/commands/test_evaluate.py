import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.checkpoint.loading import ModelName, load
from equalize.commands import windows
from equalize.commands.evaluate import EvalConfig, count_images, evaluate, score_split
from equalize.commands.forward import Forward
from equalize.commands.labels import check_split
from equalize.commands.windows import slide_window, upsampled
from equalize.data.dataset import open_data
from equalize.data.label_check import LabelSettings
from equalize.distributed import is_main, leave
from equalize.errors import DataError, NumericsError
from equalize.metrics import score_of
from tests.support.scenes import write_scenes
from tests.support.side_by_side import in_two_processes
from tests.support.tolerance import TIE, assert_same_score


@pytest.fixture
def scenes(tmp_path) -> Path:
    """Pairs of two sizes, five classes of which class 4 never occurs, pixels that are ignored."""
    root = write_scenes(tmp_path / "data", 4, counts={"train": 2, "val": 5})
    other = write_scenes(tmp_path / "other", 4, counts={"val": 2}, size=(40, 56), seed=1)
    for kind in ("images", "masks"):
        for path in (other / kind / "val").iterdir():
            path.rename(root / kind / "val" / f"other{path.name}")
    return root


def by_hand(model, root, size, *, classes=5, ignored=255) -> dict:
    """Scores one image after another with NumPy sets of pixels, by the definition of IoU."""
    intersection, union, labeled = (np.zeros(classes) for _ in range(3))
    right_pixels = pixels = 0
    for path in sorted((root / "images/val").iterdir()):
        image = Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        x = torch.from_numpy((np.asarray(image) / 255 - mean) / std).permute(2, 0, 1)[None].float()
        label = np.asarray(Image.open(root / "masks/val" / path.name))
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(x).logits, size=label.shape, mode="bilinear")
        predicted = logits[0].argmax(0).numpy()
        keep = label != ignored
        for k in range(classes):
            intersection[k] += ((predicted == k) & (label == k) & keep).sum()
            union[k] += (((predicted == k) | (label == k)) & keep).sum()
            labeled[k] += ((label == k) & keep).sum()
        right_pixels += ((predicted == label) & keep).sum()
        pixels += keep.sum()
    iou = [100 * i / u if u else None for i, u in zip(intersection, union, strict=True)]
    acc = [100 * i / n if n else None for i, n in zip(intersection, labeled, strict=True)]
    mean = lambda values: np.mean([each for each in values if each is not None])  # noqa: E731
    return {"IoU": iou, "Acc": acc, "mIoU": mean(iou), "mAcc": mean(acc), "aAcc": 100 * right_pixels / pixels}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_score_is_that_of_an_independent_computation(segformer_dir, scenes, batch_size):
    from transformers import SegformerForSemanticSegmentation

    score = evaluate(ModelName(source=str(segformer_dir)), scenes, EvalConfig(batch_size=batch_size, device="cpu"))
    expected = by_hand(SegformerForSemanticSegmentation.from_pretrained(segformer_dir).eval(), scenes, (48, 64))
    assert score.images == 7
    for key in ("mIoU", "mAcc", "aAcc"):
        assert getattr(score, key) == pytest.approx(expected[key], abs=TIE)
    for row in score.classes:
        for key in ("IoU", "Acc"):
            value = expected[key][row.id]
            assert getattr(row, key) == (value if value is None else pytest.approx(value, abs=TIE))
    assert score.classes[4].pixels == 0
    json.dumps(score.to_json(), allow_nan=False)


def test_size_of_the_user_wins_over_the_checkpoints(segformer_dir, scenes):
    from transformers import SegformerForSemanticSegmentation

    score = evaluate(ModelName(source=str(segformer_dir)), scenes, EvalConfig(size=(64, 64), device="cpu"))
    expected = by_hand(SegformerForSemanticSegmentation.from_pretrained(segformer_dir).eval(), scenes, (64, 64))
    assert score.aAcc == pytest.approx(expected["aAcc"], abs=TIE)


def test_each_image_is_counted_once_and_adds_up(segformer_dir, scenes):
    checkpoint = ModelName(source=str(segformer_dir)).load()
    labeled = check_split(open_data(scenes, split="val", labels=True), 5, None, LabelSettings())
    config, cpu = EvalConfig(batch_size=3), torch.device("cpu")
    with torch.no_grad():
        each = list(count_images(checkpoint, labeled, config, cpu))
        total = score_split(checkpoint, labeled, config, cpu)
    assert len(each) == len(list((scenes / "images/val").iterdir())) == 7
    assert score_of(sum(each), 7) == total  # the same passes twice


def test_a_binary_network_on_masks_of_0_and_255(tmp_path):
    import segmentation_models_pytorch as smp

    for classes in (1, 2):
        model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 8), classes=classes)
        model.save_pretrained(tmp_path / str(classes))
    root = write_scenes(tmp_path / "data", 2, counts={"val": 2}, size=(64, 64))
    name = ModelName(source=str(tmp_path / "1"))
    for path in (root / "masks/val").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 1, 1, 0).astype(np.uint8)).save(path)
    expected = evaluate(name, root, EvalConfig(device="cpu"))
    assert expected.classes[1].pixels > 0
    for path in (root / "masks/val").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * np.uint8(255)).save(path)
    said = []
    assert evaluate(name, root, EvalConfig(device="cpu"), notify=said.append) == expected
    assert "255 is class 1 (labels are 0 and 255 alone; --ignore-index 255 leaves it out)" in said[-1]
    assert evaluate(name, root, EvalConfig(device="cpu", ignore_index=255)).classes[1].pixels == 0
    two = evaluate(ModelName(source=str(tmp_path / "2")), root, EvalConfig(device="cpu"))
    assert two.classes[1].pixels == expected.classes[1].pixels


def test_an_ignored_class_is_left_out_of_the_means_and_named(segformer_dir, scenes):
    said = []
    name = ModelName(source=str(segformer_dir))
    every = evaluate(name, scenes, EvalConfig(device="cpu"))
    score = evaluate(name, scenes, EvalConfig(device="cpu", ignore_index=255))
    assert score == every
    for path in (scenes / "masks/val").iterdir():  # 255 as class 3, so that each pixel has a class
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 3, labels).astype(np.uint8)).save(path)
    score = evaluate(name, scenes, EvalConfig(device="cpu", ignore_index=0), notify=said.append)
    assert (score.classes[0].IoU, score.classes[0].Acc, score.classes[0].pixels) == (None, None, 0)
    known = [row.IoU for row in score.classes if row.IoU is not None]
    assert score.mIoU == pytest.approx(sum(known) / len(known))
    assert "class 0 is ignored: neither scored nor part of the means" in said[-1]
    assert "left_out" not in score.to_json()


def test_a_checkpoint_of_reduced_labels(segformer_dir, scenes, tmp_path):
    """As SegFormer's of ADE20K: label 0 does not count, and 1 is class 0."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    SegformerForSemanticSegmentation.from_pretrained(segformer_dir).save_pretrained(tmp_path / "reduced")
    processor = SegformerImageProcessor(size={"height": 48, "width": 64}, do_reduce_labels=True)
    processor.save_pretrained(tmp_path / "reduced")
    expected = evaluate(ModelName(source=str(segformer_dir)), scenes, EvalConfig(device="cpu"))
    for path in (scenes / "masks/val").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 0, labels + 1).astype(np.uint8)).save(path)
    said = []
    found = evaluate(ModelName(source=str(tmp_path / "reduced")), scenes, EvalConfig(device="cpu"), notify=said.append)
    assert found == expected
    assert "moved down by one (as the checkpoint was trained; labels are 0 to 4)" in said[-1]


def as_tensor(picture, size):
    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)


def slid(logits, size, picture, batch_size=1):
    strips = list(slide_window(logits, picture, size, batch_size=batch_size, preprocess=as_tensor))
    assert [top for top, _ in strips] == [0, *np.cumsum([strip.shape[1] for _, strip in strips])[:-1]]
    return torch.cat([strip for _, strip in strips], dim=1)


def test_sliding_windows_average_where_they_overlap():
    seen = []

    def logits(x):
        seen.append(tuple(x.shape[2:]))
        return torch.nn.functional.avg_pool2d(x, 2) * 0 + len(seen)

    averaged = slid(logits, (4, 6), Image.new("RGB", (10, 4)))
    assert seen == [(4, 6)] * 2
    assert averaged[0, 0].tolist() == [1, 1, 1, 1, 1.5, 1.5, 2, 2, 2, 2]
    noise = np.random.default_rng(0).integers(0, 255, (37, 20, 3)).astype(np.uint8)
    for size, batch_size in (((8, 8), 1), ((8, 8), 2), ((11, 64), 3), ((64, 64), 1)):
        whole = slid(lambda x: x, size, Image.fromarray(noise), batch_size)
        assert torch.allclose(whole, torch.from_numpy(noise).permute(2, 0, 1).float(), atol=1e-4)  # of 255


def test_sliding_window_over_images_of_its_size_is_the_plain_score(segformer_dir, tmp_path, monkeypatch):
    root = write_scenes(tmp_path, 5, counts={"val": 3})
    name = ModelName(source=str(segformer_dir))
    plain = evaluate(name, root, EvalConfig(device="cpu"))
    monkeypatch.setattr(Forward, "batches", lambda *_: pytest.fail("a picture is read whole as well"))
    slid = evaluate(name, root, EvalConfig(device="cpu", sliding_window=True))
    assert_same_score(slid.to_json(), plain.to_json())
    larger = evaluate(name, root, EvalConfig(device="cpu", sliding_window=True, size=(96, 96)))
    assert_same_score(larger.to_json(), plain.to_json())  # a window is no larger than the image


@pytest.mark.parametrize("size", [(48, 64), (7, 100), (97, 3), (12, 16)])
def test_strips_are_what_interpolate_gives_at_once(size):
    scores = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(scores[None], size=size, mode="bilinear")[0]
    for rows in (1, 5, 1000):
        strips = [strip for _, strip in upsampled(scores, size, at_once=rows * 5 * size[1])]
        assert strips[0].shape[1] == min(rows, size[0])
        torch.testing.assert_close(torch.cat(strips, dim=1), expected, atol=1e-5, rtol=0)  # other order of sums


def test_large_images_are_scored_in_windows(tmp_path, monkeypatch):
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 8), classes=3)
    model.save_pretrained(tmp_path / "unet")
    root = write_scenes(tmp_path / "data", 3, counts={"val": 2}, size=(64, 96))
    name, config = ModelName(source=str(tmp_path / "unet")), EvalConfig(device="cpu")
    plain = evaluate(name, root, config)
    monkeypatch.setattr(windows, "_LARGE", 64 * 96 - 1)
    said = []
    assert_same_score(evaluate(name, root, config, notify=said.append).to_json(), plain.to_json())
    assert said[-1] == "large images (2) are taken in windows of 512x512, see --size"


def test_names_come_from_file_checkpoint_or_data(segformer_dir, scenes, tmp_path):
    name = ModelName(source=str(segformer_dir))
    (scenes / "classes.txt").write_text("sky\nroad\ncar\ntree\nsign\n")
    assert [row.name for row in evaluate(name, scenes, EvalConfig(device="cpu")).classes][:2] == ["sky", "road"]
    listed = tmp_path / "names.json"
    listed.write_text('["a", "b", "c", "d"]')
    with pytest.raises(DataError, match=r"names another number of classes.*got 4, expected 5"):
        evaluate(name, scenes, EvalConfig(device="cpu", class_names=listed))


def test_classes_that_the_data_set_numbers_otherwise_are_named(segformer_dir, scenes, tmp_path):
    checkpoint = load(segformer_dir).with_names(["sky", "road", "traffic light", "tree", "sign"])
    checkpoint.save(tmp_path / "named")
    for names, said in (
        ("sky road Traffic_Light oak sign", []),
        ("sky traffic-light road tree sign", ["'road' is class 2"]),
    ):
        (scenes / "classes.txt").write_text(names.replace(" ", "\n"))
        warned: list[str] = []
        evaluate(ModelName(source=str(tmp_path / "named")), scenes, EvalConfig(device="cpu"), warn=warned.append)
        assert len(warned) == len(said)
        assert all(f"{each} of the data set, and class 1 of" in warned[0] for each in said)


def test_refusals(segformer_dir, scenes, tmp_path):
    name = ModelName(source=str(segformer_dir))
    with pytest.raises(DataError, match="no split 'test'"):
        evaluate(name, scenes, EvalConfig(split="test", device="cpu"))
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(scenes / "masks/val/002.png")
    with pytest.raises(DataError, match=r"002\.png: has label 9"):
        evaluate(name, scenes, EvalConfig(device="cpu"))
    (scenes / "masks/val/002.png").unlink()
    with pytest.raises(DataError, match=r"002\.png: has no mask"):
        evaluate(name, scenes, EvalConfig(device="cpu"))


def test_logits_that_are_not_finite_name_the_image(segformer_dir, scenes, monkeypatch):
    from equalize.checkpoint.checkpoint import Checkpoint

    logits = Checkpoint.logits
    calls = []

    def broken(self, x):
        calls.append(len(x))
        return logits(self, x) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(Checkpoint, "logits", broken)
    with pytest.raises(NumericsError, match=r"001\.png.*NaN or Inf"):
        evaluate(ModelName(source=str(segformer_dir)), scenes, EvalConfig(device="cpu", batch_size=1))


def score_beside(source, data, place):
    score = evaluate(ModelName(source=str(source)), data, EvalConfig(device="cpu"))
    if is_main():
        place.write_text(json.dumps(score.to_json()))
    leave()


def test_two_processes_score_as_one(segformer_dir, scenes, tmp_path):
    one = evaluate(ModelName(source=str(segformer_dir)), scenes, EvalConfig(device="cpu"))
    in_two_processes(score_beside, segformer_dir, scenes, tmp_path / "score.json")
    assert_same_score(json.loads((tmp_path / "score.json").read_text()), one.to_json())  # in batches of other sizes
