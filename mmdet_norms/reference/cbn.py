"""CBN: batch norm whose statistics span the last few iterations, corrected for how the weights have moved since.

Yao et al., "Cross-Iteration Batch Normalization", https://arxiv.org/abs/2002.05712, section 3.

The input is x = conv(z; W). With the mean m and second moment q of the batch, and those of earlier iterations t under
the weights W_t of their time, a Taylor expansion says what the latter would be under today's weights:

    m'_t = m_t + rho <dm_t/dW_t, W - W_t>           q'_t = q_t + rho <dq_t/dW_t, W - W_t>

    mu  = average of m and all m'_t                 where q'_t >= m'_t^2; other entries of a channel are left out
    var = average of q and all q'_t, minus mu^2
    y   = weight (x - mu) / (sqrt(var) + eps) + bias

    x, y                        (N, C, H, W)
    m, q, mu, var, weight, bias (C,)                moments over N, H, W
    W, dm/dW, dq/dW             (C, C_in, k, k)     the statistics of a channel depend on its own filter only

t runs over the last buffer_num iterations; in the first burnin ones there are none, and var is the unbiased one of the
batch. In eval mode mu and var are the running ones, which follow the batch.
"""

import torch
from torch import Tensor, nn


class ReferenceCBN(nn.Module):
    """dm/dW and dq/dW by autograd: two more weight gradients of the convolution in each training forward."""

    def __init__(
        self, num_features, buffer_num=3, burnin=8, two_stage=True, rho=1.0, eps=1e-5, eps_in_sqrt=False, momentum=0.1
    ):
        super().__init__()
        self.buffer_num, self.burnin, self.two_stage, self.rho = buffer_num, burnin, two_stage, rho
        self.eps, self.eps_in_sqrt, self.momentum = eps, eps_in_sqrt, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))
        self.count, self.history = 0, []

    def forward(self, x: Tensor, conv_weight: Tensor | None = None) -> Tensor:
        if not self.training:
            return self._normalize(x, self.running_mean, self.running_var)
        flat = x.transpose(0, 1).flatten(1)  # (C, N H W)
        mean, second, unbiased = flat.mean(1), flat.square().mean(1), flat.var(1)
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean.detach()
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased.detach()
        self.count += 1
        window = self._window()  # iterations to look back on: none while burning in, or one after the other
        if window == 0 or not x.requires_grad:
            return self._normalize(x, mean, unbiased)
        weight = conv_weight.detach().clone()
        d_mean, d_second = (torch.autograd.grad(s.sum(), conv_weight, retain_graph=True)[0] for s in (mean, second))
        means, seconds = [mean], [second]
        for m_t, q_t, dm_t, dq_t, weight_t in self.history:
            means.append(m_t + self.rho * (dm_t * (weight - weight_t)).sum((1, 2, 3)))
            seconds.append(q_t + self.rho * (dq_t * (weight - weight_t)).sum((1, 2, 3)))
        self.history = [(mean.detach(), second.detach(), d_mean, d_second, weight), *self.history][:window]
        return self._normalize(x, *self.average(torch.stack(means), torch.stack(seconds)))

    def average(self, means: Tensor, seconds: Tensor) -> tuple[Tensor, Tensor]:
        valid = seconds >= means.square()  # (entries, C)
        mu, second = ((values * valid).sum(0) / valid.sum(0) for values in (means, seconds))
        return mu, second - mu.square()

    def _window(self) -> int:
        if self.two_stage or self.burnin == 0:
            return self.buffer_num if self.count > self.burnin else 0
        return int(self.buffer_num * min(self.count / self.burnin, 1))

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        std = (var + self.eps).sqrt() if self.eps_in_sqrt else var.sqrt() + self.eps
        x_hat = (x - mean[:, None, None]) / std[:, None, None]
        return self.weight[:, None, None] * x_hat + self.bias[:, None, None]
