"""Lines of Python that load a state dict as equalize writes it, without equalize."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equalize.checkpoint.files.safetensors_file import read_keys
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, SAFETENSORS_COPY, check_readable, read_json
from equalize.checkpoint.keys import PREFIXES, WRAPPERS


def state_dict_code(
    out: Path, module: str, factory: str, fresh: Mapping[str, object], repository: str | None, revision: str | None
) -> str:
    """Lines that build the network with a factory, then fill it from the flat safetensors file in ``out``.

    The factory gets the recorded arguments and ``fresh``, which keep it from downloading weights. With ``repository``,
    ORG/NAME on the Hub, the file is taken from there.
    """
    recorded: Any = read_json(out / ARCHITECTURE_FILE).get("arch_args") or {}
    file = out / SAFETENSORS_COPY
    at = f', revision="{revision}"' if revision else ""
    where = f'"{file}"' if repository is None else f'hf_hub_download("{repository}", "{file.name}"{at})'
    given = ", ".join(f"{key}={value!r}" for key, value in {**recorded, **fresh}.items())
    check_readable(file)
    keys = read_keys(file)
    prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in keys)), None)
    inside = sorted(WRAPPERS.intersection(part for key in keys for part in key.removeprefix(prefix or "").split(".")))
    bare = f'".".join(part for part in key.split(".") if part not in {inside})'
    lines = [
        *(["from huggingface_hub import hf_hub_download"] if repository else []),
        "from safetensors.torch import load_file",
        f"from {module} import {factory}",
        "",
        f"model = {factory}({given})",
        f"state = load_file({where})",
        *([f'state = {{key.removeprefix("{prefix}"): value for key, value in state.items()}}'] if prefix else []),
        *([f"state = {{{bare}: value for key, value in state.items()}}"] if inside else []),
        "model.load_state_dict(state)",
        "model.eval()",
    ]
    return "\n".join(lines)
