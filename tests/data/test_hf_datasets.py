"""Data sets on the Hub, loaded by the real client: against a server on loopback, then without one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from equalize.data.dataset import open_data
from equalize.errors import DataError, ResourceError
from tests.data.test_table_columns import PICTURES, encoded, stored
from tests.support.loopback_data import COMMIT, DataHub

ASK = """
import sys
from equalize.data.classes import class_names
from equalize.data.dataset import open_data
from equalize.data.masks import LabelRule, read_mask
from equalize.errors import EqualizeError

for name in sys.argv[1:]:
    try:
        data = open_data(name, labels=True)
        labels = read_mask(data.masks[0], LabelRule()).tolist()
        print(data.describe(), class_names(data), labels, data.masks[0], data.name)
    except EqualizeError as error:
        print(error.exit_code, error)
"""


STREETS, SEASONS = "acme/streets", "acme/seasons"


def written(path: Path, label: int) -> bytes:
    """A parquet file of one pair, its mask of that label."""
    picture, mask = np.zeros((1, 2, 3), np.uint8), np.full((1, 2), label, np.uint8)
    rows = [{"image": stored(encoded(picture)), "label": stored(encoded(mask))}]
    Dataset.from_list(rows, features=PICTURES).to_parquet(path)
    return path.read_bytes()


@pytest.fixture
def server(tmp_path: Path):
    first, second = (written(tmp_path / "written.parquet", label) for label in (0, 1))
    streets = {
        "id2label.json": b'{"id2label": {"0": "road", "1": "sky"}}',
        "data/train-00000-of-00001.parquet": first,
        "data/validation-00000-of-00001.parquet": second,
    }
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("summer", "winter"))
    seasons = {
        "README.md": f"---\nconfigs:\n{listed}---\n".encode(),
        "summer.parquet": first,
        "winter.parquet": second,
    }
    with DataHub({STREETS: streets, SEASONS: seasons}) as running:
        yield running


def ask(home: Path, *names: str, **environment: str) -> list[str]:
    """What another process, with a cache of its own, finds out about data sets."""
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={**os.environ, **settings},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_data_set_on_the_hub_and_then_from_the_cache(server: DataHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    names = (STREETS, f"{STREETS}@{COMMIT}", f"{STREETS}@main", f"{STREETS}@nope", "acme/nothing")
    configurations = (SEASONS, f"{SEASONS}:config=winter", f"{SEASONS}:config=dusk")
    *found, nope, nothing, unclear, winter, dusk = ask(home, *names, *configurations, HF_ENDPOINT=server.url)
    facts = "table layout, columns image and label, split validation, 1 image, 1 pair ('road', 'sky') [[1, 1]]"
    assert found == [f"{name}: {facts} {name} validation[0].label {name}" for name in names[:3]]
    for line, name in ((nope, f"{STREETS}@nope"), (nothing, "acme/nothing")):
        assert line.startswith(f"3 {name}: no such path, and no such data set on the Hub, or none for you; check")
    assert unclear.startswith(f"2 {SEASONS}: cannot be read as a data set (Config name is missing.")
    assert unclear.endswith(f"; name one: {SEASONS}:config=NAME")
    assert winter.startswith(f"{SEASONS}:config=winter: table layout, columns image and label, split train, 1 image,")
    assert "[[1, 1]]" in winter
    assert dusk.startswith(f"2 {SEASONS}: cannot be read as a data set (BuilderConfig 'dusk' not found")

    # Where the Hub cannot be reached, it is not waited for: the cache answers at once.
    *cached, nope, nothing = ask(home, *names, HF_ENDPOINT="http://hub.invalid")
    assert cached == found
    assert nope.startswith(
        f"3 {STREETS}@nope: another revision is in the cache, not nope, and the Hub cannot be reached; check the"
    )
    assert nothing.startswith(
        "3 acme/nothing: no such path, no such data set in the cache, and the Hub cannot be reached"
    )


def test_what_could_be_a_name_on_the_hub() -> None:
    with pytest.raises(ResourceError, match=r"acme/streets@main: no such path, .* HF_HUB_OFFLINE is set; .* unset"):
        open_data("acme/streets@main")
    for path in ("./acme/streets", "acme", "acme/streets/images", "acme/streets.parquet"):
        with pytest.raises(DataError, match="no such folder"):
            open_data(path)
