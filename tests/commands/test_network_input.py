"""What a network takes: sizes that images are padded to, channels, and networks that take no images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from equalize.checkpoint.loading import load
from equalize.checkpoint.outputs import logits_of_padded
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.images import input_shape, open_images
from equalize.commands.network_input import InputAxes, axes_of, fit_input
from equalize.data.dataset import open_data
from equalize.errors import InputError
from tests.support.networks import save_code
from tests.support.scenes import write_scenes
from tests.support.trained import trained_net


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


FLAGS = ("--mean", "0.5", "--std", "0.5")


def prepare(x):
    return (x / 255 - 0.5) / 0.5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pictures of several sizes, most of which 8 does not divide."""
    root = tmp_path_factory.mktemp("mixed")
    for number, size in enumerate([(48, 64), (50, 60), (37, 41), (50, 60)]):
        write_scenes(root / "one", 3, counts={"train": 1, "val": 1}, size=size, seed=number)
        for path in (root / "one").rglob("*.png"):
            place = root / "all" / path.relative_to(root / "one").with_stem(f"{number:03}")
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    return root / "all"


@pytest.fixture(scope="module")
def strict(mixed, tmp_path_factory):
    """A network whose sides must be multiples of 8."""
    scenes = write_scenes(tmp_path_factory.mktemp("scenes"), 3, counts={None: 4})
    return trained_net(tmp_path_factory.mktemp("strict"), scenes / "images", prepare, depth=3)


def of(name):
    arguments = [word for key, value in name.arch_args.items() for word in ("--arch-arg", f"{key}={value}")]
    return (name.source, "--arch", name.arch, *arguments)


def test_every_command_takes_mixed_sizes(run_cli, strict, mixed, tmp_path):
    """Calibrated in one batch size or another, it is the same network; every command says that it pads."""
    out = tmp_path / "out"
    ran = run_cli("calibrate", *of(strict), "--data", mixed, "-o", out, *FLAGS)
    assert ran.code == 0, ran.err
    assert ran.out.count("takes sides that are multiples of 8: images of other sizes are padded on the right") == 1
    assert json.loads((out / "equalize.json").read_text())["images"] == 4
    short = ("--max-steps", 1, "--batch-size", 2, "--crop", 30, "-o")
    compared = ("compare", *of(strict), "--seeds", 1, "--evaluations", 1, *short, tmp_path / "compared")
    for words in (
        ("scan", *of(strict)),
        ("evaluate", *of(strict)),
        ("verify", out, "--against", *of(strict)),
        ("finetune", *of(strict), *short, tmp_path / "trained"),
        compared,
    ):
        ran = run_cli(*words, "--data", mixed, *FLAGS)
        assert ran.code == 0, (words[0], ran.err)
        assert "multiples of 8" in ran.out, words[0]
        assert "Traceback" not in ran.err


def test_a_network_of_any_size_is_not_padded(run_cli, segformer_dir, mixed):
    ran = run_cli("evaluate", segformer_dir, "--data", mixed)
    assert "padded" not in ran.out


def test_scores_are_those_of_images_padded_by_hand(strict, mixed):
    from equalize.commands.evaluate import EvalConfig, evaluate
    from equalize.data.masks import LabelRule, read_mask
    from equalize.metrics import count_pixels, score_of

    score = evaluate(strict, mixed, EvalConfig(device="cpu", batch_size=3))
    checkpoint, counts = strict.load(), torch.zeros(3, 3, dtype=torch.int64)
    for image, mask in open_data(mixed, labels=True).with_masks():
        x = checkpoint.preprocess(Image.open(image))
        height, width = x.shape[1:]
        wide = torch.zeros(1, 3, height + -height % 8, width + -width % 8)
        wide[0, :, :height, :width] = x
        with torch.no_grad():
            predicted = checkpoint.model(wide)[0, :, :height, :width].argmax(0)
        counts += count_pixels(predicted, read_mask(mask, LabelRule()), 3)
    assert score.mIoU == pytest.approx(score_of(counts, 4).mIoU, abs=0.5)  # batches of other shapes round otherwise


