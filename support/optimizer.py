"""The optimiser of all stages: AdamW, its learning rate at a step, and one step."""

import math

import torch
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from support.errors import UserError


def adamw(module: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters of a module. The learning rate is set at every step."""
    return torch.optim.AdamW(module.parameters(), weight_decay=weight_decay, fused=True)


def learning_rate_at(step: int, max_steps: int, config, peak: float | None = None) -> float:
    """The learning rate of step 1 .. max_steps: `peak` (default `config.learning_rate`) times the
    schedule of transformers that `config.lr_scheduler_type` names.

    `config.warmup_steps` counts steps, or is a share of the run where it is below 1. The warm-up of
    transformers begins with a step at rate 0, which teaches nothing. Here it begins one step
    further on (D17), so the last step of the warm-up and the one after it have the peak rate."""
    peak = config.learning_rate if peak is None else peak
    warmup = math.ceil(config.warmup_steps * (max_steps if config.warmup_steps < 1 else 1))
    name = config.lr_scheduler_type
    with_warmup = "constant_with_warmup" if name == "constant" else name
    try:  # get_scheduler wants an optimiser; this one holds the peak rate and nothing else
        holder = torch.optim.SGD([torch.zeros(1)], peak)
        schedule = get_scheduler(with_warmup, holder, warmup, max_steps).lr_lambdas[0]
    except ValueError as error:
        raise UserError(
            f"--lr_scheduler_type {name}: {error}; raise the learning rate or choose another "
            f"schedule"
        ) from None
    if step <= warmup:  # some schedules divide by the steps after it, of which there may be none
        return peak * step / warmup
    return peak * schedule(step - 1)


def optimizer_step(module, optimizer, learning_rate: float, max_grad_norm: float) -> float:
    """Clips the global gradient norm, makes one step, clears the gradients. Returns the norm before
    clipping. Where the norm is not finite the step is left out, and the weights stay as they were
    (D19)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
