"""Images through a network: the logits of each, and the class of each pixel.

N images, K classes, H x W pixels, h x w logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.outputs import logits_at_size
from equalize.commands.images import working_size
from equalize.commands.labels import as_classes
from equalize.commands.windows import Strips, is_large, slide_window
from equalize.data.bands import Picture
from equalize.data.images import Item
from equalize.data.loader import Batch, Batches, workers_for
from equalize.device import precision_of
from equalize.errors import InputError, NumericsError
from equalize.eval_mode import refusing
from equalize.messages import Notify

Logits = Callable[[Tensor], Tensor]
"""(N, C, H, W) -> (N, classes, h, w)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig:
    """How images are run through a network."""

    size: tuple[int, int] | None = None
    """(H, W) that images are brought to; the checkpoint's, else their own, if None."""
    sliding_window: bool = False
    """Leave images at their own size and let a window of `size` slide over them."""
    batch_size: int = 8
    """Images, or windows, a forward pass."""
    device: str = "auto"
    precision: str = "fp32"
    workers: int | None = None
    """Processes that read images; by the device if None."""


def trial_size(checkpoint: Checkpoint, config: ForwardConfig, images: Sequence[Item]) -> tuple[int, int] | None:
    """(H, W) that a network is tried with before `images` are run: a window, if any is seen through windows.

    Else what they are brought to; None for their own.
    """
    own = not (config.size or checkpoint.preprocess.size)
    in_windows = config.sliding_window or (own and any(map(is_large, images)))
    return working_size(checkpoint, config.size) if in_windows else config.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """How images are run through a checkpoint's model, which is in eval mode on `device`."""

    checkpoint: Checkpoint
    config: ForwardConfig
    device: torch.device

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) that whole images are brought to; None for their own."""
        return self.config.size or self.checkpoint.preprocess.size

    def for_windows(self, images: Sequence[Item]) -> list[Item]:
        """Those of the images that are seen through windows: all if asked for, else large ones at their own size."""
        if self.config.sliding_window:
            return [*images]
        return [] if self.size else [image for image in images if is_large(image)]

    def tell_windows(self, images: Sequence[Item], notify: Notify) -> None:
        """Notifies of large images, which nobody has asked to see through windows."""
        large = len(self.for_windows(images))
        if large and not self.config.sliding_window:
            height, width = working_size(self.checkpoint, None)
            notify(f"large images ({large}) are taken in windows of {height}x{width}, see --size")

    def in_windows(self, image: Item, picture: Picture) -> Strips:
        """Logits (K, h, W) of an image's picture at its own size, by strips.

        A window that is cut to the picture's sides is padded to its whole size if the network does not take it.
        """
        size = working_size(self.checkpoint, self.config.size)
        preprocess = replace(self.checkpoint.preprocess, size=None)
        tested, stride = preprocess.windows or (None, None)
        whole = partial(self._logits, logits=self.checkpoint.logits)

        def logits(x_NCHW: Tensor) -> Tensor:
            refused = partial(_refused, image, x_NCHW.shape[2:])
            try:
                with refusing(refused):
                    return whole(x_NCHW)
            except InputError:
                if x_NCHW.shape[2:] == size:
                    raise
            with refusing(refused):
                return logits_at_size(whole, x_NCHW, size)

        with torch.no_grad(), precision_of(self.config.precision, self.device):
            yield from slide_window(
                *(logits, picture, size),
                stride=stride if tested == size else None,
                batch_size=self.config.batch_size,
                preprocess=preprocess,
            )

    def batches(self, images: Sequence[Item], skip_bad: float | None = None) -> Batches:
        """Whole images, read in batches."""
        preprocess = self.checkpoint.preprocess
        return Batches(
            *(images, preprocess),
            size=self.size,
            channels=preprocess.bands,
            batch_size=self.config.batch_size,
            workers=workers_for(self.device, self.config.workers),
            skip_bad=skip_bad,
        )

    def of_batch(self, batch: Batch, logits: Logits | None = None) -> Tensor:
        """Logits (N, K, h, w) of a batch, by `logits` in place of the checkpoint's if given."""
        refused = partial(_refused, batch.paths[0], batch.images.shape[2:])
        with torch.no_grad(), precision_of(self.config.precision, self.device), refusing(refused):
            return self._logits(batch.images, logits or self.checkpoint.logits)

    def _logits(self, images_NCHW: Tensor, logits: Logits) -> Tensor:
        return as_classes(logits(images_NCHW.to(self.device))).float()


def _refused(image: Item, size: Sequence[int], reason: str) -> InputError:
    height, width = size
    what = f"has a size that the network does not take, {height}x{width} ({reason})"
    return InputError(image, what, remedy="bring all images to a size that it takes (--size)")


def predicted(strips: Strips, image: Item) -> Iterator[tuple[int, Tensor]]:
    """The classes (h, W) of an image, by strips of logits (K, h, W) from their first row on: argmax.

    A NumericsError if a logit is not finite.
    """
    for top, scores_KhW in strips:
        # a finite sum says so of all its terms, and sooner
        if not scores_KhW.sum().isfinite() and not scores_KhW.isfinite().all():
            raise NumericsError(image, "makes the network give NaN or Inf", remedy="use --precision fp32")
        yield top, scores_KhW.max(dim=0).indices  # on a CPU two to ten times as fast as argmax, of which it is one
