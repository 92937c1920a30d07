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
