"""Everything a user can get wrong: one line on stderr, nothing on stdout, the exit code, and no OUT."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


class _Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def place(tmp_path_factory, segformer_dir, photos):
    """A folder with one of everything that is damaged."""
    place = tmp_path_factory.mktemp("bad")
    (place / "text.json").write_text("not JSON")
    (place / "other.json").write_text("[]")
    torch.save({"state_dict": {"odd.weight": torch.zeros(3)}}, place / "odd.pth")
    (place / "cut.pth").write_bytes((place / "odd.pth").read_bytes()[:300])
    torch.save(_Code(), place / "code.pth")
    for name in ("nan", "cut", "mismatch", "keys"):
        shutil.copytree(segformer_dir, place / name)
    state = load_file(segformer_dir / "model.safetensors")
    weight = "decode_head.linear_fuse.weight"
    save_file({**state, weight: state[weight] * float("nan")}, place / "nan/model.safetensors", {"format": "pt"})
    save_file({**state, weight: state[weight][:1].clone()}, place / "mismatch/model.safetensors", {"format": "pt"})
    del state[weight]
    save_file(state, place / "keys/model.safetensors", {"format": "pt"})
    (place / "cut/model.safetensors").write_bytes((segformer_dir / "model.safetensors").read_bytes()[:9000])
    for name, config in {
        "remote": {"model_type": "x", "auto_map": {"AutoModel": "m.M"}},
        "type": {"model_type": "x"},
    }.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
    (place / "no_files").mkdir()
    (place / "no_images").mkdir()
    (place / "no_images/note.txt").write_text("none")
    shutil.copytree(photos, place / "photos")
    shutil.copytree(photos, place / "truncated")
    (place / "truncated/2.png").write_bytes((photos / "2.png").read_bytes()[:60])
    (place / "existing").mkdir()
    (place / "existing/file").touch()
    (place / "existing/c.yaml").write_text("lr: 1")
    shutil.copytree(segformer_dir, place / "segformer")
    shutil.copytree(segformer_dir, place / "equalized")
    (place / "equalized/equalize.json").write_text('{"schema": 1, "strategy": "migrate"}')
    return place


SCAN = [
    ("scan", 2, "equalize scan: missing argument 'MODEL'"),
    ("scan missing", 2, "missing: no such file or directory"),
    ("scan not/there", 3, "not/there: "),
    ("scan cut.pth", 2, "cut.pth: is truncated"),
    ("scan code.pth", 2, "code.pth: its pickle asks for 'posix.system'"),
    ("scan odd.pth", 2, "odd.pth: state dict fits no known architecture"),
    ("scan remote", 2, "remote/config.json: asks for code"),
    ("scan type", 2, "type/config.json: is not a valid config ("),
    ("scan no_files", 2, "no_files: holds no weights"),
    ("scan torchvision:nothing", 2, "torchvision:nothing: "),
    ("scan segformer --size 7", 2, "--size: is too small"),
    ("scan segformer --size large", 2, "--size: is no size, got 'large'"),
    ("scan segformer --size 64x64x64", 2, "--size: is no size"),
    ("scan segformer --size 64 --input-shape 1,3,64,64", 2, "--input-shape: cannot stand with --size"),
    ("scan segformer --input-shape 1,a", 2, "--input-shape: is no shape, got '1,a'"),
    ("scan segformer --input-shape 3,64", 2, "SegformerForSemanticSegmentation: cannot be traced"),
    ("scan segformer --samples 3", 2, "--samples: needs --data"),
    ("scan segformer --mean none", 2, "--mean: needs --data"),
    ("scan segformer --colors none", 2, "--colors: needs --data"),
    ("scan segformer --masks-drawn-on stored", 2, "--masks-drawn-on: needs --data"),
    ("scan segformer --ignore-index 0", 2, "--ignore-index: needs --data"),
    ("scan segformer --optimizer sgd", 2, "--optimizer: needs --data"),
    ("scan segformer --arch-arg width", 2, "--arch-arg: is no argument, got 'width'"),
    ("scan segformer --arch-arg width=1", 2, "--arch-arg: needs --arch"),
    ("scan segformer --unknown", 2, "equalize scan: no such option: --unknown"),
    ("scan segformer another", 2, "equalize scan: got unexpected extra argument"),
    ("fly", 2, "equalize: no such command 'fly'"),
]
CALIBRATE = [
    ("calibrate segformer -o OUT", 2, "equalize calibrate: missing option '--data'"),
    ("calibrate segformer --data photos", 2, "equalize calibrate: missing option '-o'"),
    ("calibrate nan --data photos -o OUT", 4, "nan: tensor 'decode_head.linear_fuse.weight' holds 2"),
    ("calibrate cut --data photos -o OUT", 2, "cut/model.safetensors: is truncated"),
    ("calibrate mismatch --data photos -o OUT", 2, "mismatch: does not fit SegformerForSemanticSegmentation"),
    ("calibrate keys --data photos -o OUT", 2, "keys: does not fit SegformerForSemanticSegmentation"),
    ("calibrate segformer --data missing -o OUT", 2, "missing: no such folder"),
    ("calibrate segformer --data no_files -o OUT", 2, "no_files: no images found in 0 files"),
    ("calibrate segformer --data no_images -o OUT", 2, "no_images: no images found in 1 file"),
    ("calibrate segformer --data photos -o OUT --split val", 2, "photos: has no split 'val'"),
    ("calibrate segformer --data truncated -o OUT", 2, "truncated/2.png: cannot be read as an image"),
    (
        "calibrate segformer --data photos -o OUT --strategy best",
        2,
        "--strategy: 'best' is not one of 'auto', 'migrate'",
    ),
    (
        "calibrate segformer --data photos -o OUT --sites none*",
        2,
        "--sites: matches no fusion layer: none*, expected one of: decode_head.linear_fuse",
    ),
    ("calibrate segformer --data photos -o OUT --samples 0", 2, "--samples: no image would be read, got '0'"),
    ("calibrate segformer --data photos -o OUT --samples many", 2, "--samples: no image would be read"),
    ("calibrate segformer --data photos -o OUT --tolerance 1", 2, "--tolerance: is no relative precision"),
    ("calibrate segformer --data photos -o OUT --tolerance nan", 2, "--tolerance: is no relative precision"),
    ("calibrate segformer --data photos -o OUT --size 7", 2, "--size: is too small"),
    ("calibrate segformer --data photos -o OUT --batch-size 0", 2, "--batch-size: "),
    ("calibrate segformer --data photos -o OUT --skip-bad 2", 2, "--skip-bad: "),
    ("calibrate segformer --data photos -o OUT --num-classes 0", 2, "--num-classes: "),
    ("calibrate segformer --data photos -o OUT --num-classes 9", 2, "segformer: does not fit"),
    ("calibrate segformer --data photos -o OUT --precision fp8", 2, "--precision: "),
    ("calibrate segformer --data photos -o OUT --device toaster", 2, "--device: is no device, got toaster"),
    ("calibrate segformer --data photos -o existing", 2, "existing: exists; --overwrite replaces it"),
    ("calibrate segformer --data existing -o existing --overwrite", 2, "existing: is read itself"),
    ("finetune segformer --data existing/file -o existing --overwrite", 2, "existing: holds existing/file"),
    ("finetune segformer --data s --config existing/c.yaml -o existing --overwrite", 2, "existing: holds existing/c"),
    ("calibrate segformer --data photos -o segformer", 2, "segformer: is read itself"),
    ("calibrate segformer --data photos -o segformer/out", 2, "segformer/out: lies in segformer, which is read"),
    ("calibrate equalized --data photos -o OUT", 2, "equalized: is already equalized (strategy migrate)"),
]
OTHERS = [
    ("apply missing.json segformer -o OUT", 2, "missing.json: does not exist"),
    ("apply text.json segformer -o OUT", 2, "text.json: cannot be read as JSON"),
    ("apply other.json segformer -o OUT", 2, "other.json: is no plan"),
    ("verify segformer --against segformer", 2, "segformer/equalize.json: does not exist"),
    ("verify equalized", 2, "equalize verify: missing option '--against'"),
    ("verify equalized --against segformer --size 64", 2, "--size: needs --data"),
]


@pytest.mark.parametrize(("line", "code", "begins"), SCAN + CALIBRATE + OTHERS, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line(run_cli, place, monkeypatch, line, code, begins):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    ran = run_cli(*line.split(), *([] if line == "fly" else ["--json"]))
    message = ran.err.replace(f"{place}/", "")
    assert message.startswith(f"error: {begins}"), ran.err
    assert (ran.err.count("\n"), ran.out, ran.code) == (1, "", code)
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(run_cli, segformer_dir, photos, tmp_path):
    ran = run_cli("calibrate", segformer_dir, "--data", photos, "-o", tmp_path / "out", "--device", "cuda")
    assert (ran.code, ran.err) == (3, "error: --device: there is no cuda device here; use --device cpu\n")


def test_debug_shows_the_traceback_before_the_line(run_cli):
    ran = run_cli("--debug", "scan", "missing")
    assert ran.code == 2
    assert ran.err.startswith("Traceback (most recent call last):")
    assert ran.err.endswith("error: missing: no such file or directory\n")
