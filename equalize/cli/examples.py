"""Examples at the end of each command's help."""

EXAMPLES = {
    "scan": """\
# what is fused, from the configuration alone
equalize scan nvidia/segformer-b0-finetuned-ade-512-512

# at which scales, and whether equalizing will help
equalize scan resnet50_unet.pth --arch smp:Unet --data camvid --samples 64
""",
    "calibrate": """\
# measure 256 images, write the equalized network
equalize calibrate openmmlab/upernet-swin-tiny --data camvid -o OUT

# an encoder, with a decoder drawn anew for 11 classes
equalize calibrate nvidia/mit-b0 --data camvid -o OUT \\
    --init-missing --num-classes 11
""",
    "apply": """\
# to another copy of the network that OUT was made of
equalize apply OUT/equalize.json openmmlab/upernet-swin-tiny -o OUT2

# to a state dict
equalize apply OUT copy.pth --arch smp:Unet -o OUT2
""",
    "verify": """\
# on random inputs
equalize verify OUT --against openmmlab/upernet-swin-tiny

# on images
equalize verify OUT --against openmmlab/upernet-swin-tiny --data camvid
""",
    "finetune": """\
# equalize and train in one go
equalize finetune openmmlab/upernet-swin-tiny --data camvid -o OUT \\
    --calibrate --epochs 20

# the decoder alone, behind a frozen backbone that runs once an image
equalize finetune nvidia/mit-b0 --init-missing --data camvid -o OUT \\
    --freeze-backbone --cache-backbone --max-steps 500
""",
    "evaluate": """\
# the validation split
equalize evaluate OUT --data camvid --ignore-index 11

# large pictures in windows, as a program reads it
equalize evaluate OUT --data cityscapes --size 512 --sliding-window --json
""",
    "compare": """\
# as it is, and equalized: three runs of each
equalize compare openmmlab/upernet-swin-tiny --data camvid -o CMP --epochs 10

# each at its own best of three learning rates, confirmed on the test split
equalize compare nvidia/mit-b0 --init-missing --data camvid -o CMP \\
    --arms none,rescale --lrs 3e-5,1e-4,3e-4 --max-steps 500 \\
    --tune-seeds 2 --confirm-seeds 5 --test-split test
""",
    "predict": """\
# a folder, with its subfolders
equalize predict OUT photos -o PREDICTED

# large pictures in windows, in colors of one's own
equalize predict OUT 'drive/**/*.png' -o PREDICTED \\
    --sliding-window --size 512 --colors labelmap.txt
""",
    "push": """\
# see what would be sent
equalize push OUT my-name/upernet-swin-tiny-camvid --dry-run

# propose it to a repository of others
equalize push OUT their-name/upernet-swin-tiny-camvid --create-pr
""",
    "demo": """\
equalize demo

# keep the equalized network
equalize demo -o OUT
""",
}
"""By command; a line that ends in a backslash goes on in the next, as in a shell."""
