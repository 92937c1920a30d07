"""Help as plain text: flags in panels, examples at the end.

Rich's tables would cut long flags and names, and importing Rich takes longer than the rest of `--help`.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from typer import Option
from typer.core import TyperCommand, TyperGroup

_PANELS = ("Arguments", "Data", "Model", "Optimizer", "Augmentation", "Equalization", "Output")
_FLAG_WIDTH = 30  # a longer flag has its text below


def _option(
    panel: str,
    help: str,
    metavar: str | None = None,
    default: str | bool = True,
    *,
    names: Sequence[str] = (),
    **more: Any,
) -> Any:
    """A flag: what it says, its value, its default in words, its names if they are not those of the parameter."""
    return Option(*names, help=help, metavar=metavar, show_default=default, rich_help_panel=panel, **more)


data = partial(_option, "Data")
model = partial(_option, "Model")
optimizer = partial(_option, "Optimizer")
augmentation = partial(_option, "Augmentation")
equalization = partial(_option, "Equalization")
output = partial(_option, "Output")


class PanelCommand(TyperCommand):
    """A command whose help has a section for each `rich_help_panel`, and its epilog as it is written."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments and flags."""
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in _PANELS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # hidden
                continue
            argument = parameter.param_type_name == "argument"
            # --help has no panel
            panel = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Output"
            name = re.sub(r" <(str|list\[str\])>$", "", record[0])
            text = re.sub(r"default: \((.*?)\)(?=[;\]])", r"default: \1", record[1])  # Typer puts words in parentheses
            panels.setdefault(panel, []).append((name, text))
        names = [name for rows in panels.values() for name, _ in rows]
        width = min(_FLAG_WIDTH, max(map(len, names)))
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=_FLAG_WIDTH)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the examples, one line as one line."""
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}".rstrip() + "\n" for line in self.epilog.splitlines()))


class PanelGroup(TyperGroup):
    """A group that shows the first sentence of each command in full."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands."""
        with formatter.section("Commands"):
            whole = 1_000
            formatter.write_dl([(name, each.get_short_help_str(whole)) for name, each in self.commands.items()])
