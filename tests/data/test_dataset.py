"""Every layout from a tiny tree, the choice of the split, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equalize.data.classes import read_class_names
from equalize.data.colors import read_colors
from equalize.data.dataset import DataSet, open_data, sample
from equalize.data.folders import IMAGE_SUFFIXES
from equalize.errors import DataError

IDS = "_labelTrainIds.png"


def plant(root: Path, *names: str) -> Path:
    """Write tiny files under `root`: images by their suffix, else text."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in {*IMAGE_SUFFIXES} - {".npy"}:
            Image.new("L", (4, 3), 7).save(path)
        elif path.suffix == ".npy":
            np.save(path, np.zeros((3, 4), np.uint8))
        else:
            path.write_text("text\n")
    return root


def names(dataset: DataSet) -> list[str]:
    return [path.relative_to(dataset.root).as_posix() for path in dataset.images]


def mask_names(dataset: DataSet) -> list[str | None]:
    return [mask and mask.relative_to(dataset.root).as_posix() for mask in dataset.masks]


def test_a_folder_of_images_is_read_at_any_depth_and_without_junk(tmp_path: Path) -> None:
    plant(tmp_path, "b.JPG", "a.png", "deep/er/c.tif", "d.webp", "e.PPM", "f.bmp", "g.jpeg")
    plant(tmp_path, ".hidden.png", "._a.png", ".git/x.png", "__MACOSX/a.png", "Thumbs.db", "notes.txt")
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split, dataset.masks) == ("images", None, ())
    assert names(dataset) == ["a.png", "b.JPG", "d.webp", "deep/er/c.tif", "e.PPM", "f.bmp", "g.jpeg"]
    assert dataset.describe() == f"{tmp_path}: images layout, no splits, 7 images"


def test_a_folder_of_splits_is_not_mixed(tmp_path: Path) -> None:
    plant(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    assert names(open_data(tmp_path)) == ["train/a.png"]
    plant(tmp_path / "elsewhere", "images/train/a.png", "images/val/b.png")
    assert names(open_data(tmp_path / "elsewhere")) == ["images/train/a.png"]
    plant(tmp_path / "third", "a.png", "images/b.png")
    assert names(open_data(tmp_path / "third")) == ["a.png", "images/b.png"]


def test_a_class_called_train_is_not_a_split(tmp_path: Path) -> None:
    plant(tmp_path, "train/a.png", "plane/b.png")
    assert names(open_data(tmp_path)) == ["plane/b.png", "train/a.png"]


def test_images_and_masks_with_splits(tmp_path: Path) -> None:
    for split, stem in (("train", "a"), ("val", "b"), ("test", "c")):
        plant(tmp_path, f"images/{split}/{stem}.jpg", f"masks/{split}/{stem}.png")
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split) == ("images+masks", "train")
    assert names(dataset) == ["images/train/a.jpg"]
    assert mask_names(dataset) == ["masks/train/a.png"]
    shown = "such as images/train/a.jpg with masks/train/a.png"
    assert dataset.describe().endswith(f"images+masks layout, split train, 1 image, 1 pair, {shown}")
    assert open_data(tmp_path, labels=True).split == "val"
    assert open_data(tmp_path, split="validation").split == "val"
    with pytest.raises(DataError, match=r"no split 'nope' \(images\+masks layout\), expected one of test, train, val"):
        open_data(tmp_path, split="nope")


def test_images_and_masks_without_splits_pair_by_relative_stem(tmp_path: Path) -> None:
    plant(tmp_path, "images/x/a.b.jpg", "images/y/a.b.jpg", "masks/y/a.b.tif", "masks/y/a.b.png")
    dataset = open_data(tmp_path)
    assert mask_names(dataset) == [None, "masks/y/a.b.png"]
    assert (dataset.split, dataset.pairs) == (None, 1)
    with pytest.raises(DataError, match=r"has no split 'val' .*leave --split away"):
        open_data(tmp_path, split="val")


