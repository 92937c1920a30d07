"""transformers directories: loaded strictly, drawn under a seed, written back as they came."""

import contextlib
import json
import shutil
import sys
from dataclasses import replace

import architectures
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from equalize.checkpoint.files.weights import state_on_disk
from equalize.checkpoint.loading import load, reload
from equalize.errors import CheckpointError, NumericsError
from tests.checkpoint.test_state_dicts import refusal, same_bits
from tests.support.tolerance import assert_same_outputs


def edited(source, target, **changes):
    """A copy of a directory with other fields in its config.json; None removes a field."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_directory_loads_as_from_pretrained_does(segformer_dir):
    from transformers import SegformerForSemanticSegmentation

    checkpoint = load(segformer_dir)
    stock = SegformerForSemanticSegmentation.from_pretrained(segformer_dir)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert_same_outputs(checkpoint.logits(x), stock(x).logits)
        assert_same_outputs(reload(segformer_dir)(x).logits, stock(x).logits)
    assert (checkpoint.family, checkpoint.architecture) == ("transformers", "SegformerForSemanticSegmentation")
    assert checkpoint.classes == tuple(f"LABEL_{i}" for i in range(5))
    assert not checkpoint.model.training
    assert checkpoint.newly_initialized == ()
    assert len(checkpoint.sha256) == 64
    assert checkpoint.preprocess.size == (48, 64)
    assert checkpoint.preprocess.reduce_labels is False
    assert "preprocessor_config.json" in str(checkpoint.preprocess)


def test_a_processor_that_says_nothing_of_labels(segformer_dir, tmp_path):
    """The library's default is no statement about the training; what was trained is."""
    shutil.copytree(segformer_dir, tmp_path / "before")
    file = tmp_path / "before/preprocessor_config.json"
    content = json.loads(file.read_text())
    del content["do_reduce_labels"]
    file.write_text(json.dumps(content))
    checkpoint = load(tmp_path / "before")
    assert checkpoint.preprocess.reduce_labels is None
    for reduced, written in ((True, True), (False, None)):
        checkpoint.with_reduced_labels(reduced).save(tmp_path / str(reduced))
        assert load(tmp_path / str(reduced)).preprocess == replace(checkpoint.preprocess, reduce_labels=written)


@pytest.mark.parametrize(("ignored", "is_class"), [(0, True), (255, False)])
def test_a_class_that_training_ignored_is_named(segformer_dir, tmp_path, ignored, is_class):
    source = edited(segformer_dir, tmp_path / "in", semantic_loss_ignore_index=ignored)
    for weights in (True, False):
        said = "its training ignored label 0, by its configuration: --ignore-index 0 does so too"
        assert (said in load(source, weights=weights).notes) == is_class


