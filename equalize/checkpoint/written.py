"""The description of a written directory: of which family it is, by its JSON files. Needs no torch."""

from pathlib import Path

from equalize.checkpoint.description import Description
from equalize.checkpoint.families.custom.description import CustomDescription
from equalize.checkpoint.families.mmsegmentation.description import MMSegmentationDescription
from equalize.checkpoint.families.smp.description import SmpDescription
from equalize.checkpoint.families.torchvision.description import TorchvisionDescription
from equalize.checkpoint.families.transformers.description import TransformersDescription
from equalize.checkpoint.source import locate
from equalize.errors import CheckpointError

DESCRIPTIONS: tuple[Description, ...] = (
    TransformersDescription(),
    SmpDescription(),
    MMSegmentationDescription(),
    TorchvisionDescription(),
    CustomDescription(),
)


def described_by_arch(arch: str) -> Description:
    """The family whose networks an ``--arch`` names: a library by its scheme, else the user's own code."""
    scheme = arch.partition(":")[0]
    return next((each for each in DESCRIPTIONS if each.scheme == scheme), DESCRIPTIONS[-1])


def written_by(directory: Path) -> Description:
    """The family of a written directory.

    A CheckpointError if it has neither a record of an architecture nor a config of a known library.
    """
    place = locate(directory)
    named = None if place.record is None else place.record.get("arch")
    if isinstance(named, str):
        return described_by_arch(named)
    found = next((each for each in DESCRIPTIONS if each.describes(place.config)), None)
    if found is None and place.config:
        raise unknown_library(place.path)
    if found is None:
        raise CheckpointError(directory, "holds no record of an architecture and no config of a library")
    return found


def unknown_library(directory: Path) -> CheckpointError:
    """The error about a ``config.json`` of another library."""
    known = " or ".join(f"{each.config_field} ({each.name})" for each in DESCRIPTIONS if each.config_field)
    return CheckpointError(directory / "config.json", "is of no known library", expected=known)
