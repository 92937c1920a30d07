"""segmentation_models_pytorch: directories as its ``save_pretrained`` writes them, and state dicts."""

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from equalize.checkpoint.build import class_argument
from equalize.checkpoint.families.smp import loader
from equalize.checkpoint.families.smp.recognize import recognize, under_smp_keys
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, Weights, read_json
from equalize.checkpoint.loading_code import state_dict_code
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.errors import ResourceError


class Smp(Family[Spec]):
    """Directories with a config, and state dicts, which are recognized by their keys where no ``--arch`` is given."""

    name = "smp"
    library = "segmentation-models-pytorch"
    scheme = "smp"
    arch_forms = ("smp:NAME",)
    config_field = "_model_class"

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By the config or ``--arch``; else by the prefixes of the keys."""
        if request.arch is not None:
            return request.scheme == self.scheme
        return "_model_class" in place.config or under_smp_keys(weights.shapes) is not None

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
        """A directory with its config, brought up to date; a state dict with a record."""
        save = super().save_spec(spec, loaded, place)
        if spec.arch is not None:
            return save
        config = None if spec.num_classes is None else {"classes": spec.num_classes}
        return replace(save, architecture=None, config=config)

    def reload(self, place: Place, request: Request) -> nn.Module:
        """A directory by ``smp.from_pretrained``."""
        return super().reload(place, request) if place.record is not None else loader.reload(place.path)

    def architecture(self, out: Path) -> str:
        """The class name as smp spells it."""
        if not (out / ARCHITECTURE_FILE).is_file():
            return str(read_json(out / "config.json")["_model_class"])
        name = super().architecture(out)
        with contextlib.suppress(ResourceError):  # the name is known without smp, too
            name = loader.builder(name).func.__name__
        return name

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """``smp.from_pretrained`` of a directory; for a state dict the class, then its weights."""
        if not (out / ARCHITECTURE_FILE).is_file():
            at = f', revision="{revision}"' if revision else ""
            code = f'model = smp.from_pretrained("{repository or out}"{at}).eval()'
            return f"import segmentation_models_pytorch as smp\n\n{code}"
        fresh = {"encoder_weights": None}
        return state_dict_code(out, "segmentation_models_pytorch", self.architecture(out), fresh, repository, revision)
