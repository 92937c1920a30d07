"""Every example of docs/questions.md runs and gives the table that stands there, its key number within a tolerance."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
# a command, what it printed, and the tolerance of its key number
BLOCKS = {
    script: (printed, float(tolerance))
    for script, printed, tolerance in re.findall(
        r"```\n\$ python (\S+)\n(.*?)```\n\nThe key number is tested to ±([\d.]+)\.", TEXT, re.DOTALL
    )
}
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def key_number(printed: str) -> float:
    return float(re.search(rf"^key number: ({NUMBER})$", printed, re.MULTILINE).group(1))


def test_every_example_stands_in_the_page():
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "examples" / "questions").glob("[0-9]*.py")}
    assert scripts == set(BLOCKS)
    assert len(scripts) == 10


@pytest.mark.slow
@pytest.mark.parametrize("script", BLOCKS)
def test_an_example_gives_what_the_page_says(script):
    run = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    printed, tolerance = BLOCKS[script]
    # the same tables, whatever numbers are in them
    assert re.sub(NUMBER, "#", run.stdout).strip() == re.sub(NUMBER, "#", printed).strip()
    assert key_number(run.stdout) == pytest.approx(key_number(printed), abs=tolerance)
