"""Tensors that refuse float64 until they are brought to the CPU, as Apple's MPS does."""

import torch
from torch import Tensor, nn


class MetalTensor(Tensor):
    """Every operation on one gives another; ``.cpu()`` gives a plain tensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            return result.as_subclass(Tensor).clone()
        writes = getattr(func, "__name__", "").endswith("_")  # `copy_` casts on its way
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, cls) and each.dtype == torch.float64 and not writes:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return result


def on_metal(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers as `MetalTensor`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().as_subclass(MetalTensor))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(MetalTensor)
    return model
