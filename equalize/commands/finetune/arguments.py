"""`TrainConfig` as transformers spells it."""

from transformers import TrainingArguments

from equalize.commands.finetune.splits import Task
from equalize.data.loader import workers_for
from equalize.distributed import rank_and_number


def arguments_of(task: Task, directory: str, *, pairs: int) -> TrainingArguments:
    """The configuration of a task with that many pairs; the trainer keeps its state in the directory."""
    config, device = task.config, task.device
    workers = 0 if config.cache_backbone else workers_for(device, config.workers)  # of a cache nothing is decoded
    interval = "steps" if config.eval_every else "epoch"
    a_round = config.batch_size * rank_and_number()[1]  # a batch for each process; of fewer pairs nothing would be left
    args = TrainingArguments(
        output_dir=directory,
        num_train_epochs=config.epochs or 1,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        max_grad_norm=config.clip,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_drop_last=pairs >= a_round,  # a batch of one is too small for some BatchNorms
        ddp_find_unused_parameters=True,
        eval_strategy=interval if task.val else "no",
        save_strategy=interval,
        eval_steps=config.eval_every,
        save_steps=config.eval_every or 1,
        save_total_limit=2,  # with a limit of 1 transformers would keep the best alone
        metric_for_best_model="mIoU",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on after --resume
        logging_strategy="steps",
        logging_first_step=True,
        logging_steps=config.log_every or 0.01,  # of all steps
        logging_nan_inf_filter=False,
        report_to=list(config.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if config.precision == "fp32":
        args.mixed_precision = "no"  # also where Accelerate's configuration has another
    args._n_gpu = min(args.n_gpu, 1)  # of several, one: transformers would train on all of them in nn.DataParallel
    return args
