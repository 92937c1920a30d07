"""The card says what the files say, and nothing else."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from equalize.commands.push.card import model_card
from equalize.errors import CheckpointError, InputError
from tests.support.planned import planned

SCORE = {
    "mIoU": 41.25,
    "mAcc": 50.5,
    "aAcc": 80.125,
    "images": 20,
    "classes": [
        {"id": 0, "name": "road|way", "IoU": 80.0, "Acc": 90.0, "pixels": 5},
        {"id": 1, "name": "pole", "IoU": None, "Acc": None, "pixels": 0},
    ],
}

BASE_CARD = """---
license: mit
tags: [vision]
model-index:
- name: base
  results:
  - task: {type: image-segmentation}
    dataset: {type: ade, name: ADE}
    metrics: [{type: mean_iou, value: 99.0}]
---
# Base

Trained long.
"""


@pytest.fixture
def out(segformer_dir, tmp_path):
    return planned(segformer_dir, tmp_path / "out")


def card_of(out, repository="acme/streets", revision=None) -> ModelCard:
    return ModelCard(model_card(out, repository, revision))


def write_score(out, **score) -> None:
    (out / "metrics.jsonl").write_text(json.dumps({"step": 3, "epoch": 1.0, **SCORE, **score}))


def metadata(out) -> dict:
    return yaml.safe_load(str(card_of(out)).split("---\n")[1])


def test_metadata_name_the_base_the_library_and_no_score_that_nobody_measured(out):
    assert metadata(out) == {
        "base_model": "acme/segformer-tiny",
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["equalize", "scale-equalization", "semantic-segmentation"],
    }


def test_the_text_holds_what_was_measured(out):
    text = card_of(out).text
    assert "# streets" in text
    assert "[acme/segformer-tiny](https://huggingface.co/acme/segformer-tiny), revision `abc123" in text
    assert "12 images of `streets`, split `train`" in text
    assert "| 0-7 | `head.proj.0` | bilinear x2 | 0.25 | 0.5 | ± 12.5 % |" in text
    assert "| 8-15 | `head.proj.8` | none | 0.25 | 2 | ± 12.5 % |" in text
    assert "4 times the smallest" in text
    assert "`rescale`: fusion weights times tau/sigma of each branch: they act on branches of one scale; tau 1." in text
    assert "Strategy: `auto`, to the root mean square of each layer's sigmas" in text
    assert "2.5e-06" in text
    assert "- `encoder.fuse`: already \\| normalized" in text
    assert "with scale equalization embedded in its fusion layers, by `equalize` 0.1.0. Paper: [Scale" in text


def test_paths_of_the_users_machine_stay_there(segformer_dir, tmp_path):
    out = planned(segformer_dir, tmp_path / "out", source="/home/alice/models/tiny", revision=None)
    card = str(card_of(out))
    assert "alice" not in card
    assert "secret-project" not in card
    assert "base_model" not in card
    assert "Base model: `tiny`" in card
    own = planned(segformer_dir, tmp_path / "own", source="torchvision:lraspp_mobilenet_v3_large", revision=None)
    assert "Base model: `torchvision:lraspp_mobilenet_v3_large`" in str(card_of(own))


def test_a_network_of_the_users_own_code(out):
    (out / "architecture.json").write_text('{"arch": "/home/alice/net.py:make"}')
    card = str(card_of(out))
    assert "A semantic segmentation `make` with scale equalization embedded in its fusion layers, by" in card
    assert "built by its author's own code" in card
    assert "```python" not in card
    assert "alice" not in card


def test_the_code_for_mmsegmentation(out):
    (out / "architecture.json").write_text('{"arch": "mmseg", "arch_args": {}}')
    (out / "config.py").write_text('model = dict(type="EncoderDecoder", decode_head=dict(type="UPerHead"))')
    text = card_of(out, revision="dev").text
    assert 'path = snapshot_download("acme/streets", revision="dev")\nmodel = init_model(' in text


def test_an_evaluation_becomes_a_model_index(out):
    write_score(out, data="camvid", split="val")
    (entry,) = metadata(out)["model-index"]
    assert entry["name"] == "streets"
    (result,) = entry["results"]
    assert result["task"]["type"] == "image-segmentation"
    assert result["dataset"] == {"name": "camvid", "type": "camvid", "split": "val"}
    assert [(each["type"], each["name"], each["value"]) for each in result["metrics"]] == [
        ("mean_iou", "mIoU", 41.25),
        ("mean_accuracy", "mAcc", 50.5),
        ("accuracy", "aAcc", 80.125),
    ]
    text = card_of(out).text
    assert "mIoU 41.25 %, mAcc 50.50 %, aAcc 80.12 % on `camvid`, split `val`, 20 images, at step 3." in text
    assert "| road\\|way | 80.00 | 90.00 |" in text
    assert "| pole | - | - |" in text


LINES = [
    {"step": 5, "epoch": 0.5, "loss": 2.0, "lr": 1e-3},
    {"step": 5, "epoch": 0.5, "mIoU": 12.0, "mAcc": 22.0, "aAcc": None},
    {"step": 10, "epoch": 1.0, "loss": 1.5, "lr": 1e-4},
    {"step": 10, "epoch": 1.0, "mIoU": 10.0, "mAcc": 20.0, "aAcc": 30.0},
]


def test_of_a_training_the_score_of_the_best_model_counts_as_that_is_what_it_leaves(out):
    text = "\n".join(map(json.dumps, LINES)) + '\n{"step": 11, "mIo'  # cut short by a crash
    (out / "metrics.jsonl").write_text(text)
    card = card_of(out)
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [
        ("mIoU", 12.0),
        ("mAcc", 22.0),
    ]
    assert card.data.eval_results[0].dataset_name == "unknown"
    assert "According to `metrics.jsonl`: 10 steps, 1 epochs, last loss 1.5.\n" in card.text
    assert ", at step 5." in card.text


def test_the_plan_knows_best_which_weights_a_training_kept(segformer_dir, tmp_path):
    trained = {"step": 8, "train_as": "folded", "score": {**SCORE, "data": "streets", "split": "valid"}}
    out = planned(segformer_dir, tmp_path / "out", finetuned=trained)
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    card = card_of(out)
    first = card.data.eval_results[0]
    assert (first.metric_value, first.dataset_name, first.dataset_split) == (41.25, "streets", "valid")
    assert "The weights are those after step 8.\n" in card.text
    assert "In the fusion layers the optimizer trained the weights as they are stored.\n" in card.text


def test_the_commands_and_settings_that_made_it(segformer_dir, tmp_path):
    out = planned(segformer_dir, tmp_path / "out", command="equalize calibrate tiny --data streets --out cal")
    assert "```sh\nequalize calibrate tiny --data streets --out cal\n```" in card_of(out).text
    (out / "last").mkdir()
    (out / "last/commands.txt").write_text("equalize finetune cal\nequalize finetune cal --resume\n")
    (out / "finetune.yaml").write_text("lr: 0.1\nclass_names: /home/alice/classes.txt\n")
    text = card_of(out).text
    assert "--out cal\nequalize finetune cal\nequalize finetune cal --resume\n```" in text
    assert "```yaml\nlr: 0.1\nclass_names: classes.txt\n```" in text


def test_numbers_that_are_none_are_left_out(out):
    write_score(out, mIoU=None, mAcc=None, aAcc=None)
    assert "model-index" not in metadata(out)
    assert "## Evaluation" not in card_of(out).text


def test_a_card_of_the_users_is_kept(out):
    theirs = "---\nlicense: apache-2.0\nlanguage: en\ntags: [mine]\npipeline_tag: depth-estimation\n---\n"
    theirs += "# My model\n\nBuy *milk*.\n"
    (out / "README.md").write_text(theirs)
    card = card_of(out)
    assert card.text.startswith("# My model\n\nBuy *milk*.\n")
    assert "## Scale equalization" in card.text
    content = metadata(out)
    assert content["license"] == "apache-2.0"
    assert content["language"] == "en"
    assert content["pipeline_tag"] == "depth-estimation"
    assert content["tags"] == ["mine", "equalize", "scale-equalization", "semantic-segmentation"]
    assert content["base_model"] == "acme/segformer-tiny"


def test_a_second_push_renews_our_part_and_leaves_theirs(out):
    (out / "README.md").write_text("Before.\n")
    once = str(card_of(out))
    (out / "README.md").write_text(once + "\nAfter.\n")
    write_score(out)
    twice = card_of(out)
    assert twice.text.count("## Scale equalization") == 1
    assert "mIoU 41.25" in twice.text
    assert twice.text.lstrip().startswith("Before.")
    assert twice.text.rstrip().endswith("After.")
    (out / "README.md").write_text(str(twice))
    assert str(card_of(out)) == str(twice)


def test_a_new_score_replaces_the_old_one_of_the_same_measurement(out):
    write_score(out, data="camvid")
    (out / "README.md").write_text(str(card_of(out)))
    write_score(out, data="camvid", mIoU=55.5)
    values = {result.metric_name: result.metric_value for result in card_of(out).data.eval_results}
    assert values == {"mIoU": 55.5, "mAcc": 50.5, "aAcc": 80.125}
    write_score(out, data="other")
    assert len(card_of(out).data.eval_results) == 6


def test_a_training_without_equalization_names_its_base_and_license(segformer_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(segformer_dir, out)
    assert "base_model" not in metadata(out)
    (out / "last").mkdir()
    (out / "last/run.json").write_text(json.dumps({"source": "acme/street", "revision": "0" * 40, "sha256": "1" * 64}))
    assert metadata(out)["base_model"] == "acme/street"
    (out / "last/run.json").write_text(json.dumps({"source": "/home/me/street", "revision": None}))
    assert "base_model" not in metadata(out)
    assert "- Base model: `street`" in str(card_of(out))
    assert "/home/me" not in str(card_of(out))


def test_the_bases_card_gives_its_license_and_not_its_scores(segformer_dir, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(BASE_CARD)
    out = planned(segformer_dir, tmp_path / "out", source=str(base), revision=None)
    (out / "README.md").write_text(BASE_CARD)  # copied along, as side files are
    content = metadata(out)
    assert content["license"] == "mit"
    assert "model-index" not in content
    assert "vision" not in content["tags"]
    text = card_of(out).text
    assert "The base model's card states: mit." in text
    assert text.index("## How to load it") < text.index("<summary>Card of the base model</summary>")
    assert "Trained long." in text


def test_a_model_without_a_plan_has_a_card_too(segformer_dir):
    card = card_of(segformer_dir)
    assert "equalization embedded" not in card.text
    assert "SegformerForSemanticSegmentation.from_pretrained" in card.text


def test_metadata_that_are_no_yaml_are_refused(out):
    (out / "README.md").write_text("---\nlicense: [mit\n---\nHello\n")
    with pytest.raises(InputError, match=r"README.md: has metadata that cannot be read .*; mend or remove it"):
        card_of(out)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({}, "holds no weights"),
        ({"config.json": '{"model_type": "segformer"}'}, "holds no weights"),
        ({"config.json": '{"model_type": "segformer"}', "model.safetensors": "<html>"}, "is an HTML page"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, content, error):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=error):
        card_of(tmp_path)


def test_an_unknown_library_and_what_is_no_plan_are_refused(out):
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no record of an architecture"):
        card_of(out)
    (out / "equalize.json").write_text('{"schema": 1}')
    with pytest.raises(InputError, match="is no plan"):
        card_of(out)


def test_what_is_no_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        card_of(tmp_path / "nothing")
    (tmp_path / "model.pth").write_text("x")
    with pytest.raises(InputError, match="no such directory"):
        card_of(tmp_path / "model.pth")
