"""Traces a model and an example input to a `Graph`: recorded on fake tensors, else exported, else recorded in a run.

On fake tensors a network can be traced on the meta device, from its configuration alone; nothing is computed. A
recording needs no solver and no guards, so it is tried first; it refuses values that reach Python. Export has symbols
for those, as long as neither sizes nor control flow depend on them. What is left must be run. See `record.py`.
"""

import contextlib
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import config as fx_config

from equalize.errors import ResourceError, SiteError
from equalize.eval_mode import eval_mode
from equalize.graph.fx_reader import read_ops
from equalize.graph.graph import Graph, Op, Training
from equalize.graph.record import Call, record, record_fake
from equalize.graph.recorder import named_tensors

_REMEDY = "give an input shape that the network takes (--size, --input-shape)"


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """Traces `model` in eval mode on inputs shaped like `example`; runs it only where nothing else can read it.

    It is left as it was. Values of `example`, a positional input or a tuple of them, matter in a recorded run only. A
    SiteError if it can neither be traced nor run, a ResourceError if there is no memory to run it.
    """
    inputs = tuple(example) if isinstance(example, list | tuple) else (example,)
    if not all(isinstance(each, Tensor) for each in inputs):
        raise SiteError("example", "must be a tensor or a tuple of tensors", got=type(example).__name__)
    if isinstance(model, torch.jit.ScriptModule):
        raise SiteError(type(model).__name__, "is TorchScript, which cannot be traced", remedy="give its nn.Module")
    ops = _faked(model, inputs)
    tracer: Literal["export", "recorder"] = "recorder"
    ran = False
    if ops is None:
        try:
            ops, tracer = exported_ops(model, inputs), "export"
        except SiteError as refusal:
            ops, ran = _recorded(model, inputs, refusal), True
    shapes = {key: tuple(tensor.shape) for key, tensor in named_tensors(model).items()}
    return Graph(ops=ops, shapes=shapes, tracer=tracer, ran=ran)


def trace_training(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    graph: Graph,
    keys: Collection[str],
    calls: Sequence[Call] = (),
) -> Training:
    """Traces what `model` does in training beside what `graph` has, its trace in eval mode; it is left as it was.

    Args:
        example: as of `trace`.
        keys: of the weights that make or read the branches: where no module around one asks for the mode, and every
            parameter is read in eval mode, there is nothing beside.
        calls: ways in which its library calls it in training, tried where its own forward leaves layers out.
    """
    inputs = tuple(example) if isinstance(example, list | tuple) else (example,)
    uncalled = _uncalled(model, graph)
    if not uncalled and not _asks_for_training(model, keys):
        return Training(graphs=(graph,))
    graphs: list[Graph] = []
    for call in (operator.call, *calls):
        if graphs and not uncalled:
            break
        ops = _faked(model, inputs, call, training=True)
        if ops is None and graph.ran:
            with contextlib.suppress(Exception), _quiet():
                ops = record(model, inputs, call, training=True)
        if ops is not None:
            graphs.append(replace(graph, ops=ops))
            uncalled &= _uncalled(model, graphs[-1])
    parameters = dict(nn.Module.named_parameters(model, remove_duplicate=False))
    layers = {key: model.get_submodule(key.rpartition(".")[0]) for key in uncalled if parameters[key].ndim > 1}
    taken = {
        key: layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else parameters[key].shape[1]
        for key, layer in layers.items()
    }
    return Training(graphs=tuple(graphs), uncalled=taken)


def _uncalled(model: nn.Module, graph: Graph) -> set[str]:
    """The parameters that no op reads, under one name each."""
    parameters = dict(nn.Module.named_parameters(model, remove_duplicate=False))
    read = {id(parameters[key]) for key, uses in graph.uses.items() if uses and key in parameters}
    return {key for key, parameter in parameters.items() if id(parameter) not in read}


