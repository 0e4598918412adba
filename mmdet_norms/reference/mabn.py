"""MABN: batch norm for small batches, by averages of its statistics over iterations, forward and backward.

Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", arXiv:2001.06838.

    v = average of E[x^2] over the last m iterations            E: over N, H, W
    z = x / sqrt(v + eps)                                       no mean: the convolution in front is centred
    r = sqrt(v + eps) / sqrt(running_var + eps)                 clipped to [1/5, 5]
    y = weight r z + bias

    g     = weight r dL/dy
    p     = average of E[g z] over the last m iterations        in batch norm's own gradient: of this batch alone
    dL/dx = (g - z p) / sqrt(v + eps)

    x, y, z, g                           (N, C, H, W)
    v, r, p, running_var, weight, bias   one value per channel
    buffer_x2, buffer_gz                 (m, C)                 E[x^2] and E[g z] of the last m iterations

m = real_B / B: as many iterations of B images as make real_B. Until the window is full, and in the first 100 iterations
(warmup_iters), v and p are those of the batch alone. In the first 1000 iterations r = 1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceCenConv2d(nn.Conv2d):
    """The convolution in front: each filter minus its mean."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ReferenceMABN(nn.Module):
    RENORM_DELAY = 1000  # iterations before r is used

    def __init__(self, num_features, B=2, real_B=32, warmup_iters=100, momentum=0.98, eps=1e-5, buffer_size=None):
        super().__init__()
        self.window = buffer_size or real_B // B
        self.warmup_iters, self.momentum, self.eps = warmup_iters, momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(1, num_features, 1, 1))
        self.register_buffer('iters', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('buffer_x2', torch.zeros(self.window, num_features))
        self.register_buffer('buffer_gz', torch.zeros(self.window, num_features))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        if not self.training:
            return weight * (x / (self.running_var + self.eps).sqrt()) + bias
        t = int(self.iters.add_(1))  # waits for the GPU
        v = self.average(self.buffer_x2, x.detach().square(), t)
        r = self.renorm(v, t)
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * v
        z = x / (v + self.eps).sqrt()
        if z.requires_grad:
            z_kept = z.detach()
            z.register_hook(lambda g: g - z_kept * self.average(self.buffer_gz, g * z_kept, t))
        return weight * r * z + bias

    def average(self, buffer: Tensor, values: Tensor, t: int) -> Tensor:
        now = values.mean((0, 2, 3), keepdim=True)
        buffer[t % self.window] = now.flatten()
        alone = t <= self.window or t < self.warmup_iters
        return now if alone else buffer.mean(0).view_as(now)

    def renorm(self, v: Tensor, t: int) -> Tensor:
        if t <= max(self.RENORM_DELAY, self.warmup_iters):
            return torch.ones_like(v)
        return ((v + self.eps).sqrt() / (self.running_var + self.eps).sqrt()).clamp(1 / 5, 5)
