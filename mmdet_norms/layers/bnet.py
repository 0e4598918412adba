"""BNET: batch normalization whose affine step looks at the neighbourhood.

Xu et al., "Batch Normalization with Enhanced Linear Transformation", https://arxiv.org/abs/2011.14150.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.depthwise import inference, is_supported, normalize_and_convolve
from ._args import ConfigError, check_map, check_number, check_residual, reject_unknown
from ._fold import InferenceOnly, fold_batch_norm
from ._loading import check_kind
from ._recompute import in_backward, run_batch_norm
from ._watched import is_watched
from ._with_batch_norm import WithBatchNorm


class _DepthwiseConv2d(nn.Conv2d):
    """One k x k filter per channel, stride 1, zero padding ``(k - 1) / 2``, bias; input dtype kept."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def reset_parameters(self) -> None:
        """Centre tap 1, everything else 0: the identity, i.e. batch norm with weight 1 and bias 0."""
        centre = self.kernel_size[0] // 2
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, :, centre, centre] = 1
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.conv2d(x, weight, bias, 1, self.padding, 1, self.groups).to(x.dtype)


class BNETTaps(_DepthwiseConv2d):
    """The convolution of :class:`BNET`.

    mmengine's init rules (``layer='Conv2d'``) match a module by the name of its class and of its *direct* bases.
    This second generation is therefore a ``Conv2d`` for ``isinstance`` but not for those rules, which would replace
    the identity by a Kaiming draw of std ``sqrt(2 / (C k^2))``.

    Some hosts (heads of RTMDet, YOLOv3, YOLOF) have no rules, but an ``init_weights`` of their own that draws whatever
    ``isinstance`` says is a ``Conv2d``. Such a draw is undone at the end of the whole model's ``init_weights``. Weights
    that were loaded, zeroed, or set by an ``init_cfg`` that names this class stay.
    """

    def __delattr__(self, name: str) -> None:
        if name == '_params_init_info':  # mmengine's notes of what set each parameter, which it deletes at the end
            self._undo_draw(self._params_init_info)
        super().__delattr__(name)

    def _undo_draw(self, notes: dict) -> None:
        note = notes.get(self.weight, {}).get('init_info', '')
        loaded = vars(self).pop('_loaded', False)
        if 'user-defined' in note and not loaded and self.weight.any():
            self.reset_parameters()

    def _load_from_state_dict(self, state, prefix, *args):
        if prefix + 'weight' in state and '_params_init_info' in vars(self):  # by an init_weights of its own
            self._loaded = True
        super()._load_from_state_dict(state, prefix, *args)


