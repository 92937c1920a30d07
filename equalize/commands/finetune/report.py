"""What came of a training as a page: curves, four images, scores of the classes, settings, what to do next."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerState

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.commands.evaluate import EvalConfig
from equalize.commands.finetune.callbacks import CheckpointWriter, lines_of
from equalize.commands.finetune.splits import Task
from equalize.commands.forward import Forward, predicted
from equalize.commands.labels import LabeledSplit
from equalize.commands.overlays import as_rgb, colors_of_masks
from equalize.commands.report.page import Section, Table, write_page
from equalize.commands.report.style import can_draw
from equalize.commands.report.training import Panel, draw_curves, draw_panels
from equalize.commands.report.words import percent
from equalize.commands.windows import upsampled
from equalize.data.bands import read_picture
from equalize.data.images import Item
from equalize.data.masks import read_mask
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, counted
from equalize.plan.plan import Plan

_IMAGES = 4
_LONGEST = 480  # pixels of the longer side of an image in the panels


def write_report(task: Task, writer: CheckpointWriter, state: TrainerState, notify: Notify) -> None:
    """Writes OUT/report.html, and OUT/curves.png and OUT/panels.png where matplotlib is installed."""
    lines = lines_of(state)
    scored = [line for line in lines if line.get("mIoU") is not None]
    best = max(scored, key=lambda line: float(line["mIoU"]), default=None)
    sections = [_result(task, writer, state, scored, best)]
    if can_draw():
        sections.append(Section(heading="Curves", pictures=(draw_curves(lines, best["step"] if best else None),)))
        if best is not None and task.val is not None:
            sections.append(_images(task, task.val, writer, best["step"]))
    else:
        notify("no curves.png and no panels.png: pip install 'equalize[plot]', then this command again with --resume")
    if best is not None:
        sections.append(_classes(best))
    if writer.plan is not None and writer.plan.sites:
        sections.append(_scales(writer.plan))
    settings = (writer.run.path / "finetune.yaml").read_text(encoding="utf-8")
    sections += [Section(heading="Settings (finetune.yaml)", code=settings.strip())]
    sections += [Section(heading="Next", code="\n".join(_next(task, writer)))]
    source = task.name.source
    title = f"Training of {source if task.checkpoint.revision else Path(source).name}"
    write_page(writer.run.path, title, sections)


def _result(
    task: Task, writer: CheckpointWriter, state: TrainerState, scored: Sequence[dict[str, Any]], best: Any
) -> Section:
    if best is None or task.val is None:
        verdict = f"{state.global_step} steps; nothing was scored, and the model is that of the last step."
    else:
        where = f"{len(task.val.dataset.images)} images of {task.val.dataset.name}"
        where += f", split {task.val.dataset.split}" if task.val.dataset.split else ""
        of = f"the best of {len(scored)} evaluations" if len(scored) > 1 else "the only evaluation"
        verdict = f"mIoU {best['mIoU']:.2f} % on {where}: {of}, at step {best['step']} of {state.global_step}."
    pairs = task.train.dataset.pairs
    trained = f"{state.global_step} steps on {pairs} images of {task.train.dataset.name}, seed {task.config.seed}."
    plan, seen = writer.plan, writer.facts.get("train_as")
    if plan is None or not plan.equalized:
        how = "No scale equalization was in effect."
    else:
        what = "the equalized weights" if seen == "explicit" else "the weights as they are stored"
        layers = counted(len(plan.equalized), "fusion layer")
        how = f"Scale equalization of {layers} ({plan.strategy}): the optimizer trained {what}."
    return Section(heading="Result", verdict=verdict, paragraphs=(trained, how))


def _classes(best: dict[str, Any]) -> Section:
    rows = best["classes"]
    pixels = max(1, sum(row["pixels"] for row in rows))
    cells = tuple(
        (row["name"], percent(row["IoU"]), percent(row["Acc"]), percent(100 * row["pixels"] / pixels))
        for row in rows
        if row["pixels"] or row["IoU"] is not None
    )
    means = ("mean", percent(best["mIoU"]), percent(best["mAcc"]), "")
    absent = len(rows) - len(cells)
    said = (f"{absent} classes that were neither labeled nor predicted are left away.",) if absent else ()
    header = ("class", "IoU, %", "accuracy, %", "share of the labels, %")
    return Section(heading="Classes", paragraphs=said, table=Table(header=header, rows=(*cells, means)))


def _scales(plan: Plan) -> Section:
    rows = tuple(
        (
            f"{site.layer}: channels {branch.start} to {branch.stop - 1}",
            branch.resampling or "-",
            f"{branch.std:.4g}",
            "-" if branch.ci95 is None else f"± {branch.ci95:.1%}",
            site.strategy,
        )
        for site in plan.sites
        for branch in site.branches
    )
    said = f"Measured on {plan.facts['images']} images before the training." if plan.facts.get("images") else ""
    header = ("branch", "resampling", "sigma", "95 %", "strategy")
    return Section(heading="Scales of the branches", paragraphs=(said,), table=Table(header=header, rows=rows))


def _next(task: Task, writer: CheckpointWriter) -> Iterator[str]:
    """The commands that go on from OUT, whole; the settings that scoring needs are in its finetune.yaml."""
    arch, out, data = task.name.arch, str(writer.run.path), task.train.dataset
    code = ["--arch", arch] if arch is not None and task.checkpoint.adapter.runs_code(arch) else []
    split = ["--split", task.config.val_split] if task.config.val_split != "val" else []
    place = str(data.root) if data.is_on_hub else str(data.root.expanduser().absolute())
    yield shlex.join(["equalize", "evaluate", out, "--data", place, *split, *code])
    yield shlex.join(["equalize", "push", out, "ORG/NAME", "--dry-run", "--show-card"])


def _images(task: Task, val: LabeledSplit, writer: CheckpointWriter, step: int) -> Section:
    """Four images of the validation split, seen by the best model."""
    pairs = spread(val.dataset.with_masks())
    checkpoint = replace(task.checkpoint, model=writer.read_model(step).to(task.device))
    config = task.config.scoring()
    with eval_mode(checkpoint.model):
        panels = [panel_of(checkpoint, val, image, mask, config, task.device) for image, mask in pairs]
    names = val.names or tuple(str(k) for k in range(val.num_classes))
    colors = colors_of_masks(val.num_classes, val.rule, pairs[0][1], checkpoint.palette)
    picture = draw_panels(panels, colors, names)
    said = (
        f"The model of step {step} on {len(panels)} of {len(val.dataset.images)} images, evenly spread over the split."
    )
    return Section(heading="Images of the validation split", paragraphs=(said,), pictures=(picture,))


def spread(items: Sequence[Any], count: int = _IMAGES) -> list[Any]:
    """At most `count` of the items, evenly spread over them, always the same."""
    places = dict.fromkeys((2 * number + 1) * len(items) // (2 * count) for number in range(count))
    return [items[place] for place in places] if items else []


def panel_of(
    checkpoint: Checkpoint, val: LabeledSplit, image: Item, mask: Item, config: EvalConfig, device: torch.device
) -> Panel:
    """An image as it is scored, then reduced to what is shown; the model is in eval mode on `device`."""
    picture, label_HW = read_picture(image, checkpoint.preprocess.bands), read_mask(mask, val.rule, image)
    forward = Forward(checkpoint=checkpoint, config=config, device=device)
    if forward.for_windows([image]):
        strips = forward.in_windows(image, picture)
    else:
        (batch,) = forward.batches([image])
        strips = upsampled(forward.of_batch(batch)[0], label_HW.shape)
    prediction_HW = torch.cat([classes_hW.cpu() for _, classes_hW in predicted(strips, image)])
    counts_HW = label_HW != val.rule.ignore_index
    wrong = float((prediction_HW != label_HW)[counts_HW].double().mean()) if counts_HW.any() else None
    height, width = label_HW.shape
    scale = min(1.0, _LONGEST / max(height, width))
    size = max(1, round(scale * height)), max(1, round(scale * width))
    shown = as_rgb(picture)
    rows_h, columns_w = ((torch.arange(to) + 0.5) * of // to for to, of in zip(size, (height, width), strict=True))
    places = rows_h.long()[:, None], columns_w.long()[None]
    return Panel(
        name=image.name,
        picture_HW3=np.asarray(shown if scale == 1 else shown.resize(size[::-1], Image.Resampling.LANCZOS)),
        label_HW=label_HW[places].numpy(),
        prediction_HW=prediction_HW[places].numpy(),
        ignore_index=val.rule.ignore_index,
        wrong=wrong,
    )
