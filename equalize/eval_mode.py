"""`eval_mode`: run a network in eval mode and restore its state afterwards."""

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule  # noqa: TID251  its type alone

from equalize.errors import EqualizeError
from equalize.messages import one_line

_RANDOM = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextlib.contextmanager
def eval_mode(model: nn.Module, *, attributes: bool = False) -> Iterator[None]:
    """Eval mode, no gradients, full float32 matrix products; afterwards all state is restored.

    Restored, also after an interruption: the mode of every module, every buffer (of a module that replaced one, its
    attributes too), the random state, all precisions.

    Args:
        model: any module, on any device.
        attributes: restore all other attributes of the modules too, with the containers in them. Needed where a
            network is traced: it may keep tensors of the run, which under export are fake, and export puts copies in
            the place of lists. Not to be used on a network that FSDP has sharded, which keeps its state there.
    """
    modes = [(module, module.training) for module in nn.Module.modules(model)]
    contents = [(container, container.copy()) for container in (_containers(model) if attributes else ())]
    buffers = [(each, vars(each).copy(), dict(each._buffers.items())) for each in nn.Module.modules(model)]
    named = nn.Module.named_buffers(model)
    values = [(buffer, buffer.detach().clone()) for _, buffer in named if not is_expanded(buffer)]
    try:
        _switch([(module, False) for module, _ in modes])
        with torch.no_grad(), _full_float32(), torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        _switch(modes)
        for container, content in contents:
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(content)
        for module, content, own in buffers:
            now = dict(module._buffers.items())
            if any(now.get(name) is not own.get(name) for name in now | own):
                vars(module).clear()  # what it keeps beside its buffers may say what was in those that were replaced
                vars(module).update(content)
                module._buffers.clear()
                module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _switch(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Puts modules, outer ones first, into training or eval mode, by their own `train` or `eval` where they have one.

    torchvision's feature extractors have a graph for each mode, for example. A layer with weights of its own is spared
    that: loralib's merges its adapter into them, where a plan would scale the sum as one weight.
    """
    for module, training in modes:
        own = (type(module).train, type(module).eval) != (nn.Module.train, nn.Module.eval)
        holds_weights = any(True for _ in nn.Module.parameters(module, recurse=False))
        if own and module.training != training and (isinstance(module, GraphModule) or not holds_weights):
            (module.train if training else module.eval)()
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 without TF32 and bfloat16; afterwards all switches are as they were.

    torch has older switches, and newer ones by backend, `fp32_precision`. Older ones that disagree with the newer ones
    raise an error where they are read; those that can be read, as in the code of a network, still can be in here.
    """
    cudnn: Any = torch.backends.cudnn
    on_cpu: Any = torch.backends.mkldnn
    newer = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, on_cpu.matmul, on_cpu.conv, on_cpu.rnn]
    with contextlib.ExitStack() as restoring:
        restoring.callback(_set_precisions, newer, [each.fp32_precision for each in newer])
        with contextlib.suppress(RuntimeError):
            restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with contextlib.suppress(RuntimeError):
            restoring.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        _set_precisions(newer, ["ieee"] * len(newer))
        yield


def _set_precisions(switches: Sequence[Any], values: Sequence[str]) -> None:
    """Sets `fp32_precision` where another value is in effect, to "none" where the value is then inherited."""
    for switch, value in zip(switches, values, strict=True):
        for each in ("none", value):
            if switch.fp32_precision != value:
                switch.fp32_precision = each


def set_containers_training(model: nn.Module) -> None:
    """Has the code of containers see training mode, and what computes something else in it eval mode.

    So a network takes its ways of training, auxiliary heads among them, on the values of inference: leaves such as
    BatchNorm and dropout stay as they are. Within `eval_mode`, which restores the modes.
    """
    for module in nn.Module.modules(model):
        module.training = any(True for _ in nn.Module.children(module)) and not isinstance(module, _RANDOM)


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that the tensor cannot be written to, by a forward pass neither."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that a model is on, whose random state a run of it may move."""
    return sorted({tensor.device.index or 0 for tensor in nn.Module.parameters(model) if tensor.device.type == "cuda"})


@contextlib.contextmanager
def refusing(refusal: Callable[[str], EqualizeError]) -> Iterator[None]:
    """Whatever a network raises on an input becomes the refusal of it, for a reason; lack of memory stays as it is."""
    try:
        yield
    except (EqualizeError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        line = one_line(error)
        if "allocate" in line:
            raise
        raise refusal(line) from error


def _containers(model: nn.Module) -> list[Any]:
    """The modules' attributes, and every dict, list and set in them."""
    found: dict[int, Any] = {}
    stack: list[Any] = [vars(module) for module in nn.Module.modules(model)]
    while stack:
        value = stack.pop()
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = value
            stack += value.values() if isinstance(value, dict) else value
    return list(found.values())
