"""The sigmoid focal loss in plain PyTorch, with the signatures of mmcv's compiled ops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse import at_least_fp32


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Per logit the sign of the truth and its alpha factor times the weight."""
    hit = target[:, None] == torch.arange(input.shape[1], device=input.device)
    factor = torch.full_like(at_least_fp32(input), 1 - alpha).masked_fill_(hit, alpha)
    if weight.numel():
        factor *= weight[target][:, None]
    return torch.where(hit, 1, -1), factor


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss ``-a * (1 - p)**gamma * log(p)`` per logit, written into ``output``.

    ``p`` is the probability of the truth: ``sigmoid(x)`` with ``a = alpha`` for the target class,
    ``sigmoid(-x)`` with ``a = 1 - alpha`` for the others.

    Args:
        input: (N, C) logits. ``output``: (N, C).
        target: (N,) int64 class; C means background.
        weight: (C,) factor by target class, or empty.
    """
    sign, factor = _focal_terms(input, target, weight, alpha)
    x = at_least_fp32(input) * sign
    output.copy_(-factor * torch.sigmoid(-x) ** gamma * F.logsigmoid(x))


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient ``-a * (1 - p)**gamma * (1 - p - gamma * p * log(p))`` of the loss by the logit."""
    sign, factor = _focal_terms(input, target, weight, alpha)
    x = at_least_fp32(input) * sign
    miss = torch.sigmoid(-x)
    slope = miss - gamma * torch.sigmoid(x) * F.logsigmoid(x)
    grad_input.copy_(-factor * sign * miss**gamma * slope)
