"""Whatever a file holds: exit 0 or 2, one line, nothing run.

The files here also stay under 10 seconds and 1 GB: sizes that a header or a config claims are not believed. A pickle or
a header that really is long may take longer.

EQUALIZE_WHOLE_CORPUS=1 runs all 2,000 mutations instead of a fixed few, and every gadget in every protocol and form.
"""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import corpus

WHOLE = bool(os.environ.get("EQUALIZE_WHOLE_CORPUS"))
MUTATIONS = 400 if WHOLE else 14  # of each of five seeds
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(3, 2, 1)
        self.fuse = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        low = nn.functional.interpolate(self.low(x[..., ::2, ::2]), scale_factor=2.0, mode="bilinear")
        return self.fuse(torch.cat([x, low], 1))
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "net.py"
    path.write_text(NETWORK)
    return path


def state():
    torch.manual_seed(0)
    shapes = {"low.weight": (2, 3, 1, 1), "low.bias": (2,), "fuse.weight": (2, 5, 1, 1), "fuse.bias": (2,)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def server():
    """One process that has imported everything, of which each case gets a fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.corpus"],
        cwd=Path(corpus.__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        yield process
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture
def run(server, tmp_path):
    """Runs (name, arguments) each, after commands that fill the server's caches."""

    def answer(cases, warm=(), batch=1) -> list[corpus.Ended]:
        cases = [(name, [*map(str, arguments)]) for name, arguments in cases]
        request = {"scratch": str(tmp_path), "batch": batch, "warm": [[*map(str, w)] for w in warm], "cases": cases}
        print(json.dumps(request), file=server.stdin, flush=True)
        lines = list(iter(server.stdout.readline, "\n"))
        ended = [corpus.Ended(*json.loads(line)) for line in lines]
        assert len(ended) == len(cases)
        report = os.environ.get("EQUALIZE_CORPUS_REPORT")
        if report:
            with open(report, "a") as file:
                file.writelines(json.dumps(each) + "\n" for each in ended)
        return ended

    return answer


def wrongs(ended: list[corpus.Ended], codes=(0, 2)) -> list[corpus.Ended]:
    return [
        each
        for each in ended
        if each.code not in codes
        or (each.code and not (len(each.lines) == 1 and each.lines[0].startswith("error: ")))
        or each.seconds > corpus.SECONDS
        or each.bytes > corpus.BYTES
    ]


@pytest.mark.slow
def test_the_harness_sees_what_it_should(run, network, tmp_path):
    torch.save(state(), tmp_path / "good.pth")
    flags = ("--arch", f"{network}:Net", "--size", "16")
    ended = run(
        [
            ("good", ["scan", tmp_path / "good.pth", *flags]),
            ("absent", ["scan", tmp_path / "absent.pth"]),
            ("runs code", ["scan", tmp_path / "good.pth", "--arch", "os:abort"]),
        ]
    )
    assert [each.code for each in ended] == [0, 2, -6]
    assert wrongs(ended) == ended[2:]


def test_no_gadget_runs(run, tmp_path):
    canary = tmp_path / "canary"
    gadgets = corpus.gadgets(canary)
    assert len(gadgets) >= 20
    (tmp_path / "run.py").write_text(f"open({str(canary)!r}, 'w')")
    (tmp_path / "hubconf.py").write_text(f"def model(): open({str(canary)!r}, 'w')")
    (tmp_path / "inner.pth").write_bytes(pickle.dumps(gadgets["os.system"]))
    cases = []
    for number, (name, gadget) in enumerate(gadgets.items()):
        for protocol in corpus.PROTOCOLS:
            for shift, (form, wrap) in enumerate((("zip", corpus.in_zip), ("legacy", corpus.legacy))):
                if not WHOLE and number and (number + shift) % len(corpus.PROTOCOLS) != protocol:
                    continue  # the first in every way there is, the others in turn
                path = tmp_path / f"{number}-{protocol}-{form}.pth"
                path.write_bytes(wrap(pickle.dumps({"weight": torch.Size([1]), "evil": gadget}, protocol)))
                cases.append((f"{name} {protocol} {form}", ["scan", path]))
    ended = run(cases, batch=50)
    assert not canary.exists()
    assert wrongs(ended, codes=(2,)) == []


def test_a_gadget_would_run_if_pickle_had_its_way(tmp_path):
    """The corpus is no dud."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(corpus.gadgets(canary)["os.system"]))
    assert canary.exists()


def seeds(directory: Path, network: Path, segformer: Path, upernet: Path):
    """Name -> (what to scan, the file to mutate, flags)."""
    flags = ["--arch", f"{network}:Net", "--size", "16", "--json"]
    torch.save(state(), directory / "zip.pth")
    torch.save(state(), directory / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state(), directory / "flat.safetensors")
    for name, source in {"model": segformer, "shards": directory}.items():
        (directory / name).mkdir()
        if name == "model":
            for path in source.glob("*.json"):
                (directory / name / path.name).write_bytes(path.read_bytes())
    parts = list(state().items())
    for number, part in enumerate((parts[:2], parts[2:])):
        save_file(dict(part), directory / "shards" / f"model-{number}.safetensors")
    weight_map = {key: f"model-{number // 2}.safetensors" for number, (key, _) in enumerate(parts)}
    index = directory / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 88}, "weight_map": weight_map}))
    return {
        "zip": (directory / "zip.pth", directory / "zip.pth", flags),
        "legacy": (directory / "old.pth", directory / "old.pth", flags),
        "safetensors": (directory / "flat.safetensors", directory / "flat.safetensors", flags),
        "transformers": (directory / "model", directory / "model" / "config.json", ["--size", "32", "--json"]),
        "shards": (directory / "shards", index, flags),
    }


@pytest.mark.parametrize("seed", ["zip", "legacy", "safetensors", "transformers", "shards"])
def test_changed_bytes(seed, run, network, segformer_dir, upernet_dir, tmp_path):
    (tmp_path / "seeds").mkdir()
    model, file, flags = seeds(tmp_path / "seeds", network, segformer_dir, upernet_dir)[seed]
    cases = [(seed, ["scan", model, *flags])]
    for number, mutant in enumerate(corpus.mutants(file.read_bytes(), MUTATIONS, random.Random(seed))):
        place = tmp_path / str(number)
        if model.is_dir():
            place.mkdir()
            for path in model.iterdir():
                os.link(path, place / path.name)
            (place / file.name).unlink()
            (place / file.name).write_bytes(mutant)
        else:
            place = place.with_suffix(model.suffix)
            place.write_bytes(mutant)
        cases.append((f"{seed} {number}", ["scan", place, *flags]))
    ended = run(cases, warm=[["scan", model, *flags]], batch=20)
    assert ended[0].code == 0
    assert wrongs(ended) == []


def test_bombs(run, network, segformer_dir, smp_dir, tmp_path):
    configs = [json.loads((place / "config.json").read_text()) for place in (segformer_dir, smp_dir)]
    cases = []
    for name, make in corpus.file_bombs().items():
        (tmp_path / name).write_bytes(make())
        cases.append((name, ["scan", tmp_path / name, "--arch", f"{network}:Net", "--size", "32", "--json"]))
    for name, files in corpus.config_bombs(*configs).items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
        os.link(smp_dir / "model.safetensors", tmp_path / name / "model.safetensors")
        cases.append((name, ["scan", tmp_path / name, "--size", "32", "--json"]))
    assert len(cases) >= 15
    assert wrongs(run(cases, warm=[["scan", segformer_dir, "--size", "32", "--json"]], batch=10)) == []