@pytest.mark.parametrize("ending", ["annot", "_labels", "-masks", "_Annotations"])
def test_folders_of_masks_beside_those_of_splits(tmp_path: Path, ending: str) -> None:
    """CamVid as SegNet laid it out."""
    for split, stem in (("train", "a"), ("val", "b"), ("test", "c")):
        plant(tmp_path, f"{split}/{stem}.png", "train.txt")
        if split != "test":
            plant(tmp_path, f"{split}{ending}/{stem}.png")
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split) == ("camvid", "train")
    assert (names(dataset), mask_names(dataset)) == (["train/a.png"], [f"train{ending}/a.png"])
    assert names(open_data(tmp_path, labels=True)) == ["val/b.png"]
    with pytest.raises(DataError, match=r"test/c\.png: has no mask"):
        open_data(tmp_path, split="test", labels=True)
    plant(tmp_path, "video/x.png")
    dataset = open_data(tmp_path)
    assert names(dataset) == ["train/a.png"]
    assert dataset.describe().endswith("; 1 image in no split passed over (video/x.png)")


def test_a_plain_folder_passes_folders_of_masks_over(tmp_path: Path) -> None:
    plant(tmp_path, "day/rgb/a.jpg", "day/rgb/b.jpg", "day/labels/a.png", "trainannot/c.png", "train/c.png")
    dataset = open_data(tmp_path)
    assert names(dataset) == ["day/rgb/a.jpg", "day/rgb/b.jpg", "train/c.png"]
    assert mask_names(dataset) == ["day/labels/a.png", None, "trainannot/c.png"]
    assert "no splits, 3 images, 2 pairs, such as day/rgb/a.jpg with day/labels/a.png" in dataset.describe()
    assert dataset.describe().endswith("; 1 image without a mask (b.jpg)")
    plant(tmp_path / "splits", "train/image/a.png", "train/mask/a.png", "val/image/b.png")
    assert names(open_data(tmp_path / "splits")) == ["train/image/a.png"]
    masks_only = open_data(plant(tmp_path / "only", "masks/a.png", "labels/b.png"))
    assert names(masks_only) == ["labels/b.png", "masks/a.png"]
    assert masks_only.describe().endswith("2 images; all lie in folders named as those of masks are")


