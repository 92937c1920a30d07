"""Rewrites of a traced graph that keep what it computes and make it cheaper to run.

For a network in eval mode: in-place operators become ones that return a new tensor, so that no tensor changes after it
was made; then BatchNorms go into the convolutions before them, and copies go.
"""

from operator import getitem

import torch
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from equalize.graph.aten import named_arguments

VIEWS = ("slice", "select", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "expand")
_COPIES = ("contiguous", "clone")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
_STRIDED = {"as_strided", "view_as_real", "view_as_complex"}  # what these make depends on how their input is laid out


def name_of(node: fx.Node) -> str:
    """The operator that a node calls, without its overload; empty for other nodes."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0] if node.op == "call_function" else ""


def without_mutations(graph: fx.Graph) -> None:
    """Replaces operators that write into their first argument by those that return a new tensor.

    Those that write into memory that others read stay: they change a larger tensor, or views of theirs.
    """
    for node in list(graph.nodes):
        name = name_of(node)
        base = node.args[0] if node.args else None
        if not name.endswith("_") or not isinstance(base, fx.Node) or name_of(base) in VIEWS or _is_shared(base):
            continue
        packet = getattr(torch.ops.aten, name[:-1], None)
        overload = getattr(packet, getattr(node.target, "_overloadname", ""), None)
        if overload is None:
            continue
        node.target = overload
        place = {each: index for index, each in enumerate(graph.nodes)}
        for user in list(base.users):
            if user is not node and place[user] > place[node]:
                user.replace_input_with(base, node)


def _is_shared(node: fx.Node) -> bool:
    """Whether a tensor's memory is read under other names: through views of it, or what it is a view of."""
    if any(_may_share(user) for user in node.users):
        return True
    while _may_share(node):
        node = node.all_input_nodes[0]
        if len(node.users) > 1:
            return True
    return _mutates(node)  # it was kept because of other readers


def written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory is written into after they were made."""
    return {memory_of(node) for node in graph.nodes if _mutates(node)}


def memory_of(node: fx.Node) -> fx.Node:
    """The node that made the memory in which a node's tensor may lie."""
    while _may_share(node) or _mutates(node):
        source = node.kwargs.get("out", node.all_input_nodes[0])
        assert isinstance(source, fx.Node)
        node = source
    return node


def _may_share(node: fx.Node) -> bool:
    """Whether an operator may give its input's own memory."""
    schema = getattr(node.target, "_schema", None)
    views = schema is not None and not schema.is_mutable and any(each.alias_info for each in schema.returns)
    return views or node.target is getitem or name_of(node) in _DROPOUTS


def sweep(graph: fx.Graph) -> None:
    """Removes everything that the output does not depend on, in-place writes into what it does included."""
    output = next(iter(reversed(graph.nodes)))
    needed: set[fx.Node] = set()
    stack: list[fx.Node] = [output]
    writes = [node for node in graph.nodes if _mutates(node)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
        if not stack:
            stack = [write for write in writes if write not in needed and memory_of(write) in needed]
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and node not in needed:
            graph.erase_node(node)


def optimize_graph(graph: fx.Graph) -> bool:
    """Makes a graph without mutations cheaper, whose results share no memory with the tensors they are made of.

    Convolutions are fastest with channels last, so views must not depend on strides; BatchNorms behind a convolution
    and copies cost passes over memory. Over the networks of `examples/bench_calibration.py` all of it together saves a
    tenth of the time. Returns whether inputs may now come with any strides; if not, the graph was left alone.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    foreign = [node for node in calls if getattr(node.target, "namespace", "aten") != "aten"]
    if foreign or any(name_of(node) in _STRIDED or _mutates(node) for node in calls):
        return False
    _without_copies(graph)
    _fold_batch_norms(graph)
    sweep(graph)
    return True


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _without_copies(graph: fx.Graph) -> None:
    """Removes copies and inactive dropout; views become reshapes, which accept any strides."""
    for node in list(graph.nodes):
        name = name_of(node)
        if name in _COPIES or (name in _DROPOUTS and not named_arguments(node)["train"]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default


def _fold_batch_norms(graph: fx.Graph) -> None:
    """Folds a BatchNorm into the convolution that only it reads; in every run anew, for weights may have changed."""
    for norm in list(graph.nodes):
        convolution = norm.args[0] if name_of(norm) == "batch_norm" else None
        if not isinstance(convolution, fx.Node) or name_of(convolution) != "conv2d" or len(convolution.users) > 1:
            continue
        of_norm, of_convolution = named_arguments(norm), named_arguments(convolution)
        statistics = of_norm["running_mean"], of_norm["running_var"]
        if of_norm["training"] or None in statistics:
            continue
        with graph.inserting_before(convolution):
            before = of_convolution["weight"], of_convolution["bias"]
            affine = of_norm["weight"], of_norm["bias"]
            folded = graph.call_function(fuse_conv_bn_weights, (*before, *statistics, of_norm["eps"], *affine))
            convolution.update_arg(1, graph.call_function(getitem, (folded, 0)))
            if len(convolution.args) < 3:
                convolution.args = (*convolution.args, None)
            convolution.update_arg(2, graph.call_function(getitem, (folded, 1)))
        norm.replace_all_uses_with(convolution)
        graph.erase_node(norm)
