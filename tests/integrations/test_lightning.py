"""`EqualizeCallback` in Lightning's own `Trainer`."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize

import equalize
from equalize.checkpoint.checkpoint import write_plan
from equalize.integrations import EqualizeTrainerCallback  # noqa: F401  imports without Lightning
from tests.plan.test_attach import OPTIMIZERS, drawn, train

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

from equalize.integrations import EqualizeCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 6


class Module(lightning.LightningModule):
    """Trains as `train` of the tests of `attach` does, batch by batch."""

    def __init__(self):
        super().__init__()
        self.network, _, _ = drawn("bias")
        self.scores = iter(range(100, 0, -1))  # the first validation is the best

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def validation_step(self, batch, index):
        self.log("score", float(next(self.scores)))

    def configure_optimizers(self):
        return OPTIMIZERS["AdamW"](self.network.parameters())


def batches():
    _, x, y = drawn("bias")
    return [(x.roll(step, 0)[:4], y.roll(step, 0)[:4]) for step in range(STEPS)]


def fit(directory, plan, *others, steps=STEPS, resume=None):
    module = Module()
    saving = callbacks.ModelCheckpoint(
        directory,
        filename="{step}",
        monitor="score",
        mode="max",
        save_top_k=-1,
        every_n_train_steps=0,
        every_n_epochs=1,
    )
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, limit_train_batches=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EqualizeCallback(plan), saving, *others],
        num_sanity_val_steps=0,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(_Epochs(batches()), batch_size=None)
    trainer.fit(module, loader, torch.utils.data.DataLoader([0]), ckpt_path=resume)
    return module, trainer, saving


class _Epochs(torch.utils.data.IterableDataset):
    """Three batches an epoch, and the next ones in the next; a resumed training first asks for those of the old one."""

    def __init__(self, batches):
        self.left = iter(batches)

    def __iter__(self):
        return iter([next(self.left) for _ in range(3)])


def read(path):
    return torch.load(path, weights_only=False)["state_dict"]


def plain_loaded(path):
    """The network of a checkpoint in a module that knows nothing of equalization, strictly."""
    module = Module()
    module.load_state_dict(read(path))
    return module.network.state_dict()


def test_trains_as_a_loop_of_ones_own(plan, tmp_path):
    """To the last bit against `attach` by hand: the same kernels on the same batches; every checkpoint is plain."""
    write_plan(plan, tmp_path)
    module, trainer, saving = fit(tmp_path, tmp_path)
    expected, x, y = drawn("bias")
    equalize.attach(plan, expected)
    train(expected, OPTIMIZERS["AdamW"](expected.parameters()), x, y, STEPS)
    torch.testing.assert_close(module.network.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert not parametrize.is_parametrized(module.network.body.fuse)
    first, last = (plain_loaded(tmp_path / f"step={step}.ckpt") for step in (3, 6))
    torch.testing.assert_close(last, expected.state_dict(), rtol=0, atol=0)
    assert saving.best_model_path.endswith("step=3.ckpt")
    assert not torch.equal(first["body.fuse.weight"], last["body.fuse.weight"])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    torch.testing.assert_close(plain_loaded(tmp_path / "after.ckpt"), last, rtol=0, atol=0)


def test_resumes_to_rounding(plan, tmp_path):
    whole, _, _ = fit(tmp_path / "whole", plan)
    resumed, trainer, _ = fit(tmp_path / "resumed", plan, resume=tmp_path / "whole" / "step=3.ckpt")
    assert trainer.global_step == STEPS
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_averages_of_weights(plan, tmp_path):
    """Lightning's own average, made before the callback attaches, against the average of what was trained by hand."""
    averaging = callbacks.EMAWeightAveraging(decay=0.5)
    module, _, _ = fit(tmp_path, plan, averaging)
    expected, x, y = drawn("bias")
    equalize.attach(plan, expected)
    optimizer = OPTIMIZERS["AdamW"](expected.parameters())
    average = None
    for step in range(STEPS):
        train(expected, optimizer, x.roll(step, 0), y.roll(step, 0), 1)
        now = copy.deepcopy(expected.state_dict())
        average = now if average is None else {key: value.lerp(now[key], 0.5) for key, value in average.items()}
    torch.testing.assert_close(module.network.state_dict(), average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_loaded(tmp_path / "step=6.ckpt"), average, rtol=1e-4, atol=1e-5)


def test_without_a_plan(tmp_path):
    with pytest.raises(equalize.EqualizeError, match=r"^EqualizeCallback: has no plan, and does not know where"):
        fit(tmp_path, None)
