"""Runs a network over pictures and writes the class of each pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.files.atomic import atomic_directory, check_target, demand_apart
from equalize.checkpoint.loading import ModelName
from equalize.commands.forward import Forward, ForwardConfig, trial_size
from equalize.commands.images import fit_images
from equalize.commands.labels import names_of, with_output
from equalize.commands.overlays import class_colors
from equalize.commands.predict.files import Predictions, Skip, Writer
from equalize.commands.training_record import TrainingRecord, settings_taken
from equalize.commands.windows import Strips, upsampled
from equalize.data.bands import Picture, picture_size, read_picture
from equalize.data.colors import read_colors
from equalize.data.dataset import DataSet
from equalize.data.images import Item
from equalize.data.selection import file_of, select_pictures
from equalize.device import device_of, precision_of
from equalize.errors import DataError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, Progress, ignore, ignore_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig(ForwardConfig):
    """How classes are predicted and shown."""

    skip_bad: float = 0.0
    """Share of the pictures that may be unreadable."""
    colors: str | Path | None = None
    """A file with the colors of classes; the checkpoint's own, else distinct ones, if None."""
    class_names: str | Path | None = None
    """A file with names of the classes."""
    overlays: bool = True


def predict(
    name: ModelName,
    places: Sequence[str | Path],
    out: str | Path,
    config: PredictConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Predictions:
    """Writes `out`, whole or not at all.

    Args:
        places: pictures, folders of any depth, patterns.
        out: the directory to make. overwrite: whether it may exist.

    Raises:
        CheckpointError: the model cannot be loaded. DataError: a picture cannot be read. OutputError: `out` exists, or
        touches what is read. NumericsError: the network gives NaN or Inf.
    """
    config = config or PredictConfig()
    selection = select_pictures(places)
    demand_apart(out, (*selection.folders, *map(file_of, selection.images), config.colors, config.class_names))
    check_target(Path(out), overwrite, name.source)
    for note in selection.notes:
        notify(note)
    device = device_of(config.device)
    precision_of(config.precision, device)
    checkpoint = name.load()
    config, reduced = _as_trained(checkpoint, config, notify)
    size, skip_bad = trial_size(checkpoint, config, selection.images), config.skip_bad
    checkpoint = fit_images(checkpoint, selection.images, size, device, notify, warn, skip_bad=skip_bad)
    sample = _first_readable(selection.images, checkpoint.preprocess.bands, skip_bad)
    checkpoint, number = with_output(checkpoint, sample, size, device, notify)
    colors = class_colors(number, read_colors(config.colors) if config.colors else None, checkpoint.palette)
    names = names_of(number, sample, checkpoint, config) or tuple(map(str, range(number)))
    if reduced:
        notify("masks: classes from 0 on; the network was trained on reduced labels, its class 0 was stored as label 1")
    forward = Forward(checkpoint=checkpoint, config=config, device=device)
    forward.tell_windows(selection.images, notify)
    with atomic_directory(out, overwrite=overwrite) as work, eval_mode(checkpoint.model):
        writer = Writer(work, selection, colors, names, overlays=config.overlays)
        read = _pictures(forward, selection.images, skip_bad, writer.skipped)
        for done, (image, picture, strips) in enumerate(read, 1):
            writer.write(image, picture, strips)
            progress(done, len(selection.images))
        for path, reason in writer.skipped:
            warn(f"skipped {path}: {reason}")
        return writer.finish(checkpoint.source, out)


def _as_trained(checkpoint: Checkpoint, config: PredictConfig, notify: Notify) -> tuple[PredictConfig, bool | None]:
    """The settings with the size of the training if none is given, as `evaluate` has it; and if labels were reduced."""
    record = TrainingRecord.of(checkpoint, notify)
    taken = settings_taken(config, {"size": record.size}, {"size": checkpoint.preprocess.size}, notify)
    return replace(config, **taken), record.reduced_before(checkpoint)


def _first_readable(images: Sequence[Item], bands: int, skip_bad: float) -> DataSet:
    """The first picture that can be read, as a data set."""
    for image in images:
        try:
            read_picture(image, bands)
        except DataError:
            if not skip_bad:
                raise
        else:
            return DataSet(root=file_of(image).parent, layout="images", split=None, images=(image,))
    raise DataError(images[0], f"cannot be read, nor can any other of {len(images)} pictures")


def _pictures(
    forward: Forward, images: Sequence[Item], skip_bad: float, skipped: list[Skip]
) -> Iterator[tuple[Item, Picture, Strips]]:
    """Each picture that can be read with its logits at its own size, in strips; the others go to `skipped`."""
    bands = forward.checkpoint.preprocess.bands
    every = forward.batches(images, skip_bad)
    for_windows = forward.for_windows(images)
    for image in for_windows:
        try:
            picture = read_picture(image, bands)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append((str(image), str(error).removeprefix(f"{image}: ")))
            every.check_skipped(skipped)
            continue
        yield image, picture, forward.in_windows(image, picture)
    taken = {*for_windows}
    whole = [image for image in images if image not in taken]
    for group in forward.batches(whole, skip_bad).groups() if whole else ():
        skipped += group.skipped
        every.check_skipped(skipped)
        for batch in group.batches:
            scores_NKhw = forward.of_batch(batch)
            for image, scores_Khw in zip(batch.paths, scores_NKhw, strict=True):
                picture = read_picture(image, bands)  # again, at its own size
                yield image, picture, upsampled(scores_Khw, picture_size(picture))