@pytest.mark.parametrize(
    ("split", "pairs"),
    [
        ("val", "img_dir/val/b.jpg ann_dir/val/b.png, img_dir/train/a.jpg ann_dir/train/a.png"),
        ("val2017", "images/val2017/b.jpg annotations/val2017/b.png, "
         "images/train2017/a.jpg annotations/train2017/a.png"),
        ("val", "images_val/b.jpg masks_val/b.png, images_train/a.jpg masks_train/a.png"),
        ("Val", "Val/IMAGES/B.JPG Val/Masks/b.PNG, Train/IMAGES/A.JPG Train/Masks/a.PNG"),
        ("train", "train/img/a.jpg train/gt/a.png"),
        ("train", "data/train/images/a.jpg data/train/labels/a.png"),
        ("train", "segmentation/train/a.jpg segmentation/train_mask/a.png"),
        ("train", "train/a.jpg train_masks/a_mask.gif, train/b.jpg train_masks/b_mask.gif"),
        ("val", "val/b.jpg annotations/b.png, train/a.jpg annotations/a.png"),
        ("train", "train/1_sat.jpg train/1_mask.png, train/2_sat.jpg train/2_mask.png"),
        ("training", "training/images/21_training.tif training/1st_manual/21_manual1.gif, "
         "training/images/22_training.tif training/1st_manual/22_manual1.gif"),
        ("tr", "imagesTr/a_0000.png labelsTr/a.png, imagesTr/b_0000.png labelsTr/b.png"),
        ("training", "ISIC_Training_Input/I_0.jpg ISIC_Training_GroundTruth/I_0_segmentation.png"),
        ("train", "leftImg8bit/train/x/a_leftImg8bit.jpg gtFine/train/x/a_gtFine_mask.png, "
         "leftImg8bit/train/x/b_leftImg8bit.jpg gtFine/train/x/b_gtFine_mask.png"),
        ("val", "TrainVal_images/val_images/b.jpg TrainVal_parsing_annotations/val_segmentations/b.png, "
         "TrainVal_images/train_images/a.jpg TrainVal_parsing_annotations/train_segmentations/a.png"),
        ("eval", "images/eval/b.jpg masks/eval/b.png, images/train/a.jpg masks/train/a.png"),
        (None, "Images/a.jpg Labels/a.png"),
        (None, "imgs/a.b.c.bmp masks/a.b.c.tif, imgs/a.b.d.bmp masks/a.b.d.tif"),
        (None, "img/a.jpg ann/a.jpg.png, img/b.jpg ann/b.jpg.png"),
        (None, "img/img_1.jpg label/label_1.png, img/img_12.jpg label/label_12.png"),
        (None, "images/a.jpg annotations/trimaps/a.png"),
        (None, "rgb/top_1_RGB.tif labels_all/top_1_label.tif, rgb/top_2_RGB.tif labels_all/top_2_label.tif"),
        (None, "a.jpg a_mask.png, b.jpg b_mask.png"),
        (None, "a.png a_L.png, b.png b_L.png"),
        (None, "a.jpg a_gt.npy, b.jpg b_gt.npy"),
        (None, "a.jpg mask_a.png, b.jpg mask_b.png"),
        (None, "image1.png mask1.png, image12.png mask12.png"),
        (None, "001/image.png 001/mask.png, 002/image.png 002/mask.png"),
        (None, "x/n(1).png x/n(1)_mask.png, x/n(2).png x/n(2)_mask.png"),
        (None, "images/a.jfif masks/a.pgm, images/b.JFIF masks/b.pgm"),
        ("training", "training/image_2/1_10.png training/semantic/1_10.png"),
    ],
)  # fmt: skip
def test_usual_names_tell_pictures_masks_and_splits(tmp_path: Path, split: str | None, pairs: str) -> None:
    """mmsegmentation, Kaggle, DeepGlobe, DRIVE, nnU-Net, ISIC, Supervisely, Potsdam, CamVid, BUSI and their like."""
    planted = [pair.rsplit(" ", 1) for pair in pairs.split(", ")]
    plant(tmp_path, *(name for pair in planted for name in pair))
    dataset = open_data(tmp_path, labels=True)
    of_split = planted[:1] if split and len({path.stem for path in dataset.images}) < len(planted) else planted
    assert dataset.split == split
    assert list(map(list, zip(names(dataset), mask_names(dataset), strict=True))) == sorted(of_split)
    assert dataset.notes == ()
    every = {name for each in dataset_splits(tmp_path, planted) for name in names(each)}
    assert every == {picture for picture, _ in planted}


def dataset_splits(root: Path, planted: list[list[str]]) -> list[DataSet]:
    """What calibration sees, of each split."""
    first = open_data(root)
    found = ["train", "val"] if first.split and len(planted) > len(first.images) else [first.split]
    return [open_data(root, split=split) for split in found]


