"""A checkpoint and labeled images -> a trained checkpoint, in the format that came in.

config.py           every setting, with its default
config_file.py      finetune.yaml: MODEL, data and settings
splits.py           the data, checked; another number of classes; the pairs that are trained on
loss.py             the loss, and which outputs of a network it is computed from
stored_backbone.py  a frozen backbone that returns what it returned before
backbone_cache.py   its outputs for all images, on disk
optimizer.py        parameter groups and the schedule
sharding.py         FSDP and DeepSpeed, as `accelerate launch` configures them
run_directory.py    what OUT holds while training goes on, and how a model gets into it
callbacks.py        when a model is scored and saved, and what is recorded
arguments.py        the configuration as transformers spells it
trainer.py          transformers' Trainer with equalization in effect
report.py           OUT/report.html, curves.png and panels.png
finetune.py         `finetune`: all of it
pace.py             how fast it goes, by a few timed steps
dry_run.py          what would be trained, and about how long it takes
"""
