"""MABN: batch norm for small batches, by moving averages of the statistics in both passes.

The method in 70 lines: ``reference/mabn.py``; here exact, fast and resumable. How it goes with checkpointing, DDP, loss
scaling, accumulation and other norms' states: docs/norms.md.

Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020,
https://arxiv.org/abs/2001.06838.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch_internals import disable_dynamo
from ..kernels import map_ops
from ._args import ConfigError, check_count, check_map, check_number, reject_unknown
from ._averaging import AveragesOnRequest
from ._contract import Contract
from ._fold import float64, fold_affine
from ._loading import check_kind
from ._mabn_states import take_over
from ._numerics import statistics_dtype
from ._replay import Calls
from .cen_conv import WantsCenConv

NO_DERIVATIVE = (
    'MABN has no second derivative (create_graph=True): its backward pass averages over iterations and is the '
    'derivative of no function, by design (Yan et al. 2020, arXiv:2001.06838), so to differentiate it again would give '
    'a wrong number. '
    'For gradient penalties, AdaHessian or Hessian-vector products use another norm that suits small batches '
    "(norm_cfg type 'GN', 'CBN' or 'BRN'), or put MABN into eval mode, where it is an affine map"
)


class _Normalize(torch.autograd.Function):
    """``y = weight * renorm * x / sqrt(used + eps) + bias`` with MABN's backward pass. Saves x and vectors only.

    used and renorm are ``(C,)``, or ``(G, C)`` of groups of images. ``average(psi, t)`` is what the backward pass of
    iteration t uses in place of its psi.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, used, renorm, t, average, eps):
        ctx.save_for_backward(x, weight, used, renorm, t)
        ctx.average, ctx.eps, ctx.bias_dtype = average, eps, bias.dtype
        scale = weight.to(used.dtype) * renorm * (used + eps).rsqrt()
        return map_ops.affine(x, torch.zeros_like(scale), scale, bias.to(used.dtype).expand_as(scale))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DERIVATIVE)
        x, weight, used, renorm, t = ctx.saved_tensors
        channels, zero, inverse = x.shape[1], torch.zeros_like(used), (used + ctx.eps).rsqrt()
        total, product = map_ops.gradient_sums(grad, x, zero)
        scale = weight.to(used.dtype) * renorm * inverse
        p = ctx.average(scale * product * (used.numel() / x.numel()), t)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = map_ops.gradient(grad, x, scale, zero, -inverse.square() * p, zero)
        if ctx.needs_input_grad[1]:
            grad_weight = (renorm * inverse * product).view(-1, channels).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = total.view(-1, channels).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class MABN(WantsCenConv, AveragesOnRequest):
    r"""Moving average batch normalization: no mean, second moments averaged over a window of m iterations.

    With :math:`\chi_t = \mathrm E[x^2]` per channel over ``(N, H, W)`` in iteration t = 1, 2, ..., and gradient g of y:

    .. math::
        v &= \overline{\chi_t}, \quad z = x / \sqrt{v + \epsilon}, \quad y = \gamma\, r z + \beta, \quad
        r = \mathrm{clip}(\sqrt{v + \epsilon} / \sqrt{\rho + \epsilon},\ 1/5,\ 5) \\
        \psi_t &= \mathrm E[\gamma r g z], \quad
        \partial L / \partial x = (\gamma r g - z\, \overline{\psi_t}) / \sqrt{v + \epsilon}, \quad
        \rho \leftarrow \text{momentum} \cdot \rho + (1 - \text{momentum})\, v

    A bar is the mean of the last m, and nothing while t <= m or t < warmup_iters. r = 1 while t <= max(1000,
    warmup_iters); it has the :math:`\rho` of before. So the backward pass is the exact gradient at first, and later, by
    design, the derivative of nothing: ``create_graph=True`` raises a ``RuntimeError`` in training.
    Eval: :math:`y = \gamma x / \sqrt{\rho + \epsilon} + \beta`.

    No mean is subtracted: the convolution in front has to supply outputs without one (:mod:`.cen_conv`).

    Shapes: x and y ``(N, C, H, W)``, also empty, which is no iteration. State, as published: ``weight``, ``bias``
    ``(C,)``; ``running_var`` (:math:`\rho`) ``(1, C, 1, 1)``; ``iters`` (t) ``(1,)``; ``buffer_x2``, ``buffer_gz``
    ``(m, C)``: :math:`\chi_t` and :math:`\psi_t` in row t mod m. ``docs/norms.md`` says what counts as an iteration,
    and which other states load. Statistics are in fp32 for fp16/bf16 inputs; y has the dtype and layout of x.

    Args:
        num_features: C.
        B: images per process. Default 2, as published.
        real_B: the batch size to imitate, a multiple of B: m is real_B / B. Default 32, as published.
        warmup_iters: default 100, as published; more if the loss diverges at the start.
        momentum: weight of the **old** value in ``running_var``, unlike torch's. Default 0.98, as published.
        eps: added inside the roots. Default 1e-5, as published.
        buffer_size: m, in place of B and real_B.
        norm_batch: images whose statistics are taken together, inside a larger batch: makes a
            :class:`~mmdet_norms.layers.mabn_groups.GroupedMABN`, the published ImageNet variant. Default ``None``.

    Raises:
        ValueError: an argument out of range; real_B no multiple of B; buffer_size given with B or real_B; an input
            that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Yan et al., arXiv:2001.06838, sections 4 and 5.
    """

    # As batch norm: the published backbone keys (layer1.0.bn1.weight) and those of any batch norm model fit unchanged.
    _abbr_ = 'bn'
    contract = Contract(
        'MABN',
        marks=('iters', 'buffer_x2', 'buffer_gz', 'pre_x2', 'pre_gz'),
        loads=('BN', 'MABN of ImageNet', 'affine'),
        behind='CenConv',
        grouped_as='MABN',
        is_differentiable_twice=False,
        counters=('iters',),
    )
    RENORM_DELAY = 1000  # fixed as published, as the limits are
    RENORM_LIMITS = (1 / 5, 5.0)
    WINDOWS = ('buffer_x2', 'buffer_gz')

    def __new__(cls, *args, norm_batch: int | None = None, **kwargs):
        """With a ``norm_batch``, the variant that has it."""
        if cls is MABN and (norm_batch, *args[7:]) != (None,):
            from .mabn_groups import GroupedMABN as cls  # which is made of this class
        return super().__new__(cls)

    def __init__(
        self,
        num_features: int,
        B: int | None = None,
        real_B: int | None = None,
        warmup_iters: int = 100,
        momentum: float = 0.98,
        eps: float = 1e-5,
        buffer_size: int | None = None,
        norm_batch: int | None = None,
        **unknown,
    ):
        reject_unknown(MABN, unknown)
        check_number(MABN, 'eps', eps, 0)
        check_number(MABN, 'momentum', momentum, 0, 1)
        check_count(MABN, 'warmup_iters', warmup_iters, 0)
        super().__init__(num_features, eps, 1 - momentum)
        self.num_features = num_features
        self.buffer_size = _window(B, real_B, buffer_size)
        self.warmup_iters = warmup_iters
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        for name, value in self.new_state().items():
            self.register_buffer(name, value)
        self._calls = Calls()

    @property
    def renorm_delay(self) -> int:
        """Iterations in which r is 1."""
        return max(self.RENORM_DELAY, self.warmup_iters)

    def new_state(self) -> dict[str, Tensor]:
        """The buffers of a new layer."""
        return dict(
            running_var=torch.ones(1, self.num_features, 1, 1),
            iters=torch.zeros(1, dtype=torch.int64),
            buffer_x2=torch.zeros(self.buffer_size, self.num_features),
            buffer_gz=torch.zeros(self.buffer_size, self.num_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if self.training and x.numel() > 0:
            return self._forward_train(x)
        var = self.running_var.flatten().to(statistics_dtype(x))
        weight, bias = self.weight.to(var.dtype), self.bias.to(var.dtype)
        return F.batch_norm(x, torch.zeros_like(var), var, weight, bias, False, 0.0, self.eps)

    @disable_dynamo  # the compiler cannot tell a forward from its repetition by a checkpoint
    def _forward_train(self, x: Tensor) -> Tensor:
        self._check_conv(x)
        with torch.no_grad():
            moment = self._second_moment(x)
            used = self._calls.once(moment, lambda: self._iterate(moment))
        average = partial(self._windowed, getattr(self, self.WINDOWS[1]))
        return _Normalize.apply(x, self.weight, self.bias, *used, average, self.eps)

    def _second_moment(self, x: Tensor) -> Tensor:
        return map_ops.second_moment(x)

    def _iterate(self, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A new iteration, with this moment of the batch: v, r, and which it is. Vectors (C,), of groups (G, C)."""
        if self.averages:
            of_batch = moment.view(-1, self.num_features).mean(0)
            self._average([(self.running_var, of_batch.view_as(self.running_var))])
            return moment, torch.ones_like(moment), self.iters.clone()
        return self._advance(moment)

    def _advance(self, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.iters += 1
        t = self.iters.clone()
        used, old = self._windowed(self.buffer_x2, moment, t), self.running_var.flatten().to(moment.dtype)
        renorm = self._renorm(used, old, t > self.renorm_delay)
        new = self.momentum * old + (1 - self.momentum) * used
        self.running_var.copy_(torch.where(new.isfinite(), new, old).view_as(self.running_var))
        return used, renorm, t

    def _windowed(self, window: Tensor, row: Tensor, t: Tensor) -> Tensor:
        """Write ``row`` (C,) of iteration t over the oldest of ``window`` (m, C). Returns its mean; at first the row.

        Not where it is inf or nan: an overflow in fp16, for which a loss scaler skips the step, would stay for m steps,
        and the scaler would halve its scale in each.
        """
        slot, new = t % len(window), row.to(window.dtype)
        window.index_copy_(0, slot, torch.where(new.isfinite(), new, window.index_select(0, slot)))
        alone = (t <= len(window)) | (t < self.warmup_iters)  # the one <= and the one < are as published
        return torch.where(alone, row, window.to(row.dtype).mean(0))

    def _renorm(self, used: Tensor, running_var: Tensor, wanted: Tensor) -> Tensor:
        renorm = ((used + self.eps).sqrt() / (running_var + self.eps).sqrt()).clamp(*self.RENORM_LIMITS)
        return torch.where(wanted, renorm, torch.ones_like(renorm))

    def to_batch_norm(self) -> nn.BatchNorm2d:
        """A batch norm that is this layer in eval mode: mean 0, variance ``running_var``. In eval mode."""
        norm = nn.BatchNorm2d(self.num_features, eps=self.eps, momentum=1 - self.momentum)
        norm = norm.to(self.weight.device, self.weight.dtype)
        with torch.no_grad():
            norm.weight.copy_(self.weight)
            norm.bias.copy_(self.bias)
            norm.running_var.copy_(self.running_var.flatten())
        return norm.eval()

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: nothing of the layer remains. Give it ``CenConv2d.to_conv2d()`` of a centred one."""
        scale = float64(self.weight) / (float64(self.running_var).flatten() + self.eps).sqrt()
        fold_affine(conv, scale, float64(self.bias))

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, buffer_size={self.buffer_size}, warmup_iters={self.warmup_iters}, '
            f'momentum={self.momentum}, eps={self.eps}'
        )

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        take_over(self, state, prefix, missing if strict else [])
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def resized(self, rows: Tensor, t: int) -> Tensor:
        """A window of another length after iteration t as one of this: the newest rows, filled up with their mean."""
        newest = range(t, max(t - min(len(rows), self.buffer_size), 0), -1)
        resized = rows.new_zeros(self.buffer_size, rows.shape[1])
        if newest:
            kept = rows[[i % len(rows) for i in newest]]
            resized += kept.mean(0)
            resized[[i % self.buffer_size for i in newest]] = kept
        return resized


def _window(B: int | None, real_B: int | None, buffer_size: int | None) -> int:
    if buffer_size is not None:
        check_count(MABN, 'buffer_size', buffer_size, 1)
        if B is not None or real_B is not None:
            raise ConfigError(
                f"norm_cfg of type 'MABN': buffer_size={buffer_size} stands in place of B={B} and real_B={real_B}; "
                'write one or the other'
            )
        return buffer_size
    B, real_B = 2 if B is None else B, 32 if real_B is None else real_B
    check_count(MABN, 'B', B, 1)
    check_count(MABN, 'real_B', real_B, 1)
    if real_B % B:
        raise ConfigError(
            f"norm_cfg of type 'MABN': real_B={real_B} is no multiple of B={B}; the window is real_B / B iterations"
        )
    return real_B // B