def shade(root: Path, *, pictures: list[str], masks: list[str]) -> Path:
    """Noise for pictures, three labels for masks."""
    random = np.random.default_rng(0)
    for name in pictures + masks:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shape, most = ((16, 20, 3), 256) if name in pictures else ((16, 20), 3)
        Image.fromarray(random.integers(0, most, shape).astype(np.uint8)).save(root / name)
    return root


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        (["a.jpg", "b.jpg"], ["a.png", "b.png"]),
        (["a.png", "b.png"], ["a_foo.png", "b_foo.png"]),
        (["orig/a.png", "orig/b.png"], ["out/a.png", "out/b.png"]),
        (["frames_with_annotations/x/a.png", "frames_with_annotations/y/b.png"], ["labels/x/a.png", "labels/y/b.png"]),
        ([f"P{n}/P{n}_photo/P{n}.png" for n in "12"], [f"P{n}/P{n}_lesion/P{n}_lesion.png" for n in "12"]),
    ],
)
def test_contents_tell_masks_where_names_do_not(tmp_path: Path, pictures: list[str], masks: list[str]) -> None:
    dataset = open_data(shade(tmp_path / "both", pictures=pictures, masks=masks))
    assert (names(dataset), mask_names(dataset)) == (pictures, masks)
    assert f"2 pairs, such as {pictures[0]} with {masks[0]}" in dataset.describe()
    alike = open_data(shade(tmp_path / "alike", pictures=pictures + masks, masks=[]))
    assert sorted(names(alike)) == sorted(pictures + masks)
    assert alike.layout == "images"


def test_pictures_of_similar_names_stay_pictures(tmp_path: Path) -> None:
    plant(tmp_path, "a.jpg", "a_1.jpg", "a_2.jpg", "left/b.jpg", "right/b.jpg", "gt_car.jpg", "label.jpg")
    assert len(open_data(tmp_path).images) == 7


def test_masks_beside_pictures_that_pair_with_nothing_are_named_and_no_pictures(tmp_path: Path) -> None:
    plant(tmp_path, "a.png", "a_mask.png", "b.png", "b_mask.png", "b_mask_1.png", "images/c.png", "masks/z.png")
    dataset = open_data(tmp_path / "images")
    assert names(dataset) == ["c.png"]
    dataset = open_data(tmp_path)
    assert names(dataset) == ["a.png", "b.png", "images/c.png"]
    assert "2 masks without an image (b_mask_1.png, masks/z.png); 1 image without a mask (c.png)" in dataset.describe()
    with pytest.raises(DataError, match=r"c\.png: has no mask; 1 of 3 .*; 2 masks without an image \(b_mask_1\.png"):
        open_data(tmp_path, labels=True)


def test_pictures_in_two_formats_are_said_to_be_taken_twice(tmp_path: Path) -> None:
    """The second pairs are CVC-ClinicDB's."""
    plant(tmp_path / "plain", "tiff/a.tif", "png/a.png", "png/b.png")
    pictures = ["images/a.jpg", "images/a.png", "images/b.png"]
    shade(tmp_path / "pairs", pictures=pictures, masks=["masks/a.png", "masks/b.png"])
    plant(tmp_path / "cvc", *(f"{kind}/{folder}/1.{kind}" for kind in ("PNG", "TIF") for folder in ("Original", "GT")))
    for folder, name in (("plain", "tiff/a.tif"), ("pairs", "images/a.png"), ("cvc", "TIF/Original/1.TIF")):
        dataset = open_data(tmp_path / folder, labels=folder != "plain")
        assert name in names(dataset)
        assert dataset.notes == (f"1 image named as others of another format, all are taken ({name})",)
    plant(tmp_path / "sequences", "1/a.jpg", "2/a.jpg")
    assert open_data(tmp_path / "sequences").notes == ()


