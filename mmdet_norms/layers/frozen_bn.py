"""Frozen batch norm: the fixed affine map that a pretrained batch norm becomes when it is no longer trained."""

import torch
from torch import Tensor, nn

from ._args import check_map, check_number, reject_unknown
from ._contract import Contract
from ._fold import fold_batch_norm
from ._loading import check_kind
from ._numerics import per_channel, statistics_dtype


class FrozenBN(nn.Module):
    r"""Batch norm whose statistics *and* affine pair never change.

    .. math::
        y_c = s_c x_c + t_c, \qquad s_c = \frac{\gamma_c}{\sqrt{\mathrm{running\_var}_c + \epsilon}}, \qquad
        t_c = \beta_c - s_c\,\mathrm{running\_mean}_c

    Shapes: x and y ``(N, C, H, W)``, N = 0 included; ``weight``, ``bias``, ``running_mean``, ``running_var`` ``(C,)``.
    The same in ``train()`` and ``eval()``. Computed in fp32 or better; y has the dtype and layout of x.

    All values are buffers, not frozen parameters: mmcv sets ``requires_grad=True`` on every parameter of a norm, and
    optimizers and DDP's check for unused parameters would see them. It is no subclass of ``BatchNorm2d``, which SyncBN
    conversion would replace by a norm that trains.

    State dict: batch norm's. Where a checkpoint holds only ``weight`` and ``bias`` (statistics already folded in), the
    layer becomes exactly that affine map. ``num_batches_tracked`` is carried along; a checkpoint may lack it.

    Args:
        num_features: C.
        eps: added to the variance inside the root. Default 1e-5, batch norm's.

    Raises:
        ValueError: ``eps`` out of range; an input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Ioffe and Szegedy, arXiv:1502.03167, section 3.1 (batch norm at inference); frozen in detectors since
    He et al., arXiv:1512.03385, appendix A.
    """

    _abbr_ = 'bn'  # the attribute name in host models: batch norm's, so that its checkpoints load by key
    contract = Contract('FrozenBN', loads=('BN', 'affine'), as_in_bn=('eps',))

    def __init__(self, num_features: int, eps: float = 1e-5, **unknown):
        super().__init__()
        reject_unknown(type(self), unknown)
        check_number(type(self), 'eps', eps, 0)
        self.num_features = num_features
        self.eps = eps
        self.register_buffer('weight', torch.ones(num_features))
        self.register_buffer('bias', torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))
        self.register_buffer('num_batches_tracked', torch.tensor(0))

    def init_weights(self) -> None:
        """mmengine calls this when the rules of the modules around have been applied.

        What ``zero_init_residual`` zeroes would stay 0 here, and its block without effect: without weights to load, it
        is the identity.
        """
        if not self.weight.any():
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        return _affine(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)

    def to_batch_norm(self) -> nn.BatchNorm2d:
        """The same function as a ``BatchNorm2d`` in eval mode without gradients, for tools that fold BN into convs."""
        bn = nn.BatchNorm2d(self.num_features, eps=self.eps).to(self.weight.device, self.weight.dtype)
        bn.load_state_dict(self.state_dict())
        return bn.requires_grad_(False).eval()

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: nothing of the layer remains."""
        fold_batch_norm(conv, self)

    def extra_repr(self) -> str:
        return f'{self.num_features}, eps={self.eps}'

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        has_affine = prefix + 'weight' in state or prefix + 'bias' in state
        if has_affine and prefix + 'running_mean' not in state and prefix + 'running_var' not in state:
            state[prefix + 'running_mean'] = torch.zeros_like(self.running_mean)
            state[prefix + 'running_var'] = torch.ones_like(self.running_var) - self.eps
        state.setdefault(prefix + 'num_batches_tracked', self.num_batches_tracked)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes
def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    dtype = statistics_dtype(x)
    scale = weight.to(dtype) * torch.rsqrt(var.to(dtype) + eps)
    shift = bias.to(dtype) - mean.to(dtype) * scale
    # Not F.batch_norm: it would keep x for the backward pass, and that needs only the scale.
    return (x * per_channel(scale) + per_channel(shift)).to(x.dtype)
