"""A folder on disk -> images, and masks where there are any.

    folders.py    what is in a folder: files, subfolders, what is passed over
    layouts.py    how well-known data sets lay out images, masks and splits
    dataset.py    `open_data`: the match, the split, the pairs
    images.py     one file -> one RGB picture
    batches.py    pictures -> batches of tensors, with workers and a share of bad files allowed

A package of floor 1: it knows nothing of models but the `preprocess` it is handed.
"""

from .batches import Batch, Batches, Preprocess, Skipped, batches
from .dataset import DataSet, open_data, sample
from .images import read_image

__all__ = [
    "Batch",
    "Batches",
    "DataSet",
    "Preprocess",
    "Skipped",
    "batches",
    "open_data",
    "read_image",
    "sample",
]
