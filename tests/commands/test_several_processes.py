"""The same command in several processes: one result to the last bit, one voice, one end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.commands import run_together
from tests.support.networks import save_code

NETWORK = """
import os, pathlib, time, torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    '''Two fusion layers, one behind the other; as many BatchNorms in a row as asked for.'''

    def __init__(self, norms=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(nn.BatchNorm2d(4) for _ in range(norms)))
        self.deep = nn.Conv2d(4, 6, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(10, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.last = nn.Conv2d(9, 3, 1)

    def forward(self, x):
        if type(x) is torch.Tensor and os.environ.get("RANK") == STALLS:
            pathlib.Path(MARKER).touch()
            time.sleep(60)
        x = x / x.std((2, 3), keepdim=True)  # not a number where an image has but one color
        stem = self.stem(x).relu()
        deep = self.deep(F.max_pool2d(stem, 2))
        first = self.first(torch.cat([F.interpolate(deep, stem.shape[2:], mode="bilinear"), stem], 1))
        pooled = F.avg_pool2d(first, 2)
        return self.last(torch.cat([F.interpolate(pooled, stem.shape[2:], mode="bilinear"), stem], 1))
"""


def network(folder: Path, *, stalls: str = "none", **arguments: int) -> tuple[object, ...]:
    """MODEL and its flags."""
    code = NETWORK.replace("STALLS", repr(stalls)).replace("MARKER", repr(str(folder / "marker")))
    name = save_code(code, folder, **arguments)
    flags = [each for key, value in arguments.items() for each in ("--arch-arg", f"{key}={value}")]
    return (name.source, "--arch", name.arch, *flags)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 43 images, some of them upright, the sixth unreadable. Read only."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(3)
    for index in range(43):
        pixels = (torch.rand(4, 6, 3, generator=generator) * 255).to(torch.uint8).numpy()
        sides = (24, 36) if index % 4 == 3 else (36, 24)
        Image.fromarray(pixels).resize(sides).save(folder / f"{index:02}.png")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    return folder


def contents(directory: Path) -> tuple[dict, bytes]:
    """To the last bit: every process runs the same kernels on a batch, and results are merged in one order."""
    plan = json.loads((directory / "equalize.json").read_text())
    for key in ("seconds", "output"):
        del plan[key]
    return plan, (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "norms", "numbers", "images"),
    [
        (("--strategy", "rescale"), 1, (1, 3), 42),  # blocks of eight, sizes apart; norms without data one by one
        pytest.param(  # blocks of two; norms that share a pass
            *(("--strategy", "reinit", "--size", "24"), 16, (1, 2, 4), 42), marks=pytest.mark.slow
        ),
        (("--strategy", "migrate", "--size", "24", "--tolerance", "0.3", "--seed", "2"), 1, (1, 2), None),
    ],
)
def test_any_number_of_processes_makes_the_same_plan(pictures, tmp_path, flags, norms, numbers, images):
    model = network(tmp_path, norms=norms)
    arguments = ("calibrate", *model, "--data", pictures, *flags, "--batch-size", 2, "--skip-bad", "0.1", "--json")
    found = []
    for number in numbers:
        main, *others = run_together(number, *arguments, "-o", tmp_path / str(number))
        assert main.code == 0, main.err
        assert all((each.code, each.out, each.err) == (0, "", "") for each in others)
        assert json.loads(main.out)["output"] == str(tmp_path / str(number))
        found.append(contents(tmp_path / str(number)))
    plan, _ = found[0]
    assert all(each == found[0] for each in found)
    if images is None:  # stopped early, after whole rounds
        assert (plan["images"], plan["samples"]) == (32, 43)
        assert plan["converged"]
    else:
        assert (plan["images"], plan["skipped"]) == (images, 1)


def test_scan_shares_the_images_too(pictures, tmp_path):
    arguments = ("scan", *network(tmp_path), "--data", pictures, "--size", 24, "--skip-bad", "0.1", "--json")
    (alone,) = run_together(1, *arguments)
    main, other = run_together(2, *arguments)
    assert json.loads(main.out) == json.loads(alone.out)
    assert (other.code, other.out, other.err) == (0, "", "")


def test_an_image_that_one_process_cannot_read_ends_all(pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for index, path in enumerate(sorted(pictures.iterdir())):
        (data / f"{index:02}.png").write_bytes(path.read_bytes())
    (data / "05.png").write_bytes((data / "06.png").read_bytes())
    (data / "12.png").write_bytes((data / "00.png").read_bytes()[:60])  # in the second process's second block
    arguments = ("calibrate", *network(tmp_path), "--data", data, "--size", 24, "-o", tmp_path / "out")
    ended = run_together(2, *arguments, "--batch-size", 4)
    assert [each.code for each in ended] == [2, 2]
    lines = [line for each in ended for line in each.err.splitlines()]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {data / '12.png'}: cannot be read")
    assert max(each.seconds for each in ended) < 30
    assert not (tmp_path / "out").exists()


def test_too_many_bad_images_are_counted_over_all_processes(pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in pictures.iterdir():
        bad = path.stem in {"02", "05", "08"}  # allowed: two
        (data / path.name).write_bytes(path.read_bytes()[:60] if bad else path.read_bytes())
    arguments = ("calibrate", *network(tmp_path), "--data", data, "--size", 24, "-o", tmp_path / "out")
    for number in (1, 3):
        ended = run_together(number, *arguments, "--batch-size", 3, "--skip-bad", "0.04", "--tolerance", "0")
        assert [each.code for each in ended] == [2] * number
        assert "08.png: is bad image number 3 of 43" in "".join(each.err for each in ended)
        assert sum(len(each.err.splitlines()) for each in ended) == 1


def test_a_number_that_is_none_in_one_process_ends_all(pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in pictures.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (24, 24), "red").save(data / "05.png")
    ended = run_together(
        *(2, "calibrate", *network(tmp_path), "--data", data, "--size", 24, "-o", tmp_path / "out"),
        *("--batch-size", 4, "--strategy", "migrate"),
    )
    assert [each.code for each in ended] == [4, 4]
    (line,) = [line for each in ended for line in each.err.splitlines()]
    assert "05.png" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_others(pictures, tmp_path, killed):
    """Also where no launcher looks after them."""
    ended = run_together(
        *(3, "calibrate", *network(tmp_path, stalls=str(killed)), "--data", pictures, "--size", 24),
        *("-o", tmp_path / "out", "--skip-bad", "0.1"),
        kill=(killed, signal.SIGKILL),
        marker=tmp_path / "marker",
    )
    rest = [each for rank, each in enumerate(ended) if rank != killed]
    assert ended[killed].code == -signal.SIGKILL
    assert [each.code for each in rest] == [3, 3]
    assert "error: another process: is gone" in "".join(each.err for each in rest)
    assert max(each.seconds for each in rest) < 20
    assert not (tmp_path / "out").exists()


def test_interrupted_together_they_say_so_once(pictures, tmp_path):
    ended = run_together(
        *(2, "calibrate", *network(tmp_path, stalls="1"), "--data", pictures, "--size", 24),
        *("-o", tmp_path / "out", "--skip-bad", "0.1"),
        kill=(-1, signal.SIGTERM),
        marker=tmp_path / "marker",
    )
    assert [each.code for each in ended] == [143, 143]
    assert "".join(each.err for each in ended) == "interrupted\n"


def test_a_comparison_is_refused_by_one_voice(tmp_path):
    ended = run_together(2, "compare", *network(tmp_path), "--data", tmp_path, "-o", tmp_path / "out")
    assert [each.code for each in ended] == [2, 2]
    assert ended[0].err.startswith("error: torchrun: each run of a comparison is trained by one process; start")
    assert ended[0].err.count("\n") == 1
    assert ended[1].err == ""
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_says_half_of_it_is_told_what_is_missing(monkeypatch, run_cli, pictures, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ran = run_cli("calibrate", *network(tmp_path), "--data", pictures, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "RANK, MASTER_ADDR, MASTER_PORT: not set, where WORLD_SIZE=2" in ran.err


@pytest.mark.slow
def test_torchrun(pictures, tmp_path):
    arguments = ("calibrate", *network(tmp_path), "--data", pictures, "--size", 24, "--skip-bad", "0.1", "--json")
    program = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    ended = subprocess.run(
        [*program, "-m", "equalize", *map(str, arguments), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["images"] == 42
