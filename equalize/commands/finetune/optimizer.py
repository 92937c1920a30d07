"""Parameter groups, optimizer and learning-rate schedule."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_polynomial_decay_schedule_with_warmup

from equalize.commands.finetune.config import TrainConfig
from equalize.errors import InputError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def freeze(model: nn.Module, backbone: str | None, config: TrainConfig) -> tuple[nn.Module, ...]:
    """Freezes parameters as configured; returns the modules that must stay in eval mode."""
    frozen: list[nn.Module] = []
    if config.freeze_backbone:
        if backbone is None:
            raise _no_backbone("--freeze-backbone")
        frozen.append(model.get_submodule(backbone))
    if config.freeze_norms:
        frozen += [module for module in nn.Module.modules(model) if isinstance(module, _NORMS)]
    for module in frozen:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in nn.Module.parameters(model)):
        raise InputError("--freeze-backbone", "leaves nothing to train")
    return tuple(frozen)


def make_optimizer(
    model: nn.Module, backbone: str | None, config: TrainConfig, fusion: Collection[str] = ()
) -> Optimizer:
    """AdamW or SGD over groups: backbone and head, with weight decay and (vectors: biases, norms) without.

    `fusion` are keys of weights that learn `fusion_lr_mult` times as fast as their part, also while parametrized.
    """
    if backbone is None and config.head_lr_mult != 1:
        raise _no_backbone("--head-lr-mult")
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in nn.Module.named_parameters(model):
        if parameter.requires_grad:
            of_head = backbone is None or not name.startswith(f"{backbone}.")
            fuses = name.replace(".parametrizations.", ".").removesuffix(".original") in fusion
            groups.setdefault((of_head, parameter.ndim > 1, fuses), []).append(parameter)
    settings = [
        {
            "params": groups[of_head, decays, fuses],
            "lr": config.peak_lr * (config.head_lr_mult if of_head else 1) * (config.fusion_lr_mult if fuses else 1),
            "weight_decay": config.decay if decays else 0.0,
        }
        for of_head, decays, fuses in sorted(groups)
    ]
    if config.optimizer == "sgd":
        return SGD(settings, lr=config.peak_lr, momentum=0.9)
    return AdamW(settings, lr=config.peak_lr)


def make_schedule(optimizer: Optimizer, steps: int, config: TrainConfig) -> LambdaLR:
    """Linear warm-up from 0, then (1 - progress) ** power."""
    warmup = min(round(config.warmup * steps), steps - 1)  # not all steps: transformers divides by the number after it
    schedule: LambdaLR = get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup, steps, lr_end=0.0, power=config.power
    )
    return schedule


def _no_backbone(flag: str) -> InputError:
    return InputError(flag, "the network has no part called backbone or encoder", remedy="leave it away")
