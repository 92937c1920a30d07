"""A checkpoint and images in, a checkpoint with scale equalization out: measured, written, reloaded, proven."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equalize.checkpoint import Checkpoint, reload, safetensors_copy, state_on_disk
from equalize.checkpoint.checkpoint import main_output
from equalize.checkpoint.families import family_of_arch
from equalize.checkpoint.files.atomic import check_target
from equalize.checkpoint.load import ModelName
from equalize.commands.images import Images, Measuring, Progress, device_of, input_shape, precision_of
from equalize.errors import InputError
from equalize.peers import ALONE, Peers
from equalize.plan.apply import apply, demand_fit
from equalize.plan.calibrate import calibrate
from equalize.plan.plan import Plan, Strategy
from equalize.sites.scan import Scan, scan
from equalize.sites.sites import SiteKind
from equalize.verify.function import Check, check_function, check_tensors
from equalize.version import __version__

__all__ = ["ModelName", "embed", "find", "replay", "verify"]

_CHECKED_IMAGES = 2

Say = Callable[[str], None]


def find(checkpoint: Checkpoint, shape: Sequence[int], pattern: str | None = None) -> Scan:
    """The sites of a checkpoint's network: the resampled ones, or those whose layer matches `pattern`.

    Raises:
        InputError: no layer matches; lists what there is.
    """
    kinds: tuple[SiteKind, ...] = ("resampled",) if pattern is None else ("resampled", "plain")
    found = scan(checkpoint.model, torch.empty(tuple(shape), device="meta"), kinds=kinds)
    if pattern is None:
        return found
    chosen = tuple(site for site in found.sites if fnmatch.fnmatchcase(site.layer, pattern))
    if not chosen:
        there = ", ".join(site.layer for site in found.sites) or "none"
        raise InputError("--sites", f"matches no fusion layer: {pattern}", expected=f"one of: {there}")
    return replace(found, sites=chosen)


def embed(
    name: ModelName,
    data: str | Path,
    out: str | Path,
    *,
    strategy: Strategy = "auto",
    keep_norm: bool = False,
    pattern: str | None = None,
    how: Measuring | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    peers: Peers = ALONE,
    progress: Progress = lambda done, of: None,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
) -> Plan:
    """`equalize calibrate`: measures, embeds, writes, reloads, proves.

    Args:
        name: the model.
        data: images.
        out: the directory to write; whole or absent afterwards, and absent if there is no site.
        strategy, keep_norm: see `equalize.plan.strategies`.
        pattern: a glob over layers; None takes every resampled site.
        how: the images and the pass over them.
        dry_run: write nothing.
        overwrite: whether `out` may exist.
        peers: the processes that share the images; the main one writes.
        progress: called with the images done in this pass, and all of it.
        say, warn: called with what a user should know, or may want to act on; a line at a time.

    Returns:
        The plan, its facts filled in: provenance and, in the main process, `check` and `output`.
    """
    how = how or Measuring()
    device = peers.device(device_of(how.device))
    autocast = precision_of(how.precision, device)
    source = Path(name.source)
    if not dry_run and peers.is_main:
        check_target(Path(out), overwrite, source if source.exists() else None)
    checkpoint = name.load()
    if checkpoint.plan_json is not None:
        earlier = checkpoint.plan_json.get("strategy", "unknown")
        raise InputError(name.source, f"is already equalized (strategy {earlier})", remedy="calibrate the original")
    for note in checkpoint.notes:
        say(note)
    say(f"preprocessing: {checkpoint.preprocess}")
    if checkpoint.newly_initialized:
        say(f"drawn anew under seed {name.seed}: {_counted(checkpoint.newly_initialized)}")
    images = Images(data, checkpoint, how, progress, peers)
    say(f"data: {images.dataset.describe()}")
    found = find(checkpoint, images.shape, pattern)
    with autocast:
        plan = calibrate(
            checkpoint.model.to(device),
            images,
            strategy,
            name.seed,
            keep_norm=keep_norm,
            drawn=checkpoint.newly_initialized,
            found=found,
            tolerance=how.tolerance,
            compiled=how.compiled,
        )
    checkpoint.model.cpu()
    for path, reason in images.skipped:
        warn(f"skipped {path}: {reason}")
    facts = {
        **_provenance(name, checkpoint, images.shape, found),
        "data": {"path": str(data), "split": images.dataset.split, "fingerprint": images.dataset.fingerprint()},
        **plan.facts,
        "skipped": len(images.skipped),
        "output": None,
        "check": None,
    }
    plan = replace(plan, facts=facts)
    if dry_run or not plan.sites or not peers.is_main:
        return plan
    return _write(checkpoint, name, plan, Path(out), [images.few(_CHECKED_IMAGES)], overwrite=overwrite)


def replay(plan: Plan, name: ModelName, out: str | Path, *, overwrite: bool = False) -> Plan:
    """`equalize apply`: a plan again, without data; the proof runs on random inputs.

    Raises:
        SiteError: the plan does not fit the model.
    """
    source = Path(name.source)
    check_target(Path(out), overwrite, source if source.exists() else None)
    name = _as_planned(name, plan)
    checkpoint = name.load()
    if checkpoint.plan_json is not None:
        raise InputError(name.source, "is already equalized", remedy="apply the plan to the original")
    apply(plan, checkpoint.model)
    shape = tuple(plan.facts.get("input_shape") or input_shape(checkpoint, None))
    provenance = {"source": name.source, "revision": checkpoint.revision, "sha256": checkpoint.sha256}
    plan = replace(plan, facts={**plan.facts, **provenance})
    return _write(checkpoint, name, plan, Path(out), _random_images(shape), overwrite=overwrite)


def verify(
    out: str | Path, name: ModelName, data: str | Path | None = None, how: Measuring | None = None
) -> tuple[Plan, Check]:
    """`equalize verify`: the proof again, on demand, on a few images of `data` or on random inputs.

    Raises:
        InputError: `out` holds no plan, or that of another model. NumericsError: it is not what its plan says.
    """
    plan = Plan.read(out)
    name = _as_planned(name, plan)
    original = name.load()
    demand_fit(plan, original.model)
    if data is None:
        inputs = _random_images(tuple(plan.facts.get("input_shape") or input_shape(original, None)))
    else:
        inputs = [Images(data, original, how or Measuring()).few(_CHECKED_IMAGES)]
    return plan, _prove(original, Path(out), name, plan, inputs)


def _write(
    checkpoint: Checkpoint, name: ModelName, plan: Plan, out: Path, inputs: Sequence[Tensor], *, overwrite: bool
) -> Plan:
    """Writes, and proves what was written before it takes its place."""
    proven: list[Plan] = []

    def prove(directory: Path) -> Plan:
        checkpoint.model.to("meta")  # it is written: its memory serves the proof
        check = _prove(name.load(), directory, name, plan, inputs)
        proven.append(replace(plan, facts={**plan.facts, "output": str(out), "check": check.to_json()}))
        return proven[0]

    checkpoint.save(out, overwrite=overwrite, prove=prove)
    return proven[0]


def _prove(original: Checkpoint, directory: Path, name: ModelName, plan: Plan, inputs: Sequence[Tensor]) -> Check:
    on_disk = original.disk_keys()
    drawn = {
        on_disk.get(key, key) for key in original.newly_initialized
    }  # a classifier of other classes has another shape
    stored = {key: tensor for key, tensor in original.stored.keys.weights.tensors.items() if key not in drawn}
    after = state_on_disk(directory)
    check_tensors(stored, after, {*drawn, *(on_disk.get(key, key) for key in plan.changed)})
    if (copy := safetensors_copy(directory)) is not None:
        check_tensors(original.safetensors_copy(after), copy, ())
    dtypes = {torch.float32, *(tensor.dtype for tensor in after.values() if tensor.is_floating_point())}
    written = reload(directory, name.arch, name.arch_args).eval()
    return check_function(
        original.model,
        written,
        plan,
        inputs,
        lambda output: main_output(output, original.architecture),
        stored=max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


def _provenance(name: ModelName, checkpoint: Checkpoint, shape: Sequence[int], found: Scan) -> dict[str, Any]:
    return {
        "equalize": __version__,
        "torch": torch.__version__,
        "source": name.source,
        "revision": checkpoint.revision,
        "sha256": checkpoint.sha256,
        "family": checkpoint.family,
        "architecture": checkpoint.architecture,
        "arch": name.arch,
        "arch_args": dict(name.arch_args),
        "init_missing": name.init_missing,
        "num_classes": name.num_classes,
        "drawn": list(checkpoint.newly_initialized),
        "preprocess": asdict(checkpoint.preprocess),
        "input_shape": list(shape),
        "tracer": found.tracer,
    }


def _as_planned(name: ModelName, plan: Plan) -> ModelName:
    """The name with what the plan knows of how its model was made; a plan never names code to run."""
    facts = plan.facts
    arch, arguments = facts.get("arch"), facts.get("arch_args") or {}
    if name.arch is None and arch is not None and family_of_arch(str(arch)).runs_code(str(arch)):
        raise InputError(name.source, "was built by code outside it", remedy=f"name that code again: --arch {arch}")
    return replace(
        name,
        arch=name.arch or arch,
        arch_args=name.arch_args or (arguments if name.arch in (None, arch) else {}),
        init_missing=name.init_missing or bool(facts.get("init_missing")),
        num_classes=name.num_classes or facts.get("num_classes"),
        seed=plan.seed,
    )


def _random_images(shape: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tuple(shape), generator=generator)]


def _counted(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} tensors ({', '.join(keys[:3])}{more})"
