"""What only a process of its own can show: imports, signals, pipes, clean streams."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.commands import Command
from tests.support.networks import save_code


def test_help_needs_nothing_heavy():
    script = (
        "import sys; from equalize.cli import main\n"
        "for line in ('--help', '--version', 'scan --help', 'calibrate --help', ''):\n"
        "    assert main(line.split()) == 0, line\n"
        "    heavy = {'torch', 'numpy', 'PIL', 'scipy', 'transformers', 'torchvision', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("Usage: ") == 4


def test_version_is_the_package_s(run_cli):
    import equalize

    assert run_cli("--version") == (0, f"equalize {equalize.__version__}\n", "")


def test_json_stands_alone_on_clean_streams(segformer_dir, photos, tmp_path):
    """From the start of Python to its end: forked processes have imported what may print or warn."""
    arguments = ["calibrate", segformer_dir, "--data", photos, "-o", tmp_path / "out", "--size", "64", "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "equalize", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert ended.returncode == 0, ended.stderr
    said = [line.partition(": ")[0] for line in ended.stderr.splitlines()]
    assert said == ["preprocessing", "data", "no masks", "input"]
    assert json.loads(ended.stdout)["sites"]


def test_closed_streams_are_no_error():
    ended = subprocess.run(["sh", "-c", '"$0" -m equalize --version >&- 2>&-', sys.executable], check=False)
    assert ended.returncode == 0


def into_a_pipe_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--help", ""),
        ("scan MODEL --size 64", "next: equalize calibrate MODEL --data IMAGES --size 64 -o OUT"),
        ("scan MODEL --size 64 --json", ""),
    ],
)
def test_a_reader_that_goes_away_is_no_error(arguments, hint, segformer_dir):
    words = arguments.replace("MODEL", str(segformer_dir)).split()
    ended = Command(*words, prepare=into_a_pipe_that_nobody_reads).finish()
    assert (ended.code, ended.err.strip()) == (0, hint.replace("MODEL", str(segformer_dir)))


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


@pytest.mark.parametrize(("workers", "number", "code"), [(0, signal.SIGINT, 130), (2, signal.SIGTERM, 143)])
def test_an_interrupted_calibration_leaves_nothing(photos, tmp_path, workers, number, code):
    place, marker = tmp_path / "place", tmp_path / "measuring"
    place.mkdir()
    net = save_code(NETWORK.replace("MARKER", repr(str(marker))), tmp_path)
    command = Command(
        *("calibrate", net.source, "--arch", net.arch, "--data", photos),
        *("-o", place / "out", "--workers", workers),
    )
    while command.is_running() and not marker.exists():
        time.sleep(0.02)
    command.send_signal(number)
    ended = command.finish()
    assert (ended.code, ended.out, ended.err) == (code, "", "interrupted\n")
    assert list(place.iterdir()) == []
