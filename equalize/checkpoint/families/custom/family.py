"""A user's own network: the factory in a file or module that ``--arch`` names, which is consent to run it."""

from functools import partial

from equalize.checkpoint.build import class_argument
from equalize.checkpoint.families.custom.description import CustomDescription
from equalize.checkpoint.family import Family, Spec
from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.checkpoint.user_code import load_factory, run_factory


class Custom(CustomDescription, Family[Spec]):
    """Networks built by a factory in the user's own code; the last family to be tried."""

    arch_forms = ("file.py:Factory", "package.module:Factory")

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """True for any ``--arch``; the other families are tried first."""
        return request.arch is not None

    def open(self, place: Place, weights: Weights, request: Request) -> Spec:
        """Run the file or import the module."""
        arch = str(request.arch)
        factory, arguments = load_factory(arch), dict(request.arch_args)
        if request.num_classes is not None:
            arguments[class_argument(factory, arch)] = request.num_classes
        return Spec(
            architecture=request.arch_name,
            make=partial(run_factory, factory, arch, arguments),
            preprocess=Preprocess(origin="ImageNet defaults, the checkpoint does not say", assumed=True),
            num_classes=request.num_classes,
            arch=arch,
            arguments=arguments,
            limited=False,
        )

    def runs_code(self, arch: str) -> bool:
        """Always."""
        return True
