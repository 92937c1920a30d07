"""The list of checkpoint families; the first whose `claims` is true loads a checkpoint."""

from typing import Any

from equalize.checkpoint.families.custom.family import Custom
from equalize.checkpoint.families.mmsegmentation.family import MMSegmentation
from equalize.checkpoint.families.smp.family import Smp
from equalize.checkpoint.families.torchvision.family import Torchvision
from equalize.checkpoint.families.transformers.family import Transformers
from equalize.checkpoint.family import Family

FAMILIES: tuple[Family[Any], ...] = (Transformers(), Smp(), MMSegmentation(), Torchvision(), Custom())


def family_of_arch(arch: str) -> Family[Any]:
    """The family whose networks an ``--arch`` names: a library by its scheme, else the user's own code."""
    scheme = arch.partition(":")[0]
    return next((each for each in FAMILIES if each.scheme == scheme), FAMILIES[-1])