def test_several_masks_of_one_picture(tmp_path: Path) -> None:
    """Train ids go before ids, classes before colors and instances; else the user decides."""
    ids = [f"gt/a_{kind}.png" for kind in ("labelIds", "labelTrainIds", "color", "instanceIds")]
    plant(tmp_path / "ids", "img/a.jpg", *ids, "instances/a.png")
    assert mask_names(open_data(tmp_path / "ids", labels=True)) == ["gt/a_labelTrainIds.png"]
    kinds = ("gt_labelColor", "gt_labelIds", "gt_labelTrainIds")
    plant(tmp_path / "acdc", "rgb/f/train/a_rgb.png", *(f"gt/f/train/a_{kind}.png" for kind in kinds))
    assert mask_names(open_data(tmp_path / "acdc", labels=True)) == ["gt/f/train/a_gt_labelTrainIds.png"]
    plant(
        tmp_path / "kitti", *(f"training/{kind}/1.png" for kind in ("image_2", "semantic", "semantic_rgb", "instance"))
    )
    assert mask_names(open_data(tmp_path / "kitti", labels=True)) == ["training/semantic/1.png"]
    plant(tmp_path / "maps", "images/a.jpg", "labels/masks/a.png", "labels/colormaps/a.png")
    assert mask_names(open_data(tmp_path / "maps", labels=True)) == ["labels/masks/a.png"]
    plant(
        tmp_path / "two", "img/a.jpg", "img/b.jpg", *(f"gt/{stem}_{who}.png" for stem in "ab" for who in ("1st", "2nd"))
    )
    with pytest.raises(
        DataError, match=r"a\.jpg: may have several masks: gt/a_1st\.png, gt/a_2nd\.png; leave one kind"
    ):
        open_data(tmp_path / "two", labels=True)
    measured = open_data(tmp_path / "two")
    assert (names(measured), measured.masks) == (["img/a.jpg", "img/b.jpg"], ())
    assert "masks passed over: img/a.jpg may have several masks: gt/a_1st.png, gt/a_2nd.png" in measured.describe()
    for stem in ("1", "2"):
        plant(tmp_path / "drive", f"training/images/{stem}_training.tif", f"training/1st_manual/{stem}_manual1.gif")
        plant(tmp_path / "drive", f"training/mask/{stem}_training_mask.gif")
    with pytest.raises(DataError, match=r"several masks: training/mask/1_training_mask\.gif, training/1st_manual/1"):
        open_data(tmp_path / "drive", labels=True)


def test_pictures_of_kinds_that_are_not_read_are_named_and_leave_no_masks_behind(tmp_path: Path) -> None:
    plant(tmp_path / "some", "images/a.jpg", "masks/a.png", "images/b.HEIC", "images/c.nii.gz", "notes.txt")
    said = "2 files of kinds that are not read passed over (images/b.HEIC, images/c.nii.gz)"
    assert open_data(tmp_path / "some").notes == (said,)
    plant(tmp_path / "all", "images/a.dcm", "masks/a.png")
    with pytest.raises(DataError, match=r"a\.dcm: is of a kind that is not read, and all other files lie in folders"):
        open_data(tmp_path / "all")


@pytest.mark.parametrize("prefix", ["", "ADEChallengeData2016/"])
def test_ade20k(tmp_path: Path, prefix: str) -> None:
    for split, stem in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        plant(tmp_path / prefix, f"images/{split}/{stem}.jpg", f"annotations/{split}/{stem}.png")
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split) == ("ade20k", "training")
    assert mask_names(dataset) == [f"{prefix}annotations/training/ADE_train_1.png"]
    assert open_data(tmp_path, labels=True).split == "validation"
    assert open_data(tmp_path, split="train").split == "training"


