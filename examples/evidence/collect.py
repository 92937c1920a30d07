"""Makes the tables and the plot of docs/results.md from finished runs, and keeps their numbers.

    python examples/evidence/collect.py --out EVIDENCE

Every run becomes a line of `examples/evidence/results/JOB.jsonl`; the tables between the marks of docs/results.md and
docs/results-JOB.png are made from these lines alone, so that they can be made again without the runs.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from claims import Evidence, networks, verdicts
from run import Job, end_to_end, jobs
from scipy import stats

from equalize.commands.report.comparison import draw_rates
from equalize.commands.report.style import draw_picture

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parents[1] / "docs"
KEPT = ("arm", "lr", "seed", "steps", "train_as", "mIoU", "curve", "start")

Runs = list[dict[str, Any]]


def gather(job: Job, out: Path) -> Runs:
    """The runs of a job: those kept before and those that have finished since."""
    place = RESULTS / f"{job.name}.jsonl"
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    runs = {(each["arm"], each["lr"], each["seed"]): each for each in map(json.loads, lines)}
    for path in sorted((out / job.name).rglob("runs/*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: found[key] for key in KEPT} | {"test": (found.get("test") or {}).get("mIoU")}
        kept["curve"] = [[step, round(value, 3)] for step, value in kept["curve"]]
        runs[found["arm"], found["lr"], found["seed"]] = kept
    if runs:
        place.write_text("".join(json.dumps(runs[key]) + "\n" for key in sorted(runs)), encoding="utf-8")
    return [runs[key] for key in sorted(runs)]


def keep_scans(out: Path) -> None:
    """What the indicator said of each network: results/scans.json."""
    place = RESULTS / "scans.json"
    kept = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    for path in sorted(out.glob("scan-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        branches = [[(b["stop"] - b["start"], b["std"]) for b in site["branches"]] for site in found["sites"]]
        kept[path.stem.removeprefix("scan-")] = {
            "delta": found["delta"],
            "expect": found["expect"],
            "ratio": [round(max(s for _, s in each) / min(s for _, s in each), 2) for each in branches],
            "sigma_rms": [
                round((sum(c * s**2 for c, s in each) / sum(c for c, _ in each)) ** 0.5, 4) for each in branches
            ],
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    place.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def arms_of(job: Job, runs: Runs) -> tuple[str, ...]:
    """Those of the job, and those that were run before they were taken out of the tool."""
    return tuple(dict.fromkeys((*job.arms, *(run["arm"] for run in runs))))


def tuning(job: Job, runs: Runs) -> dict[str, dict[float, list[float]]]:
    """mIoU on val of the tuning seeds that are finished, by arm and rate."""
    found: dict[str, dict[float, list[float]]] = {arm: {} for arm in arms_of(job, runs)}
    for run in runs:
        if run["seed"] < job.tune:
            found[run["arm"]].setdefault(run["lr"], []).append(run["mIoU"])
    return {arm: dict(sorted(rates.items())) for arm, rates in found.items()}


def tuning_table(job: Job, runs: Runs) -> str:
    """Rows of arms, columns of rates: mean mIoU on val, with * where a seed is missing; the best of each in bold."""
    found = tuning(job, runs)
    rates = sorted({rate for each in found.values() for rate in each})
    lines = [f"| arm, val mIoU | {' | '.join(f'{rate:g}' for rate in rates)} |", f"|---{'|---:' * len(rates)}|"]
    for arm, scores in found.items():
        means = {rate: fmean(values) for rate, values in scores.items()}
        best = max(means, key=lambda rate: means[rate], default=None)
        stars = {rate: "*" * (len(values) < job.tune) for rate, values in scores.items()}
        cells = ["" if rate not in means else f"{means[rate]:.1f}{stars[rate]}" for rate in rates]
        cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def confirmed(job: Job, runs: Runs, evidence: Evidence) -> Runs:
    """Those of fresh seeds, each arm at its best rate."""
    if job.rates_of is None:
        return [run for run in runs if run["test"] is not None]
    return [run for run in runs if run["lr"] == evidence.best(job.rates_of, run["arm"])]


def confirmation_table(job: Job, runs: Runs, split: str) -> str:
    """Each arm at its own best rate, fresh seeds: mean on a split, difference to `none` with its 95 % interval.

    Runs are paired where they began from the same weights.
    """
    by_arm = {arm: {run["seed"]: run for run in runs if run["arm"] == arm} for arm in arms_of(job, runs)}
    score = "mIoU" if split == "val" else split
    rows = []
    plain = by_arm["none"]
    for arm, mine in by_arm.items():
        seeds = sorted(seed for seed in mine.keys() & plain.keys() if mine[seed]["start"] == plain[seed]["start"])
        if not seeds:
            continue
        scores = [mine[seed][score] for seed in seeds]
        row = [f"`{arm}`", f"{mine[seeds[0]]['lr']:g}", str(len(seeds)), _spread(scores)]
        rows.append([*row, _difference(scores, [plain[seed][score] for seed in seeds]) if arm != "none" else ""])
    heading = f"| arm | rate | seeds | {split} mIoU | less `none`, 95 % over seeds |\n|---|---:|---:|---:|---|\n"
    return heading + "\n".join(f"| {' | '.join(row)} |" for row in rows) if rows else "Not confirmed yet."


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _difference(arm: list[float], baseline: list[float]) -> str:
    pairs = [one - other for one, other in zip(arm, baseline, strict=True)]
    if len(pairs) < 2:
        return f"{pairs[0]:+.2f}"
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)
    return f"{fmean(pairs):+.2f} ({fmean(pairs) - half:+.2f} to {fmean(pairs) + half:+.2f})"


def plot(job: Job, found: Mapping[str, Mapping[float, list[float]]]) -> str:
    """mIoU against rate as `equalize compare` draws it; returns the file's name."""
    first = job.arms[0]  # the baseline
    arms = {arm: scores for arm, scores in found.items() if scores or arm == first}
    picture = draw_rates(arms, split="val", title=[f"{job.name}, {job.steps} steps"])
    (DOCS / f"results-{job.name}.png").write_bytes(picture.light)
    return f"results-{job.name}.png"


