from pathlib import Path

import pytest

from tests.support.compared_nets import write_nets
from tests.support.scenes import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("five"), 5, counts={"train": 8, "val": 6})


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    return write_nets(tmp_path_factory.mktemp("nets"))
