"""Norms made of the statistics of the batch and of each instance, which are known from one pass over the map."""

import torch
from torch import Tensor, nn

from ._args import check_batch_norm, check_map
from ._with_batch_norm import WithBatchNorm


class BatchAndInstance(WithBatchNorm):
    """Base of norms with ``weight`` and ``bias`` ``(C,)`` and the batch's statistics in a child without them.

    A subclass has ``_normalize(x, mean, var)``, which returns y and the mean and biased variance ``(C,)`` that it took
    as the batch's: the given ones, or without them those of x.
    """

    def __init__(self, num_features: int, eps: float, momentum: float | None):
        check_batch_norm(type(self), eps, momentum)
        super().__init__(num_features, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        count = x.shape[0] * x.shape[2] * x.shape[3]
        use_batch = self.bn.training and count > 1
        y, mean, var = self._normalize(x) if use_batch else self._normalize(x, *self._running())
        if use_batch:
            self._update(mean, var, count)
        return y

    def extra_repr(self) -> str:
        return f'{self.num_features}, eps={self.bn.eps}, momentum={self.bn.momentum}'
