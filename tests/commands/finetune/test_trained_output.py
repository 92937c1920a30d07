"""Which output of a network is trained: the one that is scored, wherever it stands in training mode, as logits."""

import pytest
import torch
from torch.nn import functional as F

from equalize.checkpoint.loading import load
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.loss import ModelWithLoss
from equalize.commands.finetune.trained_output import trained_output
from equalize.errors import InputError
from tests.support.mmseg_networks import AUXILIARY, saved
from tests.support.output_nets import save_net

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def opened(tmp_path, name, output=None):
    path, arch = save_net(tmp_path, name)
    checkpoint = load(path, arch, output=output).with_output(X)
    return checkpoint, trained_output(checkpoint, X)


@pytest.mark.parametrize(
    ("name", "output", "main", "others"),
    [
        ("AuxFirst", "1", "1", 1),
        ("Pid", "1", "1", 1),  # the boundary has no classes
        ("Pid", "0", "0", 1),
        ("Deep", None, "0", 2),
        ("DeepLast", None, "2", 2),
        ("Stacked", None, "1", 1),
        ("OnlyInTraining", None, "2", 1),
        ("Named", None, "seg", 1),
        ("WithFeatures", "prediction", "prediction", 0),
    ],
)
def test_the_scored_output_is_trained(tmp_path, name, output, main, others):
    checkpoint, trained = opened(tmp_path, name, output)
    assert (trained.name, len(trained.auxiliary), trained.before_activation) == (main, others, False)
    assert not any(module.training for module in checkpoint.model.modules())
    network = checkpoint.model.train()
    network.low.eval(), network.deep.eval()  # no dropout, and no batch statistics
    heads = trained.of(checkpoint, network, X)
    assert len(heads) == 1 + others
    low, _, logits = network.run(X)
    expected = network.auxiliary(low) if output == "0" else logits
    torch.testing.assert_close(heads[0], F.interpolate(expected, size=heads[0].shape[2:]))  # at twice the size a copy


@pytest.mark.parametrize(
    ("name", "before"),
    [
        *(
            ("Sigmoid", True),
            ("SigmoidModule", True),
            ("ResizedSigmoid", True),
            ("InPlace", True),
            ("InPlaceModule", True),
        ),
        *(("OnlyWhenEvaluated", False), ("Softmax", True), ("DefaultSoftmax", True), ("OneOfSoftmax", True)),
        *(("LogSigmoid", True), ("OneOfLogSoftmax", True), ("LogSoftmax", True)),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_the_loss_is_that_of_the_logits_before_the_activation(tmp_path, name, before):
    """Against the cross entropy of what the activation is given, and its gradient."""
    checkpoint, trained = opened(tmp_path, name)
    assert trained.before_activation == before
    network = checkpoint.model.train()
    network.low[3].p = 0.0
    labels = torch.randint(0, 2, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    loss = ModelWithLoss(checkpoint, TrainConfig(aux_weight=0.0), trained)(X, labels)["loss"]
    (gradient,) = torch.autograd.grad(loss, network.main.weight)
    logits = F.interpolate(network.run(X)[2], size=(32, 32), mode="bilinear", align_corners=False)
    if logits.shape[1] == 1:
        expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    else:
        expected = F.cross_entropy(logits, labels)
    (wanted,) = torch.autograd.grad(expected, network.main.weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(("name", "output"), [("AuxFirst", "1"), ("OnlyInTraining", None), ("OnlyInTraining", "2")])
def test_outputs_of_equal_values(tmp_path, name, output):
    """As of classifiers that are zero at first: where both modes return the same outputs, names tell them apart."""
    path, arch = save_net(tmp_path, name)
    checkpoint = load(path, arch, output=output)
    for layer in (checkpoint.model.main, checkpoint.model.auxiliary):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    checkpoint = checkpoint.with_output(X)
    if output is None:
        with pytest.raises(
            InputError, match=r"none or several may be the scored one, got 0 .*; choose one with --output"
        ):
            trained_output(checkpoint, X)
    else:
        assert trained_output(checkpoint, X).name == output


def test_side_outputs_behind_sigmoids_are_trained_as_logits(tmp_path):
    checkpoint, trained = opened(tmp_path, "SideOutputs", "0")
    heads = trained.of(checkpoint, checkpoint.model, X)
    low, _, main = checkpoint.model.run(X)
    for head, logits in zip(
        heads, (main, checkpoint.model.auxiliary(low), checkpoint.model.boundary(low)), strict=True
    ):
        torch.testing.assert_close(head, logits)


def test_some_classes_of_a_softmax_are_not_trained(tmp_path):
    """Of the five that its logits have the network returns four: label 0 may be the first of either."""
    with pytest.raises(InputError, match=r"NoBackground: leaves out classes of its softmax, .*, got 4 of 5; train it"):
        opened(tmp_path, "NoBackground")


@pytest.mark.parametrize("name", ["Frozen", "WithoutGradients"])
def test_a_network_without_gradients_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: cannot be trained: all its parameters are frozen, or"):
        opened(tmp_path, name)


def test_probabilities_that_no_activation_gave_are_not_trained(tmp_path):
    path, arch = save_net(tmp_path, "ByHand")
    checkpoint = load(path, arch).with_output(X)
    with pytest.raises(
        InputError, match="ByHand: ends in probabilities, and no sigmoid or softmax that could be taken"
    ):
        trained_output(checkpoint, X)


def test_an_activation_of_smp(smp_dir, tmp_path):
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet("tu-test_resnet.r160_in1k", encoder_weights=None, decoder_channels=[16, 8, 8, 8, 8], classes=1)
    model.save_pretrained(tmp_path / "plain")
    model.segmentation_head[2] = smp.base.modules.Activation("sigmoid")
    checkpoint = load(tmp_path / "plain")
    checkpoint.model.segmentation_head[2] = model.segmentation_head[2]
    seen = checkpoint.with_output(X)
    assert seen.threshold == 0.5
    assert trained_output(seen, X).before_activation
    assert load(tmp_path / "plain").with_output(X).threshold == 0


@pytest.mark.parametrize(
    ("head", "backbone", "other"), [("PIDHead", "PIDNet", "p_cls_seg"), ("DDRHead", "DDRNet", "aux_cls_seg")]
)
def test_heads_of_mmsegmentation_that_return_several_outputs_in_training(tmp_path, head, backbone, other):
    """PIDHead gives the detail branch first; of its three outputs the last shows boundaries and no classes."""
    source = saved(tmp_path, head, backbone, changes={f"    auxiliary_head={AUXILIARY},\n": ""})
    x_NCHW, seen = torch.randn(2, 3, 128, 128), {}
    checkpoint = load(source).with_output(x_NCHW)
    trained = trained_output(checkpoint, x_NCHW)
    network = checkpoint.model.train()
    for name in ("conv_seg", other):
        layer = network.decode_head.get_submodule(name)
        layer.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
    scored, auxiliary = trained.of(checkpoint, network, x_NCHW)
    assert scored is seen["conv_seg"]
    assert auxiliary is seen[other]


def test_a_network_that_computes_its_own_loss_is_refused(tmp_path):
    path, arch = save_net(tmp_path, "NeedsTargets")
    checkpoint = load(path, arch).with_output(X)
    with pytest.raises(InputError, match="NeedsTargets: cannot be run in training mode on images alone"):
        trained_output(checkpoint, X)
    assert not any(module.training for module in checkpoint.model.modules())