@pytest.mark.parametrize("prefix", ["", "VOC2012/", "VOCdevkit/VOC2012/", "VOCdevkit/VOC2007/"])
def test_voc(tmp_path: Path, prefix: str) -> None:
    base = tmp_path / prefix
    plant(base, *(f"JPEGImages/{stem}.jpg" for stem in "abcd"), "SegmentationClass/a.png", "SegmentationClass/b.png")
    plant(base, *(f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val", "trainval", "._val")))
    for split, lines in (("train", "b\n"), ("val", "a \n\n"), ("trainval", "b\na\n")):
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(lines)
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split, names(dataset)) == ("voc", "train", [f"{prefix}JPEGImages/b.jpg"])
    both = open_data(tmp_path, split="trainval", labels=True)
    assert names(both) == [f"{prefix}JPEGImages/a.jpg", f"{prefix}JPEGImages/b.jpg"]
    assert mask_names(both) == [f"{prefix}SegmentationClass/a.png", f"{prefix}SegmentationClass/b.png"]
    assert names(open_data(tmp_path, labels=True)) == [f"{prefix}JPEGImages/a.jpg"]
    with pytest.raises(DataError, match="one of train, trainval, val"):
        open_data(tmp_path, split="test")


def test_voc_lists_of_names_with_spaces_or_a_second_column(tmp_path: Path) -> None:
    plant(tmp_path, "JPEGImages/a b.jpg", "JPEGImages/c.jpg", "ImageSets/Segmentation/train.txt")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a b\nc 1\n")
    assert names(open_data(tmp_path)) == ["JPEGImages/a b.jpg", "JPEGImages/c.jpg"]


def test_splits_are_a_word_in_the_names_of_folders(tmp_path: Path) -> None:
    for folder in ("uavid_train/seq1", "uavid_val/seq16", "uavid_test/seq21"):
        plant(tmp_path / "uavid", f"{folder}/Images/0.png", f"{folder}/Labels/0.png")
    assert names(open_data(tmp_path / "uavid")) == ["uavid_train/seq1/Images/0.png"]
    assert names(open_data(tmp_path / "uavid", labels=True)) == ["uavid_val/seq16/Images/0.png"]
    for folder in ("train_station", "test_bench"):
        plant(tmp_path / "scenes", f"{folder}/images/0.png", f"{folder}/masks/0.png")
    assert open_data(tmp_path / "scenes").split is None


@pytest.mark.parametrize("line", ["{}", "{}.jpg", "images/{}.jpg masks/{}.png", "images\\{}.jpg,masks\\{}.png"])
def test_splits_by_lists_beside_the_folders(tmp_path: Path, line: str) -> None:
    for stem in ("a", "b", "c", "d"):
        plant(tmp_path, f"images/{stem}.jpg", f"masks/{stem}.png")
    for split, stems in (("train", "ab"), ("val", "c")):
        (tmp_path / f"{split}.txt").write_text("".join(line.replace("{}", stem) + "\r\n" for stem in stems))
    (tmp_path / "test.txt").write_text("of what was tested\n")
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split) == ("images+masks", "train")
    assert names(dataset) == ["images/a.jpg", "images/b.jpg"]
    assert mask_names(open_data(tmp_path, labels=True)) == ["masks/c.png"]
    assert "passed over" not in dataset.describe()
    with pytest.raises(DataError, match="no split 'test'"):
        open_data(tmp_path, split="test")


@pytest.mark.parametrize("folder", ["", "splits/"])
def test_lists_of_paths_where_images_share_names(tmp_path: Path, folder: str) -> None:
    for place in ("s1", "s2", "more/s2"):
        plant(tmp_path, *(f"{place}/{kind}/{stem}.png" for kind in ("rgb", "semantic") for stem in "01"))
    plant(tmp_path, f"{folder}train.txt", f"{folder}val.txt")
    (tmp_path / folder / "train.txt").write_text("/data/s1/rgb/0.png s1/semantic/0.png\nmore/s2/rgb/1.png\n")
    (tmp_path / folder / "val.txt").write_text("s1/rgb/1\n")
    assert names(open_data(tmp_path)) == ["more/s2/rgb/1.png", "s1/rgb/0.png"]
    assert names(open_data(tmp_path, labels=True)) == ["s1/rgb/1.png"]
    (tmp_path / folder / "val.txt").write_text("s1/rgb/1\ns2/rgb/1.png\n0\n")  # the last may be any of three
    with pytest.raises(DataError, match=r"val\.txt: names 1 of 3 images that are not there, the first is 0"):
        open_data(tmp_path, labels=True)


