"""BNET: batch norm whose affine step looks at the neighbourhood.

Xu et al., "Batch Normalization with Enhanced Linear Transformation", https://arxiv.org/abs/2011.14150, section 3.

    x_hat = (x - mean) / sqrt(var + eps)
    y_c   = K_c * x_hat_c + b_c                     for each channel c

    x, x_hat, y  (N, C, H, W)
    mean, var    (C,)            over N, H, W; var biased; in eval mode the running ones
    K            (C, 1, k, k)    bnconv.weight: a kernel per channel, where batch norm has a weight
    b            (C,)            bnconv.bias

The convolution ``*`` pads x_hat with zeros, as if x went on at its mean. With k = 1 this is batch norm.
"""

from torch import Tensor, nn


class ReferenceBNET(nn.BatchNorm2d):
    """Two operations, so x_hat is written, read, and kept for the backward pass."""

    def __init__(self, num_features: int, kernel_size: int = 3, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__(num_features, eps, momentum, affine=False)
        self.bnconv = nn.Conv2d(num_features, num_features, kernel_size, padding=kernel_size // 2, groups=num_features)
        # The identity, 1 at the centre of each kernel: training starts from batch norm.
        nn.init.dirac_(self.bnconv.weight, groups=num_features)
        nn.init.zeros_(self.bnconv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x_hat = super().forward(x)
        return self.bnconv(x_hat)
