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


def test_a_network_that_its_author_made_half_or_double_is_float32():
    """Networks of several dtypes are left as they are."""
    assert construct(lambda: nn.Linear(2, 2).double(), "Net").weight.dtype == torch.float32
    assert construct(lambda: nn.Linear(2, 2).half(), "Net", on_meta=True).weight.dtype == torch.float32
    mixed = construct(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "Net")
    assert [layer.weight.dtype for layer in mixed] == [torch.float32, torch.float64]
