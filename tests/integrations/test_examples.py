"""The scripts of `examples/integrations` as a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
NEEDS = {"lightning_smp": "lightning", "mmengine_runner": "mmseg"}
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "scenes")


def test_there_is_one_a_library():
    assert SCRIPTS == ["lightning_smp", "mmengine_runner", "torchvision_loop", "transformers_trainer"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_and_learns(script, tmp_path):
    """To a score above that of one class for all pixels, by weights that the library loaded."""
    if script in NEEDS:
        pytest.importorskip(NEEDS[script])
    command = [sys.executable, EXAMPLES / f"{script}.py", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    score = re.search(r"^after: mIoU ([\d.]+), (.+)$", done.stdout, re.MULTILINE)
    assert score, done.stdout
    assert float(score[1]) > 100 / 8
    assert Path(score[2]).exists()
    if script == "torchvision_loop":
        again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert again.stdout == score[0] + "\n", again.stderr[-3000:]
