"""MABN over groups of images inside a larger batch, as the authors trained on ImageNet. Formulas: :mod:`.mabn`.

Yan et al., https://arxiv.org/abs/2001.06838, sections 4 and 5.

A batch of N images is G groups of n, and a group is what an iteration is there: each has its own v, r and p, and the
averages run over the last m groups up to it, in this batch and those before. The batch is one step of running_var, by
the mean of its v. Other than there, running_var starts as the first v, and r counts from iteration 100 on.

    x, y, z, g                           (N, C, H, W) as (G, n, C, H, W)
    v, r, p                              (G, C)
    running_var, weight, bias            (C,)
    pre_x2, pre_gz                       (m, C)                 E[x^2] and E[g z] of the last m groups, oldest first
"""

import math

import torch
from torch import Tensor, nn


class ReferenceGroupedMABN(nn.Module):
    def __init__(
        self, num_features, norm_batch=2, real_B=32, warmup_iters=100, momentum=0.98, eps=1e-5, buffer_size=None
    ):
        super().__init__()
        self.norm_batch, self.window = norm_batch, buffer_size or real_B // norm_batch
        self.warmup_iters, self.momentum, self.eps = warmup_iters, momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))
        self.register_buffer('iters', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('pre_x2', torch.ones(self.window, num_features))
        self.register_buffer('pre_gz', torch.zeros(self.window, num_features))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        if not self.training:
            return weight * (x / (self.running_var + self.eps).sqrt()[:, None, None]) + bias
        self.iters += 1
        t = int(self.iters)  # waits for the GPU
        groups = x.unflatten(0, (-1, self.norm_batch))
        v = self.average('pre_x2', groups.detach().square(), t)
        r = self.renorm(v, t)
        now = v.mean((0, 1, 3, 4))
        self.running_var = now if t == 1 else self.momentum * self.running_var + (1 - self.momentum) * now
        z = groups / (v + self.eps).sqrt()
        if z.requires_grad:
            z_kept = z.detach()
            z.register_hook(lambda g: g - z_kept * self.average('pre_gz', g * z_kept, t))
        return (weight * r * z + bias).flatten(0, 1)

    def average(self, name: str, values: Tensor, t: int) -> Tensor:
        now = values.mean((1, 3, 4), keepdim=True)  # (G, 1, C, 1, 1)
        rows = torch.cat([getattr(self, name), now.flatten(1)])
        setattr(self, name, rows[-self.window :])
        alone = t <= math.ceil(self.window / len(now))
        last = [rows[i + 1 : i + 1 + self.window].mean(0) for i in range(len(now))]
        return now if alone else torch.stack(last).view_as(now)

    def renorm(self, v: Tensor, t: int) -> Tensor:
        if t < self.warmup_iters:
            return torch.ones_like(v)
        running = self.running_var[:, None, None]
        return ((v + self.eps).sqrt() / (running + self.eps).sqrt()).clamp(1 / 5, 5)
