"""How many bits the pictures of a data set use, and what their files say about it.

Sensors of 10 to 14 bits are stored in files of 16, most often without a word: their upper 8 bits are black. How many
are used is found once for a data set, over pictures of all its splits, so that all of them keep one scale.
"""

from collections.abc import Sequence

from equalize.data.images import Deep, Item, deep_values, is_deep, open_picture, opened

_BITS = (8, 10, 12, 14, 16)
_MAX_SAMPLE_VALUE = 281  # the tag of TIFF
_PHOTOMETRIC, _SEPARATED = 262, 5
_BANDS = 277
_LOOKED_AT = 32
_FOUR = 4


def with_depth(images: Sequence[Item], every: Sequence[Item]) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Images of a split, as `Deep` where those of `every` split have 16 bits, and what to say about their files."""
    notes: list[str] = []
    looked_at = [each for each in map(_look, _spread(every)) if each]
    if any(bands == _FOUR for bands, _, _ in looked_at):
        notes.append("TIFFs of four bands: networks of 3 channels get the first three as red, green and blue")
    declared = {most for _, _, most in looked_at if most}
    largest = max(declared or {most for _, most, _ in looked_at}, default=0)
    if not largest:
        return tuple(images), tuple(notes)
    bits = next((each for each in _BITS if largest < 2**each), _BITS[-1])
    why = "as the files declare" if declared else f"the largest value of {len(looked_at)} is {largest}"
    notes.append(f"pictures of 16 bits use {bits} ({why}); networks of 1 or 3 channels get the upper 8 of these")
    return tuple(item if isinstance(item, Deep) else Deep(item=item, bits=bits) for item in images), tuple(notes)


def _look(item: Item) -> tuple[int, int, int] | None:
    """The bands of a TIFF, the largest value and the largest declared of a picture of 16 bits; 0 where it is none.

    A portable gray map is already scaled to 16 bits by what it declares.
    """
    try:
        with opened(item) as image:
            tags = getattr(image, "tag_v2", {})
            bands = 0 if tags.get(_PHOTOMETRIC, _SEPARATED) == _SEPARATED else tags.get(_BANDS, 1)
            if not is_deep(image):
                return bands, 0, 0
        with open_picture(item) as image:
            values = deep_values(image, item)
        assert values is not None
        if image.format == "PPM":
            return bands, 1, 0xFFFF
        declared = tags.get(_MAX_SAMPLE_VALUE, 0)
        limit = int(max(declared) if isinstance(declared, tuple) else declared)
        return bands, max(1, int(values.max())), 0 if limit == 0xFFFF else limit
    except Exception:  # what cannot be read is named when it is
        return None


def _spread(items: Sequence[Item]) -> Sequence[Item]:
    step = max(1, len(items) / _LOOKED_AT)
    return [items[int(place * step)] for place in range(min(len(items), _LOOKED_AT))]
