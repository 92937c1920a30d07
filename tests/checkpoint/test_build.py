"""Networks on the meta device have the structure that they have in memory."""

import torch
from torch import nn

from equalize.checkpoint.build import construct


class _ReadsValues(nn.Module):
    """As many transformers do for their rates of stochastic depth; meta tensors have no values."""

    def __init__(self):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.one, self.other = nn.Linear(1 << 15, 1 << 15), nn.Linear(1 << 15, 1 << 15)  # 4 GiB each
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm2d(2)


def test_a_constructor_that_reads_values_is_built_without_memory_and_keeps_its_ties():
    model = construct(_ReadsValues, "network", on_meta=True)
    assert model.rates == [0.0, 0.5, 1.0]  # exact in binary
    assert model.other.weight is model.one.weight
    assert all(tensor.is_meta for tensor in model.state_dict().values())
