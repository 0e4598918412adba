"""AN: attentive normalization, a mixture of affine transforms weighted per instance.

Li, Sun, Wu, "Attentive Normalization", ECCV 2020, https://arxiv.org/abs/1908.01259.
Independent implementation from the paper's maths.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch_versions import autocast_is_on
from ..kernels.instance_affine import instance_affine, is_supported
from ._args import ConfigError, check_map, check_number, reject_unknown
from ._contract import Contract
from ._fold import InferenceOnly, batch_norm_affine, float64
from ._loading import check_kind
from ._recompute import in_backward, run_batch_norm, running_statistics
from ._watched import is_watched
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
    return _in_range(d, dtype)


def _in_range(d: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype in _HALVES:  # a whole model in half precision: flat channels, and sums over them, may exceed its range
        limit = torch.finfo(dtype).max / d.shape[1]
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
    if not isinstance(x, Tensor) or not autocast_is_on(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class _Attention(nn.Module):
    """Weights ``(N, K, 1, 1)`` of the mixture from the statistics of the raw input. Named as in the checkpoints."""

    def __init__(self, num_features: int, k: int, norm: nn.Module | None):
        super().__init__()
        conv = nn.Conv2d(num_features, k, 1, bias=norm is None)
        self.attention = nn.Sequential(conv) if norm is None else nn.Sequential(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self._gates(_describe(x, self.attention[0].weight.dtype))

    def from_moments(self, mean: Tensor, var: Tensor) -> Tensor:
        """The same from mean and unbiased variance ``(N, C)`` of every channel of every instance."""
        d = mean / (var + _DESCRIPTOR_EPS).sqrt()
        return self._gates(_in_range(d[..., None, None], self.attention[0].weight.dtype))

    def _gates(self, d: Tensor) -> Tensor:
        conv, *norms = self.attention
        logits = conv(d)
        for norm in norms:
            logits = run_batch_norm(norm, logits)
        return F.relu6(logits + 3) / 6  # not F.hardsigmoid, whose gradient has only fp32's digits of 1/6 in fp64


class FoldedAN(InferenceOnly, nn.Module):
    r"""AN at inference: the instance's moments, two small matrix products, one scale-shift pass.

    .. math::
        g_n = \min(\max(A d_n + a, 0), 6), \qquad (s_n, t_n) = g_n M, \qquad y_{nc} = s_{nc} x_{nc} + t_{nc}

    A and a hold the attention's convolution, its logit norm and the 3 of hsigmoid; M, ``(k, 2 C)``, holds
    :math:`\gamma / 6`, :math:`\beta / 6` and, for batch norm, the running statistics:
    :math:`\gamma_{kc} / 6 \sigma_c` and :math:`(\beta_{kc} - \gamma_{kc} \mu_c / \sigma_c) / 6`. Group norm's
    statistics follow from the instance's moments. Nothing goes into the convolution in front, whose raw output the
    attention reads.

    Same shapes, dtypes and treatment of 1x1 maps and N = 0 as :class:`AN`. State dict: ``attention.weight``
    ``(k, C)``, ``attention.bias`` ``(k,)``, ``mixture`` ``(k, 2 C)``.
    """

    def __init__(self, num_features: int, k: int, num_groups: int | None, eps: float):
        super().__init__()
        self.num_features, self.num_groups, self.eps = num_features, num_groups, eps
        self.attention = nn.Linear(num_features, k)
        self.mixture = nn.Parameter(torch.empty(k, 2 * num_features))

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if x.shape[0] == 0:
            return x
        with _no_autocast(x):
            if is_supported(x):
                return instance_affine(x, lambda mean, var: self._rule(x, mean, var))
            wide = x.float() if x.dtype in _HALVES else x
            var, mean = torch.var_mean(wide, (2, 3), correction=0)
            scale, origin, shift = (t[..., None, None] for t in self._rule(x, mean, var))
            return torch.addcmul(shift, wide - origin, scale).to(x.dtype)

    def _rule(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, origin and shift of every channel of every instance from its mean and biased variance (N, C)."""
        size = x.shape[2] * x.shape[3]
        d = mean / (var * (size / max(size - 1, 1)) + _DESCRIPTOR_EPS).sqrt()
        weight, bias, mixture = (p.to(mean.dtype) for p in (*self.attention.parameters(), self.mixture))
        scale, shift = (F.relu6(F.linear(d, weight, bias)) @ mixture).chunk(2, 1)
        if self.num_groups is None:
            return scale, torch.zeros_like(mean), shift
        scale, mean, var = (t.unflatten(1, (self.num_groups, -1)) for t in (scale, mean, var))
        origin, var = _pool(mean, var, 2)
        return (scale * (var + self.eps).rsqrt()).flatten(1), origin.expand_as(mean).flatten(1), shift

    def extra_repr(self) -> str:
        return f'{self.num_features}' + ('' if self.num_groups is None else f', num_groups={self.num_groups}')


