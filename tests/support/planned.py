"""A directory as `calibrate` leaves it, without calibrating: a plan with made-up numbers beside real weights."""

import json
import shutil
from pathlib import Path

from equalize.moments.measured import MeasuredBranch
from equalize.plan.plan import Plan, PlannedSite, ScaleInputs
from equalize.sites.sites import Refusal

FACTS = {
    "equalize": "0.1.0",
    "source": "acme/segformer-tiny",
    "revision": "abc1230000000000000000000000000000000000",
    "sha256": "5" * 64,
    "family": "transformers",
    "architecture": "SegformerForSemanticSegmentation",
    "drawn": [],
    "input_shape": [2, 3, 48, 64],
    "data": {"path": "/home/alice/secret-project/streets", "split": "train", "fingerprint": "f" * 64},
    "images": 12,
    "check": {"max_abs_change": 2.5e-6, "interior": 1.5e-7, "border": 0.0},
    "output": "/home/alice/secret-project/out",
}


def branch(start, std, **changes):
    fields = {"stop": start + 8, "resampling": "bilinear", "factor": (2.0, 2.0), "source": f"head.proj.{start}"}
    return MeasuredBranch(start=start, std=std, **{**fields, "count": 100, "mean": 0.25, "ci95": 0.125, **changes})


def plan(**facts) -> Plan:
    site = PlannedSite(
        layer="decode_head.linear_fuse",
        weight="decode_head.linear_fuse.weight",
        bias=None,
        norm="decode_head.batch_norm",
        op="conv2d",
        kernel=(1, 1),
        axis=1,
        groups=1,
        kind="resampled",
        exact_border=True,
        shift=None,
        branches=(branch(0, 0.5), branch(8, 2.0, resampling=None, factor=(1.0, 1.0))),
        strategy="rescale",
        tau=1.0,
    )
    return Plan(
        strategy="auto",
        sites=(site,),
        refusals=(Refusal(at="encoder.fuse", reason="already | normalized"),),
        edits=(ScaleInputs(tensor=site.weight, axis=1, start=0, stop=8, factor=2.0),),
        facts={**FACTS, **facts},
    )


def planned(model: Path, out: Path, **facts) -> Path:
    """A copy of a saved model with a plan beside it."""
    shutil.copytree(model, out)
    (out / "equalize.json").write_text(json.dumps(plan(**facts).to_json()))
    return out