def _asks_for_training(model: nn.Module, keys: Collection[str]) -> bool:
    """Whether the forward of a module around one of these weights, or a method that it calls, asks for the mode."""
    parts = [key.split(".") for key in keys]
    around = {".".join(words[:end]) for words in parts for end in range(len(words) - 1)}
    modules = nn.Module.named_modules(model, remove_duplicate=False)
    return any(_reads_mode(kind, "forward", set()) for kind in {type(each) for path, each in modules if path in around})


def _reads_mode(kind: type, method: str, seen: set[str]) -> bool:
    seen.add(method)
    own = (vars(each).get(method) for each in kind.__mro__ if each not in nn.Module.__mro__)
    names = {name for each in own if inspect.isfunction(each) for name in inspect.unwrap(each).__code__.co_names}
    return "training" in names or any(_reads_mode(kind, name, seen) for name in names if name not in seen)


def _faked(
    model: nn.Module, inputs: tuple[Tensor, ...], call: Call = operator.call, *, training: bool = False
) -> tuple[Op, ...] | None:
    """What a recording on fake tensors says; None where it is refused."""
    try:
        with _quiet():
            return record_fake(model, inputs, call, training=training)
    except MemoryError:
        raise
    except Exception:  # the network's code may raise anything on fake tensors: export or a run finds out what
        return None


def exported_ops(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Op, ...]:
    """The ops of `model` in eval mode as `torch.export` gives them; a SiteError if it refuses."""
    program = export(model, inputs)
    if program.range_constraints:
        raise SiteError(type(model).__name__, "cannot be traced (sizes depend on values)", got=_shapes(inputs))
    signature = program.graph_signature
    keys = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    plain = frozenset(signature.inputs_to_parameters.values())
    return read_ops(program.graph_module.graph, program.graph_module, keys=keys, plain=plain)


def _recorded(model: nn.Module, example: tuple[Tensor, ...], refusal: SiteError) -> tuple[Op, ...]:
    try:
        with _quiet():
            return record(model, example)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the network's code may raise anything
        name = type(model).__name__
        if "allocate memory" in str(error):
            what = "must be run to be read, and there is too little memory for that"
            raise ResourceError(name, what, remedy="use a smaller --size") from error
        again = _line(error) in refusal.what  # as where the input does not fit
        what = refusal.what if again else f"{refusal.what}, and a run failed ({_line(error)})"
        raise SiteError(name, what, got=refusal.got, remedy=_remedy(model, example)) from error


def _remedy(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError:
        return "give the inputs that its forward takes, without labels (in Python, a tuple of them)"
    return _REMEDY


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    return f"input {' + '.join(str(list(tensor.shape)) for tensor in inputs)}"


def _line(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()[:200]}".removesuffix(": ")


def export(model: nn.Module, example: tuple[Tensor, ...], *, any_batch: bool = False) -> ExportedProgram:
    """`model` in eval mode as an exported program that shares its tensors; the values of `example` do not matter.

    `any_batch` makes one program for batches of any size, where the network's code allows it. A SiteError if
    `torch.export` refuses the network, or the network refuses the example.
    """
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    inputs = tuple(torch.empty_like(each, device=device) for each in example)
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if any_batch else None
    with eval_mode(model, attributes=True), _quiet():
        try:
            return torch.export.export(model, inputs, strict=False, dynamic_shapes=shapes)
        except MemoryError:
            raise
        except Exception as error:  # the network's code may raise anything on fake tensors
            what = f"cannot be traced ({_line(error)})"
            raise SiteError(type(model).__name__, what, got=_shapes(inputs), remedy=_remedy(model, inputs)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without export's warnings, and the graph that it prints where it refuses.

    Export would also look up the source lines of every call, a sixth of its time; they are not used.
    """
    disabled, without_lines = logging.root.manager.disable, fx_config.do_not_emit_stack_traces
    logging.disable(logging.ERROR)
    fx_config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        fx_config.do_not_emit_stack_traces = without_lines
