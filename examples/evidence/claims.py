"""The verdicts of docs/results.md on the registered claims, from the kept lines of finished runs alone.

A claim is open until a network contradicts it or every run that it is decided by is there. Tests are one-sided, paired
by seed; Holm's correction is over those of C3 and C7 together.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from run import Job, jobs
from scipy.stats import spearmanr

from equalize.commands.compare.confirmation import holm, p_values, steps_to_reach
from equalize.commands.compare.statistics import Difference, difference

PROBED = 20  # injected cases: ten scalings, two optimizers
GAIN, NOTHING = 0.03, 0.01
GRID = math.sqrt(10) * 1.1  # one step of the rates, and what rounding them adds
BOTH = ("pspnet", "unet")
ALL = (*BOTH, "segformer", "deeplabv3plus")

Run = Mapping[str, Any]


class MissingRunsError(Exception):
    """Runs that a claim is decided by are not there yet."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The kept lines, by job, and what the indicator said of each network."""

    runs: Mapping[str, Sequence[Run]]
    scans: Mapping[str, Mapping[str, Any]]
    probe: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, results: Path) -> "Evidence":
        """From examples/evidence/results."""
        return cls(
            runs={
                path.stem: [json.loads(line) for line in path.read_text().splitlines()]
                for path in results.glob("*.jsonl")
            },
            scans=_json(results / "scans.json", {}),
            probe=_json(results / "probe.json", []),
        )

    def best(self, name: str, arm: str) -> float:
        """The rate with the best mean of the tuning seeds, once eight seeds confirmed one."""
        rates = {run["lr"] for run in self._of(name, arm) if run["test"] is not None}
        if len(rates) != 1:
            raise MissingRunsError
        return float(rates.pop())

    def test(self, name: str, arm: str) -> list[float]:
        """mIoU of the third split, by confirming seed; not of seeds that were run beside those registered."""
        scores = {run["seed"]: run["test"] for run in self._of(name, arm) if run["test"] is not None}
        seeds = range(_job(name).tune, _job(name).tune + _job(name).confirm)
        if not scores.keys() >= set(seeds):
            raise MissingRunsError
        return [scores[seed] for seed in seeds]

    def gain(self, name: str, arm: str, baseline: str = "none") -> Difference:
        """Between two arms at their best rates, on the third split."""
        return difference(self.test(name, arm), self.test(name, baseline))

    def end(self, name: str, arm: str) -> list[float]:
        """mIoU of the validation split at the arm's rate, of a job that takes its rates from another."""
        source = _job(name).rates_of
        assert source is not None
        rate = self.best(source, arm)
        scores = {run["seed"]: run["mIoU"] for run in self._of(name, arm) if run["lr"] == rate}
        if len(scores) < _job(name).confirm:
            raise MissingRunsError
        return [scores[seed] for seed in sorted(scores)]

    def curve(self, name: str, arm: str) -> list[tuple[float, float]]:
        """Mean over the confirming seeds, on the validation split."""
        self.test(name, arm)
        curves = [run["curve"] for run in self._of(name, arm) if run["test"] is not None]
        return [(step, fmean(curve[at][1] for curve in curves)) for at, (step, _) in enumerate(curves[0])]

    def loss_at_tenth(self, name: str, arm: str) -> float:
        """Of the validation split, against the best rate, mean over the tuning seeds."""
        best = self.best(name, arm)
        means = {rate: fmean(values) for rate, values in self._tuned(name, arm).items()}
        tenth = min(means, key=lambda rate: abs(math.log(rate / (best / 10))))
        return means[best] - means[tenth]

    def _tuned(self, name: str, arm: str) -> dict[float, list[float]]:
        found: dict[float, list[float]] = {}
        for run in self._of(name, arm):
            if run["seed"] < _job(name).tune:
                found.setdefault(run["lr"], []).append(run["mIoU"])
        return found

    def _of(self, name: str, arm: str) -> list[Run]:
        return [run for run in self.runs.get(name, ()) if run["arm"] == arm]