class FoldedBNET(InferenceOnly, BNETTaps):
    """What is left of :class:`BNET` when its batch norm is part of the convolution in front: the depthwise one.

    Zero padding is zero in normalized space still, which the convolution in front now puts out. State dict: ``weight``
    ``(C, 1, k, k)``, ``bias`` ``(C,)``. It can end a residual block, too: add the shortcut and apply ReLU in the same
    pass (:func:`mmdet_norms.kernels.depthwise.inference`).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False, inplace: bool = False) -> Tensor:
        check_map(self, self.in_channels, x)
        if residual is not None:
            check_residual(self, self.in_channels, x, residual)
        return inference(x, self.weight, self.bias, residual, relu, inplace)


class BNET(WithBatchNorm):
    r"""Batch norm followed by a depthwise k x k convolution in place of the per-channel affine step.

    .. math::
        \hat x_c = \frac{x_c - \mathrm E[x_c]}{\sqrt{\mathrm{Var}[x_c] + \epsilon}}, \qquad
        y_c = K_c * \hat x_c + b_c, \qquad K_c \in \mathbb R^{k \times k}

    Mean and biased variance are taken per channel over ``(N, H, W)`` of the batch in training mode; in eval mode the
    running ones are used. ``*`` pads with zeros in *normalized* space: outside the map, x equals the channel mean.
    Batch norm is the case ``k = 1``.

    Shapes: x and y ``(N, C, H, W)``; ``bnconv.weight`` ``(C, 1, k, k)`` and ``bnconv.bias`` ``(C,)``, which replace
    batch norm's weight and bias; ``running_mean``, ``running_var`` ``(C,)``. N = 0 passes through and leaves the
    running statistics as they are; so does a batch with one value per channel, which has no variance and is normalized
    with the running statistics. A forward repeated by activation checkpointing counts once. Statistics are accumulated
    in fp32 for fp16/bf16 inputs; y has the dtype of x.

    Training in fp32 on a CPU runs in :mod:`mmdet_norms.kernels.depthwise`, which saves x only and costs about what
    batch norm does; every other case is the two modules one after the other.

    The layer starts as the identity transform (centre tap 1, the rest 0), so a network that swaps BN for BNET starts as
    the same function. ``zero_init_residual`` of a ResNet zeroes the taps, as it zeroes BN's weight.

    State dict: the published keys ``running_mean, running_var, num_batches_tracked, bnconv.weight, bnconv.bias``.
    A plain batch norm's ``weight`` and ``bias`` load as centre tap and bias: the identical function.

    The batch norm is a child module (``bn``), not a base class: SyncBN conversion, conv-BN fusion, ``norm_eval`` and
    precise-BN tools find it there and treat it correctly, and the convolution stays in place behind it.

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

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or not kernel_size % 2:
            raise ConfigError(
                f"norm_cfg of type 'BNET': kernel_size={kernel_size!r} must be an odd positive integer, "
                'because an even kernel shrinks the map; write 3, 5 or 7'
            )
        check_number(type(self), 'eps', eps, 0)
        if momentum is not None:
            check_number(type(self), 'momentum', momentum, 0, 1)
        super().__init__(num_features, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False))
        self.kernel_size = kernel_size
        self.bnconv = BNETTaps(num_features, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if self.training and self._is_as_built() and is_supported(x, *self.parameters(), self.bn.running_mean):
            if not self.bn.training:
                return self._train(x, self.bn.running_mean, self.bn.running_var)[0]
            if x.numel() > x.shape[1]:
                return self._train_on_batch_statistics(x)
        return self.bnconv(run_batch_norm(self.bn, x))

    def _train(self, x: Tensor, *statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return normalize_and_convolve(x, self.bnconv.weight, self.bnconv.bias, self.bn.eps, *statistics)

    def _train_on_batch_statistics(self, x: Tensor) -> Tensor:
        y, mean, var = self._train(x)
        if not in_backward():  # activation checkpointing repeats a forward that was counted
            count = x.numel() // x.shape[1]
            self._update(mean, var * (count / (count - 1)))
        return y

    def _is_as_built(self) -> bool:
        """Neither child was replaced (SyncBN conversion, fusion, parametrization) or is being watched."""
        bn, taps = self.bn, self.bnconv
        built = type(bn) is nn.BatchNorm2d and type(taps) is BNETTaps and bn.track_running_stats
        return built and not (is_watched(bn) or is_watched(taps))

    def fold_into(self, conv: nn.Module) -> FoldedBNET:
        """See :mod:`._fold`: the depthwise convolution remains. (Folding into *that* is wrong at the borders.)"""
        fold_batch_norm(conv, self.bn)
        taps = FoldedBNET(self.num_features, self.kernel_size).to(self.bnconv.weight)
        taps.load_state_dict(self.bnconv.state_dict())
        return taps.eval()

    def extra_repr(self) -> str:
        return f'{self.num_features}, kernel_size={self.kernel_size}'

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        if f'{prefix}bnconv.weight' not in state and prefix + 'weight' in state:
            self._load_batch_norm_affine(state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def _load_batch_norm_affine(self, state, prefix, errors) -> None:
        weight = state.pop(prefix + 'weight')
        if weight.shape != (self.num_features,):
            errors.append(
                f'size mismatch for {prefix}weight: a batch norm weight of shape ({self.num_features},) can become '
                f'the centre tap of {prefix}bnconv.weight, but the checkpoint has {tuple(weight.shape)}'
            )
            state.pop(prefix + 'bias', None)  # left alone it would look like the state of yet another norm
            return
        taps = weight.new_zeros(self.bnconv.weight.shape)
        taps[:, 0, self.kernel_size // 2, self.kernel_size // 2] = weight
        state[f'{prefix}bnconv.weight'] = taps
        if prefix + 'bias' in state:
            state[f'{prefix}bnconv.bias'] = state.pop(prefix + 'bias')