def test_a_given_size_is_padded_too(strict, mixed):
    lines = []
    config = CalibrationConfig(size=(50, 60), device="cpu")
    checkpoint, images = open_images(mixed, strict.load(), config, notify=lines.append)
    assert checkpoint.multiple == 8
    assert images.shape == (2, 3, 56, 64)
    assert images.few(2).shape == (2, 3, 56, 64)
    assert "50x60 is padded" in lines[0]
    images = open_images(mixed, strict.load(), CalibrationConfig(size=(48, 64), device="cpu"), notify=lines.append)[1]
    assert images.shape == (2, 3, 48, 64)
    assert sum("padded" in line for line in lines) == 1


@pytest.mark.parametrize("multiple", [1, 2, 4, 8, 14, 16, 32])
def test_the_multiple_is_found(strict, mixed, multiple):
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            assert x.shape[2] % multiple == x.shape[3] % multiple == 0
            return self.stem(x)

    assert fitted(strict, Only(), mixed).multiple == multiple


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("levels", [2, 3])
def test_a_network_that_takes_some_odd_sizes_is_padded_for_the_others(strict, tmp_path, padding, levels):
    """ESPNet: 67 pixels become 34, then 17, and twice 17 is 34; but not so 65. Without padding it takes 65, not 67."""

    class Halving(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 2, 1 + 2 * padding, stride=2, padding=padding)
            self.down = nn.Conv2d(2, 2, 1 + 2 * padding, stride=2, padding=padding)
            self.out = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            down = x
            for _ in range(levels - 1):
                down = self.down(down)
            return self.out(torch.cat([x, nn.functional.interpolate(down, scale_factor=2.0 ** (levels - 1))], 1))

    for number, size in enumerate([(91, 119), (90, 116)]):  # (width, height) of which it takes the first
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    assert fitted(strict, Halving(), tmp_path).multiple == 2**levels


def fitted(name, model, data, size=None, notify=lambda line: None):
    from dataclasses import replace

    return fit_input(replace(name.load(), model=model), open_data(data).images, size, notify)


def test_a_network_that_refuses_small_images_alone_is_not_padded(strict, mixed):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            assert x.shape[2] * x.shape[3] > 200 * 200
            return self.stem(x)

    assert fitted(strict, Large(), mixed, (300, 301)).multiple == 1


def test_a_network_of_one_size(strict, mixed, photos):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            if x.shape[2:] != (48, 64):
                raise RuntimeError("position embeddings of another size")
            return self.stem(x)

    assert fitted(strict, Fixed(), mixed, (48, 64)).multiple == 1
    assert fitted(strict, Fixed(), photos).multiple == 1
    with pytest.raises(
        InputError, match=r"takes 48x64 and few other sizes, and .*001\.png has another; .*--size 48x64"
    ):
        fitted(strict, Fixed(), mixed)
    with pytest.raises(InputError, match=r"takes no images of 50x60 \(position embeddings.*; try --size 64x64"):
        fitted(strict, Fixed(), mixed, (50, 60))


def test_a_network_that_takes_no_images_at_all(strict, mixed):
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.stem(x["image"])

    with pytest.raises(
        InputError, match=r"takes no images of 64x96 \(.*; where it is no matter of size, name a factory"
    ):
        fitted(strict, Batch(), mixed, (64, 96))


def test_cropped_logits_of_a_coarser_output():
    x = torch.rand(1, 3, 10, 12)
    seen = []

    def coarse(images):
        seen.append(images)
        return nn.functional.avg_pool2d(images, 4)

    got = logits_of_padded(coarse, x, 8)
    assert seen[0].shape == (1, 3, 16, 16)
    assert got.shape == (1, 3, 10, 12)
    wide = nn.functional.interpolate(coarse(nn.functional.pad(x, (0, 4, 0, 6))), (16, 16), mode="bilinear")
    assert torch.equal(got, wide[..., :10, :12])  # the same kernels on the same shapes
    assert logits_of_padded(coarse, torch.rand(1, 3, 8, 16), 8).shape == (1, 3, 2, 4)