_ON_GN = Contract(
    'AN with group norm',
    loads=('affine',),
    why_not={'BN': 'group norm has no running statistics: it uses those of each image'},
    stays='its scale and shift come from the input',
)


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
    rows cancels, but lets them learn different things. Strictly, too: nothing is reported missing.

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
            ``eps`` or ``momentum`` out of range; an input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Li, Sun, Wu, arXiv:1908.01259, section 3. Independent implementation from the paper's maths.
    """

    _abbr_ = 'bn'  # mmcv names the attribute after it: bn2 in a Bottleneck, as in the published checkpoints
    contract = Contract(
        'AN',
        marks=('weight_', 'attention_weights'),
        kind_without_statistics='AN with group norm',
        loads=('BN',),
        as_in_bn=('eps', 'momentum'),
        stays='its scale and shift come from the input',
        counters=('num_batches_tracked', 'attention_weights.attention.1.num_batches_tracked'),
    )

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
            raise ConfigError(
                f"norm_cfg of type 'AN': norm={norm!r} is unknown; choose 'BN' (backbones) or 'GN' (heads)"
            )
        if not _is_positive_integer(k):
            raise ConfigError(
                f"norm_cfg of type 'AN': k={k!r}, the number of affine transforms, must be a positive integer; "
                'the paper uses 10 and 20'
            )
        if norm == 'GN' and not (_is_positive_integer(num_groups) and num_features % num_groups == 0):
            divisors = [str(i) for i in range(1, num_features + 1) if num_features % i == 0]
            raise ConfigError(
                f"norm_cfg of type 'AN': num_groups={num_groups!r} must divide the {num_features} channels; "
                f'choose one of: {", ".join(divisors)}'
            )
        check_number(type(self), 'eps', eps, 0)
        if momentum is not None:
            check_number(type(self), 'momentum', momentum, 0, 1)
        bn = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False) if norm == 'BN' else None
        super().__init__(num_features, bn)
        self.norm = norm
        if norm == 'GN':
            self.contract = _ON_GN
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
        check_map(self, self.num_features, x)
        with _no_autocast(x):
            if is_supported(x) and self._is_as_built():
                batch_statistics = self.norm == 'BN' and self.bn.training and x.numel() > x.shape[1]
                return instance_affine(x, lambda mean, var: self._rule(x, mean, var, batch_statistics))
            if self.norm == 'BN':
                x_hat = run_batch_norm(self.bn, x)
            else:
                # nn.functional's checks refuse one value per group, which is a normal thing: x_hat = 0.
                x_hat = torch.group_norm(x, self.num_groups, None, None, self.eps)
            return _mix(x_hat, self.attention_weights(x), self.weight_, self.bias_, x.dtype)

    def _is_as_built(self) -> bool:
        """Neither child was replaced (SyncBN conversion, fusion) or is being watched."""
        if type(self.attention_weights) is not _Attention or is_watched(self.attention_weights):
            return False
        if self.norm == 'GN':
            return True
        return type(self.bn) is nn.BatchNorm2d and self.bn.track_running_stats and not is_watched(self.bn)

    def _rule(self, x: Tensor, mean: Tensor, var: Tensor, batch_statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, origin and shift of every channel of every instance from its mean and biased variance (N, C)."""
        size = x.shape[2] * x.shape[3]
        lam = self.attention_weights.from_moments(mean, var * (size / max(size - 1, 1))).flatten(1).to(mean.dtype)
        scale, shift = lam @ self.weight_.to(mean.dtype), lam @ self.bias_.to(mean.dtype)
        if self.norm == 'GN':
            scale, mean, var = (t.unflatten(1, (self.num_groups, -1)) for t in (scale, mean, var))
            origin, var = _pool(mean, var, 2)
            return (scale * (var + self.eps).rsqrt()).flatten(1), origin.expand_as(mean).flatten(1), shift
        if not batch_statistics:
            bn = self.bn
            running = running_statistics(bn) if bn.training else (bn.running_mean, bn.running_var)
            origin, var = (statistic.to(mean.dtype) for statistic in running)
        else:
            origin, var = (t.squeeze(0) for t in _pool(mean, var, 0))
            if not in_backward():  # activation checkpointing repeats a forward that was counted
                count = len(x) * size
                self._update(origin.detach(), var.detach() * (count / (count - 1)))
        return scale * (var + self.bn.eps).rsqrt(), origin, shift

    def folded(self) -> FoldedAN:
        """See :mod:`._fold`: the layer in eval mode, with all that is fixed multiplied out."""
        conv, *norms = self.attention_weights.attention
        weight = float64(conv.weight).flatten(1)
        bias = weight.new_zeros(self.k) if conv.bias is None else float64(conv.bias)
        for bn in norms:
            if not isinstance(bn, nn.Identity):  # left by another tool's fusion
                scale, shift = batch_norm_affine(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
                weight, bias = weight * scale[:, None], bias * scale + shift
        gamma, beta = float64(self.weight_) / 6, float64(self.bias_) / 6
        if self.norm == 'BN':
            scale, shift = batch_norm_affine(None, None, self.bn.running_mean, self.bn.running_var, self.bn.eps)
            gamma, beta = gamma * scale, beta + gamma * shift
        folded = FoldedAN(self.num_features, self.k, self.num_groups if self.norm == 'GN' else None, self.eps)
        state = {'attention.weight': weight, 'attention.bias': bias + 3, 'mixture': torch.cat([gamma, beta], 1)}
        folded.to(self.weight_).load_state_dict(state)
        return folded.eval()

    def extra_repr(self) -> str:
        groups = f', num_groups={self.num_groups}' if self.norm == 'GN' else ''
        return f'{self.num_features}, norm={self.norm!r}, k={self.k}{groups}'

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        if f'{prefix}weight_' not in state and prefix + 'weight' in state:
            self._load_plain_affine(state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def _load_plain_affine(self, state, prefix, errors) -> None:
        plain = {name: state.pop(prefix + name) for name in ('weight', 'bias') if prefix + name in state}
        for name, value in plain.items():
            if value.shape != (self.num_features,):
                errors.append(
                    f"size mismatch for {prefix}{name}: a plain norm's {name} of shape ({self.num_features},) can "
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
            state.update((f'{prefix}attention_weights.{k}', v) for k, v in self.attention_weights.state_dict().items())


def _pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over parts of equal size with these; ``dim`` is kept."""
    origin = mean.mean(dim, keepdim=True)
    return origin, (var + (mean - origin).square()).mean(dim, keepdim=True)


def _is_positive_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
