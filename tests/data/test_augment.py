import numpy as np
import pytest
import torch
from PIL import Image

from equalize.data.augment import Augment, draw_seed, pad
from equalize.data.dataset import open_data
from equalize.data.masks import LabelRule
from equalize.data.pairs import EpochOrder, TrainingPairs, collate
from equalize.errors import DataError
from tests.support.scenes import write_scenes

PLAIN = {"scale": (1.0, 1.0), "flip": 0.0, "photometric": False, "cat_max_ratio": 1.0}


def picture_and_labels(height=40, width=60):
    """A picture whose red channel holds its labels: what happens to one must happen to the other."""
    labels = torch.arange(height)[:, None] // 10 * 6 + torch.arange(width)[None] // 10
    red = labels.numpy().astype(np.uint8)
    return Image.fromarray(np.stack([red, red, red], axis=-1)), labels


def test_picture_and_labels_stay_aligned():
    image, labels = picture_and_labels()
    augment = Augment(crop=(24, 30), scale=(0.5, 2.0), photometric=False)
    for seed in range(20):
        seen, seen_labels = augment(image, labels, seed)
        assert (seen.height, seen.width) == tuple(seen_labels.shape)
        assert seen.height <= 24
        assert seen.width <= 30
        red = torch.from_numpy(np.array(seen)[..., 0].astype(np.int64))
        assert (red == seen_labels).float().mean() > 0.6  # the rest lies on borders that resizing blurs


def test_same_seed_same_picture_and_global_random_numbers_untouched():
    image, labels = picture_and_labels()
    augment = Augment(crop=(24, 30))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, first_labels = augment(image, labels, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, again_labels = augment(image, labels, 3)
    other, _ = augment(image, labels, 4)
    assert np.array_equal(first, again)
    assert torch.equal(first_labels, again_labels)
    assert first.size != other.size or not np.array_equal(first, other)


def test_draw_seed_depends_on_each_of_its_arguments():
    drawn = {draw_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(-1, 5)}
    assert len(drawn) == 5 * 5 * 6


def test_resize_is_of_the_base_size():
    image, labels = picture_and_labels(40, 60)
    seen, seen_labels = Augment(crop=(400, 400), base=(20, 80), **{**PLAIN, "scale": (1.5, 1.5)})(image, labels, 0)
    assert seen.size == (120, 30)
    assert seen_labels.shape == (30, 120)
    assert seen_labels.dtype == torch.int64


def test_flip_exchanges_left_and_right():
    image, labels = picture_and_labels()
    seen, seen_labels = Augment(crop=(40, 60), **{**PLAIN, "flip": 1.0})(image, labels, 0)
    assert torch.equal(seen_labels, labels.flip(-1))
    assert np.array_equal(np.array(seen), np.array(image)[:, ::-1])


def test_crops_of_one_class_are_drawn_again():
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:, 50:] = 1
    labels[:10] = 255
    image = Image.new("RGB", (100, 100))
    augment = Augment(crop=(40, 40), **{**PLAIN, "cat_max_ratio": 0.75})
    shares = []
    for seed in range(40):
        _, seen = augment(image, labels, seed)
        counted = seen[seen != 255]
        shares.append(float(torch.bincount(counted).max() / counted.numel()))
    assert sum(share < 0.75 for share in shares) >= 36  # a window drawn once passes in a third of the cases
    free = [Augment(crop=(40, 40), **PLAIN)(image, labels, seed)[1] for seed in range(40)]
    assert sum(len(seen[seen != 255].unique()) == 1 for seen in free) >= 5


def test_colors_change_and_labels_do_not():
    image, labels = picture_and_labels()
    image = Image.fromarray(np.array(image) * 5 + 40)
    seen = [Augment(crop=(40, 60), **{**PLAIN, "photometric": True})(image, labels, seed) for seed in range(12)]
    assert all(torch.equal(each[1], labels) for each in seen)
    assert sum(not np.array_equal(each[0], image) for each in seen) >= 6


def test_pad_fills_with_zero_under_ignored_labels():
    image, labels = pad(torch.ones(3, 2, 3), torch.ones(2, 3, dtype=torch.int64), (4, 3), 11)
    assert image.shape == (3, 4, 3)
    assert float(image[:, 2:].abs().sum()) == 0
    assert labels.tolist() == [[1] * 3, [1] * 3, [11] * 3, [11] * 3]


def make_pairs(root, seed=0):
    dataset = open_data(root, split="train", labels=True)

    def preprocess(image, size):
        assert size == (image.height, image.width)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    return TrainingPairs(
        pairs=dataset.with_masks(),
        rule=LabelRule(),
        num_classes=3,
        augment=Augment(crop=(32, 32)),
        preprocess=preprocess,
        seed=seed,
        padded=(32, 32),
    )


def test_pairs_are_those_of_their_epoch(tmp_path):
    pairs = make_pairs(write_scenes(tmp_path, 3, counts={"train": 4}))
    image, labels = pairs[2]
    assert image.shape == (3, 32, 32)
    assert labels.shape == (32, 32)
    assert torch.equal(pairs[2][0], image)
    assert not torch.equal(pairs[2 + len(pairs)][0], image)  # the same pair in the next epoch
    batch = collate([pairs[0], pairs[1]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["labels"].shape == (2, 32, 32)


def test_a_bad_mask_comes_back_as_an_error_that_names_it(tmp_path):
    root = write_scenes(tmp_path, 3, counts={"train": 2})
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(root / "masks/train/001.png")
    pairs = make_pairs(root)
    found = collate([pairs[0], pairs[1]])["failure"]
    assert isinstance(found, DataError)
    assert "001.png" in str(found)
    assert "label 7" in str(found)


def test_order_is_a_permutation_that_epoch_and_seed_decide():
    order = EpochOrder(10, seed=1)
    first = list(order)
    assert sorted(first) == list(range(10))
    assert list(order) == first
    order.set_epoch(3)
    third = list(order)
    assert sorted(third) == list(range(30, 40))
    assert [each - 30 for each in third] != first
    assert list(EpochOrder(10, seed=2)) != first


@pytest.mark.parametrize("photometric", [True, False])
def test_pickles_for_workers(photometric):
    import pickle

    image, labels = picture_and_labels()
    augment = Augment(crop=(24, 30), photometric=photometric)
    again = pickle.loads(pickle.dumps(augment))
    assert np.array_equal(augment(image, labels, 5)[0], again(image, labels, 5)[0])
