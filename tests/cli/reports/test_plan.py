import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from equalize.cli.reports.plan import plan_report, scan_report, verification_json, verification_report
from equalize.cli.terminal import _print
from equalize.commands.scan import CheckpointScan
from equalize.moments.measured import MeasuredSite, values_of, with_moments
from equalize.moments.moments import Moments
from equalize.plan.edits import Scale, ScaleInputs
from equalize.plan.plan import Plan, PlannedSite
from equalize.sites.branches import Branch
from equalize.sites.scan import Scan
from equalize.sites.sites import Refusal, Site
from equalize.verify.function import Check

LONG = "model.decode_head.a_rather_long_name_of_a_module.another_long_name_of_a_module.and_yet_one_more.conv"
UP = Branch(start=0, stop=8, resampling="bilinear", factor=(4.0, 4.0), source=LONG, producers=("up.weight",))
SKIP = Branch(start=8, stop=12, resampling=None, factor=(1.0, 1.0), source="skip", fixed="skip has a second consumer")
SITE = Site(
    layer="head.fuse",
    weight="head.fuse.weight",
    bias="head.fuse.bias",
    norm=None,
    op="conv2d",
    kernel=(3, 3),
    axis=1,
    groups=1,
    kind="resampled",
    exact_border=False,
    shift="bias",
    branches=(UP, SKIP),
)
MEASURED = with_moments(
    SITE, [Moments(count=8, mean=0.5, m2=8 * 0.25**2, ci95=0.021), Moments(count=8, mean=0.0, m2=8.0)]
)


def planned_site(strategy):
    return PlannedSite(**values_of(MEASURED, MeasuredSite), strategy=strategy, tau=1.0)


CHECK = Check(max_abs_change=3e-6, interior=1e-7, border=2e-7)
PROVEN = {"check": CHECK.to_json(), "logit_range": 10.0}


def scan_checkpoint(scan, images=None):
    return CheckpointScan(
        source="m", family="custom", architecture="Net", input_shape=(2, 3, 64, 96), scan=scan, images=images
    )


@pytest.fixture
def out(tmp_path):
    """A directory whose config says that smp loads it."""
    (tmp_path / "config.json").write_text('{"_model_class": "Unet"}')
    return tmp_path


def printed(report, width=80):
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in report:
        _print(console, part)
    return file.getvalue()


def words(report):
    """Without the bars."""
    return " ".join(re.sub("[\u2588-\u258f]", "", printed(report)).split())


@pytest.mark.parametrize("width", [40, 80, 140])
def test_names_are_never_cut_or_broken(width):
    scan = Scan(sites=(SITE,), refusals=(Refusal(at=LONG, reason="not linear"),), tracer="export")
    out = printed(scan_report(scan_checkpoint(scan)), width)
    assert out.count(LONG) == 2
    assert "head.fuse\n" in out
    assert "…" not in out
    assert not re.search(r" $", out, re.MULTILINE)


def test_a_scan_says_what_is_fused_what_cannot_migrate_and_what_is_not_listed():
    scan = Scan(sites=(SITE,), refusals=(), tracer="recorder", ran=True, unlisted=3)
    text = words(scan_report(scan_checkpoint(scan)))
    assert "m: custom Net, read by a recorded run at 2x3x64x96" in text
    assert "conv2d 3x3 over 12 channels, 2 branches" in text
    assert f"0..8 bilinear x4 {LONG} 8..12 - skip" in text
    assert "8..12 keeps its scale under migrate: skip has a second consumer" in text
    assert "1 fusion layer; --all lists 3 more without a resampled branch." in text
    assert "sigma" not in text


def test_a_measured_scan_shows_scales_and_their_ratio():
    text = words(scan_report(scan_checkpoint(Scan(sites=(MEASURED,), refusals=(), tracer="export"), images=5)))
    assert "0.5 0.25 ± 2.1%" in text
    assert "largest sigma / smallest: 4.00" in text
    assert "measured on 5 images" in text


def test_bars_of_sigma_stand_beside_the_numbers_where_there_is_room():
    found = scan_checkpoint(Scan(sites=(MEASURED,), refusals=(), tracer="export"), images=5)
    rows = [line.split() for line in printed(scan_report(found)).splitlines() if "..8 " in line or "..12 " in line]
    assert rows[0][7] == "██▌"  # a quarter of ten characters
    assert rows[1][4] == "█" * 10
    shown = {}
    for width in (80, 200):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        for part in scan_report(found):
            _print(console, part)
        shown[width] = console.file.getvalue()
    assert "█" in shown[200]
    beside = [line for line in shown[80].splitlines() if "█" in line]  # the long name stands below, by itself
    assert all("..8 " in line or "..12 " in line for line in beside)
    assert len(beside) == 2


def test_a_measured_scan_says_whether_equalizing_will_help():
    site = replace(MEASURED, expect="gain", delta=0.0623)
    found = replace(
        scan_checkpoint(Scan(sites=(site, MEASURED), refusals=(), tracer="export"), images=5),
        expect="gain",
        delta=0.0623,
    )
    text = words(scan_report(found))
    assert "largest sigma / smallest: 4.00 expect a gain from equalizing: delta 0.062" in text
    assert "cannot tell whether equalizing helps" in text  # the other
    assert "This network: expect a gain from equalizing: delta 0.062, the largest of its fusion layers." in text
    for branch in MEASURED.branches:
        assert f"{branch.step_share:.1%}" in text


