"""The Hugging Face Hub: the form of its ids, and whether it can be reached, or why not."""

import os
import re
import socket

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
"""``organization/name`` or ``organization/name@revision``."""


def hub_reachable() -> bool:
    """Whether the Hub can be reached: not switched off, and its name resolves (or a proxy is set)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def why_not_reached() -> tuple[str, str]:
    """Where `hub_reachable` is false: the reason, and what to do."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    return "the Hub cannot be reached", "check the network"