def test_structure_needs_only_the_config(segformer_dir, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(segformer_dir / name, tmp_path)
    checkpoint = load(tmp_path, weights=False)
    assert {parameter.device.type for parameter in checkpoint.model.parameters()} == {"meta"}
    assert "no weights" in refusal(tmp_path)


def test_unchanged_comes_out_byte_for_byte_with_side_files(segformer_dir, tmp_path):
    source = edited(segformer_dir, tmp_path / "in")
    (source / "notes").mkdir()
    (source / "notes" / "training.txt").write_text("eight epochs")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("x")
    load(source).save(tmp_path / "out")
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    assert names.pop(0) == ".git/HEAD"
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_only_what_changed_changes_on_disk(upernet_dir, tmp_path):
    checkpoint = load(upernet_dir)
    key = "decode_head.bottleneck.conv.weight"
    with torch.no_grad():
        checkpoint.model.get_parameter(key).mul_(2)
    checkpoint.save(tmp_path / "out")
    before, after = state_on_disk(upernet_dir), state_on_disk(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [checkpoint.disk_keys()[key]]
    shards = sorted(path.name for path in upernet_dir.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    untouched = [n for n in shards if (upernet_dir / n).read_bytes() == (tmp_path / "out" / n).read_bytes()]
    assert len(untouched) == len(shards) - 1
    assert same_bits(reload(tmp_path / "out").state_dict(), checkpoint.model.state_dict())


def test_every_tensor_survives_a_change(segformer_dir, tmp_path):
    """Also those that transformers renames between disk and model."""
    checkpoint = load(segformer_dir)
    with torch.no_grad():
        for tensor in checkpoint.model.state_dict().values():
            tensor.add_(1)
    checkpoint.save(tmp_path / "out")
    assert same_bits(reload(tmp_path / "out").state_dict(), checkpoint.model.state_dict())
    assert state_on_disk(tmp_path / "out").keys() == state_on_disk(segformer_dir).keys()
    assert checkpoint.disk_keys().keys() == checkpoint.model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32_and_written_as_they_were(segformer_dir, tmp_path, dtype):
    source = edited(segformer_dir, tmp_path / "in")
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt", "mine": "kept"})
    checkpoint = load(source)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    with torch.no_grad():
        checkpoint.model.decode_head.linear_fuse.weight.mul_(2)
    checkpoint.save(tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    state["decode_head.linear_fuse.weight"] *= 2
    assert same_bits(after, state)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "mine": "kept"}


def test_values_that_do_not_fit_the_type_on_disk(segformer_dir, tmp_path):
    source = edited(segformer_dir, tmp_path / "in")
    state = {k: t.half() if t.is_floating_point() else t for k, t in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load(source)
    with torch.no_grad():
        checkpoint.model.decode_head.linear_fuse.weight.mul_(1e9)
    with pytest.raises(NumericsError, match="linear_fuse"):
        checkpoint.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encoder_without_decoder_needs_init_missing(segformer_encoder_dir):
    sentence = refusal(segformer_encoder_dir)
    assert "16 missing" in sentence
    assert "decode_head" in sentence
    assert "SegformerForImageClassification" in sentence
    assert "--init-missing" in sentence
    meta = load(segformer_encoder_dir, weights=False)
    assert meta.architecture == "SegformerForSemanticSegmentation"


def test_a_drawn_decoder_is_written_so_that_from_pretrained_finds_all(segformer_encoder_dir, tmp_path):
    from transformers import SegformerForSemanticSegmentation

    state = torch.random.get_rng_state()
    checkpoint = load(segformer_encoder_dir, init_missing=True, num_classes=3, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(checkpoint.newly_initialized) == 16
    assert all(key.startswith("decode_head.") for key in checkpoint.newly_initialized)
    assert checkpoint.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    checkpoint.save(tmp_path / "out")
    model, info = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert same_bits(model.state_dict(), checkpoint.model.state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["SegformerForSemanticSegmentation"]
    assert len(config["id2label"]) == 3
    before, after = state_on_disk(segformer_encoder_dir), state_on_disk(tmp_path / "out")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert "decode_head.linear_c.0.proj.weight" in after  # the name that every version of transformers reads


def test_the_seed_decides_the_draw(segformer_encoder_dir):
    def fuse(seed):
        return load(segformer_encoder_dir, init_missing=True, seed=seed).model.decode_head.linear_fuse.weight

    assert torch.equal(fuse(1), fuse(1))
    assert not torch.equal(fuse(1), fuse(2))


def test_other_classes_need_init_missing_and_draw_only_the_classifier(segformer_dir, upernet_dir, tmp_path):
    assert "--init-missing" in refusal(segformer_dir, num_classes=3)
    checkpoint = load(segformer_dir, num_classes=3, init_missing=True)
    assert checkpoint.newly_initialized == ("decode_head.classifier.weight", "decode_head.classifier.bias")
    checkpoint.save(tmp_path / "out")
    assert load(tmp_path / "out").logits(torch.ones(1, 3, 32, 32)).shape[1] == 3
    drawn = load(upernet_dir, num_classes=3, init_missing=True).newly_initialized
    assert {key.rpartition(".")[0] for key in drawn} == {"decode_head.classifier", "auxiliary_head.classifier"}


def test_init_missing_stays_strict_about_shapes(segformer_dir, tmp_path):
    source = edited(segformer_dir, tmp_path / "in", decoder_hidden_size=12)
    sentence = refusal(source, init_missing=True)
    assert "of another shape" in sentence
    assert "decode_head" in sentence


def test_extra_keys_are_kept(segformer_dir, tmp_path):
    source = edited(segformer_dir, tmp_path / "in")
    extra = {"ema.decay": torch.ones(3)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load(source)
    with torch.no_grad():
        checkpoint.model.decode_head.linear_fuse.weight.mul_(2)
    checkpoint.save(tmp_path / "out")
    assert torch.equal(state_on_disk(tmp_path / "out")["ema.decay"], torch.ones(3))


def test_stale_copies_in_other_formats_are_left_behind(segformer_dir, tmp_path):
    source = edited(segformer_dir, tmp_path / "in")
    torch.save({}, source / "pytorch_model.bin")
    (source / "tf_model.h5").write_bytes(b"x")
    (source / "onnx").mkdir()
    (source / "onnx/model_quantized.onnx").write_bytes(b"x")
    torch.save({}, source / "vocabulary.bin")
    load(source).save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors", "vocabulary.bin"}


@pytest.mark.parametrize("place", ["top", "nested"])
def test_remote_code_is_refused(upernet_dir, tmp_path, place):
    request = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    changes = {"auto_map": request}
    if place == "nested":
        backbone = json.loads((upernet_dir / "config.json").read_text())["backbone_config"]
        changes = {"backbone_config": backbone | changes}
    source = edited(upernet_dir, tmp_path / "in", **changes)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert "auto_map" in refusal(source)
    assert "auto_map" in refusal(source, weights=False)
    assert not (tmp_path / "canary").exists()


def test_unknown_model_type(segformer_dir, tmp_path):
    sentence = refusal(edited(segformer_dir, tmp_path / "in", model_type="segformer3000"))
    assert "config.json: is not a valid config" in sentence
    assert "`segformer3000`" in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_sizes": "many"},
        {"depths": [1, 1, 1, 1, 1, 1]},
        {"num_attention_heads": [3, 3, 3, 3]},
        {"architectures": "Segformer"},
        {"architectures": 5},
        {"id2label": {"a": "b"}},
        {"id2label": []},
        {"model_type": None},
    ],
)
def test_broken_configs_are_one_sentence(segformer_dir, tmp_path, changes):
    source = edited(segformer_dir, tmp_path / "in", **changes)
    for weights in (True, False):
        with contextlib.suppress(CheckpointError):
            load(source, weights=weights)


def test_config_that_is_not_json(segformer_dir, tmp_path):
    source = edited(segformer_dir, tmp_path / "in")
    (source / "config.json").write_text('{"model_type": ')
    assert "not valid JSON" in refusal(source)


def test_an_encoder_that_has_no_segmentation_network(tmp_path):
    from transformers import ResNetConfig

    ResNetConfig(architectures=["ResNetForImageClassification"]).save_pretrained(tmp_path)
    sentence = refusal(tmp_path, weights=False)
    assert "ResNetForImageClassification" in sentence
    assert "UperNet" in sentence


DINOV2 = """
from torch import nn
from transformers import Dinov2Model, Dinov2PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

class Dinov2ForSemanticSegmentation(Dinov2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.dinov2 = Dinov2Model(config)
        self.classifier = nn.Conv2d(config.hidden_size, config.num_labels, 1)
        self.post_init()

    def forward(self, pixel_values):
        tokens = self.dinov2(pixel_values).last_hidden_state[:, 1:]
        side = pixel_values.shape[-1] // self.config.patch_size
        features = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
        return SemanticSegmenterOutput(logits=self.classifier(features))
"""


def test_a_class_of_a_tutorial_is_named_as_such_and_built_by_its_own_code(tmp_path):
    """By the loader of transformers, which renames keys here too."""
    from transformers import Dinov2Config

    from equalize.checkpoint.user_code import load_factory

    (tmp_path / "tutorial.py").write_text(DINOV2)
    arch = f"{tmp_path / 'tutorial.py'}:Dinov2ForSemanticSegmentation"
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config.num_labels = 3
    stock = load_factory(arch)(config).eval()
    stock.save_pretrained(tmp_path / "in")
    sentence = refusal(tmp_path / "in")
    assert "is a Dinov2ForSemanticSegmentation, a class of its author's code and none of transformers" in sentence
    assert sentence.endswith("name it: --arch file.py:Dinov2ForSemanticSegmentation")
    x = torch.randn(1, 3, 28, 28)
    checkpoint = load(tmp_path / "in", arch).with_output(x)
    with torch.no_grad():
        assert_same_outputs(checkpoint.logits(x), stock(x).logits)
        checkpoint.model.classifier.bias.add_(1)
    checkpoint.save(tmp_path / "out")
    assert state_on_disk(tmp_path / "out").keys() == state_on_disk(tmp_path / "in").keys() != stock.state_dict().keys()
    for again in (reload(tmp_path / "out", arch), load(tmp_path / "out", arch).model):
        assert same_bits(again.state_dict(), checkpoint.model.state_dict())
    own = vars(sys.modules[type(checkpoint.model).__module__])
    exec(checkpoint.adapter.loading_code(tmp_path / "out"), own)
    assert same_bits(own["model"].state_dict(), checkpoint.model.state_dict())


def test_a_lone_state_dict_with_the_config_of_a_directory(upernet_dir, tmp_path):
    state = {f"module.{key}": tensor for key, tensor in state_on_disk(upernet_dir).items()}
    torch.save({"state_dict": state, "epoch": 4}, tmp_path / "run.pth")
    assert "--arch" in refusal(tmp_path / "run.pth")
    checkpoint = load(tmp_path / "run.pth", arch=f"transformers:{upernet_dir}")
    with torch.no_grad():
        checkpoint.model.decode_head.bottleneck.conv.weight.mul_(2)
    checkpoint.save(tmp_path / "out")
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert written["epoch"] == 4
    assert written["state_dict"].keys() == state.keys()
    for again in (reload(tmp_path / "out"), load(tmp_path / "out").model):
        assert same_bits(again.state_dict(), checkpoint.model.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [lambda key: f"model._orig_mod.{key}", lambda key: key.replace("encoder.", "encoder.module.")],
    ids=["in front", "inside"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_directory_whose_keys_hold_names_of_wrappers(segformer_dir, tmp_path, wrap, sharded):
    """What is written has the keys that the library's own loader takes."""
    from transformers import SegformerForSemanticSegmentation

    source, out = edited(segformer_dir, tmp_path / "in"), tmp_path / "out"
    state = {wrap(key): tensor for key, tensor in state_on_disk(segformer_dir).items()}
    assert state.keys() != state_on_disk(segformer_dir).keys()
    (source / "model.safetensors").unlink()
    if sharded:
        names = dict.fromkeys(list(state)[:9], "model-1.safetensors")
        names = {key: names.get(key, "model-2.safetensors") for key in state}
        for file in set(names.values()):
            save_file({key: state[key] for key in state if names[key] == file}, source / file)
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        save_file(state, source / "model.safetensors")
    checkpoint = load(source)
    assert "in: keys are written without the names of wrappers" in checkpoint.notes[0]
    with torch.no_grad():
        checkpoint.model.decode_head.classifier.bias.add_(1)
    checkpoint.save(out)
    assert state_on_disk(out).keys() == state_on_disk(segformer_dir).keys()
    stock, info = SegformerForSemanticSegmentation.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert same_bits(stock.state_dict(), checkpoint.model.state_dict())
    original = load(segformer_dir).model.state_dict()
    assert [key for key, tensor in stock.state_dict().items() if not torch.equal(tensor, original[key])] == [
        "decode_head.classifier.bias"
    ]


@pytest.mark.parametrize("name", ["Beit", "DPT", "MobileNetV2", "MobileViT", "Mask2Former"])
def test_every_renamed_tensor_finds_its_place_on_disk(tmp_path, name):
    name = f"{name}For{'Universal' if name == 'Mask2Former' else 'Semantic'}Segmentation"
    model = architectures.transformers(name, *architectures.TRANSFORMERS[name])
    logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "in")
    checkpoint = load(tmp_path / "in")
    with torch.no_grad():
        for tensor in checkpoint.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(2).add_(0.5)
    checkpoint.save(tmp_path / "out")
    assert same_bits(reload(tmp_path / "out").state_dict(), checkpoint.model.state_dict())
    assert state_on_disk(tmp_path / "out").keys() == state_on_disk(tmp_path / "in").keys()


def test_a_variant_stays_one(segformer_dir, tmp_path):
    from transformers import SegformerForSemanticSegmentation

    source = edited(segformer_dir, tmp_path / "in")
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    checkpoint = load(source)
    with torch.no_grad():
        checkpoint.model.decode_head.classifier.bias.add_(1)
    checkpoint.save(tmp_path / "out")
    stock = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", variant="fp16")
    for model in (stock, reload(tmp_path / "out")):
        assert same_bits(model.state_dict(), checkpoint.model.state_dict())


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("MaskFormerForInstanceSegmentation", "MaskFormerImageProcessor"),
        ("Mask2FormerForUniversalSegmentation", "Mask2FormerImageProcessor"),
        ("EomtForUniversalSegmentation", "EomtImageProcessor"),
        ("EomtDinov3ForUniversalSegmentation", "EomtImageProcessor"),
    ],
)
def test_classified_masks_are_scored_as_the_image_processor_does(name, processor, tmp_path):
    torch.manual_seed(0)
    height, width = (64, 64) if "Eomt" in name else (32, 96)
    architectures.transformers(name, *architectures.TRANSFORMERS[name]).save_pretrained(tmp_path)
    checkpoint, x = load(tmp_path), torch.randn(2, 3, height, width)
    stock = getattr(transformers, processor)(size={"shortest_edge": height, "longest_edge": width})
    with torch.no_grad():
        ours, theirs = checkpoint.logits(x), checkpoint.model(x)
    sizes = [(90, 170), (40, 30)]
    found = stock.post_process_semantic_segmentation(theirs, target_sizes=sizes, return_segmentation_scores=True)
    for scores, size, expected in zip(ours, sizes, found, strict=True):
        scores = torch.nn.functional.interpolate(scores[None], size=size, mode="bilinear")[0]
        assert_same_outputs(scores, expected.segmentation_scores)
