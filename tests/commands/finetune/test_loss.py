import pytest
import torch
from torch.nn import functional as F

from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.loss import segmentation_loss
from equalize.commands.finetune.trained_output import trained_output
from equalize.errors import InputError


def test_networks_that_match_masks_are_refused():
    class Matcher(torch.nn.Conv2d):
        def forward(self, x, mask_labels=None):
            return x

    checkpoint = type("Stub", (), {"model": Matcher(3, 3, 1), "architecture": "Matcher", "family": "custom"})()
    with pytest.raises(InputError, match="Matcher: is trained by matching masks"):
        trained_output(checkpoint, torch.ones(1, 3, 4, 4))


def test_loss_is_the_mean_over_labeled_pixels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 6, 6), torch.randint(0, 4, (2, 6, 6))
    labels[:, :2] = 11
    options = {"label_smoothing": 0.1, "ignore_index": 11}
    weights = (1.0, 2.0, 0.5, 3.0)
    for weight in (None, weights):
        given = None if weight is None else torch.tensor(weight)
        expected = F.cross_entropy(logits, labels, weight=given, **options)
        config = TrainConfig(class_weights=weight, aux_weight=0.25, **options)
        found = segmentation_loss([logits, logits], labels, config)
        assert found == pytest.approx(1.25 * float(expected), rel=1e-5)
    assert float(segmentation_loss([logits], torch.full((2, 6, 6), 11), TrainConfig(ignore_index=11))) == 0.0
