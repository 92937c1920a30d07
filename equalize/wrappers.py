"""`unwrapped`: the network inside of what wraps it whole."""

from torch import nn

from equalize.errors import InputError


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of DistributedDataParallel, DataParallel and torch.compile, whose keys have prefixes."""
    while True:
        if not isinstance(model, nn.Module):
            expected = "a torch.nn.Module, such as checkpoint.model"
            raise InputError("model", "is no network", got=type(model).__name__, expected=expected)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := dict(model._modules.items()).get("_orig_mod")) is not None:
            model = inner
        else:
            return model
