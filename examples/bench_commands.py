"""How long whole commands take: `--help`, `scan`, and `calibrate` on a folder against a bare loop over it.

python examples/bench_commands.py                       short commands beside imports that anybody pays, in turn
python examples/bench_commands.py MODEL DATA --size 512 --samples 64 --batch-size 8     the bare loop
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["beside_imports", "command_times", "end_to_end"]

EQUALIZE = (sys.executable, "-m", "equalize")


def bare_loop() -> None:
    """Decodes, preprocesses and runs the network, with the loader that `calibrate` has, and nothing else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--size", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch-size", type=int)
    arguments = parser.parse_args()
    import torch

    import equalize
    from equalize.data.dataset import open_data, sample
    from equalize.data.loader import Batches

    checkpoint = equalize.load(arguments.model)
    paths = sample(open_data(arguments.data, split="train").images, arguments.samples, 0)
    size = (arguments.size, arguments.size)
    checkpoint.model.eval()
    start = time.perf_counter()
    with torch.no_grad():
        for batch in Batches(paths, checkpoint.preprocess, size=size, batch_size=arguments.batch_size):
            checkpoint.model(batch.images)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 3)}))


def command_times(rounds: int) -> dict[str, float]:
    """Median wall seconds of `equalize --help` and of `equalize scan` on SegFormer-B0."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {"equalize --help": ("--help",), "equalize scan": ("scan", _segformer(Path(folder)), "--json")}
        return {
            name: statistics.median(_timed((*EQUALIZE, *arguments))[0] for _ in range(rounds))
            for name, arguments in commands.items()
        }


def beside_imports(rounds: int = 5) -> dict[str, tuple[float, float, float]]:
    """Median wall seconds of short commands, of an import beside each, and of their ratios pair by pair; warmed up."""
    imports = "import torch; from transformers import UperNetForSemanticSegmentation, SwinConfig"
    with tempfile.TemporaryDirectory() as folder:
        model = _upernet_swin_t(Path(folder))
        pairs: dict[str, tuple[Sequence[str], str]] = {
            "scan UPerNet-Swin-T at 512 / import of its class": (("scan", model, "--size", "512", "--json"), imports),
            "push --dry-run / import torch": (("push", model, "org/name", "--dry-run", "--json"), "import torch"),
            "--help / python -c pass": (("--help",), "pass"),
        }
        return {
            name: _in_turn((*EQUALIZE, *ours), (sys.executable, "-c", bare), rounds)
            for name, (ours, bare) in pairs.items()
        }


def _in_turn(ours: Sequence[str], bare: Sequence[str], rounds: int) -> tuple[float, float, float]:
    pairs = [(_timed(ours)[0], _timed(bare)[0]) for _ in range(rounds + 1)][1:]
    columns = *zip(*pairs, strict=True), [first / second for first, second in pairs]
    first, second, ratio = (statistics.median(column) for column in columns)
    return first, second, ratio


def end_to_end(data: str, *, size: int, samples: int, batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of whole processes, and of the loop or the calibration in them; interleaved, SegFormer-B0."""
    options = ("--size", str(size), "--samples", str(samples), "--batch-size", str(batch))
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _segformer(Path(folder))
        calibrate = ("calibrate", model, "--data", data, "--split", "train", "--device", "cpu", *options)
        calibrate = (*calibrate, "-o", f"{folder}/out", "--overwrite", "--json")
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        commands: dict[str, Sequence[str]] = {
            "bare loop": (sys.executable, __file__, model, data, *options),
            "calibrate, 1 process": (*EQUALIZE, *calibrate),
            "calibrate, 2 processes of 1 thread": (*launcher, "-m", "equalize", *calibrate),
        }
        for _ in range(rounds):
            for name, command in commands.items():
                wall, said = _timed(command)
                found.setdefault(name, []).append((wall, json.loads(said)["seconds"]))
    return {
        name: (statistics.median(wall for wall, _ in each), statistics.median(inner for _, inner in each))
        for name, each in found.items()
    }


def _segformer(folder: Path) -> str:
    """SegFormer-B0 with weights just drawn, as a directory."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = folder / "segformer-b0"
    SegformerForSemanticSegmentation(SegformerConfig(num_labels=11)).save_pretrained(model)
    SegformerImageProcessor(size={"height": 512, "width": 512}).save_pretrained(model)
    return str(model)


def _upernet_swin_t(folder: Path) -> str:
    """UPerNet over Swin-T with weights just drawn, as a directory."""
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    swin = SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    UperNetForSemanticSegmentation(UperNetConfig(backbone_config=swin)).save_pretrained(folder / "upernet-swin-t")
    return str(folder / "upernet-swin-t")


def _timed(command: Sequence[str]) -> tuple[float, str]:
    """Wall seconds of a command, and its standard output."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - start, done.stdout


if __name__ == "__main__":
    if len(sys.argv) > 1:
        bare_loop()
    else:
        for name, (first, second, ratio) in beside_imports().items():
            print(f"{name}: {first:.2f} s, {second:.2f} s, ratio {ratio:.2f}")
