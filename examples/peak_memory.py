"""Peak memory of `scan`, `calibrate`, `apply` and `verify` on a large sharded checkpoint, beside that on a small one.

Usage: python examples/peak_memory.py [--gigabytes 1] [--format safetensors|bin] [--dtype float32|float16|bfloat16]

Builds a SegFormer of that size with random weights in shards of 200 MB in a temporary directory, and one of a few
megabytes. Of each command it prints the largest resident set (files mapped into memory count) on either, and what the
large checkpoint took more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARAMETERS = 268_000_000  # of float32 in a gigabyte


def build(directory: Path, gigabytes: float, kind: str, dtype: str) -> None:
    """Write a checkpoint of about that size."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    stored: torch.dtype = getattr(torch, dtype)
    width = 64 * max(1, round((gigabytes * PARAMETERS * 4 / stored.itemsize / 52 / 4096) ** 0.5))
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[width // 2, width // 2, width, width],
        num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[1, 1, 1, 1],
        decoder_hidden_size=width // 2,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(config).to(stored)
    model.save_pretrained(directory, max_shard_size="200MB")
    if kind == "bin":
        to_bin(directory)


def to_bin(directory: Path) -> None:
    """The same shards as torch.save writes them."""
    import torch
    from safetensors.torch import load_file

    if (directory / "model.safetensors").exists():
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        return
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for name in sorted(set(index["weight_map"].values())):
        torch.save(load_file(directory / name), directory / new_name(name))
        (directory / name).unlink()
    index["weight_map"] = {key: new_name(name) for key, name in index["weight_map"].items()}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors.index.json").unlink()


def new_name(name: str) -> str:
    """A shard's name in the older format."""
    return name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")


def peak(arguments: list[str]) -> tuple[int, int, float]:
    """Megabytes of the resident set at most, megabytes of it that are no file, and seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    anonymous = resident = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            break
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        anonymous = max(anonymous, int(fields.get("RssAnon", "0").split()[0]))
        resident = max(resident, int(fields.get("VmHWM", "0").split()[0]))
        time.sleep(0.02)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors.decode())
    return resident // 1024, anonymous // 1024, time.monotonic() - begun


def photos(directory: Path) -> Path:
    """Two small pictures."""
    from PIL import Image

    directory.mkdir()
    for number in range(2):
        Image.effect_noise((64, 64), 60 + number).convert("RGB").save(directory / f"{number}.png")
    return directory


def measured(place: Path, gigabytes: float, options: argparse.Namespace) -> dict[str, tuple[int, int, float]]:
    """The peaks of each command on a checkpoint of some size, and of the imports."""
    model, plan, out = place / "model", place / "plan", place / "out"
    builder = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import peak_memory as p; "
    builder += f"p.build(p.Path({str(model)!r}), {gigabytes}, {options.format!r}, {options.dtype!r})"
    subprocess.run([sys.executable, "-c", builder], check=True, capture_output=True)
    shards = [path.stat().st_size for path in model.iterdir() if path.suffix in (".safetensors", ".bin")]
    common = ["--size", "64"]
    images = str(photos(place / "photos"))
    commands = {
        "imports": ["-c", "import torch, transformers, equalize.commands.scan, equalize.commands.calibrate"],
        "scan": ["-m", "equalize", "scan", str(model), *common],
        "calibrate": ["-m", "equalize", "calibrate", str(model), "--data", images, "-o", str(plan), *common],
        "apply": ["-m", "equalize", "apply", str(plan), str(model), "-o", str(out)],
        "verify": ["-m", "equalize", "verify", str(out), "--against", str(model)],
    }
    peaks = {name: peak(arguments) for name, arguments in commands.items()}
    print(
        f"{sum(shards) / 1e6:.0f} MB in {len(shards)} files of at most {max(shards) / 1e6:.0f} MB; "
        f"the plan changes {changed_bytes(model, out) / 1e6:.0f} MB"
    )
    return peaks


def changed_bytes(model: Path, out: Path) -> int:
    """The size of the tensors that are not the same in two checkpoint directories."""
    from equalize.checkpoint import state_on_disk

    after = state_on_disk(out)
    return sum(tensor.nbytes for key, tensor in state_on_disk(model).items() if not tensor.equal(after[key]))


def main() -> None:
    """Build, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        base = measured(Path(small), 0.02, options)
        peaks = measured(Path(large), options.gigabytes, options)
    print(f"{'':10} {'small':>7} {'large':>7} {'more':>7} {'more, no file':>14} {'seconds':>8}   MB, peak resident set")
    for name, (resident, anonymous, seconds) in peaks.items():
        more, more_anonymous = resident - base[name][0], anonymous - base[name][1]
        print(f"{name:10} {base[name][0]:7d} {resident:7d} {more:7d} {more_anonymous:14d} {seconds:8.1f}")


if __name__ == "__main__":
    main()
