import pytest

from equalize.commands.finetune.run_directory import RunDirectory
from tests.support.training import Killed


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "out", tmp_path / "model", resume=False, overwrite=False)
    run.prepare({"seed": 0}, "lr: 1\n")
    return run


def saving(text, *, files=("config.json", "model.bin"), killed_after=None):
    def save(directory):
        directory.mkdir()
        for number, name in enumerate(files):
            if number == killed_after:
                raise Killed
            (directory / name).write_text(text)

    return save


def model(run) -> dict[str, str]:
    return {path.name: path.read_text() for path in run.path.iterdir() if path.suffix in (".json", ".bin")}


def test_a_model_takes_the_place_of_another_with_all_its_files(run):
    run.put_model(saving("old"))
    state = run.last / "checkpoint-2"
    state.mkdir()
    (state / "trainer_state.json").write_text("{}")
    (run.path / "notes.txt").write_text("the user's")
    run.write_metrics([{"step": 1}])
    run.put_model(saving("new"))
    assert model(run) == {"config.json": "new", "model.bin": "new"}
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert run.newest_state() == state
    assert (run.path / "notes.txt").read_text() == "the user's"
    assert (run.path / "finetune.yaml").read_text() == "lr: 1\n"
    assert [path.name for path in run.path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["while saving", "before the exchange"])
def test_killed_while_a_model_is_replaced_leaves_the_old_one_whole(run, monkeypatch, moment):
    run.put_model(saving("old"))
    if moment == "before the exchange":
        monkeypatch.setattr("os.rename", lambda *args: (_ for _ in ()).throw(Killed))
        monkeypatch.setattr("equalize.checkpoint.files.atomic._exchange", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run.put_model(saving("new", killed_after=1 if moment == "while saving" else None))
    monkeypatch.undo()
    assert model(run) == {"config.json": "old", "model.bin": "old"}
    again = RunDirectory(run.path, run.path.parent / "model", resume=True, overwrite=False)
    again.prepare({"seed": 0}, "lr: 1\n")
    assert [path.name for path in run.path.parent.iterdir()] == ["out"]
    again.put_model(saving("newer"))
    assert model(again) == {"config.json": "newer", "model.bin": "newer"}


def test_disks_without_second_names_for_files_are_served(run, monkeypatch):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    run.put_model(saving("old"))
    run.put_model(saving("new"))
    assert (run.path / "finetune.yaml").read_text() == "lr: 1\n"
    assert model(run)["model.bin"] == "new"
