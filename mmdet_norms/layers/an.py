"""AN: attentive normalization, a mixture of affine transforms weighted per instance.

Li, Sun, Wu, "Attentive Normalization", ECCV 2020, https://arxiv.org/abs/1908.01259.
Independent implementation from the paper's maths.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._args import check_number, reject_unknown
from ._recompute import run_batch_norm
from ._with_batch_norm import WithBatchNorm

_NORMS = ('BN', 'GN')
_HALVES = (torch.float16, torch.bfloat16)
_DESCRIPTOR_EPS = 1e-3  # published constant; larger than eps because the quotient grows with a vanishing deviation


@torch.fx.wrap
def _describe(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(N, C, 1, 1)``: mean over unbiased standard deviation of every channel of every instance, in ``dtype``."""
    x = x.float() if x.dtype in _HALVES else x
    if x.shape[0] == 0:
        d = x.sum((2, 3), keepdim=True)
    else:
        # One value has no unbiased variance; its deviation is 0.
        correction = 1 if x.shape[2] * x.shape[3] > 1 else 0
        var, mean = torch.var_mean(x, (2, 3), correction=correction, keepdim=True)
        d = mean / (var + _DESCRIPTOR_EPS).sqrt()
    if dtype in _HALVES:  # a whole model in half precision: flat channels, and sums over them, may exceed its range
        limit = torch.finfo(dtype).max / x.shape[1]
        d = d.clamp(-limit, limit)
    return d.to(dtype)


