"""What the callbacks have in common: which networks a plan is attached to, and when it is let go of."""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from equalize.checkpoint.files.atomic import PLAN_FILE
from equalize.checkpoint.source import locate
from equalize.errors import InputError, SiteError
from equalize.in_memory import PlanLike
from equalize.plan.attach import attach, fold
from equalize.plan.plan import Plan

_LOGGER = logging.getLogger("equalize")


class EqualizedTraining:
    """Attaches a plan to the networks of a trainer, and folds them; `name` is that of the callback, for errors.

    Without a plan, or a place where it lies, it is that of the directory that the weights came from.
    """

    def __init__(self, name: str, plan: PlanLike | None) -> None:
        self._name = name
        self._plan = plan
        self._roots: list[nn.Module] = []

    def begin(self, model: nn.Module, callbacks: Iterable[object], source: str | Path | None) -> None:
        """Attaches the plan to each network that it fits, in the model and in what other callbacks keep of it.

        Averages of weights are updated parameter by parameter, so that all copies must hold the same kind of them.

        Args:
            model: what is trained; the network may be a part of it, or be wrapped.
            callbacks: the trainer's, this one among them.
            source: where the weights came from, if that is known.

        Raises:
            InputError: there is no plan, or the weights are sharded. SiteError: the plan fits nothing in the model.
        """
        plan = self._read(source)
        kept = [each for callback in callbacks for each in vars(callback).values() if isinstance(each, nn.Module)]
        self._roots = [model, *kept]
        for root in self._roots:
            fold(root)  # after a training that was interrupted
        if not plan.equalized:
            _LOGGER.warning("%s: the plan equalizes no layer; the network is trained as it is", self._name)
            return
        if not networks_of(plan, model):
            what, remedy = "is in the plan but not in this model", "use the plan's own model"
            raise SiteError(plan.equalized[0].weight, what, remedy=remedy)
        networks = {id(network): network for root in self._roots for network in networks_of(plan, root)}
        for network in networks.values():
            _refuse_shards(plan, network)
            attach(plan, network)
        _LOGGER.info("%s: the optimizer trains the equalized weights of %d layers", self._name, len(plan.equalized))

    def end(self) -> None:
        """Plain weights again, with the same function."""
        for root in self._roots:
            fold(root)
        self._roots = []

    def _read(self, source: str | Path | None) -> Plan:
        if isinstance(self._plan, Plan):
            return self._plan
        if self._plan is not None:
            return Plan.read(Path(self._plan))
        remedy = "give plan=DIRECTORY, one that equalize wrote, or plan=PLAN"
        if source is None or source == "":
            raise InputError(self._name, "has no plan, and does not know where the weights came from", remedy=remedy)
        directory = locate(source).path
        directory = directory if directory.is_dir() else directory.parent
        if not (directory / PLAN_FILE).is_file():
            raise InputError(source, f"holds no {PLAN_FILE}", remedy=remedy)
        return Plan.read(directory)


def _refuse_shards(plan: Plan, network: nn.Module) -> None:
    for site in plan.equalized:
        weight = network.get_parameter(site.weight)
        if is_traceable_wrapper_subclass(weight) or not weight.numel():
            what, remedy = "is sharded over several processes", "train with `equalize finetune`, which takes shards"
            raise InputError(site.weight, what, remedy=remedy)


def networks_of(plan: Plan, root: nn.Module) -> list[nn.Module]:
    """The modules in `root`, itself among them, that have all weights that a plan equalizes, by their names.

    Not what a network itself is built of, whose layers may have such names too, but an average that it keeps of itself.
    """
    keys = [site.weight for site in plan.equalized]
    names = {name for name, _ in nn.Module.named_parameters(root, remove_duplicate=False)}
    prefixes = [name.removesuffix(keys[0]) for name in sorted(names) if f".{name}".endswith(f".{keys[0]}")]
    fitting = {
        prefix: root.get_submodule(prefix.removesuffix("."))
        for prefix in prefixes
        if all(f"{prefix}{key}" in names for key in keys)
    }
    return [
        network
        for prefix, network in fitting.items()
        if all(type(network) is type(outer) for other, outer in fitting.items() if prefix.startswith(other))
    ]
