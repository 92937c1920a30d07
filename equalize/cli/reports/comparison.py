"""A comparison as a table and sentences, on a terminal and as Markdown."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.commands.compare.compare import Comparison
from equalize.commands.compare.statistics import Verdict
from equalize.commands.report.page import Section
from equalize.commands.report.page import Table as PageTable
from equalize.commands.report.style import Picture

__all__ = ["comparison_page", "comparison_report", "markdown"]

_HEADINGS = ("arm", "lr", "sigmas", "mIoU", "difference", "95 % seeds", "95 % images", "early", "early difference")

_CONFIRMED = ("arm", "lr", "mIoU", "difference", "95 %", "p t", "p flip", "Holm t", "Holm flip", "steps", "lost")

# Columns that a narrow terminal goes without, in this order.
_FIRST_OUT = ("95 % images", "early difference", "early", "sigmas")
_CONFIRMED_OUT = ("p flip", "Holm flip", "p t", "lost", "steps")
_WIDEST = 10_000


def comparison_report(found: Comparison) -> Iterator[ConsoleRenderable]:
    """What ran, a row for each arm and rate, and three lines for each arm."""
    yield from (Text(), _FittingTable(_HEADINGS, _table(found), _FIRST_OUT), Text(), Text(_legend(found)))
    if found.confirmed:
        confirmed = _FittingTable(_CONFIRMED, _confirmed(found), _CONFIRMED_OUT)
        yield from (Text(), confirmed, Text(), Text(_confirmed_legend(found)))
    for verdict in found.verdicts:
        yield Text(f"\n{verdict.arm} against {verdict.baseline}", style="bold")
        for question, said in _sentences(verdict):
            yield Padding(Text(f"{question}: {said}"), (0, 0, 0, 2))


def comparison_page(found: Comparison, pictures: Sequence[Picture]) -> Iterator[Section]:
    """The same for a browser."""
    for verdict in found.verdicts:
        (_, best), *others = _sentences(verdict)
        said = tuple(f"{question}: {sentence}" for question, sentence in others)
        yield Section(heading=f"{verdict.arm} against {verdict.baseline}", verdict=best, paragraphs=said)
    if found.confirmed:
        table = PageTable(header=_CONFIRMED, rows=tuple(map(tuple, _confirmed(found))))
        yield Section(heading="Confirmed", paragraphs=(_confirmed_legend(found),), table=table)
    yield Section(heading="Pictures", pictures=tuple(pictures))
    table = PageTable(header=_HEADINGS, rows=tuple(map(tuple, _table(found))))
    yield Section(heading="Every arm and rate", paragraphs=(_legend(found),), table=table)


class _FittingTable:
    """A table without its last columns of `first_out` where a terminal is too narrow; compare.md has all."""

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[str]], first_out: Sequence[str]) -> None:
        self._headings, self._rows, self._first_out = headings, rows, first_out

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        most, least = (self._width(console, self._without(number)) for number in (0, len(self._first_out)))
        return Measurement(least if console.is_terminal else most, most)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables = [self._without(number) for number in range(len(self._first_out) + 1)]
        fitting = (table for table in tables if self._width(console, table) <= options.max_width)
        yield next(fitting, tables[-1])

    def _without(self, number: int) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
        table.add_column()  # indents
        shown = [place for place, heading in enumerate(self._headings) if heading not in self._first_out[:number]]
        for place in shown:
            heading = self._headings[place]
            table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*map(Text, ("", *(row[place] for place in shown))))
        return table

    @staticmethod
    def _width(console: Console, table: Table) -> int:
        return Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum


def markdown(found: Comparison, pictures: Sequence[Picture] = ()) -> str:
    """The same as a Markdown file."""
    setup = found.setup
    rows = [_HEADINGS, ["---", *["---:"] * (len(_HEADINGS) - 1)], *_table(found)]
    lines = [f"# Comparison of {', '.join(arm.name for arm in setup.arms)}", ""]
    lines += [f"Model `{setup.name.source}`, data `{setup.data}`.", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    lines += ["", _legend(found)]
    if found.confirmed:
        rows = [_CONFIRMED, ["---", *["---:"] * (len(_CONFIRMED) - 1)], *_confirmed(found)]
        lines += ["", "## Confirmed", "", *(f"| {' | '.join(cells)} |" for cells in rows), "", _confirmed_legend(found)]
    for verdict in found.verdicts:
        lines += ["", f"## {verdict.arm} against {verdict.baseline}", ""]
        lines += [f"- **{question}**: {said}" for question, said in _sentences(verdict)]
    for picture in pictures:
        lines += ["", f"![{picture.alt}]({picture.name}.png)"]
    return "\n".join(lines) + "\n"


def _sentences(verdict: Verdict) -> list[tuple[str, str]]:
    answers = {"best": verdict.best, "sweep": verdict.sweep, "early": verdict.early}
    return [(question, answer.sentence) for question, answer in answers.items()]


def _table(found: Comparison) -> list[list[str]]:
    """A row for each arm and rate; an arm with two baselines has a second one."""
    table: list[list[str]] = []
    for (arm, rate), cell in found.cells.items():
        first, early = [arm, f"{rate:g}", _ratios(found, arm, rate), _spread(cell.final)], _spread(cell.early)
        rows = [row for row in found.rows if (row.arm, row.lr) == (arm, rate)]
        if not rows:
            table.append([*first, "", "", "", early, ""])
        for row in rows:
            if row is not rows[0]:
                first, early = [f"- against {row.baseline}", "", "", ""], ""
            final = row.difference
            intervals = [_interval(final.low, final.high), _interval(*final.images or (None, None))]
            table.append([*first, f"{final.mean:+.2f}", *intervals, early, f"{row.early.mean:+.2f}"])
    return table


def _confirmed(found: Comparison) -> list[list[str]]:
    """A row for each arm at its best rate, and for each baseline of it."""
    table = []
    for row in found.confirmed:
        cells = [row.arm, f"{row.lr:g}", _spread(row.scores)]
        if row.difference is not None:
            final = row.difference
            cells += [f"{final.mean:+.2f} to {row.baseline}", _interval(final.low, final.high)]
        cells += [""] * (5 - len(cells))
        for p in (row.p, row.holm):
            cells += [f"{p[name]:.3g}" if p else "" for name in ("t_one_sided", "sign_flip_one_sided")]
        steps = "" if row.baseline is None else "never"
        cells.append(steps if row.steps_to_baseline is None else f"{row.steps_to_baseline:.0f}")
        table.append([*cells, "" if row.loss_at_tenth is None else f"{row.loss_at_tenth:.2f}"])
    return table


def _confirmed_legend(found: Comparison) -> str:
    setup = found.setup
    assert setup.test is not None
    edges = [each.arm for each in found.tuned if each.at_edge]
    ends = f" The sweep of {', '.join(edges)} ended with its best rate at an edge." if edges else ""
    few = [f"{each.arm} ({each.lr:g})" for each in found.confirmed if each.difference and not each.difference.tells]
    ends += f" Too few seeds to tell: {', '.join(few)}." if few else ""
    val, test = setup.val.split, setup.test.split
    return (
        f"Rates chosen on the split {val} with {len(setup.seeds)} seeds; mIoU in percent on the split {test} with "
        f"{len(setup.confirm_seeds)} others, scored once, after the last step. p: one-sided, paired by seed, by "
        "Student's t and by exact sign flips; Holm: corrected for the number of arms. steps: where the mean curve on "
        f"{val} reaches the baseline's end. lost: at a tenth of the best rate, on {val}.{ends}"
    )


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _ratios(found: Comparison, arm: str, rate: float) -> str:
    """Largest sigma over smallest, of the site where they are furthest apart: as measured and as trained."""
    sites = [site for result in found.results_of(arm, rate) for site in result["sites"]]
    if not sites:
        return "-"
    before, after = (max(site[key] for site in sites) for key in ("ratio", "ratio_after"))
    return f"{before:.2f}" if before == after else f"{before:.2f} -> {after:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def _legend(found: Comparison) -> str:
    seeds = len(found.setup.seeds)
    config = found.setup.config
    return (
        f"mIoU in percent on {found.images} images after {config.max_steps} steps, early after {config.eval_first}; "
        f"means over {'1 seed' if seeds == 1 else f'{seeds} seeds (± their standard deviation)'}. sigmas: largest over "
        "smallest in the fusion layer and seed where they are furthest apart, as measured and as trained. Differences "
        "to the baseline are paired by seed. 95 % seeds: what other seeds would give; verdicts rest on it, not "
        "corrected for how many are compared. 95 % images: what these networks would score on other images; no verdict "
        "rests on it."
    )
