"""The depthwise convolution of BNET, which stands where batch norm has weight and bias."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv(nn.Module):
    """One k x k kernel and one bias per channel, stride 1, zero padding ``(k - 1) / 2``. It starts as the identity.

    It is no ``nn.Conv2d``: init rules for ``Conv2d`` and heads that draw every ``Conv2d`` would draw its kernels, too.

    Shapes: x and y ``(N, C, H, W)``, y in the dtype of x; ``weight`` ``(C, 1, k, k)``, ``bias`` ``(C,)``.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernels of 1 in the centre and 0 around it: behind a batch norm, that with weight 1 and bias 0."""
        with torch.no_grad():
            self.weight.copy_(centred_kernels(torch.ones_like(self.bias), self.kernel_size))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.conv2d(x, weight, bias, padding=self.kernel_size // 2, groups=self.channels).to(x.dtype)

    def extra_repr(self) -> str:
        return f'{self.channels}, kernel_size={self.kernel_size}'


def centred_kernels(centre: Tensor, kernel_size: int) -> Tensor:
    """Kernels ``(C, 1, k, k)`` that multiply channel c by ``centre[c]``."""
    return F.pad(centre.view(-1, 1, 1, 1), [kernel_size // 2] * 4)
