"""`seeded`: random numbers of the CPU from a seed, in a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator inside the block and restores its state afterwards.

    `torch.manual_seed` would reseed the accelerators as well, and nothing would put those back.
    """
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(before)
