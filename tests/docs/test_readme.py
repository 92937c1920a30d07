"""The commands of README and docs are commands, its test command is what continuous integration runs."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = "\n".join(
    [README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("usage.md", "training.md"))]
)
CODE = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"^(?:\$ )?(equalize [a-z]+ .*?)(?:\s+#.*)?$", CODE, re.MULTILINE)


def test_the_start_is_two_commands_and_one_of_them_is_what_ci_runs():
    start = README.split("## Start")[1].split("## From a checkpoint")[0]
    demo, tests = re.search(r"```sh\n(.*?)```", start, re.DOTALL).group(1).strip().splitlines()
    assert demo.endswith("equalize demo")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for step in tests.split(" && "):
        words = step.replace(".venv/bin/", "").replace(".venv", "").split()
        assert all(word in ci for word in words), step


@pytest.mark.parametrize("line", COMMANDS)
def test_every_flag_exists(run_cli, line):
    words = shlex.split(line)
    shown = run_cli(words[1], "--help").out
    for flag in (word for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), f"{words[1]} has no {flag}"


def test_it_shows_every_command(run_cli):
    shown = run_cli("--help").out
    names = re.findall(r"^  ([a-z]+)  ", shown.split("Commands:")[1], re.MULTILINE)
    assert {"scan", "calibrate", "demo"} <= set(names)
    assert [name for name in names if f"equalize {name}" not in README] == []
