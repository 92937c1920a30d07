"""Tables of `datasets`, local ones: columns, splits, cells that open like files, and what is refused."""

import io
import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from equalize.data.classes import class_names
from equalize.data.dataset import DataSet, open_data, sample
from equalize.data.images import read_image
from equalize.data.label_check import LabelSettings, preflight
from equalize.data.loader import Batches
from equalize.data.masks import LabelRule, read_mask
from equalize.errors import DataError, ResourceError

PICTURES = Features(image=ImageFeature(), label=ImageFeature())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes | None) -> dict | None:
    return None if data is None else {"bytes": data, "path": None}


def rows(count: int, first: int = 0) -> list[dict]:
    """Images of 4 x 6 filled with the row's number, masks filled with it modulo 3."""
    return [
        {
            "image": stored(encoded(np.full((4, 6, 3), number, np.uint8))),
            "label": stored(encoded(np.full((4, 6), number % 3, np.uint8))),
        }
        for number in range(first, first + count)
    ]


def table(count: int = 3, first: int = 0) -> Dataset:
    return Dataset.from_list(rows(count, first), features=PICTURES)


def write_columns(path: Path, *names: str, **others: list[object]) -> None:
    """A parquet file of one row with pictures in the named columns, beside a caption and others."""
    picture = [stored(encoded(np.zeros((1, 2), np.uint8)))]
    written = Dataset.from_dict({**dict.fromkeys(names, picture), "caption": ["a street"], **others})
    for name in names:
        written = written.cast_column(name, ImageFeature())
    written.to_parquet(path)


def numbers(dataset: DataSet) -> list[int]:
    return [np.asarray(read_image(item))[0, 0, 0] for item in dataset.images]


def test_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "street.parquet"
    table().to_parquet(path)
    data = open_data(path, labels=True)
    assert (data.layout, data.split, data.pairs) == ("table", None, 3)
    assert data.describe() == f"{path}: table layout, columns image and label, no splits, 3 images, 3 pairs"
    assert numbers(data) == [0, 1, 2]
    assert [read_mask(mask, LabelRule()).unique().tolist() for mask in data.masks if mask] == [[0], [1], [2]]
    assert str(data.images[1]) == f"{path}[1].image"
    assert data.fingerprint() == open_data(path).fingerprint()
    with pytest.raises(DataError, match=r"street\.parquet: has no split 'val' .*leave --split away"):
        open_data(path, split="val")


def test_an_arrow_file_and_a_saved_data_set(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    saved = open_data(tmp_path / "saved", labels=True)
    assert (saved.layout, saved.split, numbers(saved)) == ("table", None, [0, 1, 2])
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert numbers(open_data(arrow)) == [0, 1, 2]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.arrow").write_bytes(arrow.read_bytes())
    assert numbers(open_data(tmp_path / "plain")) == [0, 1, 2]
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert open_data(tmp_path / "moved").fingerprint() == saved.fingerprint()
    table(3, first=1).save_to_disk(tmp_path / "other")
    assert open_data(tmp_path / "other").fingerprint() != saved.fingerprint()


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    DatasetDict(train=table(2), validation=table(1, 5), test=table(1, 7)).save_to_disk(tmp_path)
    assert (open_data(tmp_path).split, numbers(open_data(tmp_path))) == ("train", [0, 1])
    scored = open_data(tmp_path, labels=True)
    assert (scored.split, numbers(scored)) == ("validation", [5])
    assert numbers(open_data(tmp_path, split="val")) == [5]
    assert str(scored.masks[0]) == f"{tmp_path} validation[0].label"
    assert scored.fingerprint() != open_data(tmp_path).fingerprint()
    with pytest.raises(DataError, match=r"no split 'nope' \(table layout\), expected one of train, validation, test"):
        open_data(tmp_path, split="nope")


def test_pictures_of_16_bits_keep_one_scale_in_all_splits(tmp_path: Path) -> None:
    def of(value: int) -> Dataset:
        row = {"image": stored(encoded(np.full((4, 6), value, np.uint16))), "label": rows(1)[0]["label"]}
        return Dataset.from_list([row], features=PICTURES)

    DatasetDict(train=of(4000), validation=of(900)).save_to_disk(tmp_path)
    assert numbers(open_data(tmp_path)) == [4000 >> 4]
    assert numbers(open_data(tmp_path, labels=True)) == [900 >> 4]  # of 12 bits, as in training


@pytest.mark.parametrize(
    ("train", "val", "split"),
    [
        ("data/train-00000-of-00001.parquet", "data/fold_b-00000-of-00001.parquet", "fold_b"),
        ("train-00000-of-00001.parquet", "street_val.parquet", "validation"),
        ("training/0.parquet", "valid/deep/er/0.parquet", "validation"),
    ],
)
def test_splits_of_parquet_files_by_their_names(tmp_path: Path, train: str, val: str, split: str) -> None:
    for name, first in ((train, 0), (val, 5)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table(2, first).to_parquet(tmp_path / name)
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "road", "1": "sky"}))
    assert (open_data(tmp_path).split, numbers(open_data(tmp_path))) == ("train", [0, 1])
    found = open_data(f"{tmp_path}:label=label", split=split)
    assert (found.split, numbers(found)) == (split, [5, 6])
    assert class_names(found) == ("road", "sky")


