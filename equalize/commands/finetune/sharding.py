"""How a training was launched: FSDP and DeepSpeed, as `accelerate launch` configures them, or one process alone.

Accelerate reads both from the environment. Under FSDP, and under DeepSpeed's stage 3, every process holds a part of
each parameter, so that a forward pass, and putting the state dict together, involve all of them.
"""

import os
from typing import Any

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading, parse_flag_from_env

from equalize.distributed import rank_and_number
from equalize.errors import InputError
from equalize.messages import Notify


def check_launch(device: torch.device, notify: Notify) -> None:
    """Makes FSDP ready for networks that every process loads whole, before any is loaded; notifies of idle GPUs.

    An InputError for its version 1, whose flat parameters mix weights with biases and norms.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if gpus > 1 and rank_and_number()[1] == 1:
        notify(f"one of {gpus} GPUs trains; torchrun --nproc-per-node {gpus} -m equalize finetune ... takes all")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError("fsdp_version", "is not served", got=version, expected=2, remedy="use accelerate config")
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # so that any number of processes can resume
    disable_fsdp_ram_efficient_loading()  # it would leave all processes but the first without weights


def check_deepspeed(plugin: Any) -> None:
    """Refuses an optimizer or a schedule of DeepSpeed's own, by an InputError, and has full states saved."""
    config = plugin.deepspeed_config
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise InputError("DeepSpeed's configuration", f"has its own {key}", remedy="leave it out: finetune has")
    config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
