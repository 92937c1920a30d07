"""Prepares FSDP and DeepSpeed, as `accelerate launch` configures them.

Accelerate reads both from the environment. Under FSDP, and under DeepSpeed's stage 3, every process holds a part of
each parameter, so that a forward pass, and putting the state dict together, involve all of them.
"""

import os
from typing import Any

from accelerate.utils import disable_fsdp_ram_efficient_loading, parse_flag_from_env

from equalize.errors import InputError


def check_launch() -> None:
    """Makes FSDP ready for networks that every process loads whole, before any is loaded.

    An InputError for its version 1, whose flat parameters mix weights with biases and norms.
    """
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
