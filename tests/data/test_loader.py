"""Batches: sizes never mixed, bad files counted, workers ended, global random numbers left alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from equalize.data.loader import Batches, workers_for
from equalize.errors import DataError, InputError, ResourceError


def to_tensor(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    if size is not None:
        image = image.resize((size[1], size[0]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def refuse(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    raise InputError("--size", "too small for this network", got=7)


def ignores_interrupts(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    return torch.full((3, 1, 1), float(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))


def die(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    os._exit(1)


def draw(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Images of (H, W), image i filled with value i."""
    paths = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number:03}.png"
        Image.new("RGB", (width, height), (number, number, number)).save(path)
        paths.append(path)
    return paths


def spoil(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:44])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_the_order_and_end_with_the_rest(tmp_path: Path, workers: int) -> None:
    paths = draw(tmp_path, [(4, 6)] * 7)
    found = list(Batches(paths, to_tensor, batch_size=3, workers=workers))
    assert [batch.images.shape for batch in found] == [(3, 3, 4, 6), (3, 3, 4, 6), (1, 3, 4, 6)]
    assert found[0].images.dtype == torch.float32
    assert [path for batch in found for path in batch.paths] == paths
    for batch in found:
        assert batch.images[:, 0, 0, 0].tolist() == [int(path.stem) for path in batch.paths]


def test_groups_depend_on_the_images_alone(tmp_path: Path) -> None:
    paths = draw(tmp_path, [(4, 6), (6, 4), (4, 6)] * 5)
    spoil(paths[1])
    reader = Batches(paths, to_tensor, batch_size=2, skip_bad=0.1)  # eight images a group
    every = list(reader.groups())
    assert len(reader) == len(every) == 2
    assert [len(batch.paths) for group in every for batch in group.batches] == [2, 2, 2, 1, 2, 2, 2, 1]
    assert [[path for path, _ in group.skipped] for group in every] == [[str(paths[1])], []]
    shared = [group for first in range(2) for group in reader.groups(first, 2)]
    for ours, theirs in zip(sorted(shared, key=lambda group: group.index), every, strict=True):
        assert [batch.paths for batch in ours.batches] == [batch.paths for batch in theirs.batches]
    sized = Batches(paths, to_tensor, size=(8, 8), batch_size=2, skip_bad=0.1)  # a batch is a group
    assert [len(group.batches[0].paths) for group in sized.groups()] == [1, *[2] * 6, 1]


def test_size_is_handed_to_the_preprocessing(tmp_path: Path) -> None:
    paths = draw(tmp_path, [(4, 6), (6, 4), (5, 5)])
    (batch,) = Batches(paths, to_tensor, size=(8, 10), batch_size=3)
    assert batch.images.shape == (3, 3, 8, 10)


def test_sizes_never_mix_and_alternating_ones_still_fill_batches(tmp_path: Path) -> None:
    paths = draw(tmp_path, [(4, 6), (6, 4)] * 4)
    found = list(Batches(paths, to_tensor, batch_size=4))
    assert [tuple(batch.images.shape) for batch in found] == [(4, 3, 4, 6), (4, 3, 6, 4)]
    assert sorted(path for batch in found for path in batch.paths) == paths


