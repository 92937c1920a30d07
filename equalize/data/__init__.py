"""A folder, or a table of Hugging Face `datasets` -> images, and masks where there are any.

    folders.py      what is in a folder: files, subfolders, what is passed over
    layouts.py      how well-known data sets lay out images, masks and splits
    hf_datasets.py  tables from files and from the Hub
    table_columns.py  which columns of a table hold pictures and labels, which splits it has
    dataset.py      `open_data`: the match, the split, the pairs
    images.py       one file, or cell of a table -> one RGB picture
    loader.py       pictures -> batches of tensors, with a share of bad files allowed
    masks.py        one file or cell -> one class index a pixel
    label_check.py  a sample of the labels, checked before anything is trained or scored
    classes.py      names of classes
    augment.py, pairs.py  pictures and labels for training

It knows nothing of models but the `preprocess` it is handed.
"""

from equalize.data.classes import class_names, read_class_names
from equalize.data.dataset import DataSet, open_data, require_masks, sample
from equalize.data.images import Cell, Item, read_image
from equalize.data.label_check import Preflight, ReduceLabels, preflight
from equalize.data.loader import Batch, Batches, Skipped, batches
from equalize.data.masks import LabelRule, check_labels, read_mask

__all__ = [
    "Batch",
    "Batches",
    "Cell",
    "DataSet",
    "Item",
    "LabelRule",
    "Preflight",
    "ReduceLabels",
    "Skipped",
    "batches",
    "check_labels",
    "class_names",
    "open_data",
    "preflight",
    "read_class_names",
    "read_image",
    "read_mask",
    "require_masks",
    "sample",
]
