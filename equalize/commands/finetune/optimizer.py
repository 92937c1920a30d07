"""Which parameters are trained, at which rate, and how the rate changes."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from equalize.commands.finetune.config import Recipe
from equalize.errors import InputError

__all__ = ["freeze", "make_optimiser", "make_schedule"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def freeze(model: nn.Module, backbone: str | None, recipe: Recipe) -> tuple[nn.Module, ...]:
    """Takes the gradient from what the recipe freezes; gives the modules that must stay in eval mode.

    Raises:
        InputError: nothing is left to train, or no backbone is known.
    """
    if recipe.freeze_backbone and backbone is None:
        raise InputError(
            "--freeze-backbone", "the network has no part called backbone or encoder", remedy="leave it away"
        )
    frozen: list[nn.Module] = []
    if recipe.freeze_backbone and backbone is not None:
        frozen.append(model.get_submodule(backbone))
    if recipe.freeze_norms:
        frozen += [module for module in nn.Module.modules(model) if isinstance(module, _NORMS)]
    for module in frozen:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in nn.Module.parameters(model)):
        raise InputError("--freeze-backbone", "leaves nothing to train")
    return tuple(frozen)


def make_optimiser(model: nn.Module, backbone: str | None, recipe: Recipe) -> Optimizer:
    """AdamW or SGD over four groups: backbone and head, with weight decay and (vectors: biases, norms) without.

    Raises:
        InputError: the head shall have its own rate, and no backbone is known.
    """
    if backbone is None and recipe.head_lr_mult != 1:
        raise InputError("--head-lr-mult", "the network has no part called backbone or encoder", remedy="leave it away")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in nn.Module.named_parameters(model):
        if parameter.requires_grad:
            of_head = backbone is None or not name.startswith(f"{backbone}.")
            groups.setdefault((of_head, parameter.ndim > 1), []).append(parameter)
    assert recipe.lr is not None
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": recipe.lr * (recipe.head_lr_mult if of_head else 1),
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (of_head, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if recipe.optimizer == "sgd":
        return SGD(settings, lr=recipe.lr, momentum=0.9)
    return AdamW(settings, lr=recipe.lr)


def make_schedule(optimiser: Optimizer, steps: int, recipe: Recipe) -> LambdaLR:
    """Linear warm-up, then (1 - progress) ** power."""
    warmup = round(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(0.0, 1 - (step - warmup) / max(1, steps - warmup))
        return float(left**recipe.power)

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
