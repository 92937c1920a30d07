"""What only a process of its own can show: imports, signals, pipes, clean streams."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

EQUALIZE = (sys.executable, "-m", "equalize")


def start(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*EQUALIZE, *map(str, arguments)], **{**pipes, **options})


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("argument", ["--help", "--version", "scan --help", "calibrate --help", ""])
def test_help_needs_nothing_heavy(argument):
    script = (
        "import sys; from equalize.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'PIL', 'scipy', 'transformers', 'torchvision', 'rich'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, *argument.split()], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


def test_version_is_the_package_s():
    import equalize

    assert finish(start("--version")) == (0, f"equalize {equalize.__version__}\n", "")


def test_json_stands_alone_on_clean_streams(segformer_dir):
    code, out, err = finish(start("scan", segformer_dir, "--size", "64", "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["sites"]


@pytest.mark.parametrize(
    "arguments", ["--help", "scan torchvision:fcn_resnet50 --size 64", "scan torchvision:fcn_resnet50 --size 64 --json"]
)
def test_a_reader_that_goes_away_is_no_error(arguments):
    process = start(*arguments.split())
    process.stdout.close()
    assert finish(process)[::2] == (0, "")


def test_closed_streams_are_no_error():
    ended = subprocess.run(["sh", "-c", '"$0" -m equalize --version >&- 2>&-', sys.executable], check=False)
    assert ended.returncode == 0


NETWORK = """
import pathlib, time, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Conv2d(3, 4, 1)
        self.mix = torch.nn.Conv2d(7, 2, 1)
    def forward(self, x):
        if type(x) is torch.Tensor:  # not while it is traced
            pathlib.Path(MARKER).touch()
            time.sleep(60)
        low = self.a(torch.nn.functional.avg_pool2d(x, 2))
        return self.mix(torch.cat([x, torch.nn.functional.interpolate(low, scale_factor=2.0, mode="bilinear")], 1))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_calibration_leaves_nothing(photos, tmp_path, number, code, workers):
    import torch

    place, marker, factory = tmp_path / "place", tmp_path / "measuring", tmp_path / "net.py"
    place.mkdir()
    factory.write_text(NETWORK.replace("MARKER", repr(str(marker))))
    shapes = {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "mix.weight": (2, 7, 1, 1), "mix.bias": (2,)}
    torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "net.pth")
    process = start(
        *("calibrate", tmp_path / "net.pth", "--arch", f"{factory}:Net", "--data", photos),
        *("-o", place / "out", "--workers", workers),
    )
    for _ in range(1200):
        if marker.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert finish(process) == (code, "", "interrupted\n")
    assert list(place.iterdir()) == []
