"""MABN with a simulated normalization batch: its window runs over groups of images inside a larger batch."""

import torch
from torch import Tensor

from ..compat.torch_versions import is_compiling
from ..kernels import map_ops
from ._args import ConfigError
from ._groups import check_groups, check_norm_batch, for_images
from .mabn import MABN, NO_DERIVATIVE, Call


def _window_means(past: Tensor, rows: Tensor) -> Tensor:
    """For each of ``rows`` (G, C), which come behind ``past`` (m, C): the mean of the last m rows up to it, (G, C)."""
    return torch.cat([past, rows]).unfold(0, len(past), 1)[1:].mean(-1)


def _filled_in(rows: Tensor, past: Tensor) -> Tensor:
    """``rows``, with the mean of the window as it stands where they are inf or nan."""
    return torch.where(rows.isfinite(), rows, past.mean(0))


def _pushed(window: Tensor, rows: Tensor) -> Tensor:
    """``window`` (m, C), oldest first, when ``rows`` (G, C) have followed."""
    return torch.cat([window, rows.to(window.dtype)])[-len(window) :]


def _single(t: Tensor, window: int, groups: int) -> Tensor:
    """Whether batch t uses the statistics of each group alone: the window was not full before it."""
    return t <= -(-window // groups)


class _NormalizeGroups(torch.autograd.Function):
    """``y = weight * renorm * x / sqrt(moment + eps) + bias`` with MABN's backward; moment and renorm of groups (G, C).

    Saves x and vectors only.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, moment, renorm, t, pre_gz, eps):
        ctx.save_for_backward(x, weight, moment, renorm, t)
        # Not saved for backward: each call writes it, and autograd would refuse the calls made before.
        ctx.pre_gz, ctx.eps, ctx.bias_dtype = pre_gz, eps, bias.dtype
        norm_batch = len(x) // len(moment)
        scale = for_images(weight.to(moment.dtype) * renorm * (moment + eps).rsqrt(), norm_batch)
        return map_ops.affine(x, torch.zeros_like(scale), scale, bias.to(moment.dtype).expand_as(scale).contiguous())

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not is_compiling():
            raise RuntimeError(NO_DERIVATIVE)
        x, weight, moment, renorm, t = ctx.saved_tensors
        pre_gz, inverse = ctx.pre_gz, (moment + ctx.eps).rsqrt()
        groups, norm_batch = len(moment), len(x) // len(moment)
        centre = moment.new_zeros(x.shape[:2])
        total, product = map_ops.gradient_sums(grad, x, centre)  # of the images
        product = product.unflatten(0, (groups, norm_batch)).sum(1)
        scale = weight.to(moment.dtype) * renorm * inverse
        psi = scale * product * (groups * x.shape[1] / x.numel())
        past = pre_gz.to(psi.dtype)
        p = torch.where(_single(t, len(pre_gz), groups), psi, _window_means(past, _filled_in(psi, past)))
        newest = _pushed(pre_gz, psi)
        pre_gz.copy_(torch.where(newest.isfinite().all(), newest, pre_gz))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            gain, slope = (for_images(rows, norm_batch) for rows in (scale, -inverse.square() * p))
            grad_x = map_ops.gradient(grad, x, gain, centre, slope, centre)
        if ctx.needs_input_grad[1]:
            grad_weight = (renorm * inverse * product).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = total.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class GroupedMABN(MABN):
    r"""What ``MABN(num_features, norm_batch=B)`` and ``norm_cfg=dict(type='MABN', norm_batch=B)`` make.

    Image n belongs to group :math:`i = \lfloor n / B \rfloor` of G. With :math:`\chi_i = \mathrm E[x^2]` per channel
    over the group's ``(B, H, W)``, batch number t (from 1), and a window of the last m groups, those of the batch
    before included,

    .. math::
        v_i &= \chi_i \text{ if } t \le \lceil m / G \rceil, \text{ else the mean of } \chi \text{ over the m groups up
               to i} \\
        r_i &= 1 \text{ if } t < \text{warmup\_iters, else } \mathrm{clip}(\sqrt{v_i + \epsilon} /
               \sqrt{\rho + \epsilon},\ 1/5,\ 5) \\
        z &= x / \sqrt{v_i + \epsilon}, \qquad y = \gamma\, r_i z + \beta, \qquad
        \rho \leftarrow \overline{v} \text{ if } t = 1 \text{, else momentum} \cdot \rho + (1 - \text{momentum})\,
               \overline{v}

    with :math:`\overline v` the mean over groups; r still has the :math:`\rho` before. Backward as in :class:`MABN`,
    with :math:`\psi_i = \mathrm E[\gamma r_i g z]` over the group and :math:`p_i` the mean of the last m that backward
    passes met. Published is G = m; another G moves the same window by G groups a batch. Eval is MABN's.

    State, by the published names and shapes: ``weight``, ``bias``, ``running_var`` ``(C,)``; ``iters`` ``(1,)``
    batches; ``pre_x2``, ``pre_gz`` ``(m, C)``: the last m groups, oldest first. ``load_state_dict`` takes the authors'
    ImageNet files (whose ``sta_matrix`` is a constant and goes) with their windows, a window of another length with
    its newest groups, a batch norm as MABN does; of a MABN without ``norm_batch``, and there of this, all but the
    windows, which restart. A batch with an inf or nan changes nothing and is not counted.

    Args:
        Those of :class:`MABN`; ``norm_batch``: B; ``real_B``: the window is m = real_B / B; ``warmup_iters``: batches
        before r is used, default 100 as published.

    Source: Yan et al., arXiv:2001.06838, section 5.1 (ImageNet).
    """

    WINDOWS = ('pre_x2', 'pre_gz')
    _KINDS = MABN._KINDS[::-1]

    def __init__(
        self,
        num_features: int,
        B: int | None = None,
        real_B: int | None = None,
        warmup_iters: int = 100,
        momentum: float = 0.98,
        eps: float = 1e-5,
        buffer_size: int | None = None,
        norm_batch: int = 2,
        **unknown,
    ):
        check_norm_batch('MABN', norm_batch)
        if B not in (None, norm_batch):
            raise ConfigError(
                f"norm_cfg of type 'MABN': norm_batch={norm_batch} stands in place of B={B}; write one or the other"
            )
        if buffer_size is None:
            B = norm_batch
        super().__init__(num_features, B, real_B, warmup_iters, momentum, eps, buffer_size, **unknown)
        self.norm_batch = norm_batch

    def _register_state(self) -> None:
        self.register_buffer('running_var', torch.ones(self.num_features))
        self.register_buffer('iters', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('pre_x2', torch.ones(self.buffer_size, self.num_features))
        self.register_buffer('pre_gz', torch.zeros(self.buffer_size, self.num_features))

    def _second_moment(self, x: Tensor) -> Tensor:
        check_groups('MABN', self.norm_batch, x)
        mean, var = map_ops.moments(x, per_instance=True)
        return (mean.square() + var).unflatten(0, (-1, self.norm_batch)).mean(1)

    def _advance(self, batch: Tensor, iters: Tensor, pre_x2: Tensor, running_var: Tensor) -> Call:
        t, past, old = iters + 1, pre_x2.to(batch.dtype), running_var.to(batch.dtype)
        average = _window_means(past, _filled_in(batch, past))
        used = torch.where(_single(t, len(pre_x2), len(batch)), batch, average)
        renorm = ((used + self.eps).sqrt() / (old + self.eps).sqrt()).clamp(*self.RENORM_LIMITS)
        renorm = torch.where(t < self.warmup_iters, torch.ones_like(renorm), renorm)
        now = used.mean(0)
        new = torch.where(t == 1, now, self.momentum * old + (1 - self.momentum) * now).to(running_var.dtype)
        newest = _pushed(pre_x2, batch)
        good = newest.isfinite().all() & new.isfinite().all()
        pre_x2.copy_(torch.where(good, newest, pre_x2))
        running_var.copy_(torch.where(good, new, running_var))
        iters += good
        return Call(batch, used, renorm, t)

    def _normalize(self, x: Tensor, call: Call) -> Tensor:
        return _NormalizeGroups.apply(x, self.weight, self.bias, call.used, call.renorm, call.t, self.pre_gz, self.eps)

    def _resized(self, rows: Tensor, t: int) -> Tensor:
        kept = rows[-self.buffer_size :]
        return torch.cat([kept.mean(0).expand(self.buffer_size - len(kept), -1), kept])

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, norm_batch={self.norm_batch}'
