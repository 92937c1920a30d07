"""Help: every flag has a panel and a text, nothing is cut at any width, and the examples can be typed."""

import re
import shlex
from dataclasses import MISSING, fields

import pytest
import typer

from equalize.cli import main
from equalize.cli.app import app
from equalize.cli.training_options import TrainingFlags
from equalize.commands.finetune.config import TrainConfig

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
PANELS = {"Data", "Model", "Optimizer", "Augmentation", "Equalization", "Output"}


def shown_parameters(command):
    return [each for each in command.params if not each.hidden]


def examples(text):
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip().startswith("equalize ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_panel_a_text_and_a_word_for_its_value(name):
    for parameter in shown_parameters(COMMANDS[name]):
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name
        assert "left away" not in parameter.help, parameter.name
        if parameter.param_type_name == "option":
            assert parameter.rich_help_panel in PANELS, parameter.name
            assert parameter.is_flag or "<float>" not in parameter.display_type_rich(None), parameter.name
            assert parameter.is_flag or "<int>" not in parameter.display_type_rich(None), parameter.name


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_cut(run_cli, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run_cli(name, "--help").out
    assert [line for line in shown.splitlines() if len(line) > max(width, 80)] == []
    whole = "".join(shown.split())
    for parameter in shown_parameters(COMMANDS[name]):
        assert "".join(parameter.help.split()) in whole, parameter.name
        if parameter.param_type_name == "option":
            assert all(flag in shown for flag in parameter.opts), parameter.name
    sections = re.findall(r"^(\w+):$", shown, re.MULTILINE)
    assert set(sections) <= PANELS | {"Arguments", "Examples"}
    assert sections == sorted(set(sections), key=sections.index), "a panel is shown twice"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_command_has_its_sentence(run_cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = "".join(run_cli("--help").out.split())
    for command in COMMANDS.values():
        sentence = command.help.split("\n\n")[0]
        assert "".join(sentence.split()).rstrip(".") in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_two_examples_that_can_be_typed(run_cli, name):
    lines = examples(run_cli(name, "--help").out)
    assert len(lines) >= 2
    for line in lines:
        program, command, *words = shlex.split(line)
        assert (program, command) == ("equalize", name)
        with COMMANDS[name].make_context(name, words):  # raises on a flag or a value that is none
            pass


def test_defaults_of_a_training_are_those_of_its_configuration():
    by_name = {each.name: each for each in COMMANDS["finetune"].params}
    compared = 0
    for field in fields(TrainConfig):
        if field.default in (None, MISSING, ()) or field.name not in {each.name for each in fields(TrainingFlags)}:
            continue
        told = by_name[field.name].show_default
        default = field.default
        if isinstance(default, bool):
            expected = "yes" if default else "no"
        elif isinstance(default, tuple):
            expected = ",".join(map(str, default))
        else:
            expected = str(default)
        assert told == expected, field.name
        compared += 1
    assert compared > 15


def test_completion_is_installed(run_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    assert run_cli("--show-completion").out.startswith("_equalize_completion()")
    ran = run_cli("--install-completion")
    assert (ran.code, ran.err) == (0, "")
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_EQUALIZE_COMPLETE=complete_bash" in script.read_text()


def test_a_shell_completes_commands_and_flags(monkeypatch, capsys):
    def completed(words, position):
        monkeypatch.setenv("_EQUALIZE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(position))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.split()

    assert completed("equalize ca", 1) == ["calibrate"]
    assert completed("equalize finetune --freeze-b", 2) == ["--freeze-backbone"]
    assert completed("equalize finetune --optimizer a", 3) == ["adamw"]