# channels


class Shuffled(nn.Module):
    """Its first layer sees the input rearranged."""

    def __init__(self, channels):
        super().__init__()
        self.decoder = nn.Conv2d(7, 2, 1)  # registered first, called last
        self.stem = nn.Conv2d(channels * 4, 7, 1)

    def forward(self, x):
        return self.decoder(self.stem(nn.functional.pixel_unshuffle(x, 2)))


class Patches(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Linear(channels * 16, 8)

    def forward(self, x):
        return self.stem(nn.functional.unfold(x, 4, stride=4).movedim(1, 2))


class Checked(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        if x.shape[1] != self.stem.in_channels:
            raise ValueError("Make sure that the channels match")
        return self.stem(x)


class Normalizing(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize(
    "make",
    [
        lambda channels: nn.Conv2d(channels, 4, 3),
        Shuffled,
        Patches,
        Checked,
        Normalizing,
        lambda channels: nn.Conv2d(channels, channels * 2, 3, groups=channels),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_channels_by_the_first_layer(make, channels, device):
    model = make(channels).to(device)
    assert axes_of(model, (64, 64)) == InputAxes(channels=channels)


def test_the_axes_of_volumes_and_sequences():
    assert axes_of(nn.Sequential(nn.Conv3d(2, 4, 3)), None) == InputAxes(channels=2, space=3)
    assert axes_of(nn.Sequential(nn.Conv1d(5, 4, 3)), None) == InputAxes(channels=5, space=1)


@pytest.mark.filterwarnings("ignore:Importing from timm")
def test_a_state_dict_of_four_channels(tmp_path):
    import segmentation_models_pytorch as smp

    model = smp.FPN("resnet18", encoder_weights=None, in_channels=4, classes=2, decoder_pyramid_channels=8)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    checkpoint = load(tmp_path / "net.pth", arch="smp:FPN", arch_args={"encoder_name": "resnet18"}, weights=False)
    assert input_shape(checkpoint, None) == (2, 4, 512, 512)
    assert input_shape(checkpoint, (64, 96)) == (2, 4, 64, 96)


@pytest.fixture
def bands(tmp_path_factory):
    """Data of five bands as arrays (5, H, W), with masks; of the same as (H, W, 5)."""
    root = write_scenes(tmp_path_factory.mktemp("bands"), 3, counts={"train": 3, "val": 2})
    for number, path in enumerate(sorted(root.glob("images/*/*.png"))):
        pixels = np.asarray(Image.open(path))
        array = np.concatenate([pixels, pixels[..., :2]], 2)
        np.save(path.with_suffix(".npy"), array if number % 2 else np.moveaxis(array, 2, 0))
        path.unlink()
    return root


def test_a_network_of_five_bands_in_every_command(run_cli, bands, tmp_path):
    name = multi(tmp_path, 5, bands)
    out = tmp_path / "out"
    short = ("--max-steps", 1, "--batch-size", 2, "--crop", 32, "-o")
    for words in (
        ("calibrate", *of(name), "-o", out),
        ("scan", *of(name)),
        ("evaluate", out, "--arch", name.arch),
        ("verify", out, "--against", *of(name)),
        ("finetune", *of(name), *short, tmp_path / "trained"),
    ):
        flags = () if words[0] == "evaluate" else ("--mean", "0.1,0.2,0.3,0.4,0.5", "--std", "0.3")
        ran = run_cli(*words, "--data", bands, *flags)
        assert ran.code == 0, (words[0], ran.err)
        assert "preprocessing: 5 channels, no resize, mean 0.1 0.2 0.3 0.4 0.5, std 0.3" in ran.out
        assert "warning" not in ran.err
    ran = run_cli("scan", *of(name), "--data", bands, "--mean", "0.1,0.2,0.3")
    assert ran.code == 2
    assert "give 5 numbers" in ran.err


def multi(folder, channels, data):
    from equalize.data.bands import read_picture

    torch.manual_seed(0)
    name = trained_net(folder, folder, lambda _: torch.randn(4, channels, 32, 32), channels=channels)
    model = name.load().model
    paths = open_data(data, split="train").images
    x = torch.stack([read_picture(path, channels).float() for path in paths]) / 255
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(-1, 1, 1)[:channels]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model.train()((x - mean) / 0.3)
    torch.save(model.state_dict(), name.source)
    return name


def test_a_network_of_one_channel(run_cli, photos, tmp_path):
    gray = tmp_path / "gray"
    gray.mkdir()
    for path in photos.iterdir():
        Image.open(path).convert("L").save(gray / path.name)
    name = trained_net(tmp_path, gray, lambda x: x / 255 - 0.5, channels=1)
    flags = ("--mean", "0.5", "--std", "none")
    ran = run_cli("calibrate", *of(name), "--data", gray, "-o", tmp_path / "out", *flags)
    assert ran.code == 0, ran.err
    assert "preprocessing: 1 channel, no resize, mean 0.5, std 1" in ran.out
    assert json.loads((tmp_path / "out/equalize.json").read_text())["input_check"]["deviation"] < 0.3
    assert load(tmp_path / "out", arch=name.arch).preprocess.mean == (0.5,)
    ran = run_cli("calibrate", *of(name), "--data", photos, "-o", tmp_path / "two", *flags)
    assert ran.code == 2
    assert "0.png: has 3 channels of different content, and the network takes 1" in ran.err
    ran = run_cli("scan", *of(name), "--data", gray)  # a guess for three channels becomes one for each
    assert "preprocessing: 1 channel, no resize, mean 0.449, std 0.226" in ran.out


# volumes

VOLUMES = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.high = nn.Conv3d(2, 4, 3, padding=1)
        self.low = nn.Conv3d(4, 4, 3, 2, 1)
        self.fuse = nn.Conv3d(8, 2, 3, padding=1)

    def forward(self, x):
        high = self.high(x).relu()
        low = F.interpolate(self.low(high).relu(), size=high.shape[2:], mode="trilinear")
        return self.fuse(torch.cat([high, low], 1))
"""


def test_volumes(run_cli, photos, tmp_path):
    name = save_code(VOLUMES, tmp_path)
    words = (name.source, "--arch", name.arch)
    ran = run_cli("scan", *words)
    assert ran.code == 0, ran.err
    assert "trilinear x2" in ran.out
    assert "read by a recording on fake tensors at 2x2x64x64x64" in ran.out
    (site,) = json.loads(run_cli("scan", *words, "--json").out)["sites"]
    assert [branch["resampling"] for branch in site["branches"]] == [None, "trilinear"]
    for command in (("calibrate", "-o", tmp_path / "out"), ("scan",)):
        ran = run_cli(command[0], *words, "--data", photos, *command[1:])
        assert ran.code == 2
        assert "Net: takes volumes (N, C, D, H, W), which the commands do not read" in ran.err
        assert "use equalize.calibrate() in Python" in ran.err


def test_a_size_that_the_network_refuses_late_is_one_line(run_cli, mixed, tmp_path):
    """It takes every size but one, which nothing foretells."""
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n\n\nclass Net(nn.Conv2d):\n"
        "    def __init__(self):\n        super().__init__(3, 3, 1)\n\n"
        "    def forward(self, x):\n"
        "        if x.shape[2:] == (37, 41):\n            raise IndexError('no such bin')\n"
        "        return super().forward(x)\n"
    )
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "net.pt")
    ran = run_cli("evaluate", tmp_path / "net.pt", "--arch", f"{code}:Net", "--data", mixed)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "002.png: has a size that the network does not take, 37x41 (IndexError: no such bin)" in ran.err
