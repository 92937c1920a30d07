"""A folder, or a table of Hugging Face `datasets` -> images, and masks where there are any.

    dataset.py      `open_data`: the match, the split, the pairs, of files (folders, layouts, naming, pairing) or of a
                    table (hf_datasets, table_columns)
    images.py       one file, or cell of a table -> one RGB picture (bands: for other numbers of channels; depth)
    masks.py        one file or cell -> one class index a pixel (colors, color_tables, classes: what is known of them)
    label_check.py  a sample of the labels, checked before anything is trained or scored
    loader.py       pictures -> batches of tensors, with a share of bad files allowed
    pairs.py        pictures and labels for training (augment)

It depends on models through the `preprocess` that callers pass alone.
"""

from equalize.data.bands import Picture, picture_size, read_picture
from equalize.data.classes import class_names, read_class_names
from equalize.data.colors import ColorMap, colors_of, read_colors
from equalize.data.dataset import DataSet, open_data, require_masks, sample
from equalize.data.images import Item, read_image
from equalize.data.label_check import ReduceLabels, preflight, stored_rule
from equalize.data.loader import Batches
from equalize.data.masks import LabelRule, check_labels, demand_same_size, read_mask

__all__ = [
    "Batches",
    "ColorMap",
    "DataSet",
    "Item",
    "LabelRule",
    "Picture",
    "ReduceLabels",
    "check_labels",
    "class_names",
    "colors_of",
    "demand_same_size",
    "open_data",
    "picture_size",
    "preflight",
    "read_class_names",
    "read_colors",
    "read_image",
    "read_mask",
    "read_picture",
    "require_masks",
    "sample",
    "stored_rule",
]