def networks(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Those whose gain is known, in the form of the probe's cases; a network's ratio is that of its widest layer."""
    for network in ALL:
        name = f"{network}-drawn"
        try:
            gain = evidence.gain(name, "explicit")
        except MissingRunsError:
            continue
        scan = evidence.scans[name]
        yield {"case": network, "delta": scan["delta"], "ratio": max(scan["ratio"]), "explicit": gain.mean}


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def _job(name: str) -> Job:
    return next(job for job in jobs() if job.name == name)


def _says(gain: Difference) -> str:
    return f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"


Finding = tuple[str, bool]
"""What was found, in words, and whether it is as claimed."""


def _c2(evidence: Evidence) -> Iterator[Finding]:
    for network in BOTH:
        name = f"{network}-drawn"
        rms = evidence.scans[name]["sigma_rms"]
        if all(1 / 3 <= each <= 3 for each in rms):
            continue
        ratio = evidence.best(name, "paper") / evidence.best(name, "none")
        far = max(rms, key=lambda each: abs(math.log(each)))
        yield f"{network}: {ratio:.2g} of the plain rate, 1/sigma_rms is {1 / far:.2g}", 1 / GRID <= ratio * far <= GRID


def _c3(evidence: Evidence) -> Iterator[Finding]:
    for network in BOTH:
        name = f"{network}-drawn"
        gain = evidence.gain(name, "explicit")
        rest = min((evidence.gain(name, "explicit", f"none+head-lr{by}") for by in (3, 10)), key=lambda each: each.mean)
        p = _corrected(evidence)["C3", network]
        found = f"{network} (delta {evidence.scans[name]['delta']:.3f}): {_says(gain)}, p {p:.3f}"
        yield f"{found}; over the better head-lr {_says(rest)}", gain.mean >= 1 and p < 0.05 and rest.mean > 0


def _c4(evidence: Evidence) -> Iterator[Finding]:
    for network in ALL:
        name = f"{network}-drawn"
        if evidence.scans[name]["delta"] < NOTHING:
            gain = evidence.gain(name, "explicit")
            yield f"{network}: {_says(gain)}", gain.low >= -1 and gain.high <= 1


def _c5(evidence: Evidence) -> Iterator[Finding]:
    cases = [*evidence.probe, *networks(evidence)]
    if len(cases) < PROBED + len(ALL):
        raise MissingRunsError
    gain = [case["explicit"] for case in cases]
    by_delta, by_ratio = (float(spearmanr([case[key] for case in cases], gain).statistic) for key in ("delta", "ratio"))
    yield f"{len(gain)} cases: {by_delta:.2f} (ratio of sigmas {by_ratio:.2f})", by_delta >= 0.7


def _c6(evidence: Evidence) -> Iterator[Finding]:
    for network in BOTH:
        gain = evidence.gain(f"{network}-trained-100", "preserve", "preserve+paper")
        yield f"{network}: {_says(gain)}", gain.mean >= 0


def _c7(evidence: Evidence) -> Iterator[Finding]:
    for network in BOTH:
        gain, p = evidence.gain(f"{network}-drawn", "whiten", "explicit"), _corrected(evidence)["C7", network]
        yield f"{network}: {_says(gain)}, p {p:.3f}", gain.mean >= 0.5 and p < 0.05


def _c8(evidence: Evidence) -> Iterator[Finding]:
    for network in BOTH:
        name = f"{network}-drawn"
        end = evidence.curve(name, "none")[-1]
        steps = steps_to_reach(evidence.curve(name, "explicit"), end[1])
        mine, plain = (evidence.loss_at_tenth(name, arm) for arm in ("explicit", "none"))
        share = math.inf if steps is None else steps / end[0]
        losses = f"at a tenth of the rate {mine:.1f} less, plain {plain:.1f}"
        found = f"{network}: there after {share:.2f} of the steps; {losses}"
        yield found, share <= 0.6 and mine <= plain / 2


def _c9(evidence: Evidence) -> Iterator[Finding]:
    for network in BOTH:
        gain = difference(evidence.end(f"{network}-long", "explicit"), evidence.end(f"{network}-long", "none"))
        yield f"{network}: {_says(gain)}", gain.mean >= -0.5


def _c10(evidence: Evidence) -> Iterator[Finding]:
    for network, (arm, least) in product(BOTH, (("preserve", 1), ("whiten", 3))):
        gain = evidence.gain(f"{network}-trained-100", arm)
        yield f"{network}, {arm}: {_says(gain)} at 100 steps", gain.mean >= least
    for arm, network in product(("preserve", "whiten"), BOTH):
        name = f"{network}-trained-400-augmented"
        late = difference(evidence.end(name, arm), evidence.end(name, "none"))
        yield f"{network}, {arm}: {_says(late)} at 400 with augmentation", late.mean >= -0.5


def _corrected(evidence: Evidence) -> dict[tuple[str, str], float]:
    tests = {
        (claim, network): p_values(
            np.subtract(evidence.test(f"{network}-drawn", arm), evidence.test(f"{network}-drawn", base))
        )["t_one_sided"]
        for claim, arm, base in (("C3", "explicit", "none"), ("C7", "whiten", "explicit"))
        for network in BOTH
    }
    return dict(zip(tests, holm(list(tests.values())), strict=True))


_WHERE_GAIN = ("C3", "C8")  # speak of networks of which the indicator expects a gain; described for the others

CLAIMS: dict[str, Callable[[Evidence], Iterator[Finding]]] = {
    "C2": _c2,
    "C3": _c3,
    "C4": _c4,
    "C5": _c5,
    "C6": _c6,
    "C7": _c7,
    "C8": _c8,
    "C9": _c9,
    "C10": _c10,
}


def _expects_gain(evidence: Evidence) -> bool:
    return any(evidence.scans[f"{network}-drawn"]["delta"] >= GAIN for network in BOTH)


def _verdict(found: Sequence[Finding], *, whole: bool, speaks: bool) -> str:
    if speaks and not all(ok for _, ok in found):
        return "fails"  # one network is enough
    if not whole:
        return "open"
    return "holds" if found and speaks else "no case"


def verdicts(evidence: Evidence) -> str:
    """A table in Markdown: claim, verdict, what was found."""
    lines = ["| claim | verdict | found |", "|---|---|---|", "| C1 | holds | a test, tests/plan/test_centering.py |"]
    for claim, judge in CLAIMS.items():
        found: list[Finding] = []
        whole = True
        try:
            for finding in judge(evidence):
                found.append(finding)
        except (MissingRunsError, KeyError):
            whole = False
        verdict = _verdict(found, whole=whole, speaks=claim not in _WHERE_GAIN or _expects_gain(evidence))
        lines.append(f"| {claim} | {verdict} | {'; '.join(text for text, _ in found)} |")
    return "\n".join(lines)
