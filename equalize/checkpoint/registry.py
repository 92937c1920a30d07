"""The list of checkpoint families; the first whose `claims` is true loads a checkpoint."""

from typing import Any

from equalize.checkpoint.description import Description
from equalize.checkpoint.families.custom.family import Custom
from equalize.checkpoint.families.mmsegmentation.family import MMSegmentation
from equalize.checkpoint.families.smp.family import Smp
from equalize.checkpoint.families.torchvision.family import Torchvision
from equalize.checkpoint.families.transformers.family import Transformers
from equalize.checkpoint.family import Family
from equalize.checkpoint.written import described_by_arch

FAMILIES: tuple[Family[Any], ...] = (Transformers(), Smp(), MMSegmentation(), Torchvision(), Custom())


def family_of(description: Description) -> Family[Any]:
    """The family that loads and writes what a description describes."""
    return next(each for each in FAMILIES if each.name == description.name)


def family_of_arch(arch: str) -> Family[Any]:
    """The family whose networks an ``--arch`` names."""
    return family_of(described_by_arch(arch))
