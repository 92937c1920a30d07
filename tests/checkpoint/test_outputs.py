"""Which of a network's outputs is scored: by evidence, by --output, or refused; and probabilities among them."""

import collections
from dataclasses import replace

import pytest
import torch

from equalize.checkpoint.loading import load
from equalize.checkpoint.outputs import named_outputs, scored_output
from equalize.errors import SiteError
from tests.support.output_nets import save_net

SHAPE = (2, 3, 32, 32)


def logits(channels: int, size: int = 8) -> torch.Tensor:
    return torch.zeros(2, channels, size, size)


Pair = collections.namedtuple("Pair", "low high")
KNOWN = {  # what is returned -> what is scored
    "a tensor": (logits(5), ""),
    "torchvision": ({"out": logits(5), "aux": logits(5)}, "out"),
    "auxiliary first, by name": ({"aux1": logits(5), "deep": logits(5), "aux2": logits(5)}, "deep"),
    "with a loss and a label": ((logits(5), torch.tensor(1.0), torch.zeros(2, 5)), "0"),
    "with labels beside": ((torch.zeros(2, 1, 8, 8, dtype=torch.long), logits(5)), "1"),
    "the same twice": ([same := logits(5), same], "0"),
    "deep supervision": ([logits(5, 32), logits(5, 16), logits(5, 8)], "0"),
    "deep supervision, coarse first": ((logits(5, 8), logits(5, 16), logits(5, 32)), "2"),
    "nested": ({"features": [logits(8), logits(16)], "logits": logits(5)}, "logits"),
}
UNKNOWN = {
    "two alike": [logits(5), logits(5)],
    "PIDNet's three": [logits(5), logits(5), logits(1)],
    "U-Net++, U2-Net": (logits(1, 32), logits(1, 32), logits(1, 32)),
    "logits and a picture": (logits(5, 8), logits(3, 32)),
    "named otherwise": Pair(logits(5), logits(5)),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_evident_is_scored(case):
    output, name = KNOWN[case]
    assert scored_output(output, "Net", SHAPE).name == name


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_known_is_refused_with_the_flag_that_decides_it(case):
    with pytest.raises(SiteError, match=r"Net: returns several outputs.*; choose one with --output INDEX or NAME"):
        scored_output(UNKNOWN[case], "Net", SHAPE)


def test_the_number_of_classes_decides_where_one_output_has_it():
    outputs = {"a": logits(5), "b": logits(8), "c": [logits(5, 32), logits(3, 32)]}
    found = scored_output(outputs, "Net", SHAPE, num_classes=8)
    assert (found.name, found.reason) == ("b", "the only one of 8 classes")
    assert scored_output(outputs, "Net", SHAPE, num_classes=5).name == "c/0"  # of two, the one of the image's size
    with pytest.raises(SiteError):
        scored_output(outputs, "Net", SHAPE, num_classes=2)


def test_an_output_by_index_or_name():
    pair = Pair(logits(5), logits(6))
    for chosen in ("high", "1", "-1"):
        assert scored_output(pair, "Net", SHAPE, chosen=chosen).tensor is pair.high
    assert scored_output(logits(5), "Net", SHAPE, chosen="1").name == ""  # the others vanish in eval mode
    with pytest.raises(SiteError, match=r"--output: Net returns none that is called main, expected low \(2, 5, 8, 8\)"):
        scored_output(pair, "Net", SHAPE, chosen="main")


def test_no_logits_at_all():
    for output in (None, "text", torch.zeros(2, 5), {"labels": torch.zeros(2, 1, 8, 8, dtype=torch.long)}):
        with pytest.raises(SiteError, match="Net: returns no logits"):
            scored_output(output, "Net", SHAPE)


@pytest.mark.parametrize("shape", [(2, 8, 16, 5), (1, 5, 8, 16), (2, 5, 16, 4)])
def test_outputs_that_are_none_of_the_images(shape):
    """Classes last, as in Keras; one image of two; a map of other proportions."""
    with pytest.raises(SiteError, match=r"Net: returns logits whose axes are not \(N, classes, h, w\) for images"):
        scored_output(torch.zeros(shape), "Net", (2, 3, 32, 64))
    assert scored_output(torch.zeros(2, 5, 1, 2), "Net", (2, 3, 33, 49)).name == ""  # rounded at stride 32


def test_levels_that_are_stacked_in_one_tensor():
    found = named_outputs(torch.stack([logits(5), logits(5) + 1], 1), SHAPE)
    assert [float(tensor.max()) for tensor in found.values()] == [0.0, 1.0]
    volume = torch.zeros(1, 2, 8, 8, 8)
    assert named_outputs(volume, volume.shape) == {"": volume}


PROBABILITIES = ["Sigmoid", "SigmoidModule", "ResizedSigmoid", "InPlace", "OnlyWhenEvaluated", "OneOfSoftmax", "ByHand"]


@pytest.mark.parametrize("name", [*PROBABILITIES, "LogSigmoid", "OneOfLogSoftmax"])
def test_probabilities_and_their_logarithms_count_above_one_half(tmp_path, name):
    path, arch = save_net(tmp_path, name)
    x, notes, of_logs = torch.randn(2, 3, 32, 32), [], "Log" in name
    checkpoint = load(path, arch).with_output(x, notes.append)
    with torch.no_grad():
        output = checkpoint.model(x)
        is_class_1 = (output.exp() if of_logs else output) > 0.5
        assert 0 < float(is_class_1.float().mean()) < 1
        wrong = ((checkpoint.logits(x) > 0) != is_class_1).float().mean()
    assert wrong <= (1e-3 if of_logs else 0)  # exp may round across the threshold
    assert len(notes) == 1
    assert ("logarithms of probabilities" in notes[0]) == of_logs
    assert "probabilities, not logits" in notes[0]


@pytest.mark.parametrize("name", ["Named", "Deep"])
def test_logits_stay_what_they_are(tmp_path, name):
    path, arch = save_net(tmp_path, name)
    x, notes = torch.randn(2, 3, 32, 32), []
    checkpoint = load(path, arch).with_output(x, notes.append)
    assert checkpoint.threshold == 0
    output = checkpoint.model(x)
    assert torch.equal(checkpoint.logits(x), output["seg"] if name == "Named" else output[0])
    assert len(notes) == 1
    assert "is scored, the" in notes[0]


def test_logits_that_happen_to_be_small_and_positive_are_logits(tmp_path):
    path, arch = save_net(tmp_path, "Named")
    checkpoint = load(path, arch)
    with torch.no_grad():
        checkpoint.model.main.weight.mul_(1e-3)
        checkpoint.model.main.bias.fill_(0.5)
        x = torch.randn(2, 3, 32, 32)
        assert 0 < checkpoint.model(x)["seg"].min() < checkpoint.model(x)["seg"].max() < 1
    assert checkpoint.with_output(x).threshold == 0


def test_an_output_that_is_named_where_there_is_one_alone_is_said(tmp_path):
    path, arch = save_net(tmp_path, "Sigmoid")
    notes = []
    replace(load(path, arch), output="3").with_output(torch.randn(2, 3, 32, 32), notes.append)
    assert notes[0] == "--output 3: the network gives one output alone where it is scored, and that is taken"
