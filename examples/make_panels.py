"""Draws docs/panels.png: what the demo's network makes of four of the demo's scenes, as `finetune` draws it.

python examples/make_panels.py [--out docs/panels.png]
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import equalize
from equalize.commands.evaluate import EvalConfig
from equalize.commands.finetune.report import panel_of, spread
from equalize.commands.labels import check_split
from equalize.commands.overlays import colors_of_masks
from equalize.commands.report.training import draw_panels
from equalize.data.dataset import open_data
from equalize.data.label_check import LabelSettings
from equalize.demo import DATA, MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/panels.png"))
    out = parser.parse_args().out
    checkpoint = equalize.load(MODEL)
    names = checkpoint.classes
    assert names is not None
    split = check_split(open_data(DATA, labels=True), len(names), names, LabelSettings())
    pairs = spread(split.dataset.with_masks())
    panels = [panel_of(checkpoint, split, *pair, EvalConfig(), torch.device("cpu")) for pair in pairs]
    out.write_bytes(draw_panels(panels, colors_of_masks(len(names), split.rule, pairs[0][1]), names).light)
    with Image.open(out) as drawn:  # few colors: a third of the bytes
        drawn.thumbnail((960, 960), Image.Resampling.LANCZOS)
        drawn.convert("RGB").quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
