"""A checkpoint and labelled images -> a trained checkpoint, in the format that came in.

recipe.py         every setting, with its default
new_classes.py    another number of classes: the classifier drawn anew
training_data.py  pairs, augmented, seeded by (seed, epoch, index)
objective.py      the loss, and one adapter a family
optimiser.py      parameter groups and the schedule
sharding.py       FSDP and DeepSpeed, as `accelerate launch` configures them
trainer.py        transformers' Trainer with equalization in effect
rhythm.py         when to log, evaluate, save
run_directory.py  what OUT holds while training goes on
sitting.py        one sitting of a training that may be resumed
finetune.py       `finetune`: all of it
report.py         what came out, for people
"""
