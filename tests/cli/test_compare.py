"""`equalize compare`, from the words typed to what is printed and written."""

import contextlib
import html
import io
import json
import shutil

import pytest

from equalize.cli import main
from equalize.commands.finetune.pace import Pace
from tests.support.browser import check_page
from tests.support.scenes import write_scenes

QUICK = ("--batch-size", "2", "--max-steps", "2", "--evaluations", "1", "--device", "cpu", "--size", "48x64")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("five"), 5, counts={"train": 4, "val": 2})


@pytest.fixture(scope="module")
def words(segformer_dir, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    return ("compare", segformer_dir, "--data", scenes, "--arms", "none,migrate", "--samples", "4", "-o", out, *QUICK)


ONE = ("--seeds", "1", "--lrs", "1e-2")


@pytest.fixture(scope="module")
def printed(words):
    """What the comparison of one seed prints, with --json."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert main([str(word) for word in (*words, *ONE, "--json")]) == 0
    return stream.getvalue()


@pytest.fixture(scope="module")
def out(words, printed):
    """Where its runs are. Read only."""
    return words[words.index("-o") + 1]


def test_one_object_a_table_and_a_picture(printed, out):
    content = json.loads(printed)
    assert content == json.loads((out / "compare.json").read_text())
    assert (content["arms"], content["lrs"], content["seeds"]) == (["none", "migrate"], [0.01], [0])
    assert (content["steps"], content["early_step"], content["images"]) == (2, 1, 2)
    assert len(content["runs"]) == 2
    for run in content["runs"]:
        assert {"arm", "lr", "seed", "mIoU", "early", "curve", "sites"} <= run.keys()
        assert run["sites"][0]["ratio"] >= run["sites"][0]["ratio_after"] >= 1
    assert [(row["arm"], row["baseline"], row["lr"]) for row in content["comparisons"]] == [
        ("migrate", "none", 0.01),
    ]
    assert {"mean", "low", "high", "images", "measurable"} <= content["comparisons"][0]["difference"].keys()
    (verdict,) = content["verdict"]
    assert all(verdict[question]["sentence"] for question in ("best", "sweep", "early"))
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "compare.md").read_text()
    assert "| migrate | 0.01 |" in text
    assert "](compare.png)" in text
    check_page(out / "report.html", pictures=2)
    page = (out / "report.html").read_text()
    assert page.count("<img ") == text.count("](") == 2  # one rate: learning curves, and differences by class
    assert content["verdict"][0]["best"]["sentence"] in html.unescape(page)
    assert "wrote" not in printed


def test_again_it_only_reports(run_cli, words, out):
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    ran = run_cli(*words, *ONE)
    assert ran.code == 0, ran.err
    assert "2 of 2 runs are there already" in ran.out
    assert "migrate against none" in ran.out
    for question in ("best:", "sweep:", "early:"):
        assert question in ran.text
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == before
    ran = run_cli(*words, *ONE, "--batch-size", "4")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("error: ") == 1
    assert "holds a comparison with other settings: batch_size was 2, now 4" in " ".join(ran.err.split())


def test_a_dry_run_names_what_is_there_and_changes_nothing(run_cli, words, out, monkeypatch):
    pace = Pace(step=40.0, image=0.5, cached=0.0, memory=2_000_000_000)
    monkeypatch.setattr("equalize.commands.compare.dry_run.pace_of", lambda task: pace)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    more = ("--seeds", "2", "--lrs", "1e-2", "--dry-run")
    ran = run_cli(*words, *more)
    assert ran.code == 0, ran.err
    assert "runs: 4, of which 2 are to be trained; there already: none_lr0.01_seed0, migrate_lr0.01_seed0" in ran.text
    assert f"Nothing was written to {out} (--dry-run)." in ran.text
    assert "--dry-run" not in ran.err
    content = json.loads(run_cli(*words, *more, "--json").out)
    assert (content["missing"], content["steps"], content["evaluations"]) == (
        2,
        2,
        3,
    )  # steps 1 and 2, and all at the end
    # two runs of two steps; two images; one pass over four images for each arm of the second seed
    assert content["seconds"] == 4 * 40 + (2 * 3 * 2 + 2 * 4) * 0.5
    assert "time: about 2.83 min on cpu (3 steps timed: 40 s each; 0.5 s to score an image)" in ran.text
    assert "memory: about 2 GB at the peak" in ran.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    ran = run_cli(*words, *more, "--batch-size", "4")
    assert (ran.code, ran.out) == (2, "")


def test_without_matplotlib_all_but_the_picture_is_written(run_cli, words, out, tmp_path, monkeypatch):
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy/compare.png").unlink()
    monkeypatch.setattr("equalize.commands.compare.report.can_draw", lambda: False)
    moved = [tmp_path / "copy" if word == out else word for word in words]
    ran = run_cli(*moved, *ONE)
    assert ran.code == 0, ran.err
    assert "equalize[plot]" in ran.err
    assert not (tmp_path / "copy/compare.png").exists()
    assert "compare.png" not in (tmp_path / "copy/compare.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--arms", "none"), "--arms: are no two different arms"),
        (("--arms", "none,equalized"), "--arms: has an arm that is unknown, got 'equalized'"),
        (("--lr", "1", "--lrs", "1,2"), "--lr: cannot stand with --lrs"),
        (("--lrs", "fast"), "--lrs: is no list of numbers"),
        (("--seeds", "0"), "--seeds: is too small"),
        (("--epochs", "1"), "--epochs: cannot stand with --max-steps"),
        (("--num-classes", "3"), "has label"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(run_cli, words, tmp_path, more, message):
    place = words.index("-o")
    ran = run_cli(*words[:place], *words[place + 2 :], *more, "-o", tmp_path / "new")
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("error: ") == 1
    assert not (tmp_path / "new").exists()
