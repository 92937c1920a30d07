"""`equalize apply`: a plan again, without data."""

from dataclasses import replace
from pathlib import Path

from equalize.checkpoint.files.atomic import check_target
from equalize.checkpoint.loading import ModelName
from equalize.commands.verify import as_planned, as_stored, random_images, save_proven
from equalize.errors import InputError
from equalize.messages import Notify, ignore
from equalize.plan.apply import apply
from equalize.plan.plan import Plan


def apply_plan(
    plan: Plan, name: ModelName, out: str | Path, *, overwrite: bool = False, notify: Notify = ignore
) -> Plan:
    """Carries a plan out on another copy of its model, writes it and verifies it on random inputs.

    Returns:
        The plan with the provenance of this copy.

    Raises:
        SiteError: the plan does not fit the model.
    """
    check_target(Path(out), overwrite, name.source)
    name = as_planned(name, plan)
    checkpoint = name.load()
    if checkpoint.plan_json is not None:
        raise InputError(name.source, "is already equalized", remedy="apply the plan to the original")
    for note in checkpoint.notes:
        notify(note)
    made_for = plan.facts.get("sha256")
    if made_for not in (None, checkpoint.sha256):
        what = "its scales and BatchNorm statistics are right only if the weights are the same"
        notify(f"{name.source} is another file than the plan was made for: {what}")
    apply(plan, checkpoint.model)
    inputs = random_images(plan, checkpoint)
    provenance = {"source": name.source, "revision": checkpoint.revision, "sha256": checkpoint.sha256}
    plan = as_stored(replace(plan, facts={**plan.facts, **provenance}), checkpoint)
    return save_proven(checkpoint, name, plan, Path(out), inputs, overwrite=overwrite)