def test_what_was_left_alone_is_said():
    site = replace(planned_site("none"), expect="nothing", delta=0.002)
    text = words(plan_report(Plan(strategy="none", sites=(site,), facts={"images": 4})))
    assert "none: left alone, for nothing is to be gained" in text
    assert "expect nothing from equalizing: delta 0.002" in text
    assert "4.00 before, 4.00 after" in text
    assert "Every fusion layer was left alone; a --strategy of your choice equalizes them all the same." in text


def test_a_constant_branch_has_no_ratio():
    constant = replace(MEASURED, branches=(replace(MEASURED.branches[0], std=0.0), MEASURED.branches[1]))
    text = words(scan_report(scan_checkpoint(Scan(sites=(constant,), refusals=(), tracer="export"), images=5)))
    assert "infinite (a branch is constant)" in text


def test_refusals_for_one_reason_stand_together():
    refusals = tuple(Refusal(at=f"layers.{index}", reason="normalized") for index in range(7))
    text = words(scan_report(scan_checkpoint(Scan(sites=(), refusals=refusals, tracer="export"))))
    assert "No fusion layer of resampled branches." in text
    assert "Cannot be equalized (7):" in text
    assert "layers.4 and 2 more: normalized" in text


@pytest.mark.parametrize(
    ("strategy", "edits", "after"),
    [
        ("preserve", (), ("1", "1")),
        ("migrate", (("head.fuse.weight", 0, 8, 0.25), ("up.weight", None, None, 4.0)), ("1", "1")),
        ("rescale", (("head.fuse.weight", 0, 8, 4.0), ("head.fuse.weight", 8, 12, 1.0)), ("1", "1")),
        ("rescale", (("head.fuse.weight", 0, 8, 2.0), ("head.fuse.weight", 8, 12, 0.5)), ("0.5", "0.5")),
    ],
)
def test_a_plan_shows_each_scale_before_and_after(out, strategy, edits, after):
    plan = Plan(
        strategy="auto",
        sites=(planned_site(strategy),),
        edits=tuple(
            Scale(tensor=tensor, factor=factor)
            if start is None
            else ScaleInputs(tensor=tensor, axis=1, start=start, stop=stop, factor=factor)
            for tensor, start, stop, factor in edits
        ),
        facts={"images": 5, "seconds": 1.0, "converged": True, "output": str(out), **PROVEN},
    )
    text = re.sub("[\u2588-\u258f]+ ", "", words(plan_report(plan)))  # without the bars
    assert f"0.25 ± 2.1% {after[0]} {LONG}" in text
    assert f"1 {after[1]} skip" in text
    assert "4.00 before, 1.00 after" in text
    assert f"{strategy}: " in text
    assert ("equalize compare measures it" in text) == (strategy != "rescale")


def test_a_plan_says_how_its_output_is_loaded(out):
    text = printed(
        plan_report(Plan(strategy="auto", sites=(planned_site("migrate"),), facts={"output": str(out)})), 400
    )
    code = text.partition("Load it:\n")[2]
    assert code == f'  import segmentation_models_pytorch as smp\n  model = smp.from_pretrained("{out}").eval()\n'


@pytest.mark.parametrize(("strategy", "said"), [("preserve", True), ("migrate", False)])
def test_a_plan_that_acts_in_training_alone_says_so(out, strategy, said):
    plan = Plan(strategy=strategy, sites=(planned_site(strategy),), facts={"output": str(out)})
    assert (f"equalize finetune {out} (or equalize.attach in your own loop)" in words(plan_report(plan))) == said
    assert "equalize finetune" not in words(plan_report(replace(plan, facts={"output": None})))


def test_a_plan_without_sites_says_why():
    plan = Plan(strategy="auto", refusals=(Refusal(at="head", reason="fuses by addition"),))
    text = words(plan_report(plan))
    assert "head: fuses by addition" in text
    assert "left alone" not in text


def test_a_verification_for_people_and_for_programs():
    plan = Plan(strategy="auto", sites=(planned_site("migrate"),))
    assert verification_json("out", "model", plan, CHECK) == {
        "schema": 1,
        "output": "out",
        "against": "model",
        "strategy": "auto",
        "changed": [],
        "check": {"max_abs_change": 3e-6, "interior": 1e-7, "border": 2e-7},
    }
    text = words(verification_report("out", "model", plan, CHECK, "random inputs"))
    assert "out is model with its plan carried out: head.fuse (migrate)." in text
    assert "compared with the original on random inputs" in text
    assert "logits differ by at most 3e-06, which is rounding" in text


def test_the_report_of_a_real_network_agrees_with_its_json():
    from equalize.sites.scan import scan

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.low = torch.nn.Conv2d(3, 4, 1)
            self.mix = torch.nn.Conv2d(7, 2, 1)

        def forward(self, x):
            low = self.low(torch.nn.functional.avg_pool2d(x, 2))
            return self.mix(torch.cat([x, torch.nn.functional.interpolate(low, scale_factor=2.0)], 1))

    found = scan_checkpoint(scan(Net(), torch.empty(1, 3, 32, 32)))
    (site,) = found.to_json()["sites"]
    text = words(scan_report(found))
    for branch in site["branches"]:
        assert f"{branch['start']}..{branch['stop']} {branch['resampling'] or '-'}" in text
    assert site["branches"][1]["source"] == "low"
