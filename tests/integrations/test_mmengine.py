"""`EqualizeHook` in mmengine's own `Runner`."""

import copy
import logging

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize

import equalize
from equalize.checkpoint.checkpoint import write_plan
from tests.plan.test_attach import OPTIMIZERS, drawn, train

pytest.importorskip("mmengine", reason="the extra mmseg is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 6


@pytest.fixture(autouse=True)
def _quiet():
    yield
    for name in [each for each in logging.root.manager.loggerDict if each.startswith("mm")]:
        logging.getLogger(name).handlers.clear()


def segmentor():
    from mmengine.model import BaseModel

    class Segmentor(BaseModel):
        def __init__(self):
            super().__init__()
            self.network, _, _ = drawn("bias")

        def forward(self, x, y, mode="tensor"):
            return {"loss": F.cross_entropy(self.network(x), y)}

        def init_weights(self):
            """As many networks of mmengine do, before weights are loaded."""
            torch.nn.init.constant_(self.network.body.fuse.weight, 7.0)

    return Segmentor()


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, step):
        _, x, y = drawn("bias")
        return {"x": x.roll(step, 0)[:4], "y": y.roll(step, 0)[:4]}


def run(out, plan, *hooks, load_from=None, resume=False, steps=STEPS):
    from mmengine.runner import Runner

    from equalize.integrations import EqualizeHook  # noqa: F401  registers it

    model = segmentor()
    given = {} if plan is None else {"plan": plan}
    loader = {
        "batch_size": 1, "num_workers": 0, "dataset": Batches(),
        "sampler": {"type": "DefaultSampler", "shuffle": False}, "collate_fn": lambda items: items[0],
    }  # fmt: skip
    runner = Runner(
        model=model, work_dir=str(out), train_dataloader=loader, load_from=load_from, resume=resume,
        train_cfg={"by_epoch": False, "max_iters": steps, "val_interval": 1000},
        optim_wrapper={"type": "OptimWrapper", "optimizer": OPTIMIZERS["AdamW"](model.network.parameters())},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 3}, "logger": None},
        custom_hooks=[{"type": "EqualizeHook", **given}, *hooks], log_level="ERROR", experiment_name=f"e{id(model)}",
    )  # fmt: skip
    runner.train()
    return model.network, runner


@pytest.fixture
def equalized(plan, tmp_path):
    """A checkpoint with its plan beside it."""
    directory = tmp_path / "out"
    directory.mkdir()
    model, _, _ = drawn("bias")
    state = {f"network.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, directory / "model.pth")
    write_plan(plan, directory)
    return str(directory / "model.pth")


def plain_loaded(path, key="state_dict", prefix=""):
    model = segmentor()
    state = torch.load(path, weights_only=False)[key]
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return model.network.state_dict()


def by_hand(plan, average=None):
    expected, x, y = drawn("bias")
    equalize.attach(plan, expected)
    optimizer = OPTIMIZERS["AdamW"](expected.parameters())
    averaged = copy.deepcopy(expected.state_dict())
    for step in range(STEPS):
        train(expected, optimizer, x.roll(step, 0), y.roll(step, 0), 1)
        share = 1.0 if step == 0 else average or 0.0
        averaged = {key: value.lerp(expected.state_dict()[key], share) for key, value in averaged.items()}
    return expected.state_dict(), averaged


def test_trains_as_a_loop_of_ones_own(plan, equalized, tmp_path):
    """To the last bit against `attach` by hand: the same kernels on the same batches; every checkpoint is plain."""
    network, _ = run(tmp_path / "run", None, load_from=equalized)
    expected, _ = by_hand(plan)
    torch.testing.assert_close(network.state_dict(), expected, rtol=0, atol=0)
    assert not parametrize.is_parametrized(network.body.fuse)
    torch.testing.assert_close(plain_loaded(tmp_path / "run" / "iter_6.pth"), expected, rtol=0, atol=0)
    first = plain_loaded(tmp_path / "run" / "iter_3.pth")
    assert not torch.equal(first["body.fuse.weight"], expected["body.fuse.weight"])


def test_resumes_to_rounding(plan, equalized, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine 0.10.7 resumes no checkpoint without, as is
    run(tmp_path / "run", plan, load_from=equalized, steps=3)
    resumed, runner = run(tmp_path / "run", plan, resume=True)
    assert runner.iter == STEPS
    torch.testing.assert_close(resumed.state_dict(), by_hand(plan)[0], rtol=1e-4, atol=1e-5)


def test_averages_of_weights(plan, equalized, tmp_path):
    """mmengine's own average, a copy that is made before the hook attaches; it stands first in the checkpoint."""
    run(tmp_path / "run", plan, {"type": "EMAHook", "momentum": 0.5}, load_from=equalized)
    trained, average = by_hand(plan, average=0.5)
    path = tmp_path / "run" / "iter_6.pth"
    torch.testing.assert_close(plain_loaded(path), average, rtol=1e-4, atol=1e-5)
    ema = plain_loaded(path, "ema_state_dict", "module.")
    torch.testing.assert_close(ema, trained, rtol=0, atol=0)


@pytest.mark.parametrize("option", [{"update_buffers": True}, {"begin_iter": 2}])
def test_averages_past_the_equalized_weights_are_refused(plan, equalized, tmp_path, option):
    with pytest.raises(equalize.EqualizeError, match=r"^EMAHook: writes averages past the equalized weights, got "):
        run(tmp_path / "run", plan, {"type": "EMAHook", **option}, load_from=equalized)


def test_without_a_plan(plan, equalized, tmp_path):
    with pytest.raises(equalize.EqualizeError, match=r"^EqualizeHook: has no plan, and does not know where"):
        run(tmp_path / "run", None)
