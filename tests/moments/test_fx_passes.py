"""An optimized graph computes what it did, with fewer passes over memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from equalize.moments.fx_passes import name_of, optimize_graph, sweep, without_mutations


def optimized_graph(model: nn.Module, x: torch.Tensor) -> tuple[fx.Graph, bool, list[torch.Tensor]]:
    """The graph of the eval-mode model, whether it was optimized, and its outputs for x, channels last."""
    program = torch.export.export(model.eval(), (x,))
    graph = program.graph_module.graph
    without_mutations(graph)
    sweep(graph)
    done = optimize_graph(graph)
    tensors = {**program.state_dict, **program.constants}
    lifted = [tensors[spec.target] for spec in program.graph_signature.input_specs if spec.target]
    with torch.no_grad():
        strided = x.contiguous(memory_format=torch.channels_last) if done else x
        outputs = fx.Interpreter(program.graph_module, graph=graph).run(*lifted, strided, enable_io_processing=False)
    return graph, done, list(outputs)


def names(graph: fx.Graph) -> list[str]:
    return [name_of(node) for node in graph.nodes if node.op == "call_function"]


def expected(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model.eval()(x.clone())
    return list(found) if isinstance(found, tuple) else [found]


class Block(nn.Module):
    """A residual block with every way of normalizing, a window of tokens and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.biased = nn.Conv2d(3, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.wide = nn.Conv2d(8, 8, 1, groups=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, eps=0.1)])
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
        nn.init.normal_(self.norms[0].weight)

    def forward(self, x):
        a = F.relu(self.norms[0](self.biased(x)), inplace=True)
        b = F.gelu(self.norms[1](self.plain(F.dropout(a, training=self.training))))
        c = self.norms[2](self.wide(b))
        tokens = c.permute(0, 2, 3, 1).contiguous().view(len(x), -1, 8)
        return F.silu(tokens.transpose(1, 2).view(c.shape) + a)


def test_it_computes_the_same():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 3, 9, 12)
    graph, done, (found,) = optimized_graph(model, x)
    assert done
    assert torch.allclose(found, expected(model, x)[0], rtol=1e-5, atol=1e-6)
    assert not {"batch_norm", "dropout", "contiguous", "view"} & set(names(graph))


def test_a_batch_norm_with_statistics_of_the_batch_or_a_second_reader_stays():
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.own, self.norm = nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)
            self.norm.running_mean.normal_()

        def forward(self, x):
            y = self.conv(x)
            return self.own(self.conv(x + 1)), self.norm(y), y * 1

    torch.manual_seed(2)
    model, x = Batch(), torch.randn(2, 3, 6, 5)
    graph, done, found = optimized_graph(model, x)
    assert done
    assert names(graph).count("batch_norm") == 2
    for mine, theirs in zip(found, expected(model, x), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forward", [lambda x: x.as_strided((2, 3), (1, 2)) * 2, lambda x: _filled(x)])
def test_what_depends_on_strides_or_writes_into_views_is_left_alone(forward):
    class Strided(nn.Module):
        def forward(self, x):
            return forward(x)

    x = torch.randn(1, 3, 4, 4)
    _, done, (found,) = optimized_graph(Strided(), x)
    assert not done
    assert torch.equal(found, expected(Strided(), x)[0])  # doubling and copying round nothing


def _filled(x):
    y = x * 1
    y[:, :1] = 0.5
    return y
