"""A comparison as tables and sentences: compare.md, and report.html with its pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from equalize.commands.compare.compare import Comparison
from equalize.commands.compare.pictures import draw_comparison
from equalize.commands.compare.statistics import Verdict
from equalize.commands.report.page import PAGE_FILE, Section, Table, write_page
from equalize.commands.report.style import Picture, can_draw

SWEEP = ("arm", "lr", "sigmas", "mIoU")
COMPARED = (*SWEEP, "difference", "95 % seeds", "95 % images", "early", "early difference")
CONFIRMED = ("arm", "lr", "mIoU", "difference", "95 %", "p t", "p flip", "Holm t", "Holm flip", "steps", "lost")


def write_report(found: Comparison, out: Path) -> list[str]:
    """Writes compare.md, report.html and, with matplotlib, their pictures; the names of the files."""
    pictures = draw_comparison(found) if can_draw() else ()
    (out / "compare.md").write_text(_markdown(found, pictures), encoding="utf-8")
    arms = ", ".join(arm.name for arm in found.setup.arms)
    write_page(out, f"{arms} on {found.setup.data}", _page(found, pictures))
    return ["compare.md", PAGE_FILE, *(f"{picture.name}.png" for picture in pictures)]


def _page(found: Comparison, pictures: Sequence[Picture]) -> Iterator[Section]:
    """All of it for a browser."""
    for verdict in found.verdicts:
        (_, best), *others = sentences(verdict)
        said = tuple(f"{question}: {sentence}" for question, sentence in others)
        yield Section(heading=f"{verdict.arm} against {verdict.baseline}", verdict=best, paragraphs=said)
    if found.confirmed:
        table = Table(header=CONFIRMED, rows=tuple(map(tuple, confirmed_rows(found))))
        yield Section(heading="Confirmed", paragraphs=(confirmed_legend(found),), table=table)
    yield Section(heading="Pictures", pictures=tuple(pictures))
    table = Table(header=headings(found), rows=tuple(map(tuple, rows_of(found))))
    yield Section(heading="Every arm and rate", paragraphs=(legend(found),), table=table)


def _markdown(found: Comparison, pictures: Sequence[Picture]) -> str:
    """All of it as a Markdown file."""
    setup = found.setup
    header = headings(found)
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *rows_of(found)]
    lines = [f"# Comparison of {', '.join(arm.name for arm in setup.arms)}", ""]
    lines += [f"Model `{setup.name.source}`, data `{setup.data}`.", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    lines += ["", legend(found)]
    if found.confirmed:
        rows = [CONFIRMED, ["---", *["---:"] * (len(CONFIRMED) - 1)], *confirmed_rows(found)]
        lines += ["", "## Confirmed", "", *(f"| {' | '.join(cells)} |" for cells in rows), "", confirmed_legend(found)]
    for verdict in found.verdicts:
        lines += ["", f"## {verdict.arm} against {verdict.baseline}", ""]
        lines += [f"- **{question}**: {said}" for question, said in sentences(verdict)]
    for picture in pictures:
        lines += ["", f"![{picture.alt}]({picture.name}.png)"]
    return "\n".join(lines) + "\n"


def sentences(verdict: Verdict) -> list[tuple[str, str]]:
    """Each question, and the sentence that answers it."""
    answers = {"best": verdict.best, "sweep": verdict.sweep, "early": verdict.early}
    return [(question, answer.sentence) for question, answer in answers.items()]


def headings(found: Comparison) -> tuple[str, ...]:
    """Of `rows_of`."""
    return SWEEP if found.tuned else COMPARED


def rows_of(found: Comparison) -> list[list[str]]:
    """A row for each arm and rate; an arm with two baselines has a second one."""
    table: list[list[str]] = []
    for (arm, rate), cell in found.cells.items():
        first = [arm, f"{rate:g}", _ratios(found, arm, rate), _spread(cell.final)]
        if found.tuned:
            table.append(first)
            continue
        early = _spread(cell.early)
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


def confirmed_rows(found: Comparison) -> list[list[str]]:
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


def confirmed_legend(found: Comparison) -> str:
    """How to read `confirmed_rows`."""
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


def legend(found: Comparison) -> str:
    """How to read `rows_of`."""
    seeds = len(found.setup.seeds)
    config = found.setup.config
    early = "" if found.tuned else f", early after {config.eval_first}"
    first = (
        f"mIoU in percent on {found.images} images after {config.max_steps} steps{early}; means over "
        f"{'1 seed' if seeds == 1 else f'{seeds} seeds (± their standard deviation)'}. sigmas: largest over "
        "smallest in the fusion layer and seed where they are furthest apart, as measured and as trained."
    )
    if found.tuned:
        return first
    return (
        f"{first} Differences to the baseline are paired by seed. 95 % seeds: what other seeds would give; verdicts "
        "rest on it, not corrected for how many are compared. 95 % images: what these networks would score on other "
        "images; no verdict rests on it."
    )
