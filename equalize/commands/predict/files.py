"""What `equalize predict` writes, and a record of it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from equalize.commands.forward import predicted
from equalize.commands.overlays import Colors, draw_legend, draw_overlay
from equalize.commands.windows import Strips
from equalize.data.bands import Picture, picture_size
from equalize.data.images import Item
from equalize.data.selection import Selection

_LONGEST_JPEG = 65500  # pixels a side
_BYTE = 256
Skip = tuple[str, str]
"""A picture that could not be read, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedFile:
    """A picture and what was written for it, relative to DIR."""

    image: str
    mask: str
    overlay: str | None
    size: tuple[int, int]
    """(H, W)."""
    shares: dict[int, float]
    """Of the pixels, by class; those that occur."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedClass:
    """A class over all pictures."""

    id: int
    name: str
    color: str
    """#rrggbb."""
    pixels: int
    share: float
    """Of the pixels of all pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What was written."""

    source: str
    output: str
    files: tuple[PredictedFile, ...]
    classes: tuple[PredictedClass, ...]
    """Every class, absent ones too."""
    skipped: tuple[Skip, ...]
    """Pictures that could not be read, and why."""

    def to_json(self) -> dict[str, Any]:
        """The object that `equalize predict --json` prints."""
        return asdict(self)


class Writer:
    """Writes masks and overlays into a directory, and counts pixels by class."""

    def __init__(
        self, folder: Path, selection: Selection, colors: Colors, names: tuple[str, ...], *, overlays: bool
    ) -> None:
        self.skipped: list[Skip] = []
        self._folder, self._colors, self._names, self._overlays = folder, colors, names, overlays
        self._name = dict(zip(selection.images, selection.names, strict=True))
        self._order = {image: place for place, image in enumerate(selection.images)}
        self._files: dict[int, PredictedFile] = {}
        self._counts_K = np.zeros(len(names), np.int64)

    def write(self, image: Item, picture: Picture, strips: Strips) -> None:
        """One picture, by strips of logits (K, h, W)."""
        height, width = picture_size(picture)
        number = len(self._names)
        classes_HW: NDArray[np.integer] = np.empty((height, width), np.uint8 if number <= _BYTE else np.uint16)
        for top, classes_hW in predicted(strips, image):
            classes_HW[top : top + len(classes_hW)] = classes_hW.to(torch.int32).cpu().numpy()
        counts_K = np.bincount(classes_HW.ravel(), minlength=number)
        self._counts_K += counts_K
        name = self._name[image]
        mask, overlay = f"masks/{name}.png", None
        self._save(Image.fromarray(classes_HW), mask)
        if self._overlays:
            overlay = f"overlays/{name}.{'jpg' if max(height, width) <= _LONGEST_JPEG else 'png'}"
            self._save(draw_overlay(picture, classes_HW, self._colors), overlay)
        self._files[self._order[image]] = PredictedFile(
            image=str(image),
            mask=mask,
            overlay=overlay,
            size=(height, width),
            shares={int(k): float(counts_K[k]) / (height * width) for k in np.flatnonzero(counts_K)},
        )

    def _save(self, image: Image.Image, path: str) -> None:
        place = self._folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place, quality=90, subsampling=0)  # of JPEG

    def finish(self, source: str, out: str | Path) -> Predictions:
        """Writes the legend and the record, of a model called `source`."""
        total = int(self._counts_K.sum())
        classes = tuple(
            PredictedClass(
                id=k, name=name, color="#" + bytes(color.tolist()).hex(), pixels=int(pixels), share=int(pixels) / total
            )
            for k, (name, color, pixels) in enumerate(zip(self._names, self._colors, self._counts_K, strict=True))
        )
        rows = [
            (f"{row.id}  {row.name}" if row.name != str(row.id) else row.name, self._colors[row.id].tolist())
            for row in classes
            if row.pixels
        ]
        self._save(draw_legend(rows), "legend.png")
        done = Predictions(
            source=source,
            output=str(out),
            files=tuple(self._files[place] for place in sorted(self._files)),
            classes=classes,
            skipped=tuple(self.skipped),
        )
        text = json.dumps(done.to_json(), indent=2, ensure_ascii=False)
        path = self._folder / "predictions.json"
        path.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")  # JSON, as names may be no text
        return done
