"""Ghost batch norm: batch norm of groups of images, each by its own statistics."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.image_groups import ImageGroups
from ._args import check_batch_norm, check_map, reject_unknown
from ._contract import Contract
from ._fold import fold_batch_norm
from ._groups import check_norm_batch, number_of_groups
from ._with_batch_norm import WithBatchNorm


class GhostBN(WithBatchNorm):
    r"""Batch norm with a simulated normalization batch: ``norm_cfg=dict(type='BN', norm_batch=B)``.

    Image i of a batch belongs to group :math:`g = \lfloor i / B \rfloor`, and

    .. math::
        y = \gamma\, \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta

    with mean and biased variance per channel over the ``(B, H, W)`` of the group. So a batch of 32 with ``B=2`` is
    normalized, forward and backward, as 16 batch norms of pairs would. One batch is one step of the running statistics:
    towards the average over groups of mean and unbiased variance, counted once. Eval is plain batch norm, of any batch.

    Shapes: x and y ``(N, C, H, W)``, N a multiple of B in training, 0 included. Statistics in fp32 or better; y has the
    dtype and layout of x. A single value per channel and group has no variance: such a batch is normalized with the
    running statistics and leaves them. State dict as ``nn.BatchNorm2d``'s.

    Args:
        num_features: C.
        norm_batch: B. Default 2, the hard case of the published rows.
        eps: added to the variance inside the root. Default 1e-5.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.1.
        affine: with weight and bias. Default True.

    Raises:
        ValueError: a number out of range; in training, a batch that is no multiple of B; not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Hoffer et al., arXiv:1705.08741, section 4; the running statistics as Yan et al., arXiv:2001.06838.
    """

    _abbr_ = 'bn'  # the attribute name in host models: batch norm's, so that its checkpoints load by key
    contract = Contract(
        'GhostBN',
        loads=('BN',),
        as_in_bn=('eps', 'momentum'),
        batch_norm='bn',
        grouped_as='BN',
        counters=('num_batches_tracked',),
    )

    def __init__(
        self,
        num_features: int,
        norm_batch: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        check_norm_batch('BN', norm_batch)
        check_batch_norm(type(self), eps, momentum)
        super().__init__(num_features, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=affine))
        self.norm_batch = norm_batch

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        bn = self.bn
        if not bn.training:
            return bn(x)
        groups = number_of_groups('BN', self.norm_batch, x)
        count = self.norm_batch * x.shape[2] * x.shape[3]
        if count <= 1 or not x.numel():
            return F.batch_norm(x, *self._running(), bn.weight, bn.bias, False, 0.0, bn.eps)
        images = ImageGroups(x, groups)
        mean, var = images.mean, images.var
        self._update(mean, var, count)
        scale, shift = (var + bn.eps).rsqrt(), torch.zeros_like(mean)
        if bn.affine:
            scale, shift = scale * bn.weight.to(mean.dtype), shift + bn.bias.to(mean.dtype)
        return images.affine(scale, mean, shift)

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: eval is batch norm, of which nothing remains."""
        fold_batch_norm(conv, self.bn)

    def extra_repr(self) -> str:
        return f'norm_batch={self.norm_batch}'