@torch.fx.wrap
def _mix(x_hat: Tensor, lam: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``(lam @ weight) * x_hat + lam @ bias``, computed in fp32 or better, returned in ``dtype``."""
    full = torch.float32 if dtype in _HALVES else dtype
    lam = lam.flatten(1).to(full)
    gamma, beta = lam @ weight.to(full), lam @ bias.to(full)
    # addcmul promotes a half x_hat itself, and keeps the half one for the backward pass.
    return torch.addcmul(beta[..., None, None], x_hat, gamma[..., None, None]).to(dtype)


def _no_autocast(x: Tensor):
    """Autocast would run the tiny attention net in half precision.

    Entered only where it is on, so that exported graphs do not carry it; symbolic tracing has no device to ask.
    """
    if not isinstance(x, Tensor) or not _autocast_is_on(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _autocast_is_on(device: str) -> bool:
    if hasattr(torch.amp, 'is_autocast_available'):  # torch 2.4: one question for all devices
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


class _Attention(nn.Module):
    """Weights ``(N, K, 1, 1)`` of the mixture from the statistics of the raw input. Named as in the checkpoints."""

    def __init__(self, num_features: int, k: int, norm: nn.Module | None):
        super().__init__()
        conv = nn.Conv2d(num_features, k, 1, bias=norm is None)
        self.attention = nn.Sequential(conv) if norm is None else nn.Sequential(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        conv, *norms = self.attention
        logits = conv(_describe(x, conv.weight.dtype))
        for norm in norms:
            logits = run_batch_norm(norm, logits)
        return F.relu6(logits + 3) / 6  # not F.hardsigmoid, whose gradient has only fp32's digits of 1/6 in fp64


class AN(WithBatchNorm):
    r"""Batch or group norm whose affine step is a mixture of ``k`` ones, weighted for each instance by its statistics.

    .. math::
        d_{nc} &= \frac{m_{nc}}{\sqrt{v_{nc} + 10^{-3}}}, \qquad \lambda_n = \mathrm{hsigmoid}(A(d_n)), \qquad
        \mathrm{hsigmoid}(t) = \min(\max(t + 3, 0), 6) / 6 \\
        y_{nc} &= \Bigl(\sum_k \lambda_{nk}\, \gamma_{kc}\Bigr) \hat x_{nc} + \sum_k \lambda_{nk}\, \beta_{kc}

    :math:`m` and :math:`v` are mean and *unbiased* variance of the raw input x over ``(H, W)``; gradients flow through
    both. :math:`\hat x` is the normalized input without affine step and :math:`A` the attention net:

    - ``norm='BN'`` (backbones): batch norm over ``(N, H, W)``, running statistics in eval mode; A is a 1x1 convolution
      without bias and a batch norm over the k logits, with statistics of its own over the N instances.
    - ``norm='GN'`` (heads): group norm, the same in training and eval mode; A is a 1x1 convolution with bias.

    The :math:`\lambda_{nk}` are independent gates around 1/2, which do not sum to 1: a new layer's output has a
    standard deviation of about k/2, which the norm behind the next convolution absorbs.

    Shapes: x and y ``(N, C, H, W)``; ``weight_`` and ``bias_`` (:math:`\gamma`, :math:`\beta`) ``(k, C)``.
    Statistics and mixing are in fp32 for fp16/bf16 inputs, autocast or not; y has the dtype and layout of x.

    Where the published code fails or yields NaN:

    - 1x1 maps: v = 0, because a single value does not vary.
    - One instance in training with ``norm='BN'``: one logit per component has no variance, so the attention's batch
      norm uses its running statistics and leaves them; likewise :math:`\hat x` of a 1x1 map of one instance.
    - No instance: y is empty, gradients are 0, and no statistic or counter changes.
    - Activation checkpointing: the repeated forward does not update running statistics a second time.

    Initialization as published: ``weight_`` ~ N(1, 0.1), ``bias_`` ~ N(0, 0.1), logit norm 1 and 0. The attention's
    convolution is drawn by Kaiming's rule (fan-out, ReLU) for BN, as the published backbones do, and by torch's default
    for GN, as the published heads do. It is a plain ``Conv2d``: init rules for ``Conv2d`` draw it again, which a
    ResNet's default rule does in just that published way.

    State dict: the published keys ``weight_, bias_, running_mean, running_var, num_batches_tracked,
    attention_weights.attention.*``. The ``weight`` and ``bias`` of a plain batch or group norm load as well. If the
    checkpoint then has no attention, the result is the identical function: row j of ``weight_`` becomes
    ``2 / k * (weight + weight_[j] - mean(weight_))``, ``bias_`` likewise, and weight and bias of the attention's last
    step (logit norm for BN, convolution for GN) are zeroed, so that every :math:`\lambda` is 1/2. The spread of the
    rows cancels, but lets them learn different things. The attention's keys are reported as missing: they name what
    was initialized (``strict=True`` is therefore an error, as usual).

    The batch norms are child modules (``bn`` and the logit norm), not a base class: SyncBN conversion, conv-BN fusion,
    ``norm_eval`` and precise-BN tools find them there. After SyncBN conversion both are synchronized.

    Args:
        num_features: C.
        norm: 'BN' or 'GN': what normalizes x. Default 'BN'.
        k: number of affine transforms. The paper uses 10 (stages 1 and 2 of a ResNet, first two convolutions of a box
            head) and 20 (the later ones). Default 10.
        num_groups: groups of the group norm; must divide C. Default 32, as published. Not used for BN.
        eps: added to the variance of x inside the root. Default 1e-5, as published; the logit norm always has that.
        momentum: weight of the newest batch in the running statistics of both batch norms (torch's convention);
            ``None`` averages over all batches. Default 0.1, as published. Not used for GN.

    Raises:
        ValueError: ``norm`` is neither choice; ``k`` is no positive integer; ``num_groups`` does not divide C;
            ``eps`` or ``momentum`` out of range.
        TypeError: an unknown key.

    Source: Li, Sun, Wu, arXiv:1908.01259, section 3. Independent implementation from the paper's maths.
    """

    _abbr_ = 'bn'  # mmcv names the attribute after it: bn2 in a Bottleneck, as in the published checkpoints

    def __init__(
        self,
        num_features: int,
        norm: str = 'BN',
        k: int = 10,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        if norm not in _NORMS:
            raise ValueError(
                f"norm_cfg of type 'AN': norm={norm!r} is unknown; choose 'BN' (backbones) or 'GN' (heads)"
            )
        if not _is_positive_integer(k):
            raise ValueError(
                f"norm_cfg of type 'AN': k={k!r}, the number of affine transforms, must be a positive integer; "
                'the paper uses 10 and 20'
            )
        if norm == 'GN' and not (_is_positive_integer(num_groups) and num_features % num_groups == 0):
            divisors = [str(i) for i in range(1, num_features + 1) if num_features % i == 0]
            raise ValueError(
                f"norm_cfg of type 'AN': num_groups={num_groups!r} must divide the {num_features} channels; "
                f'choose one of: {", ".join(divisors)}'
            )
        check_number(type(self), 'eps', eps, 0)
        if momentum is not None:
            check_number(type(self), 'momentum', momentum, 0, 1)
        bn = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False) if norm == 'BN' else None
        super().__init__(num_features, bn)
        self.norm = norm
        self.k = k
        self.num_groups = num_groups
        self.eps = eps
        self.weight_ = nn.Parameter(torch.empty(k, num_features))
        self.bias_ = nn.Parameter(torch.empty(k, num_features))
        self.attention_weights = _Attention(
            num_features, k, nn.BatchNorm2d(k, momentum=momentum) if norm == 'BN' else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the published initial values."""
        nn.init.normal_(self.weight_, 1, 0.1)
        nn.init.normal_(self.bias_, 0, 0.1)
        for module in self.attention_weights.attention:
            module.reset_parameters()
        if self.norm == 'BN':
            conv = self.attention_weights.attention[0]
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        with _no_autocast(x):
            if self.norm == 'BN':
                x_hat = run_batch_norm(self.bn, x)
            else:
                # nn.functional's checks refuse one value per group, which is a normal thing: x_hat = 0.
                x_hat = torch.group_norm(x, self.num_groups, None, None, self.eps)
            return _mix(x_hat, self.attention_weights(x), self.weight_, self.bias_, x.dtype)

    def extra_repr(self) -> str:
        groups = f', num_groups={self.num_groups}' if self.norm == 'GN' else ''
        return f'{self.num_features}, norm={self.norm!r}, k={self.k}{groups}'

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if f'{prefix}weight_' not in state and prefix + 'weight' in state:
            self._load_plain_affine(state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def _load_plain_affine(self, state, prefix, errors) -> None:
        plain = {name: state.pop(prefix + name) for name in ('weight', 'bias') if prefix + name in state}
        for name, value in plain.items():
            if value.shape != (self.num_features,):
                errors.append(
                    f'size mismatch for {prefix}{name}: a plain norm\'s {name} of shape ({self.num_features},) can '
                    f'become the rows of {prefix}{name}_, but the checkpoint has {tuple(value.shape)}'
                )
                return
        for name, value in plain.items():
            own = getattr(self, f'{name}_').detach()
            state[f'{prefix}{name}_'] = (own - own.mean(0) + value.to(own)) * (2 / self.k)
        if not any(key.startswith(f'{prefix}attention_weights.') for key in state):
            with torch.no_grad():
                for parameter in self.attention_weights.attention[-1].parameters():
                    parameter.zero_()


def _is_positive_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
