"""Whatever a file holds: exit 0 or 2, one line, nothing run, and no memory for sizes that it only claims.

EQUALIZE_WHOLE_CORPUS=1 runs all 2,000 mutations instead of a fixed few, and every gadget in every protocol and form.
"""

import json
import os
import pickle
import random
import resource
import shutil
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


def wrongs(run_cli, cases):
    """The cases, (name, arguments), that do not end well, and how they end."""
    for name, arguments in cases:
        ran = run_cli(*arguments)
        lines = ran.err.splitlines()
        if ran.code not in (0, 2) or (ran.code and not (len(lines) == 1 and lines[0].startswith("error: "))):
            yield name, ran.code, ran.err


def test_no_gadget_runs(tmp_path):
    canary = tmp_path / "canary"
    gadgets = corpus.gadgets(canary)
    assert len(gadgets) >= 20
    (tmp_path / "run.py").write_text(f"open({str(canary)!r}, 'w')")
    (tmp_path / "hubconf.py").write_text(f"def model(): open({str(canary)!r}, 'w')")
    (tmp_path / "inner.pth").write_bytes(pickle.dumps(gadgets["os.system"]))
    paths = []
    for number, gadget in enumerate(gadgets.values()):
        for protocol in corpus.PROTOCOLS:
            for shift, (form, wrap) in enumerate((("zip", corpus.in_zip), ("legacy", corpus.legacy))):
                if not WHOLE and number and (number + shift) % len(corpus.PROTOCOLS) != protocol:
                    continue  # the first in every way there is, the others in turn
                path = tmp_path / f"{number}-{protocol}-{form}.pth"
                path.write_bytes(wrap(pickle.dumps({"weight": torch.Size([1]), "evil": gadget}, protocol)))
                paths.append(str(path))
    program = "import sys, equalize.cli as cli; [print(cli.main(['scan', path])) for path in sys.argv[1:]]"
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    ran = subprocess.run([sys.executable, "-c", program, *paths], env=environment, capture_output=True, text=True)
    assert not canary.exists()
    lines = ran.stderr.splitlines()
    assert ran.stdout.split() == ["2"] * len(paths), ran.stderr
    assert all(line.startswith(f"error: {path}") for line, path in zip(lines, paths, strict=True))


def test_a_gadget_would_run_if_pickle_had_its_way(tmp_path):
    """The corpus is no dud."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(corpus.gadgets(canary)["os.system"]))
    assert canary.exists()


def seeds(directory: Path, network: Path, segformer: Path):
    """Name -> (what to scan, the file to mutate, flags)."""
    flags = ["--arch", f"{network}:Net", "--size", "16", "--json"]
    torch.save(state(), directory / "zip.pth")
    torch.save(state(), directory / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state(), directory / "flat.safetensors")
    shutil.copytree(segformer, directory / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "shards").mkdir()
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
def test_changed_bytes(seed, run_cli, network, segformer_dir, tmp_path):
    (tmp_path / "seeds").mkdir()
    model, file, flags = seeds(tmp_path / "seeds", network, segformer_dir)[seed]
    assert run_cli("scan", model, *flags).code == 0
    cases = []
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
        cases.append((number, ["scan", place, *flags]))
    assert list(wrongs(run_cli, cases)) == []


def test_bombs(run_cli, network, tmp_path):
    cases = []
    for name, make in corpus.file_bombs().items():
        (tmp_path / name).write_bytes(make())
        cases.append((name, ["scan", tmp_path / name, "--arch", f"{network}:Net", "--size", "32", "--json"]))
    (tmp_path / "config.json").write_text('{"model_type":' + "[" * 1_000_000 + "]" * 1_000_000 + "}")
    cases.append(("config", ["scan", tmp_path]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(wrongs(run_cli, cases)) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