def test_all_different_sizes_do_not_pile_up(tmp_path: Path) -> None:
    paths = draw(tmp_path, [(4, 4 + number) for number in range(20)])
    read = []

    def watch(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
        read.append(image.width)
        return to_tensor(image, size)

    seen = []
    for batch in Batches(paths, watch, batch_size=2):
        seen.extend(batch.paths)
        assert len(read) - len(seen) < 8  # four batches of two in the group
    assert seen == paths


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_an_error_unless_a_share_is_allowed(tmp_path: Path, workers: int) -> None:
    paths = draw(tmp_path, [(4, 6)] * 5)
    spoil(paths[2])
    with pytest.raises(DataError, match=r"002\.png: .*--skip-bad"):
        list(Batches(paths, to_tensor, batch_size=2, workers=workers, skip_bad=0.0))
    with pytest.raises(DataError, match=r"002\.png: .*repair or remove it$"):  # of a command without the flag
        list(Batches(paths, to_tensor, batch_size=2, workers=workers))
    reader = Batches(paths, to_tensor, batch_size=2, workers=workers, skip_bad=0.01)
    assert [path.stem for batch in reader for path in batch.paths] == ["000", "001", "003", "004"]
    for _ in range(2):  # a pass counts its own alone
        ((path, reason),) = (bad for group in reader.groups() for bad in group.skipped)
        assert path == str(paths[2])
        assert "cannot be read as an image" in reason
        assert path not in reason


def test_more_bad_images_than_the_share(tmp_path: Path) -> None:
    paths = draw(tmp_path, [(4, 6)] * 10)
    spoil(*paths[3:6])
    assert sum(len(batch.paths) for batch in Batches(paths, to_tensor, batch_size=4, skip_bad=0.3)) == 7
    with pytest.raises(DataError, match=r"005\.png: is bad image number 3 of 10 .*expected at most 2"):
        list(Batches(paths, to_tensor, batch_size=4, skip_bad=0.2))


def test_all_images_bad_is_an_error_whatever_the_share(tmp_path: Path) -> None:
    paths = draw(tmp_path, [(4, 6)] * 2)
    spoil(*paths)
    with pytest.raises(DataError, match="number 2 of 2"):
        list(Batches(paths, to_tensor, batch_size=1, skip_bad=1.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_ours_are_not_skipped(tmp_path: Path, workers: int) -> None:
    reader = Batches(draw(tmp_path, [(4, 6)]), refuse, batch_size=1, workers=workers, skip_bad=1.0)
    with pytest.raises(InputError, match="--size: too small for this network, got 7"):
        list(reader)


def test_a_dead_worker_is_a_lack_of_resources(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="process that reads images was killed"):
        list(Batches(draw(tmp_path, [(4, 6)]), die, batch_size=1, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_numbers_are_left_alone(tmp_path: Path, workers: int) -> None:
    paths = draw(tmp_path, [(4, 6)] * 2)
    before = torch.get_rng_state()
    list(Batches(paths, to_tensor, batch_size=1, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_a_pass_given_up_ends_its_workers(tmp_path: Path) -> None:
    for _ in Batches(draw(tmp_path, [(4, 6)] * 8), to_tensor, batch_size=1, workers=1):
        break
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_only_workers_ignore_interrupts(tmp_path: Path, workers: int) -> None:
    (batch,) = Batches(draw(tmp_path, [(4, 6)]), ignores_interrupts, batch_size=1, workers=workers)
    assert batch.images.unique().tolist() == [workers]


INTERRUPTED = """
import sys, torch, time
from pathlib import Path
from equalize.data.loader import Batches

def slow(image, size):
    time.sleep(0.05)
    return torch.zeros(3, 4, 4)

paths = sorted(Path(sys.argv[1]).iterdir()) * 1000
try:
    for number, batch in enumerate(Batches(paths, slow, batch_size=2, workers=2)):
        if number == 1:
            print("running", flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_ends_workers_without_noise(tmp_path: Path) -> None:
    draw(tmp_path, [(4, 6)])
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGINT)
    _, complaints = process.communicate(timeout=30)  # ends only when every worker has let go of stderr
    assert (process.returncode, complaints) == (130, "")


def test_masks_come_at_the_size_of_the_image_and_bad_ones_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    paths = draw(tmp_path, [(4, 6)] * 4)
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6)
    stored[0, 0] = 255
    masks = [tmp_path / "masks" / f"{number}.png" for number in range(3)]
    Image.fromarray(stored).save(masks[0])
    Image.fromarray(stored[:2]).save(masks[1])  # of another size than its image
    masks[2].write_bytes(b"nothing")
    (batch,) = Batches(paths, to_tensor, size=(2, 3), batch_size=4, masks=[*masks, None])
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int16
    assert batch.labels[0].tolist() == [[7, 9, 11], [19, 21, 23]]  # a tie goes to the later pixel
    assert (batch.labels[1:] == -1).all()
    (whole,) = Batches(paths[:1], to_tensor, batch_size=1, masks=masks[:1])
    assert whole.labels is not None
    assert whole.labels[0].flatten().tolist() == [-1, *range(1, 24)]
    (without,) = Batches(paths, to_tensor, batch_size=4)
    assert without.labels is None


@pytest.mark.parametrize(("cores", "processes", "expected"), [(16, 1, 8), (16, 4, 3), (2, 1, 1), (2, 2, 0)])
def test_an_accelerator_gets_processes_that_read(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_for(torch.device("cuda"), None) == expected
    assert workers_for(torch.device("cpu"), None) == 0
    assert workers_for(torch.device("cuda"), 0) == 0
