"""What the package offers by name, and what importing it costs."""

import subprocess
import sys

import pytest

import equalize


@pytest.mark.parametrize(
    "statement", ["import equalize; equalize.__version__", "import equalize.sites.sites, equalize.plan.plan"]
)
def test_importing_costs_no_torch(statement):
    heavy = "{'torch', 'transformers', 'torchvision', 'numpy'} & set(sys.modules)"
    code = f"import sys; {statement}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names():
    """The public Python interface, and the types in its signatures."""
    assert equalize.__all__ == sorted(equalize.__all__)
    contract = {"load", "scan", "measure", "make_plan", "calibrate", "apply", "attach", "fold"}
    kinds = {"Branch", "Checkpoint", "Edit", "EqualizeError", "Moments", "Plan", "Refusal", "Scan", "Site"}
    assert set(equalize.__all__) == contract | kinds | {"__version__"}
    assert set(dir(equalize)) >= set(equalize.__all__)
    for name in equalize.__all__:
        assert getattr(equalize, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'equalise'"):
        _ = equalize.equalise
