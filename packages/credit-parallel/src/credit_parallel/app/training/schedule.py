"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from credit_parallel.app.config import TrainerConfig


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay for weights of two and more dims that are no tables of positions or biases.

    Parameters of one dim are biases and the weights of norms.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = {name: p.ndim > 1 and "bias" not in name and "position" not in name for name, p in named}
    groups = [
        {"params": [p for name, p in named if decays[name] is wanted], "weight_decay": decay}
        for wanted, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainerConfig, steps: int) -> LambdaLR:
    """A linear rise over ``config.warmup`` steps, and half a cosine down to ``config.final_lr`` at the last one."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / (config.warmup + 1)
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    return LambdaLR(optimizer, factor)
