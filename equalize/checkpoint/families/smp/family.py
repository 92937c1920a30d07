"""segmentation_models_pytorch: directories as its ``save_pretrained`` writes them, and state dicts."""

from dataclasses import replace
from functools import partial

from torch import nn

from equalize.checkpoint.build import class_argument
from equalize.checkpoint.families.smp import loader
from equalize.checkpoint.families.smp.description import SmpDescription
from equalize.checkpoint.families.smp.recognize import recognize, under_smp_keys
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec
from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place


class Smp(SmpDescription, Family[Spec]):
    """Directories with a config, and state dicts, which are recognized by their keys where no ``--arch`` is given."""

    arch_forms = ("smp:NAME",)

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By the config or ``--arch``; else by the prefixes of the keys."""
        if request.arch is not None:
            return request.scheme == self.scheme
        return self.describes(place.config) or under_smp_keys(weights.shapes) is not None

    def open(self, place: Place, weights: Weights, request: Request) -> Spec:
        """The class and its arguments, without the encoder's pretrained weights: all weights come from the file."""
        described = request.arch is None and bool(place.config)
        note, pretrained = "", None
        if described:
            name = str(place.config["_model_class"])
            arguments = {key: value for key, value in place.config.items() if not key.startswith("_")}
            pretrained = arguments.pop("encoder_weights", None)
        else:
            named = request.arch_name or None
            name, arguments, note = recognize(weights.shapes, request.source, named, request.arch_args)
        make = loader.builder(name)
        if request.num_classes is not None:
            arguments[class_argument(make, f"smp:{name}")] = request.num_classes
        encoder = str(arguments.get("encoder_name", "resnet34"))
        return Spec(
            architecture=make.func.__name__,
            make=partial(make, **arguments),
            preprocess=loader.preprocessing(encoder, str(pretrained or "imagenet")),
            num_classes=request.num_classes,
            notes=(note,) if note else (),
            arch=None if described else f"{self.scheme}:{name}",
            arguments=None if described else arguments,
        )

    def save_spec(self, spec: Spec, loaded: Loaded, place: Place) -> SaveSpec:
        """A directory with its config, brought up to date; a state dict with a record that spells the class as smp."""
        save = super().save_spec(spec, loaded, place)
        if spec.arch is not None:
            return replace(save, architecture={**(save.architecture or {}), "class": spec.architecture})
        config = None if spec.num_classes is None else {"classes": spec.num_classes}
        return replace(save, architecture=None, config=config)

    def reload(self, place: Place, request: Request) -> nn.Module:
        """A directory by ``smp.from_pretrained``."""
        return super().reload(place, request) if place.record is not None else loader.reload(place.path)