def plot_gains(evidence: Evidence) -> str | None:
    """Gain of `explicit` against delta and against the ratio of sigmas: networks, and the injected cases.

    Returns the file's name; None while few cases are decided.
    """
    kinds = {
        f"probe, {name}": [case for case in evidence.probe if case["optimizer"] == name] for name in ("adamw", "sgd")
    }
    kinds["networks"] = list(networks(evidence))
    if sum(map(len, kinds.values())) < 4:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for (kind, cases), marker in zip(kinds.items(), "os^", strict=True):
            for panel, key in zip(axes, ("delta", "ratio"), strict=True):
                if cases:
                    panel.plot([c[key] for c in cases], [c["explicit"] for c in cases], marker, label=kind, alpha=0.8)
        for case in kinds["networks"]:
            axes[0].annotate(case["case"], (case["delta"], case["explicit"]), (4, 4), textcoords="offset points")
        axes[0].set(xlabel="delta, as scan says it before training", ylabel="explicit less none on test, mIoU")
        axes[1].set(xlabel="largest sigma / smallest", xscale="log")
        axes[1].xaxis.set_major_formatter("{x:g}")
        axes[0].legend()

    picture = draw_picture("gains", "gain of explicit against delta", draw, size=(7.4, 3.4))
    (DOCS / "results-gains.png").write_bytes(picture.light)
    return "results-gains.png"


def section(job: Job, runs: Runs, evidence: Evidence) -> Iterable[str]:
    """What docs/results.md says of a job."""
    yield f"### {job.name}\n"
    if job.rates_of is None:
        whole = all(len(values) == job.tune for rates in tuning(job, runs).values() for values in rates.values())
        missing = "" if whole else " (*: a seed is missing)"
        yield f"{len(runs)} runs of {job.steps} steps. Tuning seeds, mean mIoU on val{missing}:\n"
        yield tuning_table(job, runs) + "\n"
        if len({run["lr"] for run in runs}) > 1:
            yield f"![mIoU against the learning rate]({plot(job, tuning(job, runs))})\n"
        yield "Each arm at its own best rate, fresh seeds, scored once on test:\n"
    else:
        rate = f"the best rate of {job.rates_of}"
        yield f"{job.steps} steps, each arm at {rate}, fresh seeds, scored on val at the end:\n"
    split = "test" if job.rates_of is None else "val"
    yield confirmation_table(job, confirmed(job, runs, evidence), split) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    out = parser.parse_args().out
    RESULTS.mkdir(exist_ok=True)
    keep_scans(out)
    runs = {job: gather(job, out) for job in (*jobs(), *end_to_end())}
    evidence = Evidence.read(RESULTS)
    parts = ["### Verdicts\n", verdicts(evidence) + "\n"]
    if name := plot_gains(evidence):
        parts.append(f"![Gain of explicit equalization against delta]({name})\n")
    parts += [part for job, found in runs.items() if found for part in section(job, found, evidence)]
    if (probe := RESULTS / "probe.md").exists():
        parts += ["### The pixel probe\n", probe.read_text(encoding="utf-8")]
    page = DOCS / "results.md"
    begin, end = "<!-- tables: begin -->", "<!-- tables: end -->"
    text = page.read_text(encoding="utf-8")
    tables = f"{begin}\n\n" + "\n".join(parts) + f"\n{end}"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: tables, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
