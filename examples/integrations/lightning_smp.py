"""Lightning and segmentation_models_pytorch: equalize a decoder that was just drawn, train it, load a checkpoint.

python examples/integrations/lightning_smp.py OUT
"""

import sys
from pathlib import Path

import lightning
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scenes import CLASSES, Scenes, batches, mean_iou
from torch.utils.data import DataLoader

import equalize
from equalize.integrations import EqualizeCallback


class Segmentation(lightning.LightningModule):
    """Any network of smp."""

    def __init__(self) -> None:
        super().__init__()
        self.network = smp.Unet("resnet18", encoder_weights=None, classes=len(CLASSES))
        self.loss = smp.losses.DiceLoss("multiclass")

    def training_step(self, batch, index):
        images, labels = batch
        return self.loss(self.network(images), labels)

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(out: Path) -> None:
    """Writes OUT/*.ckpt as Lightning does, and OUT/trained as smp does."""
    module = Segmentation()
    plan = equalize.calibrate(module.network, batches(), strategy="rescale")
    saving = ModelCheckpoint(out, monitor="val_loss", filename="{step}")
    trainer = lightning.Trainer(
        max_epochs=6,
        callbacks=[EqualizeCallback(plan), saving],  # or EqualizeCallback("OUT"), a directory that equalize wrote
        logger=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    val = DataLoader(Scenes("val"), batch_size=6)
    trainer.fit(module, DataLoader(Scenes("train"), batch_size=6, shuffle=True), val)

    best = Segmentation.load_from_checkpoint(saving.best_model_path, map_location="cpu")  # plain weights
    print(f"after: mIoU {mean_iou(best.network):.1f}, {saving.best_model_path}")
    best.network.save_pretrained(out / "trained")
    smp.from_pretrained(out / "trained")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
