"""BNET: batch normalization whose affine step looks at the neighbourhood.

The method in 31 lines: ``reference/bnet.py``; here exact, fast and resumable. How it goes with mmdet's switches and
other tools: docs/norms.md.

Xu et al., "Batch Normalization with Enhanced Linear Transformation", https://arxiv.org/abs/2011.14150.
"""

from torch import Tensor, nn

from ..kernels.depthwise import inference, normalize_and_convolve
from ._args import ConfigError, check_batch_norm, check_map, check_residual, is_count, reject_unknown
from ._contract import Contract
from ._fold import InferenceOnly, fold_batch_norm
from ._running_statistics import run_batch_norm
from ._watched import is_watched
from ._with_batch_norm import WithBatchNorm
from .depthwise_conv import DepthwiseConv, centred_kernels


class FoldedBNET(InferenceOnly, DepthwiseConv):
    """What is left of :class:`BNET` when its batch norm is part of the convolution in front: the depthwise one.

    The convolution in front puts out normalized maps, so zero padding is BNET's. State dict: ``weight``, ``bias``.
    At the end of a residual block it adds the shortcut and applies ReLU in the same pass.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False, inplace: bool = False) -> Tensor:
        check_map(self, self.channels, x)
        if residual is not None:
            check_residual(self, self.channels, x, residual)
        return inference(x, self.weight, self.bias, residual, relu, inplace)


class BNET(WithBatchNorm):
    r"""Batch norm followed by a depthwise k x k convolution in place of the per-channel affine step.

    .. math::
        \hat x_c = \frac{x_c - \mathrm E[x_c]}{\sqrt{\mathrm{Var}[x_c] + \epsilon}}, \qquad
        y_c = K_c * \hat x_c + b_c, \qquad K_c \in \mathbb R^{k \times k}

    Mean and biased variance are taken per channel over ``(N, H, W)`` of the batch in training mode; in eval mode the
    running ones are used. ``*`` pads with zeros in *normalized* space: outside the map, x equals the channel mean.
    Batch norm is the case ``k = 1``, and a new layer is one: 1 in the centre of each kernel, 0 around it.

    Shapes: x and y ``(N, C, H, W)``, N = 0 included; statistics in fp32 or better, y in the dtype of x.

    State dict, as published: ``running_mean, running_var, num_batches_tracked`` of the child ``bn``, and
    ``bnconv.weight`` ``(C, 1, k, k)``, ``bnconv.bias`` ``(C,)``. A batch norm's ``weight`` and ``bias`` load as the
    centres of the kernels and the bias: the identical function.

    Args:
        num_features: C.
        kernel_size: k, odd. The paper uses 3, 5 and 7; larger costs more and gains more. Default 3.
        eps: added to the variance inside the root. Default 1e-5, as published.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.1, as published.

    Raises:
        ValueError: ``kernel_size`` even, not positive or no integer; ``eps`` or ``momentum`` out of range; an input
            that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Xu et al., arXiv:2011.14150, section 3.
    """

    _abbr_ = 'bnet'  # mmcv names the attribute after it: bnet3 in a Bottleneck, as in the published checkpoints
    contract = Contract(
        'BNET',
        marks=('bnconv',),
        loads=('BN',),
        as_in_bn=('eps', 'momentum'),
        batch_norm='bn',
        counters=('num_batches_tracked',),
    )

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        if not is_count(kernel_size) or kernel_size % 2 == 0:
            raise ConfigError(
                f"norm_cfg of type 'BNET': kernel_size={kernel_size!r} must be an odd positive integer, "
                'because an even kernel shrinks the map; write 3, 5 or 7'
            )
        check_batch_norm(type(self), eps, momentum)
        super().__init__(num_features, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False))
        self.kernel_size = kernel_size
        self.bnconv = DepthwiseConv(num_features, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        bn, conv, done = self.bn, self.bnconv, None
        if self.training and self._is_as_built():
            given = () if bn.training else (bn.running_mean, bn.running_var)
            done = normalize_and_convolve(x, conv.weight, conv.bias, bn.eps, *given)
        if done is None:
            return conv(run_batch_norm(bn, x))
        y, mean, var = done  # in one call, for which x alone is saved
        if bn.training:
            self._update(mean, var, x.numel() // x.shape[1])
        return y

    def _is_as_built(self) -> bool:
        """Neither child was replaced (SyncBN conversion, fusion, parametrization) or is being watched."""
        bn, conv = self.bn, self.bnconv
        built = type(bn) is nn.BatchNorm2d and type(conv) is DepthwiseConv and bn.track_running_stats
        return built and not (is_watched(bn) or is_watched(conv))

    def fold_into(self, conv: nn.Module) -> FoldedBNET:
        """See :mod:`._fold`: the depthwise convolution remains. (Folding into *that* is wrong at the borders.)"""
        fold_batch_norm(conv, self.bn)
        rest = FoldedBNET(self.num_features, self.kernel_size).to(self.bnconv.weight)
        rest.load_state_dict(self.bnconv.state_dict())
        return rest.eval()

    def extra_repr(self) -> str:
        return f'{self.num_features}, kernel_size={self.kernel_size}'

    def _take_over(self, state, prefix, errors) -> None:
        if f'{prefix}bnconv.weight' in state or prefix + 'weight' not in state:
            return
        weight, bias = state.pop(prefix + 'weight'), state.pop(prefix + 'bias', None)
        if weight.shape != (self.num_features,):
            errors.append(
                f'size mismatch for {prefix}weight: a batch norm weight of shape ({self.num_features},) can become '
                f'the centre tap of {prefix}bnconv.weight, but the checkpoint has {tuple(weight.shape)}'
            )
            return
        state[f'{prefix}bnconv.weight'] = centred_kernels(weight, self.kernel_size)
        if bias is not None:
            state[f'{prefix}bnconv.bias'] = bias
