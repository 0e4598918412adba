"""AN: attentive normalization, a mixture of affine transforms weighted per instance.

The method in 40 lines: ``reference/an.py``; here exact, fast and resumable. Independent, from the paper's maths.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.groups import moments_of_groups
from ..kernels.image_groups import ImageGroups, is_supported
from ._args import ConfigError, check_batch_norm, check_map, is_count, reject_unknown
from ._contract import Contract
from ._numerics import no_autocast, statistics_dtype
from ._running_statistics import run_batch_norm
from ._watched import is_watched
from ._with_batch_norm import WithBatchNorm
from .an_folded import DESCRIPTOR_EPS, FoldedAN, group_statistics

_NORMS = ('BN', 'GN')


@torch.fx.wrap
def _describe(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The descriptor of a map, see :func:`_descriptor`."""
    wide = x.to(statistics_dtype(x))
    if x.shape[0] == 0:
        mean = var = wide.sum((2, 3))  # empty too; var_mean would warn
    else:
        # One value has no unbiased variance; its deviation is 0.
        correction = 1 if x.shape[2] * x.shape[3] > 1 else 0
        var, mean = torch.var_mean(wide, (2, 3), correction=correction)
    return _descriptor(mean, var, dtype)


def _descriptor(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """d, ``(N, C, 1, 1)`` in ``dtype``, from mean and unbiased variance ``(N, C)`` of each channel of each instance."""
    d = mean / (var + DESCRIPTOR_EPS).sqrt()
    if dtype in (torch.float16, torch.bfloat16):  # flat channels, and sums over them, may exceed the range
        limit = torch.finfo(dtype).max / d.shape[1]
        d = d.clamp(-limit, limit)
    return d.to(dtype)[..., None, None]


@torch.fx.wrap
def _mix(x_hat: Tensor, lam: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``(lam @ weight) * x_hat + lam @ bias``, computed in fp32 or better, returned in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    lam = lam.flatten(1).to(wide)
    gamma, beta = lam @ weight.to(wide), lam @ bias.to(wide)
    # addcmul promotes a half x_hat itself, and keeps the half one for the backward pass.
    return torch.addcmul(beta[..., None, None], x_hat, gamma[..., None, None]).to(dtype)


class _Attention(nn.Module):
    """Weights ``(N, k, 1, 1)`` of the mixture from the statistics of the raw input. Named as in the checkpoints."""

    def __init__(self, num_features: int, k: int, norm: nn.Module | None):
        super().__init__()
        conv = nn.Conv2d(num_features, k, 1, bias=norm is None)
        self.attention = nn.Sequential(conv) if norm is None else nn.Sequential(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self._gates(_describe(x, self.attention[0].weight.dtype))

    def from_moments(self, mean: Tensor, var: Tensor) -> Tensor:
        """The same from mean and unbiased variance ``(N, C)``."""
        return self._gates(_descriptor(mean, var, self.attention[0].weight.dtype))

    def _gates(self, d: Tensor) -> Tensor:
        conv, *norms = self.attention
        logits = conv(d)
        for norm in norms:
            logits = run_batch_norm(norm, logits)
        return F.relu6(logits + 3) / 6  # not F.hardsigmoid, whose gradient has only fp32's digits of 1/6 in fp64


_ON_GN = Contract(
    'AN with group norm',
    loads=('affine',),
    why_not={'BN': 'group norm has no running statistics: it uses those of each image'},
    stays='its scale and shift come from the input',
)


class AN(WithBatchNorm):
    r"""Batch or group norm whose affine step is a mixture of ``k`` ones, weighted for each instance by its statistics.

    .. math::
        d &= m / \sqrt{v + 10^{-3}}, \qquad \lambda = \mathrm{hsigmoid}(A(d)), \qquad
        \mathrm{hsigmoid}(t) = \min(\max(t + 3, 0), 6) / 6 \\
        y_{nc} &= \Bigl(\sum_k \lambda_{nk}\, \gamma_{kc}\Bigr) \hat x_{nc} + \sum_k \lambda_{nk}\, \beta_{kc}

    :math:`m` and :math:`v` ``(N, C)`` are mean and *unbiased* variance of the raw input over ``(H, W)``; gradients flow
    through both. :math:`\hat x` is the normalized input without affine step and :math:`A` the attention net:

    - ``norm='BN'`` (backbones): batch norm over ``(N, H, W)``, running statistics in eval mode; A is a 1x1 convolution
      without bias and a batch norm over the k logits, with statistics of its own over the N instances.
    - ``norm='GN'`` (heads): group norm, the same in training and eval mode; A is a 1x1 convolution with bias.

    Shapes: x and y ``(N, C, H, W)``, also empty; ``weight_`` and ``bias_`` (:math:`\gamma`, :math:`\beta`) ``(k, C)``.
    Statistics and mixing are in fp32 for fp16/bf16 inputs; y has the dtype and layout of x. State dict, as published:
    ``weight_, bias_, running_mean, running_var, num_batches_tracked, attention_weights.attention.*``.
    ``docs/norms.md`` has how it starts, what a plain norm's state becomes, and single values.

    Args:
        num_features: C.
        norm: 'BN' or 'GN': what normalizes x. Default 'BN'.
        k: number of affine transforms. Default 10; the paper uses 20 in the later half of a ResNet and of a box head.
        num_groups: groups of the group norm; must divide C. Default 32, as published. Not used for BN.
        eps: added to the variance of x inside the root. Default 1e-5, as published; the logit norm always has that.
        momentum: weight of the newest batch in the running statistics of both batch norms (torch's convention);
            ``None`` averages over all batches. Default 0.1, as published. Not used for GN.

    Raises:
        ValueError: an argument that is neither choice, no positive integer, out of range, or does not divide C; an
            input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Li, Sun, Wu, "Attentive Normalization", ECCV 2020, section 3, https://arxiv.org/abs/1908.01259.
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
        _check(num_features, norm, k, num_groups)
        check_batch_norm(type(self), eps, momentum)
        bn = gates = None
        if norm == 'BN':
            bn = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False)
            gates = nn.BatchNorm2d(k, momentum=momentum)
        else:
            self.contract = _ON_GN
        super().__init__(num_features, bn)
        self.norm, self.k = norm, k
        self.num_groups, self.eps = num_groups, eps
        self.weight_ = nn.Parameter(torch.empty(k, num_features))
        self.bias_ = nn.Parameter(torch.empty(k, num_features))
        self.attention_weights = _Attention(num_features, k, gates)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the published initial values."""
        nn.init.normal_(self.weight_, 1, 0.1)
        nn.init.normal_(self.bias_, 0, 0.1)
        self._draw_attention()

    def _draw_attention(self) -> None:
        for module in self.attention_weights.attention:
            module.reset_parameters()
        if self.norm == 'BN':
            conv = self.attention_weights.attention[0]
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')

    def init_weights(self) -> None:
        """mmengine calls this when the rules of the modules around have been applied.

        ``zero_init_residual`` zeroes the last norm of a block with all that is in it. That is to be the mixtures, from
        which the output is 0; an attention of zeros would have no gradient.
        """
        attention = list(self.attention_weights.attention.parameters())
        if not any(value.any() for value in attention):
            nn.init.zeros_(self.weight_)
            nn.init.zeros_(self.bias_)
            self._draw_attention()

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        with no_autocast(x):
            if is_supported(x) and self._is_as_built():
                return self._from_moments(x)
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

    def _from_moments(self, x: Tensor) -> Tensor:
        """The forward in few passes over the map: everything follows from the moments (N, C) of its channels."""
        images = ImageGroups(x)
        mean, var = images.mean, images.var
        size, count = x.shape[2] * x.shape[3], x.numel() // x.shape[1]
        lam = self.attention_weights.from_moments(mean, var * (size / max(size - 1, 1))).flatten(1).to(mean.dtype)
        scale, shift = lam @ self.weight_.to(mean.dtype), lam @ self.bias_.to(mean.dtype)
        if self.norm == 'GN':
            origin, var = group_statistics(mean, var, self.num_groups)
        elif self.bn.training and count > 1:
            origin, var = moments_of_groups(mean, var, None)
            self._update(origin, var, count)
        else:
            origin, var = (statistic.to(mean.dtype) for statistic in self._running())
        eps = self.eps if self.norm == 'GN' else self.bn.eps
        return images.affine(scale * (var + eps).rsqrt(), origin, shift)

    def folded(self) -> FoldedAN:
        """See :mod:`._fold`."""
        return FoldedAN.made_of(self)

    def extra_repr(self) -> str:
        groups = f', num_groups={self.num_groups}' if self.norm == 'GN' else ''
        return f'{self.num_features}, norm={self.norm!r}, k={self.k}{groups}'

    def _take_over(self, state, prefix, errors) -> None:
        if f'{prefix}weight_' in state or prefix + 'weight' not in state:
            return
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


def _check(num_features: int, norm, k, num_groups) -> None:
    if norm not in _NORMS:
        raise ConfigError(f"norm_cfg of type 'AN': norm={norm!r} is unknown; choose 'BN' (backbones) or 'GN' (heads)")
    if not is_count(k):
        raise ConfigError(
            f"norm_cfg of type 'AN': k={k!r}, the number of affine transforms, must be a positive integer; "
            'the paper uses 10 and 20'
        )
    if norm == 'GN' and not (is_count(num_groups) and num_features % num_groups == 0):
        divisors = [str(i) for i in range(1, num_features + 1) if num_features % i == 0]
        raise ConfigError(
            f"norm_cfg of type 'AN': num_groups={num_groups!r} must divide the {num_features} channels; "
            f'choose one of: {", ".join(divisors)}'
        )
