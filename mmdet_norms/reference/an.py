"""AN: a norm whose affine step is a mixture of k ones, weighted for each instance by its own statistics.

Li, Sun, Wu, "Attentive Normalization", https://arxiv.org/abs/1908.01259, section 3.

    d      = m / sqrt(v + 0.001)                     m, v: mean and unbiased variance of x over H, W
    lambda = hsigmoid(A(d))                          hsigmoid(t) = min(max(t + 3, 0), 6) / 6
    y_nc   = (sum_k lambda_nk weight_kc) x_hat_nc + sum_k lambda_nk bias_kc

    x, x_hat, y   (N, C, H, W)    x_hat: x after batch norm or group norm without an affine step
    m, v, d       (N, C)
    lambda        (N, k)          gates, each by itself: they do not sum to 1
    weight, bias  (k, C)          weight_ and bias_, drawn around 1 and 0
    A             C -> k          a 1x1 convolution; if x_hat is of batch norm, a batch norm of the k logits behind it

Independent implementation from the paper's maths.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceAN(nn.BatchNorm2d):
    """With ``norm='GN'`` the base class has no state and is not used."""

    def __init__(self, num_features, norm='BN', k=10, num_groups=32, eps=1e-5, momentum=0.1):
        super().__init__(num_features, eps, momentum, affine=False, track_running_stats=norm == 'BN')
        self.norm, self.num_groups = norm, num_groups
        self.weight_ = nn.Parameter(1 + 0.1 * torch.randn(k, num_features))
        self.bias_ = nn.Parameter(0.1 * torch.randn(k, num_features))
        attention = nn.Sequential(nn.Conv2d(num_features, k, 1, bias=norm == 'GN'))
        if norm == 'BN':
            attention.append(nn.BatchNorm2d(k, momentum=momentum))
        self.attention_weights = nn.ModuleDict(dict(attention=attention))

    def forward(self, x: Tensor) -> Tensor:
        x_hat = super().forward(x) if self.norm == 'BN' else F.group_norm(x, self.num_groups, eps=self.eps)
        m, v = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)  # (N, C, 1, 1)
        d = m / (v + 0.001).sqrt()
        lam = F.relu6(self.attention_weights['attention'](d) + 3) / 6
        lam = lam.flatten(1)  # (N, k)
        weight, bias = lam @ self.weight_, lam @ self.bias_  # (N, C)
        return weight[:, :, None, None] * x_hat + bias[:, :, None, None]
