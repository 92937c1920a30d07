"""transformers' Trainer: calibrate a UPerNet, train it, load the best checkpoint with `from_pretrained`.

python examples/integrations/transformers_trainer.py OUT
"""

import sys
from pathlib import Path

import torch
from scenes import Scenes, batches, mean_iou
from transformers import Trainer, TrainingArguments, UperNetForSemanticSegmentation

import equalize
from equalize import demo
from equalize.integrations import EqualizeTrainerCallback


def collate(pairs: list) -> dict[str, torch.Tensor]:
    """A batch as transformers' segmentation networks take it."""
    images, labels = zip(*pairs, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def main(out: Path) -> None:
    """Writes OUT/equalized, and OUT/run/checkpoint-N as the trainer does."""
    checkpoint = equalize.load(demo.MODEL)  # what `equalize calibrate MODEL --data IMAGES -o OUT` does:
    plan = equalize.calibrate(checkpoint.model, batches(), strategy="migrate")
    checkpoint.save(out / "equalized", plan)

    model = UperNetForSemanticSegmentation.from_pretrained(out / "equalized")
    print(f"before: mIoU {mean_iou(model, lambda output: output.logits):.1f}")
    trainer = Trainer(
        model,
        TrainingArguments(
            str(out / "run"),
            max_steps=30,
            per_device_train_batch_size=6,
            learning_rate=1e-3,
            lr_scheduler_type="polynomial",
            eval_strategy="steps",
            eval_steps=10,
            save_steps=10,
            load_best_model_at_end=True,
            prediction_loss_only=True,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=Scenes("train"),
        eval_dataset=Scenes("val"),
        callbacks=[EqualizeTrainerCallback()],  # finds equalize.json where the model came from
    )
    trainer.train()
    best = UperNetForSemanticSegmentation.from_pretrained(trainer.state.best_model_checkpoint)  # plain weights
    print(f"after: mIoU {mean_iou(best, lambda output: output.logits):.1f}, {trainer.state.best_model_checkpoint}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
