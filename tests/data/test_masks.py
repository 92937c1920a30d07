"""Stored values to classes; what is no mask; the preflight; names of classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.data.classes import class_names, read_class_names
from equalize.data.colors import colors_of, read_colors
from equalize.data.dataset import open_data, sample
from equalize.data.label_check import LabelSettings, preflight, stored_rule
from equalize.data.masks import LabelRule, check_labels, read_mask
from equalize.errors import DataError, InputError

STORED = np.array([[0, 1, 2], [149, 150, 255]], np.uint8)


def save(values: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def plant_pairs(root: Path, masks: list[list[list[int]]]) -> Path:
    """`images/` and `masks/` with the given stored labels."""
    for number, values in enumerate(masks):
        mask = np.array(values, np.uint8)
        save(mask, root / "masks" / f"{number}.png")
        save(np.zeros((*mask.shape, 3), np.uint8), root / "images" / f"{number}.jpg")
    return root


def test_grayscale_palette_and_16_bit_keep_their_indices(tmp_path: Path) -> None:
    palette = Image.fromarray(STORED)
    palette.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
    assert palette.mode == "P"
    palette.save(tmp_path / "palette.png")
    for path in (
        save(STORED, tmp_path / "gray.png"),
        tmp_path / "palette.png",
        save(STORED.astype(np.uint16), tmp_path / "deep.png"),
        save(STORED.astype(np.int32), tmp_path / "wide.tif"),
    ):
        labels_HW = read_mask(path, LabelRule())
        assert labels_HW.dtype == torch.int64
        assert labels_HW.tolist() == STORED.tolist()
    assert read_mask(save(STORED > 100, tmp_path / "two.png"), LabelRule()).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert read_mask(save(np.array([[300, 65535]], np.uint16), tmp_path / "many.png"), LabelRule()).tolist() == [
        [300, 65535]
    ]


def test_what_is_no_mask(tmp_path: Path) -> None:
    colored = np.array([[[0, 0, 0], [128, 0, 0]]], np.uint8)
    with pytest.raises(DataError, match=r"a\.png: has colors, of which no file says the classes; .*--colors FILE"):
        read_mask(save(colored, tmp_path / "a.png"), LabelRule())
    with pytest.raises(DataError, match=r"b\.png: has transparent pixels, which are no labels"):
        read_mask(save(np.zeros((2, 2, 4), np.uint8), tmp_path / "b.png"), LabelRule())
    Image.new("CMYK", (2, 2)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif: has 4 channels \(CMYK\)"):
        read_mask(tmp_path / "f.tif", LabelRule())
    Image.new("L", (16, 16), 3).save(tmp_path / "c.tif", compression="jpeg")
    with pytest.raises(DataError, match=r"c\.tif: is a JPEG, whose compression changes labels"):
        read_mask(tmp_path / "c.tif", LabelRule())
    with pytest.raises(DataError, match=r"c\.jpg: is a JPEG, whose compression changes labels"):
        read_mask(save(STORED, tmp_path / "c.jpg"), LabelRule())
    with pytest.raises(DataError, match="floating-point pixels"):
        read_mask(save(np.zeros((2, 2), np.float32), tmp_path / "d.tif"), LabelRule())
    with pytest.raises(DataError, match=r"e\.png: cannot be read"):
        read_mask(tmp_path / "e.png", LabelRule())


def test_gray_in_equal_channels_or_with_opaque_alpha_is_one_channel(tmp_path: Path) -> None:
    three = np.stack([STORED] * 3, axis=-1)
    opaque = np.full_like(STORED, 255)
    for name, values in (
        ("rgb", three),
        ("rgba", np.dstack([three, opaque])),
        ("la", np.dstack([STORED, opaque])),
    ):
        assert read_mask(save(values, tmp_path / f"{name}.png"), LabelRule()).tolist() == STORED.tolist()


def test_arrays_of_numpy(tmp_path: Path) -> None:
    for number, dtype in enumerate((np.uint8, np.int64, np.uint16, bool, np.float32)):
        values = STORED.astype(dtype)
        np.save(tmp_path / f"{number}.npy", (values, values[None], values[..., None])[number % 3])
        assert read_mask(tmp_path / f"{number}.npy", LabelRule()).tolist() == values.astype(int).tolist()
    for name, values in (
        ("float", STORED + 0.5),
        ("deep", np.stack([STORED] * 2)),
        ("nan", STORED * np.nan),
        ("object", np.array([None])),
    ):
        np.save(tmp_path / f"{name}.npy", values, allow_pickle=True)
        with pytest.raises(DataError, match=rf"{name}\.npy: (is no mask, got .* expected integers|cannot be read)"):
            read_mask(tmp_path / f"{name}.npy", LabelRule())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "0.npy").read_bytes()[:-3])
    with pytest.raises(DataError, match=r"cut\.npy: cannot be read as an array"):
        read_mask(tmp_path / "cut.npy", LabelRule())


COLORS = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\nold dog:0,128,7::\n",
    "class_dict.csv": "name,r,g,b\nbackground,0,0,0\ncat,128,0,0\nold dog,0,128,7\n",
    "label_colors.txt": "0 0 0\tbackground\n128 0 0\tcat\n0 128 7\told dog\n",
    "hex.txt": "background #000000\ncat #800000\nold dog #008007\n",
    "indexed.csv": "id,name,r,g,b\n2,old dog,0,128,7\n0,background,0,0,0\n1,cat,128,0,0\n",
    "indexed_colors.txt": "0 0 0 0 background\n1 128 0 0 cat\n2 0 128 7 old dog\n",
    "indexed_names.txt": "background 0 0 0 0\ncat 128 0 0 1\nold dog 0 128 7 2\n",
    "alpha.txt": "0 background 0 0 0 255\n1 cat 128 0 0 255\n2 old dog 0 128 7 255\n",
    "headed.csv": "Blue;Green;Red;Alpha;Label\n0;0;0;255;background\n0;0;128;255;cat\n7;128;0;255;old dog\n",
    "names.json": '{"background": [0, 0, 0], "cat": "#800000", "old dog": [0, 128, 7]}',
    "by_color.json": '{"#000000": "background", "128,0,0": "cat", "(0, 128, 7)": "old dog"}',
    "by_index.json": '{"2": {"name": "old dog", "color": [0, 128, 7]}, "0": {"name": "background", "color": [0, 0, 0]},'
    ' "1": {"name": "cat", "color": [128, 0, 0]}}',
    "listed.json": '{"classes": [{"title": "background", "shape": "polygon", "color": "#000000"},'
    ' {"title": "cat", "shape": "polygon", "color": "#800000"}, {"title": "old dog", "color": "#008007"}]}',
    "list.json": '[{"id": 0, "label": "background", "rgb": [0, 0, 0]}, {"id": 1, "label": "cat", "rgb": [128, 0, 0]},'
    ' {"id": 2, "label": "old dog", "rgb": [0, 128, 7]}]',
}


@pytest.mark.parametrize("name", COLORS)
def test_colors_become_the_classes_that_a_file_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(COLORS[name])
    colors = read_colors(tmp_path / name)
    assert colors.by_class == ("background", "cat", "old dog")
    rule = LabelRule(colors=colors)
    palette = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 7]], np.uint8)
    labels = np.array([[0, 2], [1, 2]])
    pixels = palette[labels]
    assert read_mask(save(pixels, tmp_path / "a.png"), rule).tolist() == labels.tolist()
    swapped = Image.fromarray(np.array([[2, 1], [0, 1]], np.uint8))
    swapped.putpalette([128, 0, 0, 0, 128, 7, 0, 0, 0])  # as a program stores it that sorts colors by itself
    swapped.save(tmp_path / "b.png")
    assert read_mask(tmp_path / "b.png", rule).tolist() == labels.tolist()
    assert read_mask(save(labels.astype(np.uint8), tmp_path / "c.png"), rule).tolist() == labels.tolist()
    with pytest.raises(DataError, match=r"d\.png: has a color that .* not name \(1 such, 0\.5 of .*\), got 1 2 3"):
        read_mask(save(np.array([[[1, 2, 3], [0, 0, 0]]], np.uint8), tmp_path / "d.png"), rule)


def test_names_of_colors_may_end_in_a_number(tmp_path: Path) -> None:
    for number, heading in enumerate(("", "name,r,g,b\n")):
        (tmp_path / f"{number}.csv").write_text(f"{heading}grade 1,128,0,0\nclass2,0,128,0\n")
        colors = read_colors(tmp_path / f"{number}.csv")
        assert (colors.colors, colors.by_class) == ((0x800000, 0x008000), ("grade 1", "class2"))


def test_a_color_more_than_classes_that_is_called_void_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text("void:0,0,0::\nroad:128,0,0::\nsky:0,128,7::\n")
    rule = LabelRule(colors=read_colors(tmp_path / "labelmap.txt").for_classes(2))
    pixels = np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 7]]], np.uint8)
    assert read_mask(save(pixels, tmp_path / "a.png"), rule).tolist() == [[255, 0, 1]]


def test_a_color_called_void_is_no_class_unless_it_is_asked_for(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path, [[[0, 1, 2]]]), labels=True)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,128,0,0\nVoid,0,0,0\ncar,0,128,7\n")
    assert class_names(data) == ("road", "Void", "car")  # as the masks show classes, not colors
    save(np.array([[[128, 0, 0], [0, 0, 0], [128, 0, 0]]], np.uint8), tmp_path / "masks/0.png")
    assert (class_names(data), class_names(data, 3)) == (("road", "car"), ("road", "Void", "car"))
    assert class_names(data, colors="none") is None
    for rule, line in (
        stored_rule(data, LabelSettings(colors=colors_of(data, None))),
        preflight(data, 2, LabelSettings(colors=colors_of(data, None))),
    ):
        assert "the color of Void is ignored" in line
        assert read_mask(data.with_masks()[0][1], rule).tolist() == [[0, 255, 0]]


def test_a_file_of_names_alone_is_no_file_of_colors(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path, [[[0, 1]]]))
    (tmp_path / "labelmap.txt").write_text("background\nroad\n")
    (tmp_path / "label_map.txt").write_text('item {\n  id: 1\n  name: "road"\n}\n')
    assert (colors_of(data, None), class_names(data)) == (None, None)
    (tmp_path / "colors.txt").write_text("background 0 0 0\nroad 128 0 0\n")
    assert class_names(data) == ("background", "road")
    with pytest.raises(DataError, match=r"labelmap\.txt: names no colors"):
        colors_of(data, tmp_path / "labelmap.txt")


def test_files_of_colors_that_cannot_be_used(tmp_path: Path) -> None:
    for content, what in (
        ("name\n", "names no colors"),
        ("a 1 2 3\nb 1 2 3\n", "names a color or a class twice"),
        ("1 a 1 2 3\n1 b 1 2 4\n", "names a color or a class twice"),
    ):
        (tmp_path / "colors.txt").write_text(content)
        with pytest.raises(DataError, match=rf"colors\.txt: {what}, expected a line for each class"):
            read_colors(tmp_path / "colors.txt")
    (tmp_path / "colors.json").write_text("{")
    with pytest.raises(DataError, match=r"colors\.json: is no JSON"):
        read_colors(tmp_path / "colors.json")


def test_resampled_masks_get_a_hint(tmp_path: Path) -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = 255
    smooth = np.asarray(Image.fromarray(labels).resize((97, 97), Image.Resampling.BILINEAR))
    data = open_data(plant_pairs(tmp_path / "gray", [smooth.tolist()]))
    with pytest.raises(DataError, match=r"0\.png: has label .*; it looks resized with interpolation, .* nearest"):
        preflight(data, 2, LabelSettings())
    (tmp_path / "labelmap.txt").write_text("void:0,0,0::\nroad:127,0,0::\n")
    colored = np.stack([smooth // 2, 0 * smooth, 0 * smooth], axis=-1)
    with pytest.raises(DataError, match=r"does not name .*; it looks resized with interpolation: resize with nearest"):
        read_mask(save(colored, tmp_path / "a.png"), LabelRule(colors=read_colors(tmp_path / "labelmap.txt")))


def test_masks_of_more_classes_do_not_look_resampled(tmp_path: Path) -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[0, :12] = np.repeat([5, 6, 8], 4)
    data = open_data(plant_pairs(tmp_path, [labels.tolist()]))
    with pytest.raises(DataError, match=r"0\.png: has label 5, expected 0 to 4") as caught:
        preflight(data, 5, LabelSettings())
    assert "resized" not in str(caught.value)


def test_rules(tmp_path: Path) -> None:
    path = save(STORED, tmp_path / "a.png")
    assert read_mask(path, LabelRule(reduce=True)).tolist() == [[255, 0, 1], [148, 149, 255]]
    assert read_mask(path, LabelRule(ignore_index=-100, reduce=True, has_void=True)).tolist() == [
        [-100, 0, 1],
        [148, 149, -100],
    ]
    assert read_mask(path, LabelRule(ignore_index=0, has_void=True)).tolist() == [[0, 1, 2], [149, 150, 0]]
    assert read_mask(path, LabelRule(ignore_index=2)).tolist() == STORED.tolist()


def test_cityscapes_ids_become_train_ids(tmp_path: Path) -> None:
    ids = np.arange(36, dtype=np.uint8).reshape(6, 6)
    rule = LabelRule(has_void=True)
    mapped = read_mask(save(ids, tmp_path / "x_gtFine_labelIds.png"), rule).flatten().tolist()
    scored = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [mapped[stored] for stored in scored] == list(range(19))
    assert {mapped[stored] for stored in range(34) if stored not in scored} == {255}
    assert mapped[34:] == [34, 35]
    train_ids = save(STORED, tmp_path / "x_gtFine_labelTrainIds.png")
    assert read_mask(train_ids, rule).tolist() == STORED.tolist()


def test_check_labels_names_the_stored_value() -> None:
    labels_HW = torch.tensor([[0, 4, 255]])
    check_labels(labels_HW, 5, LabelRule(), Path("a.png"))
    with pytest.raises(DataError, match=r"a\.png: has label 4, expected 0 to 3 for 4 classes, or the ignored 255"):
        check_labels(labels_HW, 4, LabelRule(), Path("a.png"))
    with pytest.raises(DataError, match="has label 5, expected 1 to 4 for 4 classes, or the ignored 0"):
        check_labels(labels_HW, 4, LabelRule(reduce=True), Path("a.png"))


def test_preflight_of_good_pairs(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path, [[[0, 1], [255, 2]], [[1, 1], [255, 255]], [[255, 255]]]), labels=True)
    rule, found = preflight(data, 3, LabelSettings())
    assert rule == LabelRule()
    assert found == "3 pairs checked, 3 classes seen, labels as stored (labels are 0 to 2)"


def test_the_foreground_of_few_masks_is_found_beyond_the_sample(tmp_path: Path) -> None:
    masks = [[[0, 0]] for _ in range(70)]
    masks[next(k for k in range(70) if k not in sample(range(70), 64, 0))] = [[0, 255]]
    data = open_data(plant_pairs(tmp_path, masks))
    for rule, line in (preflight(data, 2, LabelSettings()), stored_rule(data, LabelSettings())):
        assert "255 is class 1" in line
        assert rule(torch.tensor([[0, 255]])).tolist() == [[0, 1]]


def test_preflight_reduces_where_labels_start_at_one(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path, [[[1, 2, 255]], [[2, 3, 1]]]))
    rule, found = preflight(data, 3, LabelSettings())
    assert rule.reduce
    assert found == "2 pairs checked, 3 classes seen, 0 ignored, the rest moved down by one (labels are 1 to 3)"
    with pytest.raises(DataError, match="has label 3, expected 0 to 2"):
        preflight(data, 3, LabelSettings(reduce_labels="no"))
    with pytest.raises(InputError, match="would be class 2 once labels are reduced"):
        preflight(data, 3, LabelSettings(reduce_labels="yes", ignore_index=2))


def test_preflight_leaves_one_label_too_many_to_the_user(tmp_path: Path) -> None:
    """0 .. K for K classes: it cannot be known whether 0 (ADE20K) or K (CamVid) is the unlabeled one."""
    data = open_data(plant_pairs(tmp_path, [[[0, 1]], [[2, 3]]]))
    with pytest.raises(DataError, match=r"1\.png: has label 3, expected 0 to 2 .*--ignore-index and --reduce-labels"):
        preflight(data, 3, LabelSettings())
    assert preflight(data, 3, LabelSettings(ignore_index=3)) == (
        LabelRule(ignore_index=3),
        "2 pairs checked, 3 classes seen, labels as stored (labels are 0 to 2)",
    )
    assert preflight(data, 3, LabelSettings(reduce_labels="yes"))[0].reduce


@pytest.mark.parametrize(("dtype", "most"), [(np.uint8, 255), (np.uint16, 65535)])
def test_preflight_takes_0_and_255_alone_for_two_classes(tmp_path: Path, dtype: type, most: int) -> None:
    mask = np.array([[0, most], [most, most]], dtype)
    save(mask, tmp_path / "masks/0.png")
    save(np.zeros((2, 2, 3), np.uint8), tmp_path / "images/0.jpg")
    data = open_data(tmp_path)
    rule, found = preflight(data, 2, LabelSettings())
    why = f"labels are 0 and {most} alone; --ignore-index {most} leaves it out"
    assert found == f"1 pairs checked, 2 classes seen, {most} is class 1 ({why})"
    assert read_mask(tmp_path / "masks/0.png", rule).tolist() == [[0, 1], [1, 1]]
    assert preflight(data, 2, LabelSettings(ignore_index=most))[0] == LabelRule(ignore_index=most)
    with pytest.raises(DataError, match=f"has label 1 where others have 0 and {most} alone; set --ignore-index {most}"):
        read_mask(save(mask.clip(0, 1), tmp_path / "other.png"), rule)
    same, found = preflight(data, 2, rule)
    assert (same, "ignored" in found) == (rule, False)


def test_preflight_says_that_the_foreground_of_a_second_split_is_ignored(tmp_path: Path) -> None:
    rule, _ = preflight(open_data(plant_pairs(tmp_path / "train", [[[0, 1]]])), 2, LabelSettings())
    found = preflight(open_data(plant_pairs(tmp_path / "val", [[[0, 255]]])), 2, rule)[1]
    assert found.endswith("labels as in the split that is trained on; 255 is ignored, as there, and all else is 0")


def test_preflight_of_0_and_255_alone_for_more_classes_says_that_255_is_ignored(tmp_path: Path) -> None:
    found = preflight(open_data(plant_pairs(tmp_path, [[[0, 255]]])), 3, LabelSettings())[1]
    assert found.endswith("(labels are 0 to 0; 255 is ignored: if it is a class, the network has to have two)")
    rule, found = preflight(open_data(plant_pairs(tmp_path, [[[0, 255, 1]]])), 2, LabelSettings())
    assert (rule, "255" in found) == (LabelRule(), False)


def test_preflight_follows_the_checkpoint_and_says_what_contradicts(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path, [[[0, 1, 2, 3]]]))
    rule, found = preflight(data, 3, LabelSettings(reduced_before=True))
    assert rule.reduce
    assert found.endswith("(as the checkpoint was trained; labels are 0 to 3)")
    with pytest.raises(DataError, match=r"has labels 0 to 3, while the checkpoint .* as stored; set --reduce-labels"):
        preflight(data, 3, LabelSettings(reduced_before=False))
    assert not preflight(data, 4, LabelSettings(reduced_before=False))[0].reduce
    assert not preflight(data, 4, LabelSettings(reduced_before=True, reduce_labels="no"))[0].reduce
    rule, found = preflight(
        open_data(plant_pairs(tmp_path / "before", [[[0, 1, 255]]])), 3, LabelSettings(reduced_before=True)
    )
    assert rule.reduce
    assert "and 255, as if reduced before: then set --reduce-labels no" in found


def test_preflight_says_that_an_ignored_class_is_left_out(tmp_path: Path) -> None:
    rule, found = preflight(open_data(plant_pairs(tmp_path, [[[0, 1, 2]]])), 3, LabelSettings(ignore_index=0))
    assert rule == LabelRule(ignore_index=0)
    assert found.endswith("; class 0 is ignored: neither scored nor part of the means")


def test_preflight_knows_ade20k(tmp_path: Path) -> None:
    save(np.array([[0, 5]], np.uint8), tmp_path / "annotations/training/a.png")
    save(np.zeros((1, 2, 3), np.uint8), tmp_path / "images/training/a.jpg")
    rule, found = preflight(open_data(tmp_path, labels=True), 150, LabelSettings())
    assert rule.reduce
    assert found.endswith("1 classes seen, 0 ignored, the rest moved down by one (ADE20K stores class c as c + 1)")
    assert not preflight(open_data(tmp_path), 151, LabelSettings())[0].reduce
    assert not stored_rule(open_data(tmp_path), LabelSettings())[0].reduce  # other data lies so, too
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    assert stored_rule(open_data(tmp_path), LabelSettings())[0].reduce
    (tmp_path / "objectInfo150.txt").unlink()
    save(np.array([[0, 149]], np.uint8), tmp_path / "annotations/training/a.png")
    assert stored_rule(open_data(tmp_path), LabelSettings())[0].reduce
    save(np.array([[255, 5]], np.uint8), tmp_path / "annotations/training/a.png")  # reduced by somebody before
    assert not preflight(open_data(tmp_path), 150, LabelSettings())[0].reduce


def test_preflight_ignores_the_borders_of_voc(tmp_path: Path) -> None:
    save(np.array([[0, 20, 255]], np.uint8), tmp_path / "SegmentationClass/a.png")
    save(np.zeros((1, 3, 3), np.uint8), tmp_path / "JPEGImages/a.jpg")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    rule, found = preflight(open_data(tmp_path, labels=True), 21, LabelSettings(ignore_index=0))
    assert rule == LabelRule(ignore_index=0, has_void=True)
    assert "1 classes seen, labels as stored (labels are 20 to 20)" in found


def test_preflight_refuses_bad_pairs(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path / "size", [[[0, 1]]]))
    save(np.zeros((4, 6), np.uint8), tmp_path / "size/masks/0.png")
    with pytest.raises(DataError, match=r"masks/0\.png: has another size than its image .* got 4x6, expected 1x2"):
        preflight(data, 2, LabelSettings())
    data = open_data(plant_pairs(tmp_path / "void", [[[255]], [[255, 255]]]))
    with pytest.raises(DataError, match=r"void: has no label that counts, every pixel of 2 masks is ignored"):
        preflight(data, 2, LabelSettings())
    data = open_data(plant_pairs(tmp_path / "missing", [[[0, 1]], [[1, 0]]]))
    (tmp_path / "missing/masks/1.png").unlink()
    with pytest.raises(DataError, match=r"1\.jpg: has no mask; 1 of 2"):
        preflight(open_data(tmp_path / "missing"), 2, LabelSettings())
    with pytest.raises(DataError, match=r"1\.png: cannot be read"):
        preflight(data, 2, LabelSettings())
    save(np.zeros((1, 2), np.uint8), tmp_path / "jpeg/masks/0.jpg")
    save(np.zeros((1, 2, 3), np.uint8), tmp_path / "jpeg/images/0.jpg")
    with pytest.raises(DataError, match="is a JPEG"):
        preflight(open_data(tmp_path / "jpeg"), 2, LabelSettings())


def plant_turned(root: Path, orientation: int, *, size: tuple[int, int], drawn_on: str) -> np.ndarray:
    """A picture that is stored turned, and its mask without a word about it; the mask as it is upright."""
    upright = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 7
    exif = Image.Exif()
    exif[0x0112] = orientation
    backward = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's names of what undoes each
    stored = Image.fromarray(upright).transpose(Image.Transpose(backward[orientation]))
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    stored.convert("RGB").save(root / "images/a.jpg", exif=exif)
    (stored if drawn_on == "stored" else Image.fromarray(upright)).save(root / "masks/a.png")
    return upright


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_masks_are_turned_as_their_images(tmp_path: Path, orientation: int, drawn_on: str) -> None:
    upright = plant_turned(tmp_path, orientation, size=(16, 24), drawn_on=drawn_on)
    data = open_data(tmp_path, labels=True)
    image, mask = data.with_masks()[0]
    if orientation < 5:  # nothing tells
        with pytest.raises(
            DataError, match=rf"a\.png: has no EXIF .* a\.jpg has {orientation}: .*--masks-drawn-on upright"
        ):
            preflight(data, 7, LabelSettings())
    rule, found = preflight(data, 7, LabelSettings(drawn_on="auto" if orientation > 4 else drawn_on))
    assert rule.drawn_on == drawn_on
    which = {"upright": "drawn on the upright image", "stored": "turned as their images are"}[drawn_on]
    assert found.endswith(f"; 1 masks lack the EXIF orientation of their images and are taken as {which}")
    assert read_mask(mask, rule, image).tolist() == upright.tolist()


def test_the_orientation_of_a_mask_itself_is_applied(tmp_path: Path) -> None:
    upright = plant_turned(tmp_path, 3, size=(16, 24), drawn_on="stored")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "masks/a.png").save(tmp_path / "masks/a.png", exif=exif)
    data = open_data(tmp_path, labels=True)
    rule, found = preflight(data, 7, LabelSettings())
    assert "EXIF" not in found
    assert read_mask(data.with_masks()[0][1], rule, data.with_masks()[0][0]).tolist() == upright.tolist()


def test_class_names_from_files(tmp_path: Path) -> None:
    data = open_data(plant_pairs(tmp_path, [[[0, 1]]]))
    assert class_names(data) is None
    (tmp_path / "classes.txt").write_text("\ufeffroad\n traffic light \n\n")
    assert class_names(data) == ("road", "traffic light")
    listed = [{"title": "a", "shape": "polygon", "color": "#50E3C2"}, {"title": "b", "color": "#F5A623"}]
    for content in (["a", "b"], {"1": "b", "0": "a"}, {"id2label": {"0": "a", "1": "b"}}, listed, {"classes": listed}):
        (tmp_path / "names.json").write_text(json.dumps(content))
        assert read_class_names(tmp_path / "names.json") == ("a", "b")
    for content in ("{", '{"0": "a", "2": "b"}', "[1, 2]", '"a"'):
        (tmp_path / "names.json").write_text(content)
        with pytest.raises(DataError, match=r"names\.json: cannot be read as class names"):
            read_class_names(tmp_path / "names.json")
    (tmp_path / "classes.txt").write_text("road\n\nsky\n")
    with pytest.raises(DataError, match=r"classes\.txt: leaves a class without a name"):
        class_names(data)
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read \(No such file or directory\)"):
        read_class_names(tmp_path / "absent.txt")
    (tmp_path / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n")  # Roboflow's
    assert read_class_names(tmp_path / "_classes.csv") == ("background", "cat")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: is not UTF-8 text"):
        read_class_names(tmp_path / "latin.txt")


def test_class_names_of_known_layouts(tmp_path: Path) -> None:
    save(STORED, tmp_path / "city/leftImg8bit/val/ulm/a_leftImg8bit.png")
    names = class_names(open_data(tmp_path / "city"))
    assert names is not None
    assert (len(names), names[0], names[18]) == (19, "road", "bicycle")
    save(STORED, tmp_path / "voc/JPEGImages/a.jpg")
    names = class_names(open_data(tmp_path / "voc"))
    assert names is not None
    assert (len(names), names[15]) == (21, "person")
    ade = tmp_path / "ade/ADEChallengeData2016"
    save(STORED, ade / "images/training/a.jpg")
    save(STORED, ade / "annotations/training/a.png")
    assert class_names(open_data(tmp_path / "ade")) is None
    (ade / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n2\t0.1\t9\t9\t1\tbuilding, edifice\n"
    )
    assert class_names(open_data(tmp_path / "ade")) == ("wall", "building")
