"""Maps ATen operators to `Op` kinds and attributes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from equalize.graph.graph import Kind

_BROADCASTS = ("expand", "repeat", "tile", "expand_as", "broadcast_to")


def named_arguments(node: Node) -> dict[str, Any]:
    """Arguments by their names in the operator's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): argument for index, argument in enumerate(node.args)} | dict(node.kwargs)
    named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    named |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    ordered = named | dict(node.kwargs)
    return {argument.name: ordered[argument.name] for argument in schema.arguments if argument.name in ordered}


def kind_of(name: str, node: Node, arguments: Mapping[str, Any]) -> Kind:
    """The kind of a call; in a few cases the operator's name alone does not tell."""
    kind = KINDS.get(name.removesuffix("_"), "other")
    if name.startswith("adaptive_avg_pool") and _is_area_interpolation(node, arguments):
        return "resample"
    if name in _BROADCASTS and _is_from_one_place(node, arguments):
        return "resample"
    if "dropout" in name and arguments.get("train"):
        return "other"
    if kind == "identity" and not _is_real(node):
        return "activation"  # a cast that rounds
    if kind in {"add", "elementwise"} and not isinstance(arguments.get("other"), Node):
        return "activation"  # one argument is a number: affine in the other, but no plain scale
    return kind


def _is_area_interpolation(node: Node, arguments: Mapping[str, Any]) -> bool:
    """interpolate(mode="area") is adaptive average pooling; a pooling module or global pooling is not meant so."""
    return "AdaptiveAvgPool" not in module_of(node)[1] and math.prod(arguments.get("output_size") or [1]) > 1


def _is_from_one_place(node: Node, arguments: Mapping[str, Any]) -> bool:
    """Whether each channel's one number is copied to all places, as what was pooled globally is."""
    before, after = shape_of(arguments.get("self")), shape_of(node)
    return len(after) > 2 and before == (*after[:2], *(1,) * (len(after) - 2)) != after


def module_of(node: Node) -> tuple[str, str]:
    """Path and type of the innermost module that a node was called in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    return path.removeprefix("L['self']").removeprefix("."), str(kind)  # "L['self'].a.b" or "a.b", by version of torch


def shape_of(node: object) -> tuple[int, ...]:
    """The shape of a node's tensor; () for anything else."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()


def _convolution(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    padding = arguments.get("padding", 0)
    amounts = padding if isinstance(padding, list | tuple) else [padding]
    kernel = shape_of(arguments.get("weight"))[2:]
    stride = list(arguments.get("stride") or [1])
    stride = stride * len(kernel) if len(stride) == 1 else stride
    if "transpose" in name:  # at stride 1 the kernel reaches over the border, with padding or without
        padded = any(size > 1 and step == 1 for size, step in zip(kernel, stride, strict=True))
    else:
        padded = any(amount not in (0, "valid") for amount in amounts) and any(size > 1 for size in kernel)
    return {
        "groups": int(arguments.get("groups", 1)),
        "stride": stride,
        "padded": padded,
        "transposed": "transpose" in name,
    }


def _along(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    dim = {"vstack": 0, "hstack": 1, "column_stack": 1, "dstack": 2}.get(name, int(arguments.get("dim", 0)))
    return {"dim": dim % max(len(shape_of(node)), 1)}


def _resample(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    modes = {
        "nearest": "nearest",
        "cubic": "bicubic",
        "trilinear": "trilinear",
        "linear1d": "linear",
        "linear": "bilinear",
        **dict.fromkeys(_BROADCASTS, "nearest"),
    }
    return {"mode": next((mode for part, mode in modes.items() if part in name), "area")}


def _pool(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    if name != "mean" or arguments.get("keepdim"):
        return {"dropped": ()}
    rank = len(shape_of(arguments.get("self")))
    return {"dropped": tuple(int(dim) % rank for dim in arguments.get("dim") or range(rank))}


def _pad(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    mode = str(arguments.get("mode", "constant")) if name == "pad" else name.split("_")[0]
    return {"mode": mode, "zero": mode == "constant" and not arguments.get("value")}


def _permute(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    axes = torch.empty(tuple(range(1, len(shape_of(node)) + 1)), device="meta")  # axis i has the size i + 1
    assert callable(node.target)
    return {"order": [size - 1 for size in node.target(axes, *node.args[1:], **node.kwargs).shape]}


def _norm(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    grouped = name == "group_norm" and arguments.get("num_groups") == shape_of(node)[1]
    return {"per_channel": grouped or name in {"batch_norm", "instance_norm"}}


def _shuffle(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    return {"factor": int(arguments.get("upscale_factor", 1))}


ATTRIBUTES: Mapping[Kind, Callable[[str, Mapping[str, Any], Node], dict[str, Any]]] = {
    "convolution": _convolution,
    "concat": _along,
    "resample": _resample,
    "pool": _pool,
    "norm": _norm,
    "pad": _pad,
    "permute": _permute,
    "crop": _along,
    "pixel_shuffle": _shuffle,
}

# The arguments of an operator that are its parameters rather than its data, and the role each plays.
ROLES: Mapping[Kind, Mapping[str, str]] = {
    "convolution": {"weight": "weight", "bias": "bias"},
    "linear": {"weight": "weight", "bias": "bias"},
    "norm": {"weight": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"},
    "relu": {"weight": "weight"},
}

_TABLE: Mapping[Kind, str] = {
    "convolution": "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear",
    "concat": "cat concat concatenate vstack hstack column_stack dstack",
    "resample": """
        upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_bilinear2d_aa
        upsample_bicubic2d _upsample_bicubic2d_aa upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d""",
    "pixel_shuffle": "pixel_shuffle",
    "pool": """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices mean
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d""",
    "norm": "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm",
    "relu": "relu leaky_relu prelu",
    "activation": """
        gelu silu sigmoid tanh hardswish hardsigmoid hardtanh relu6 elu selu celu mish softplus softmax log_softmax
        exp log sqrt abs neg clamp clamp_min clamp_max pow square erf""",
    "identity": """
        dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout native_dropout
        clone contiguous detach alias to _to_copy type_as lift_fresh_copy positive""",
    "pad": """
        pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d""",
    "crop": "slice narrow",
    "permute": "permute transpose swapaxes swapdims t numpy_T mT movedim",
    "reshape": "view reshape flatten unflatten squeeze unsqueeze _unsafe_view _reshape_copy view_as reshape_as",
    "add": "add",
    "elementwise": "mul sub div rsub maximum minimum where addcmul lerp",
}

KINDS: Mapping[str, Kind] = {name: kind for kind, names in _TABLE.items() for name in names.split()}
