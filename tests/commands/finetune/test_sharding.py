"""Several processes, and what `accelerate launch` may and may not decide."""

import errno
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from equalize.commands.finetune import arguments
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.sharding import check_deepspeed
from equalize.commands.images import Images
from equalize.distributed import is_main, leave
from equalize.errors import DataError, InputError, PeerError
from tests.support.side_by_side import in_two_processes
from tests.support.training import QUICK, trained_weights

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


ALONE = replace(QUICK, freeze_norms=True, max_steps=3, batch_size=1, calibrate="preserve")


@pytest.fixture(scope="module")
def trained_alone(calm, five_classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, finetune(calm, five_classes, out, replace(ALONE, accumulate=2))


def train_beside(name, data, out, config, sharded):
    if sharded:  # Accelerate shards on accelerators only, torch on any device
        from accelerate import state
        from accelerate.utils import DistributedType

        begin = state.AcceleratorState.__init__

        def begin_sharded(self, *args, **kwargs):
            if state.PartialState._shared_state.get("distributed_type") is DistributedType.MULTI_CPU:
                state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            begin(self, *args, **kwargs)

        state.AcceleratorState.__init__ = begin_sharded
    blocks = []
    read = Images.read

    def watched(self, first=0, step=1):
        for block in read(self, first, step):
            blocks.append(block.first)
            yield block

    Images.read = watched
    done = finetune(name, data, out, config)
    (out.parent / f"blocks{os.environ['RANK']}.json").write_text(json.dumps(blocks))
    if is_main():
        (out.parent / "done.json").write_text(json.dumps(done.to_json()))
    leave()


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_as_one_that_accumulates(five_classes, calm, trained_alone, tmp_path, sharded):
    """Each holds the whole network, or half of every parameter; the second has fewer images to score."""
    whole, one = trained_alone
    out = tmp_path / "two"
    in_two_processes(train_beside, calm, five_classes, out, ALONE, sharded, env=FSDP if sharded else None)
    two = json.loads((tmp_path / "done.json").read_text())
    measured = [json.loads((tmp_path / f"blocks{rank}.json").read_text()) for rank in range(2)]
    assert measured == [[0, 2], [1, 3]]  # each image of the four by one of them, in a single pass
    sites = [json.loads((each / "equalize.json").read_text())["sites"] for each in (whole, out)]
    assert sites[0] == sites[1]  # to the last bit: the same blocks, merged in the same order
    assert two["steps"] == 3
    assert two["train_as"] == "explicit"
    assert two["best"]["images"] == 3
    assert two["loss"] == pytest.approx(one.losses[-1][1], rel=1e-4)
    first, second = trained_weights(whole), trained_weights(out)
    assert list(first) == list(second)
    assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-5) for key in first)
    assert (out / "last/checkpoint-3/pytorch_model_fsdp.bin").is_file() == sharded


@pytest.mark.parametrize(("pairs", "batches"), [(6, 1), (10, 1), (15, 1), (16, 1), (31, 1), (32, 2)])
def test_fewer_pairs_than_a_batch_for_each_of_two_processes_are_trained_on(pairs, batches, monkeypatch, tmp_path):
    monkeypatch.setattr(arguments, "rank_and_number", lambda: (0, 2))
    task = SimpleNamespace(config=replace(QUICK, batch_size=8).resolved(), device=torch.device("cpu"), val=None)
    drops = arguments.arguments_of(task, str(tmp_path), pairs=pairs).dataloader_drop_last
    shares = [BatchSamplerShard(BatchSampler(range(pairs), 8, drops), 2, rank) for rank in range(2)]
    assert [len(list(share)) for share in shares] == [batches, batches]


def calibrate_with_one_that_fails(name, data, out, error, code):
    def broken(self, first=0, step=1):
        raise error
        yield

    fails = os.environ["RANK"] == "1"
    if fails:
        Images.read = broken
    with pytest.raises(type(error) if fails else PeerError) as caught:
        finetune(name, data, out, ALONE)
    assert fails or caught.value.code == code
    leave()


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("second.png", "cannot be read"), 2), (OSError(errno.ENOSPC, "No space left"), 3)]
)
def test_where_one_process_cannot_measure_both_end(five_classes, calm, tmp_path, error, code):
    in_two_processes(calibrate_with_one_that_fails, calm, five_classes, tmp_path / "out", error, code)


def test_launches_that_are_not_served(custom, five_classes, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_version: is not served, got 1, expected 2"):
        finetune(custom, five_classes, tmp_path / "out", QUICK)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="mixed_precision: is not served, got fp8"):
        QUICK.resolved()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert QUICK.resolved().precision == "bf16"
    assert replace(QUICK, precision="fp32").resolved().precision == "fp32"


def test_deepspeed_gets_our_optimizer_and_gives_whole_states():
    config: dict = {"zero_optimization": {"stage": 3}}
    plugin = SimpleNamespace(deepspeed_config=config)
    check_deepspeed(plugin)
    assert config["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    for key in ("optimizer", "scheduler"):
        config[key] = {"type": "AdamW"}
        with pytest.raises(InputError, match=f"has its own {key}"):
            check_deepspeed(plugin)
        del config[key]
