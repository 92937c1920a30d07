"""Reports of scan and calibrate as files and in a browser."""

import html
import json

import pytest

from equalize.cli import main
from equalize.commands.report import page as page_module
from tests.support.browser import CHROMIUM, check_page, look_at

SIZE = ("--size", "64", "--samples", "4")


def text_of(report):
    return html.unescape((report / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(segformer_dir, photos, tmp_path_factory):
    """That of a scan."""
    place = tmp_path_factory.mktemp("reports") / "new" / "report"
    assert main(["scan", str(segformer_dir), "--data", str(photos), *SIZE, "--report", str(place)]) == 0
    return place


def test_scan_writes_a_page_with_its_pictures_beside_it(report, run_cli, segformer_dir, photos):
    assert {path.name for path in report.iterdir()} == {"report.html", "branches-1.png", "layer-1.png"}
    text = text_of(report)
    assert f"Fusion layers of {segformer_dir}" in text
    (site,) = json.loads(run_cli("scan", segformer_dir, "--data", photos, *SIZE, "--json").out)["sites"]
    says = {"gain": "Expect a gain", "nothing": "Expect nothing", "unclear": "Cannot tell"}
    assert f"{says[site['expect']]}" in text
    assert f"delta {round(site['delta'], 3) + 0.0:.3f}." in text
    for branch in site["branches"]:
        cells = (branch["source"], f"{branch['start']}..{branch['stop']}", f"{branch['std']:.3g}")
        assert all(f"<td>{cell}</td>" in text for cell in (*cells, f"{branch['step_share']:.1%}"))
    assert f"<pre>equalize calibrate {segformer_dir}" in text


def test_calibrate_writes_one_too_and_the_plan_and_out_stay_as_they_are(run_cli, segformer_dir, photos, tmp_path):
    plans = []
    for name, more in (("plain", ()), ("drawn", ("--report", tmp_path / "report"))):
        out = tmp_path / name
        flags = ("--data", photos, *SIZE, "--strategy", "rescale", "--tolerance", "0.5")
        ran = run_cli("calibrate", segformer_dir, *flags, "-o", out, *more)
        assert ran.code == 0, ran.err
        assert (f"report: {tmp_path / 'report' / 'report.html'}" in ran.err) == (name == "drawn")
        plans.append(json.loads((out / "equalize.json").read_text()))
        plans[-1] = {key: value for key, value in plans[-1].items() if key not in ("seconds", "output", "command")}
    assert plans[0] == plans[1]
    plain, drawn = ({path.name for path in (tmp_path / name).iterdir()} for name in ("plain", "drawn"))
    assert plain == drawn
    text = text_of(tmp_path / "report")
    for site in plans[0]["sites"]:
        assert f"<h2>{site['layer']}</h2>" in text
    assert "1 of 1 fusion layer equalized." in text
    assert all(f"<td>{key}</td>" in text for key in plans[0]["changed"])
    assert f"{plans[0]['check']['interior']:.1e}" in text
    assert f"<pre>equalize finetune {tmp_path / 'drawn'}" in text


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_every_picture_and_asks_nobody_for_anything(report):
    check_page(report / "report.html", pictures=2)
    light, dark = (look_at(report / "report.html", dark=dark) for dark in (False, True))
    assert all(width > 0 for width, _ in dark.images.values())
    assert not {source for _, source in light.images.values()} & {source for _, source in dark.images.values()}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_tells_of_what_a_page_may_not_do(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(
        '<body><img alt="lost" src="lost.png"><script src="http://example.org/a.js"></script>'
        '<script>undefined_function()</script><div style="width:3000px">wide</div></body>'
    )
    seen = look_at(page)
    assert seen.images["lost"][0] == 0
    assert "http://example.org/a.js" in seen.loaded
    assert any("undefined_function" in line for line in seen.console)
    assert seen.wide


def test_what_is_missing_is_said_before_anything_is_read(run_cli, photos, tmp_path, monkeypatch):
    for command in (("scan", "nowhere"), ("calibrate", "nowhere", "-o", tmp_path / "out")):
        (tmp_path / "file").write_text("")
        ran = run_cli(*command, "--data", photos, "--report", tmp_path / "file")
        assert (ran.code, ran.err) == (2, f"error: {tmp_path / 'file'}: is no directory; give --report another place\n")
        with monkeypatch.context() as patched:
            patched.setattr(page_module, "can_draw", lambda: False)
            ran = run_cli(*command, "--data", photos, "--report", tmp_path)
        assert (ran.code, ran.err) == (3, "error: --report: needs matplotlib; pip install 'equalize[plot]'\n")
    assert "needs --data" in run_cli("scan", "nowhere", "--report", tmp_path).err
