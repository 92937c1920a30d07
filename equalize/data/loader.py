"""Loads images as batches of tensors with torch's `DataLoader`; a share of files may be unreadable.

N images a batch, H x W pixels.
"""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from equalize.data.bands import Picture, picture_size, read_picture
from equalize.data.images import Item
from equalize.data.masks import LabelRule, read_mask
from equalize.errors import DataError, EqualizeError, ResourceError

Size = tuple[int, int] | None
"""(H, W), or None: as the checkpoint says, else the image's own."""

Preprocessor = Callable[[Picture, Size], Tensor]
"""A checkpoint's preprocessing: (picture, size) -> (C, H, W) float32."""

_Stack = tuple[list[int], Tensor, Tensor | None]
"""A batch as it comes from a worker: indices into `paths`, for cells need not travel back; images and labels."""

_Loaded = tuple[list[_Stack], list[tuple[int, EqualizeError]]]
"""A group as it comes from a worker, batches and failures: of an error that is raised, only the message would come."""

_BATCHES_A_GROUP = 4
_MOST_WORKERS = 8
_LARGEST_LABEL = 2**15 - 1  # of what labels are kept in


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images of one size.

    Attributes:
        images: (N, C, H, W) float32.
        paths: files or cells of the N images.
        labels: (N, H, W) int16, -1 where a pixel does not count; None unless there are `Batches.masks`.
    """

    images: Tensor
    paths: tuple[Item, ...]
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A run of `paths` in batches: its place, and its bad files by name and why each could not be read."""

    index: int
    batches: tuple[Batch, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Batches(Dataset[_Loaded]):
    """Batches of the images in `paths`; every pass reads them anew.

    Images that come out of `preprocess` with different sizes never share a batch. So `paths` is taken in groups, whose
    bounds depend on nothing that is read: a batch long where a size is given, else four batches, within which images of
    equal size share one. So memory is bounded, and a folder of portraits and landscapes still makes full batches.
    With one size the order of `paths` is kept. No group reaches over a multiple of `run` paths.

    Attributes:
        preprocess: with workers on a platform that does not fork, it must pickle.
        size: (H, W) handed to `preprocess`.
        workers: processes that read; with 0 this one does, between the batches.
        skip_bad: share of `paths`, rounded up, that may be unreadable. At 0 or None the first bad file is an error,
            at 0 one that names --skip-bad.
        pinned: put batches into memory that a CUDA device copies from by itself.
        masks: one for each path, None where it has none; brought to the size of its image, nearest. One that cannot be
            read, or is of another size than its image, counts as none.
        run: so many paths make whole groups, whatever the batch size is.
    """

    paths: Sequence[Item]
    preprocess: Preprocessor
    _: KW_ONLY
    batch_size: int
    size: Size = None
    channels: int = 3
    workers: int = 0
    skip_bad: float | None = None
    pinned: bool = False
    masks: Sequence[Item | None] = ()
    rule: LabelRule = field(default_factory=LabelRule)
    run: int = sys.maxsize

    @property
    def group_size(self) -> int:
        """How many images a group has, but for the last of a run."""
        return min(self.run, self.batch_size if self.size is not None else _BATCHES_A_GROUP * self.batch_size)

    @property
    def groups_a_run(self) -> int:
        """How many groups a run has, but for the last."""
        return -(-self.run // self.group_size)

    def __len__(self) -> int:
        """How many groups there are."""
        runs, rest = divmod(len(self.paths), self.run)
        return runs * self.groups_a_run + math.ceil(rest / self.group_size)

    def bounds(self, place: int) -> tuple[int, int]:
        """The first path of a group, and the first behind it."""
        run, within = divmod(place, self.groups_a_run)
        start = run * self.run + within * self.group_size
        return start, min(start + self.group_size, (run + 1) * self.run)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of all groups; raises what `groups` raises."""
        for group in self.groups():
            yield from group.batches

    def groups(self, first: int = 0, step: int = 1) -> Generator[Group, None, None]:
        """The groups `first`, `first + step`, ...; their bad files are counted against those of this iteration alone.

        A DataError if they are more than `skip_bad` allows; a ResourceError if a worker died.
        """
        skipped: list[tuple[str, str]] = []
        places = range(first, len(self), step)
        with worker_deaths():
            for place, (stacks, errors) in zip(places, self._load(places), strict=True):
                bad = tuple(self._skip(self.paths[index], error) for index, error in errors)
                skipped += bad
                self.check_skipped(skipped)
                found = (
                    Batch(images=images, paths=tuple(self.paths[i] for i in of), labels=labels)
                    for of, images, labels in stacks
                )
                yield Group(index=place, batches=tuple(found), skipped=bad)

    def check_skipped(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Refuses more bad files, by name and reason, than the share that is allowed, by a DataError."""
        # Rounded up, so that any share above 0 allows one bad image in a small folder; 1e-9 is for 0.01 * 700 > 7.
        allowed = min(math.ceil((self.skip_bad or 0) * len(self.paths) - 1e-9), len(self.paths) - 1)
        if len(skipped) > allowed:
            path, reason = skipped[allowed]
            what = f"is bad image number {allowed + 1} of {len(self.paths)} ({reason})"
            expected = f"at most {allowed} (--skip-bad {self.skip_bad or 0:g})"
            raise DataError(path, what, expected=expected, remedy="repair or remove them, or allow a larger share")

    def __getitem__(self, place: int) -> _Loaded:
        """A group, read in a worker."""
        start, stop = self.bounds(place)
        stacks: list[_Stack] = []
        errors: list[tuple[int, EqualizeError]] = []
        waiting: dict[torch.Size, list[tuple[int, Tensor, Tensor | None]]] = {}
        for index, path in enumerate(self.paths[start:stop], start):
            try:
                picture = read_picture(path, self.channels)
                image_CHW = self.preprocess(picture, self.size)
            except EqualizeError as error:
                errors.append((index, error))
                continue
            queue = waiting.setdefault(image_CHW.shape, [])
            labels_HW = self._labels(index, picture, image_CHW.shape[1:]) if self.masks else None
            queue.append((index, image_CHW, labels_HW))
            if len(queue) == self.batch_size:
                stacks.append(_stack(waiting.pop(image_CHW.shape)))
        stacks.extend(map(_stack, waiting.values()))
        return stacks, errors

    def _labels(self, index: int, picture: Picture, sides: Sequence[int]) -> Tensor:
        """The labels of an image at the size that it is preprocessed to, (H, W) int16."""
        mask = self.masks[index]
        stored_HW = torch.full((1, 1), -1)
        if mask is not None:
            with contextlib.suppress(DataError):
                read_HW = read_mask(mask, self.rule, self.paths[index])
                if tuple(read_HW.shape) == picture_size(picture):
                    stored_HW = read_HW.masked_fill(read_HW == self.rule.ignore_index, -1).clamp(-1, _LARGEST_LABEL)
        return F.interpolate(stored_HW[None, None].float(), tuple(sides), mode="nearest-exact")[0, 0].short()

    def _load(self, places: range) -> "DataLoader[_Loaded]":
        """Reads these groups, in order; a worker's next one is read while the last one is computed with."""
        workers = min(self.workers, len(places))
        return DataLoader(
            self,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            prefetch_factor=1 if workers else None,
            worker_init_fn=partial(_start_worker, Image.MAX_IMAGE_PIXELS),
            pin_memory=self.pinned,
            generator=torch.Generator(),  # else each pass would draw from the global random numbers
        )

    def _skip(self, path: Item, error: EqualizeError) -> tuple[str, str]:
        if not isinstance(error, DataError):
            raise error
        if not self.skip_bad:
            share = "" if self.skip_bad is None else ", or allow a share of bad images with --skip-bad"
            error.remedy = error.remedy or f"repair or remove it{share}"
            raise error
        return str(path), str(error).removeprefix(f"{path}: ")


@contextlib.contextmanager
def worker_deaths() -> Iterator[None]:
    """A ResourceError in place of torch's error if a worker died."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        what = "a process that reads images was killed, most often for want of memory or shared memory"
        raise ResourceError("workers", what, remedy="use fewer --workers, or none, or smaller batches") from error


def workers_for(device: torch.device, given: int | None) -> int:
    """How many processes read: as given, else some for CUDA; none for a CPU, where reading takes a few percent."""
    if given is not None or device.type != "cuda":
        return given or 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def _stack(queue: list[tuple[int, Tensor, Tensor | None]]) -> _Stack:
    labels = [labels_HW for _, _, labels_HW in queue if labels_HW is not None]
    images_NCHW = torch.stack([image_CHW for _, image_CHW, _ in queue])
    return [index for index, _, _ in queue], images_NCHW, torch.stack(labels) if labels else None


def _start_worker(most_pixels: int | None, worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the parent handles it and ends its workers."""
    Image.MAX_IMAGE_PIXELS = most_pixels  # a process that was not forked has PIL's own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