def test_configurations_of_a_copy_of_a_data_set_on_the_hub(tmp_path: Path) -> None:
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("summer", "winter"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    Image.new("L", (4, 4)).save(tmp_path / "preview.png")
    for name, first in (("summer", 0), ("winter", 5)):
        (tmp_path / name).mkdir()
        table(2, first).to_parquet(tmp_path / name / "0.parquet")
    assert numbers(open_data(f"{tmp_path}:config=winter", labels=True)) == [5, 6]
    with pytest.raises(DataError, match=r"Config name is missing.*; name one: .*:config=NAME$"):
        open_data(tmp_path)


def test_what_is_told_about_images_is_no_table(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"about a.png")
    assert open_data(tmp_path).layout == "images"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_read_cells(tmp_path: Path, workers: int) -> None:
    table(5).to_parquet(tmp_path / "a.parquet")
    data = open_data(tmp_path / "a.parquet")
    assert sample(data.images, 2, seed=1) == sample(open_data(tmp_path / "a.parquet").images, 2, seed=1)

    def red(image, size):
        return torch.full((3, 2, 2), float(np.asarray(image)[0, 0, 0]))

    found = list(Batches(data.images, red, batch_size=2, workers=workers))
    assert [batch.images[:, 0, 0, 0].tolist() for batch in found] == [[0, 1], [2, 3], [4]]
    assert tuple(item for batch in found for item in batch.paths) == data.images


def test_cells_pickle_without_the_pictures(tmp_path: Path) -> None:
    """For workers that are spawned: the table travels once, by the names of its files."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    one = {"image": stored(encoded(noise)), "label": stored(encoded(noise[..., 0]))}
    Dataset.from_list([one] * 50, features=PICTURES).to_parquet(tmp_path / "a.parquet")
    images = open_data(tmp_path / "a.parquet").images
    packed = pickle.dumps(images)
    assert len(packed) < 10_000 < len(encoded(noise))
    assert np.array_equal(read_image(pickle.loads(packed)[49]), noise)


def test_pictures_are_converted_as_those_of_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    deep = encoded(np.array([[0x1234, 0xFF00]], np.uint16))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    for number, data in enumerate((turned, deep, encoded(palette))):
        (tmp_path / f"{number}.img").write_bytes(data)
    listed = [{"image": stored(data), "label": stored(data)} for data in (turned, deep, encoded(palette))]
    Dataset.from_list(listed, features=PICTURES).save_to_disk(tmp_path / "saved")
    data = open_data(tmp_path / "saved")
    for number, item in enumerate(data.images):
        assert np.array_equal(read_image(item), read_image(tmp_path / f"{number}.img"))
    assert read_image(data.images[0]).size == (4, 6)
    jpeg, deep_mask, palette_mask = data.masks
    assert deep_mask is not None
    assert palette_mask is not None
    assert read_mask(deep_mask, LabelRule()).tolist() == [[0x1234, 0xFF00]]
    assert read_mask(palette_mask, LabelRule()).tolist() == [[0, 1]]
    assert jpeg is not None
    with pytest.raises(DataError, match=r"saved\[0\]\.label: is a JPEG"):
        read_mask(jpeg, LabelRule())


def test_pictures_from_pil_keep_their_indices(tmp_path: Path) -> None:
    """As users write them: `datasets` itself encodes, palettes as TIFF."""
    palette = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    palette.putpalette(list(range(256)) * 3)
    wide = Image.fromarray(np.array([[0, 7, 255]], np.int32))
    shown = Image.new("RGB", (3, 1))
    listed = [{"image": shown, "label": palette}, {"image": shown, "label": wide}]
    Dataset.from_list(listed, features=PICTURES).to_parquet(tmp_path / "a.parquet")
    data = open_data(tmp_path / "a.parquet", labels=True)
    assert [read_mask(mask, LabelRule()).tolist() for mask in data.masks if mask] == [[[0, 7, 255]]] * 2


def test_files_outside_the_table_are_opened(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "a.png")
    listed = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "gone.png")]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(pyarrow.table({"image": pyarrow.array(listed, kind)}), tmp_path / "a.parquet")
    first, second = open_data(f"{tmp_path / 'a.parquet'}:image=image").images
    assert np.asarray(read_image(first)).tolist() == [[[9, 9, 9]] * 2] * 2
    with pytest.raises(DataError, match=r"\[1\]\.image: cannot be read as an image \(No such file"):
        read_image(second)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["image", "annotation"], ("image", "annotation")),
        (["pixel_values", "label", "depth"], ("pixel_values", "label")),
        (["segmentation_mask", "rgb"], ("rgb", "segmentation_mask")),
        (["img", "target"], ("img", "target")),
        (["Image", "Mask"], ("Image", "Mask")),
    ],
)
def test_columns_are_found(tmp_path: Path, names: list[str], expected: tuple[str, str]) -> None:
    write_columns(tmp_path / "a.parquet", *names)
    assert f"columns {' and '.join(expected)}," in open_data(tmp_path / "a.parquet", labels=True).describe()


def test_columns_that_are_not_clear(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_columns(path, "image", "mask", "annotation")
    assert open_data(path).masks == ()
    with pytest.raises(
        DataError,
        match=r"has several columns that may hold labels: mask, annotation; choose one: .*a.parquet:label=mask$",
    ):
        open_data(path, labels=True)
    write_columns(path, "image", "img")
    with pytest.raises(DataError, match="several columns that may hold images: image, img"):
        open_data(path)
    write_columns(path, "image", label=[3])
    assert open_data(path).describe().endswith("column image, no splits, 1 image")
    with pytest.raises(
        DataError, match=r"no column of labels, got image \(Image\), caption \(string\), label \(int64\)"
    ):
        open_data(path, labels=True)
    write_columns(path)
    with pytest.raises(DataError, match=r"has no column of images, got caption \(string\)"):
        open_data(path)


def test_columns_that_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_columns(path, "image", "img", "mask", "parts")
    chosen = open_data(f"{path}:image=img,label=parts", labels=True)
    assert "columns img and parts," in chosen.describe()
    assert chosen.name == "a.parquet:image=img,label=parts"
    assert chosen.fingerprint() != open_data(f"{path}:image=image,label=parts", labels=True).fingerprint()
    assert "columns mask and parts," in open_data(f"{path}:label=parts,image=mask", labels=True).describe()
    assert "columns img and mask," in open_data(f"{tmp_path}:image=img", labels=True).describe()
    assert open_data(f"{path}:image=img,label=parts", labels=True).root == Path(f"{path}:image=img,label=parts")
    for words, message in [
        (f"{path}:image=caption", r"has no such column of pictures, got caption, expected image \(Image\), img"),
        (f"{path}:split=val", "no such folder"),
    ]:
        with pytest.raises(DataError, match=message):
            open_data(words)
    Image.new("RGB", (2, 1)).save(tmp_path / "b.png")
    path.unlink()
    with pytest.raises(DataError, match="has no columns to choose from"):
        open_data(f"{tmp_path}:image=img")


def test_columns_of_undeclared_bytes_are_used_where_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    shown, labels = np.full((1, 2, 3), 9, np.uint8), np.array([[0, 1]], np.uint8)
    parquet.write_table(pyarrow.table({"image": [encoded(shown)], "label": [encoded(labels)]}), path)
    with pytest.raises(
        DataError,
        match=r"has no column of images, got image \(binary\), label \(binary\), expected .* name .*:image=COLUMN$",
    ):
        open_data(path)
    with pytest.raises(DataError, match=r"has no column of labels, .*a\.parquet:label=COLUMN$"):
        open_data(f"{path}:image=image", labels=True)
    data = open_data(f"{path}:image=image,label=label", labels=True)
    assert np.array_equal(read_image(data.images[0]), shown)
    assert [read_mask(mask, LabelRule()).tolist() for mask in data.masks if mask] == [[[0, 1]]]


def test_missing_cells_are_named(tmp_path: Path) -> None:
    listed = rows(3)
    listed[1]["label"] = None
    listed[2]["image"] = None
    Dataset.from_list(listed, features=PICTURES).to_parquet(tmp_path / "a.parquet")
    data = open_data(tmp_path / "a.parquet")
    assert (len(data.images), data.pairs) == (3, 2)
    with pytest.raises(DataError, match=r"a\.parquet\[1\]\.image: has no mask; 1 of 3 images"):
        open_data(tmp_path / "a.parquet", labels=True)
    with pytest.raises(DataError, match=r"a\.parquet\[2\]\.image: is empty"):
        read_image(data.images[2])


def test_damaged_cells_are_named(tmp_path: Path) -> None:
    good = encoded(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8))
    listed = [{"image": stored(data)} for data in (b"no picture", b"", good[: len(good) // 2])]
    Dataset.from_list(listed, features=Features(image=ImageFeature())).to_parquet(tmp_path / "a.parquet")
    first, second, third = open_data(tmp_path / "a.parquet").images
    with pytest.raises(DataError, match=r"a\.parquet\[0\]\.image: is not an image of a known format"):
        read_image(first)
    with pytest.raises(DataError, match=r"\[1\]\.image: is not an image of a known format"):
        read_image(second)
    with pytest.raises(DataError, match=r"\[2\]\.image: "):
        read_image(third)


def test_preflight_reads_cells(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "a.parquet")
    data = open_data(tmp_path / "a.parquet", labels=True)
    assert (
        preflight(data, 3, LabelSettings())[1]
        == "6 pairs checked, 3 classes seen, labels as stored (labels are 0 to 2)"
    )
    with pytest.raises(DataError, match=r"a\.parquet\[2\]\.label: has label 2, expected 0 to 1"):
        preflight(data, 2, LabelSettings())
    listed = rows(1)
    listed[0]["label"] = stored(encoded(np.zeros((3, 3), np.uint8)))
    Dataset.from_list(listed, features=PICTURES).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"another size than its image \[0\]\.image .* got 3x3, expected 4x6"):
        preflight(open_data(tmp_path / "b.parquet"), 3, LabelSettings())


def test_what_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as a data set \(Parquet magic bytes not found"):
        open_data(path)
    arrow = tmp_path / "a.arrow"
    arrow.write_bytes(b"no arrow at all")
    with pytest.raises(DataError, match=r"a\.arrow: cannot be read as a data set"):
        open_data(arrow)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="saved: cannot be read as a data set"):
        open_data(tmp_path / "saved")
    parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), path)
    with pytest.raises(DataError, match=r"a\.parquet: "):
        open_data(path)
    with pytest.raises(DataError, match=r"b\.parquet: no such folder"):
        open_data(tmp_path / "b.parquet")


def test_without_the_library(tmp_path: Path, monkeypatch) -> None:
    table().to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (tmp_path / "a.parquet", "acme/streets"):
        with pytest.raises(ResourceError, match=r"cannot be read without the library datasets; pip install equalize\["):
            open_data(name)


def test_values_that_are_no_pictures_do_not_count(tmp_path: Path) -> None:
    features = Features(**PICTURES, image_id=Value("int32"))
    Dataset.from_list([{**row, "image_id": 1} for row in rows(1)], features=features).save_to_disk(tmp_path / "a")
    assert open_data(tmp_path / "a", labels=True).pairs == 1
