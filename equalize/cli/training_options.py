"""Flags that `finetune` and `compare` share; None everywhere means: as the recipe says."""

from typing import Annotated, Literal

import typer

Epochs = Annotated[int | None, typer.Option("--epochs", metavar="E", help="20 if left away.")]
Accumulate = Annotated[int | None, typer.Option("--accumulate", metavar="N", help="Batches that make a step.")]
Optimizer = Annotated[
    Literal["adamw", "sgd"] | None, typer.Option("--optimizer", help="adamw if left away; sgd has momentum 0.9.")
]
HeadLrMult = Annotated[
    float | None, typer.Option("--head-lr-mult", help="All but the backbone learns this many times faster.")
]
Precision = Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option("--precision", help="fp32 if left away.")]
FreezeBackbone = Annotated[bool | None, typer.Option("--freeze-backbone/--no-freeze-backbone")]
FreezeNorms = Annotated[bool | None, typer.Option("--freeze-norms/--no-freeze-norms")]
Crop = Annotated[str | None, typer.Option("--crop", metavar="H[xW]", help="What training sees; --size if left away.")]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", metavar="N", help="The classifier is drawn anew if it has others.")
]
IgnoreIndex = Annotated[int | None, typer.Option("--ignore-index", help="Label that does not count; 255.")]
ReduceLabels = Annotated[
    Literal["auto", "yes", "no"] | None,
    typer.Option("--reduce-labels", help="Label 0 does not count, 1 is class 0."),
]
TrainSplit = Annotated[str | None, typer.Option("--train-split", metavar="NAME")]
ValSplit = Annotated[str | None, typer.Option("--val-split", metavar="NAME")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")]
