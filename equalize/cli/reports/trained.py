"""A verification of what was trained since it was calibrated, as Rich renderables."""

from collections.abc import Iterator

from rich.console import ConsoleRenderable
from rich.text import Text

from equalize.cli.tables import indented
from equalize.commands.verify_trained import TrainedCheck
from equalize.messages import first_of
from equalize.plan.plan import Plan


def trained_report(out: str, against: str, plan: Plan, found: TrainedCheck) -> Iterator[ConsoleRenderable]:
    """The result of verifying a model that was trained since it was calibrated."""
    step = "" if found.step is None else f", to step {found.step}"
    yield Text.assemble((out, "bold"), f" was trained after it was calibrated (from {found.source}{step}).")
    yield Text(
        "Its weights differ from the plan's because of the training, so the proof of calibration does not apply to it."
    )
    yield Text("What can be checked holds:")
    roles = {"calibrated": "was calibrated", "trained": "the training started from"}
    made_of = ", and that ".join(roles[role] for role in found.role.split(" and "))
    yield indented(f"{against} is the model that {made_of}: its weights have the recorded sha256")
    classes = f", but for the number of classes in {first_of(found.new_classifier)}" if found.new_classifier else ""
    yield indented(f"the same {found.tensors} tensors in the same shapes{classes}; training changed {found.changed}")
    yield indented("its own library loads it, and every value is finite")
    if "calibrated" in found.role and found.source != plan.facts.get("source"):
        yield Text(f"The proof of the calibration itself: equalize verify {found.source} --against {against}")
