"""What the processes of tests have imported when they start: the server they are forked from imports this module."""

import os

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it; torch reads it once, when it is imported

import torch

import equalize
import equalize.cli.reports.plan
import equalize.cli.terminal
import equalize.commands.apply
import equalize.commands.evaluate
import equalize.commands.finetune.finetune
from tests.support.networks import Fusion

equalize.scan(Fusion(torch.nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 8, 8))  # imports what tracing needs
