"""What `accelerate launch` asks for beyond a whole network in every process: FSDP and DeepSpeed.

Accelerate reads both from the environment. Under FSDP, and under DeepSpeed's stage 3, every process holds a part of
each parameter, so that a forward pass, and putting the state dict together, are the work of all of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading, str_to_bool

from equalize.errors import InputError
from equalize.messages import Notify

__all__ = ["check_deepspeed", "check_launch", "explain_fsdp"]


def check_launch(device: torch.device, warn: Notify) -> None:
    """Makes the environment ready for networks that every process loads whole, before any is loaded.

    Raises:
        InputError: version 1 of FSDP is asked for: its flat parameters do not tell weights from biases and norms.
    """
    found = [name for name in ("FSDP", "DeepSpeed") if _asked_for(f"ACCELERATE_USE_{name.upper()}")]
    if "FSDP" in found:
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise InputError("fsdp_version", "is not served", got=version, expected=2, remedy="use accelerate config")
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # for any number of processes to go on with
        disable_fsdp_ram_efficient_loading()  # it leaves every process but the first without weights
    if found and device.type == "cpu":
        warn(f"Accelerate uses {found[0]} on accelerators alone: on a CPU every process holds the whole network")


@contextmanager
def explain_fsdp(enabled: bool) -> Iterator[None]:
    """While the network is spread over the processes.

    Raises:
        InputError: FSDP does not take it as it was told to cut it.
    """
    try:
        yield
    except (ValueError, KeyError) as error:
        if not enabled:
            raise
        raise InputError(
            "accelerate",
            f"FSDP does not take this network ({' '.join(str(error).split())[:160]})",
            remedy="try fsdp_auto_wrap_policy: NO_WRAP",
        ) from error


def check_deepspeed(state: Any) -> None:
    """Demands that DeepSpeed's configuration leaves the optimizer to us, and has states saved whole.

    Args:
        state: the accelerator's.

    Raises:
        InputError: DeepSpeed is configured with an optimizer or a schedule of its own.
    """
    if (deepspeed := getattr(state, "deepspeed_plugin", None)) is not None:
        config = deepspeed.deepspeed_config
        for key in ("optimizer", "scheduler"):
            if key in config:
                raise InputError("DeepSpeed's configuration", f"has its own {key}", remedy="leave it out: finetune has")
        config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True


def _asked_for(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable) or "false"))