def test_lists_that_make_no_splits_are_named(tmp_path: Path) -> None:
    """fast.ai's CamVid has a list of what is validated on, and none to train on."""
    plant(tmp_path, "images/a.png", "labels/a_P.png", "images/b.png", "labels/b_P.png", "valid.txt")
    (tmp_path / "valid.txt").write_text("b.png\n")
    assert (
        open_data(tmp_path).describe().endswith("; valid.txt makes no split without a list train.txt of these images")
    )


def test_of_lists_in_two_folders_those_that_are_followed_are_named(tmp_path: Path) -> None:
    plant(tmp_path, "images/a.png", "masks/a.png", "images/b.png", "masks/b.png", "few/train.txt", "splits/train.txt")
    (tmp_path / "few/train.txt").write_text("a\n")
    (tmp_path / "splits/train.txt").write_text("a\nb\n")
    dataset = open_data(tmp_path)
    assert names(dataset) == ["images/a.png"]
    assert dataset.describe().endswith("; lists in splits passed over, those in few make the splits")


def test_voc_with_the_masks_of_sbd(tmp_path: Path) -> None:
    plant(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png")
    plant(tmp_path, "SegmentationClassAug/a.png", "SegmentationClassAug/b.png", "ImageSets/Segmentation/trainaug.txt")
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("a\nb\n")
    dataset = open_data(tmp_path, split="trainaug", labels=True)
    assert mask_names(dataset) == ["SegmentationClass/a.png", "SegmentationClassAug/b.png"]


def test_voc_list_that_names_missing_images(tmp_path: Path) -> None:
    plant(tmp_path, "JPEGImages/a.jpg", "ImageSets/Segmentation/train.txt")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\nz\ny\n")
    with pytest.raises(DataError, match=r"train\.txt: names 2 of 3 images .* the first is y"):
        open_data(tmp_path)


def test_train_ids_go_before_masks_of_the_plain_name(tmp_path: Path) -> None:
    """GTA V, and Synthia, as they are converted for domain adaptation."""
    plant(tmp_path, *(f"images/{k}.png" for k in "ab"), *(f"labels/{k}{kind}" for k in "ab" for kind in (".png", IDS)))
    assert mask_names(open_data(tmp_path, labels=True)) == [f"labels/a{IDS}", f"labels/b{IDS}"]


def test_acdc_whose_pictures_have_references_and_masks_of_what_is_invalid(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        place = f"{split}/GOPR1/GOPR1_frame_000041"
        plant(tmp_path, f"rgb_anon/fog/{place}_rgb_anon.png")
        plant(tmp_path, f"rgb_anon/fog/{place.replace(split, f'{split}_ref')}_rgb_ref_anon.png")
        for kind in ("labelTrainIds", "labelIds", "labelColor", "invGray") if split != "test" else ():
            plant(tmp_path, f"gt/fog/{place}_gt_{kind}.png")
    dataset = open_data(tmp_path, labels=True)
    assert names(dataset) == ["rgb_anon/fog/val/GOPR1/GOPR1_frame_000041_rgb_anon.png"]
    assert mask_names(dataset) == ["gt/fog/val/GOPR1/GOPR1_frame_000041_gt_labelTrainIds.png"]


def test_cityscapes_prefers_train_ids(tmp_path: Path) -> None:
    for split, city, frame in (("train", "aachen", "aachen_0"), ("train", "bonn", "bonn_0"), ("val", "ulm", "ulm_0")):
        plant(tmp_path, f"leftImg8bit/{split}/{city}/{frame}_leftImg8bit.png")
        plant(tmp_path, f"gtFine/{split}/{city}/{frame}_gtFine_labelIds.png")
        plant(tmp_path, f"gtFine/{split}/{city}/{frame}_gtFine_color.png")
    plant(tmp_path, "gtFine/train/bonn/bonn_0_gtFine_labelTrainIds.png")
    dataset = open_data(tmp_path)
    assert (dataset.layout, dataset.split) == ("cityscapes", "train")
    assert mask_names(dataset) == [
        "gtFine/train/aachen/aachen_0_gtFine_labelIds.png",
        "gtFine/train/bonn/bonn_0_gtFine_labelTrainIds.png",
    ]
    assert names(open_data(tmp_path, labels=True)) == ["leftImg8bit/val/ulm/ulm_0_leftImg8bit.png"]


def test_missing_masks_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg", "masks/a.png")
    with pytest.raises(DataError, match=r"b\.jpg: has no mask; 2 of 3 images"):
        open_data(tmp_path, labels=True)
    plant(tmp_path / "flat", "a.jpg")
    with pytest.raises(DataError, match="flat: holds images without masks"):
        open_data(tmp_path / "flat", labels=True)


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder, expected a folder of images"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no images found in 0 files \(images layout\), expected files named \.jpg"):
        open_data(tmp_path)
    plant(tmp_path, "readme.txt", "data.csv")
    with pytest.raises(DataError, match=r"no images found in 2 files \(images layout\), expected files named \.jpg"):
        open_data(tmp_path)
    with pytest.raises(DataError, match=r"readme\.txt: is a file, not a folder"):
        open_data(tmp_path / "readme.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    plant(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(DataError, match=r"closed: cannot be listed \(Permission denied\)"):
            open_data(tmp_path)
        with pytest.raises(DataError, match="Permission denied"):
            open_data(tmp_path / "closed" / "deeper")
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_links_are_followed(tmp_path: Path) -> None:
    plant(tmp_path / "store", "a.png")
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "store")
    (data / "one.png").symlink_to(tmp_path / "store" / "a.png")
    (data / "dangling.png").symlink_to(tmp_path / "nothing.png")
    (data / "data").symlink_to(data)
    (tmp_path / "store" / "back").symlink_to("..")
    dataset = open_data(data)
    assert names(dataset) == ["dangling.png", "linked/a.png", "one.png"]
    assert len(dataset.fingerprint()) == 64


def test_fingerprint_follows_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    first = open_data(plant(tmp_path / "one", "a.png", "b.png")).fingerprint()
    assert open_data(plant(tmp_path / "two", "b.png", "a.png")).fingerprint() == first
    assert open_data(plant(tmp_path / "three", "a.png", "c.png")).fingerprint() != first
    exact = open_data(tmp_path / "two").fingerprint(exact=True)
    assert exact != open_data(tmp_path / "one").fingerprint(exact=True)
    os.utime(tmp_path / "two" / "a.png", ns=(1, 1))  # written anew, with as many bytes
    assert open_data(tmp_path / "two").fingerprint(exact=True) != exact
    (tmp_path / "two" / "a.png").write_bytes((tmp_path / "two" / "a.png").read_bytes() + b"\0")
    assert open_data(tmp_path / "two").fingerprint() != first


def test_sample_is_a_seeded_subset_in_order(tmp_path: Path) -> None:
    dataset = open_data(plant(tmp_path, *(f"{number:02}.png" for number in range(30))))
    chosen = sample(dataset.images, 10, seed=3)
    assert chosen == sample(dataset.images, 10, seed=3)
    assert chosen != sample(dataset.images, 10, seed=4)
    assert len(set(chosen)) == 10
    assert list(chosen) == sorted(chosen)
    assert set(chosen) <= set(dataset.images)
    assert sample(dataset.images, None, seed=3) == sample(dataset.images, 31, seed=3) == list(dataset.images)


def test_paths_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a configuration has them, and --data=~/streets, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    plant(tmp_path / "streets", "a.png")
    (tmp_path / "names.txt").write_text("road\ncar\n")
    (tmp_path / "colors.txt").write_text("road 1 2 3\ncar 4 5 6\n")
    assert open_data("~/streets").root == tmp_path / "streets"
    assert read_class_names("~/names.txt") == read_colors("~/colors.txt").names == ("road", "car")
