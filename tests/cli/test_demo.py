import json

from equalize.demo import DATA, MODEL


def test_the_demo_shows_the_whole_way(run_cli, tmp_path):
    out = tmp_path / "kept"
    ran = run_cli("demo", "-o", out)
    assert (ran.code, ran.err) == (0, "")
    for sentence in ("1. equalize scan", "2. equalize calibrate", "3. equalize verify", "1.00 after", "kept"):
        assert sentence in ran.text
    assert (out / "equalize.json").is_file()
    proven = run_cli("verify", out, "--against", MODEL, "--data", DATA, "--json")
    assert json.loads(proven.out)["check"]["max_abs_change"] < 1e-3


def test_the_demo_in_json_leaves_nothing(run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ran = run_cli("demo", "--json")
    shown = json.loads(ran.out)
    assert (ran.code, list(tmp_path.iterdir())) == (0, [])
    assert list(shown) == ["scan", "calibrate", "verify", "seconds"]
    assert [site["strategy"] for site in shown["calibrate"]["sites"]] == ["migrate", "migrate"]
    before = [[branch["std"] for branch in site["branches"]] for site in shown["scan"]["sites"]]
    assert all(max(sigmas) / min(sigmas) > 1.5 for sigmas in before)


def test_what_the_demo_brings_is_small():
    assert (
        sum(path.stat().st_size for root in (MODEL, DATA) for path in root.rglob("*") if path.is_file()) < 2 * 1024**2
    )
