"""Weights drawn anew by the layer's own initializer."""

import copy

import torch
from torch import nn

from equalize.errors import SiteError
from equalize.plan.edits import Draw
from equalize.seeded import seeded
from equalize.sites.sites import Site


def draw_site(model: nn.Module, site: Site, seed: int) -> tuple[nn.Module, list[Draw]]:
    """A fusion layer freshly drawn, and the edits that draw its weight and bias; a SiteError if it cannot be drawn."""
    try:
        fresh = redraw(model.get_submodule(site.weight.rpartition(".")[0]), seed)
    except AttributeError as error:
        raise SiteError(site.weight, f"cannot be drawn ({error})", remedy="use another strategy") from error
    keys = [key for key in (site.weight, site.bias) if key is not None]
    return fresh, [Draw(tensor=key, seed=seed) for key in keys]


def redraw(layer: nn.Module, seed: int) -> nn.Module:
    """A copy of `layer`, on the CPU, freshly drawn by its own `reset_parameters` under `seed`."""
    fresh = copy.deepcopy(layer).cpu()
    reset = getattr(fresh, "reset_parameters", None)
    if not callable(reset):
        raise SiteError(type(layer).__name__, "has no reset_parameters", remedy="use another strategy")
    with seeded(seed), torch.no_grad():
        reset()
    return fresh
