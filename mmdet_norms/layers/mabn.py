"""MABN: batch norm for small batches, by moving averages of the statistics in both passes.

Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020,
https://arxiv.org/abs/2001.06838.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch_versions import is_compiling
from ..kernels import map_ops
from ._args import ConfigError, check_count, check_map, check_number, reject_unknown
from ._averaging import AveragesOnRequest
from ._contract import Contract
from ._fold import float64, fold_affine
from ._loading import check_kind
from ._numerics import per_channel, statistics_dtype
from ._recompute import in_backward
from ._replay import Calls, handle_of, layer_of
from .cen_conv import WantsCenConv

NO_DERIVATIVE = (
    'MABN has no second derivative (create_graph=True): its backward pass averages over iterations and is the '
    'derivative of no function, by design (Yan et al. 2020, arXiv:2001.06838), so to differentiate it again would give '
    'a wrong number. '
    'For gradient penalties, AdaHessian or Hessian-vector products use another norm that suits small batches '
    "(norm_cfg type 'GN', 'CBN' or 'BRN'), or put MABN into eval mode, where it is an affine map"
)
_ALL_WINDOWS = ('buffer_x2', 'buffer_gz', 'pre_x2', 'pre_gz')
_UNSAVED = ('_handle', '_calls')


class Call(NamedTuple):
    """What one training forward computed: moment of the batch, moment used, renorm factor (C,); iteration (1,).

    With groups, the first three are (G, C).
    """

    batch: Tensor
    used: Tensor
    renorm: Tensor
    t: Tensor


def _single(t: Tensor, window: int, warmup_iters: int) -> Tensor:
    """Whether iteration t uses its own statistics alone. The one ``<=`` and the one ``<`` are as published."""
    return (t <= window) | (t < warmup_iters)


def _push(window: Tensor, t: Tensor, row: Tensor) -> None:
    """Write ``row`` (C,) over the oldest row of ``window`` (m, C).

    Not where it is inf or nan: an overflow in fp16, for which a loss scaler skips the step, would stay for m steps,
    and the scaler would halve its scale in each.
    """
    slot = t % len(window)
    row = row.to(window.dtype)
    window.index_copy_(0, slot, torch.where(row.isfinite(), row, window.index_select(0, slot)))


def _compiled_call(
    batch: Tensor, iters: Tensor, buffer_x2: Tensor, running_var: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`MABN._call` for compiled code, on copies, because the compiler reuses the memory of its tensors."""
    call = layer_of(handle)._call(batch.clone(), iters, buffer_x2, running_var)
    return call.used.clone(), call.renorm.clone(), call.t.clone()


if hasattr(torch.library, 'custom_op'):  # torch >= 2.4
    # Opaque to the compiler. It would compute renorm a second time in the backward, from the running_var that the
    # forward has overwritten by then, and could not tell a forward from its recomputation by checkpointing.
    _compiled_call = torch.library.custom_op(
        'mmdet_norms::mabn_call', _compiled_call, mutates_args=('iters', 'buffer_x2', 'running_var')
    )

    @_compiled_call.register_fake
    def _(batch, iters, buffer_x2, running_var, handle):
        return torch.empty_like(batch), torch.empty_like(batch), torch.empty_like(iters)
else:
    _compiled_call = torch.compiler.disable(_compiled_call)


class _Normalize(torch.autograd.Function):
    """``y = weight * renorm * x / sqrt(moment + eps) + bias`` with MABN's backward. Saves x and vectors only."""

    @staticmethod
    def forward(ctx, x, weight, bias, moment, renorm, t, buffer_gz, warmup_iters, eps):
        ctx.save_for_backward(x, weight, moment, renorm, t)
        # Not saved for backward: each call writes it, and autograd would refuse the calls made before.
        ctx.buffer_gz = buffer_gz
        ctx.warmup_iters, ctx.eps, ctx.bias_dtype = warmup_iters, eps, bias.dtype
        scale, shift = weight.to(moment.dtype) * renorm, bias.to(moment.dtype)
        return F.batch_norm(x, torch.zeros_like(moment), moment, scale, shift, False, 0.0, eps)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not is_compiling():
            raise RuntimeError(NO_DERIVATIVE)
        x, weight, moment, renorm, t = ctx.saved_tensors
        buffer_gz, inverse = ctx.buffer_gz, (moment + ctx.eps).rsqrt()
        scale = weight.to(moment.dtype) * renorm * inverse
        centre = torch.zeros_like(moment)
        total, product = map_ops.gradient_sums(grad, x, centre)
        psi = scale * product * (x.shape[1] / x.numel())
        _push(buffer_gz, t, psi)
        average = buffer_gz.to(psi.dtype).mean(0)
        p = torch.where(_single(t, len(buffer_gz), ctx.warmup_iters), psi, average)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = map_ops.gradient(grad, x, scale, centre, -inverse.square() * p, centre)
        if ctx.needs_input_grad[1]:
            grad_weight = (renorm * inverse * product).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = total.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class MABN(WantsCenConv, AveragesOnRequest):
    r"""Moving average batch normalization: no mean, second moments averaged over a window of iterations.

    With :math:`\chi_t = \mathrm E[x^2]` per channel over ``(N, H, W)``, m the window, t the iteration (from 1),

    .. math::
        v &= \chi_t \text{ if } t \le m \text{ or } t < \text{warmup\_iters, else } \tfrac1m \textstyle\sum_{i<m}
             \chi_{t-i} \\
        r &= 1 \text{ if } t \le \max(1000, \text{warmup\_iters}), \text{ else }
             \mathrm{clip}(\sqrt{v + \epsilon} / \sqrt{\rho + \epsilon},\ 1/5,\ 5) \\
        z &= x / \sqrt{v + \epsilon}, \qquad y = \gamma\, r z + \beta, \qquad
        \rho \leftarrow \text{momentum} \cdot \rho + (1 - \text{momentum})\, v

    where :math:`\rho` is ``running_var``, in r still that of the iteration before. Backward, with upstream gradient g,

    .. math::
        \psi_t = \mathrm E[\gamma r g z], \qquad p = \psi_t \text{ or the mean of the last m, as for } v, \qquad
        \frac{\partial L}{\partial x} = \frac{\gamma r g - z p}{\sqrt{v + \epsilon}}

    and :math:`\partial L / \partial \gamma = \sum g r z`, :math:`\partial L / \partial \beta = \sum g`. While a single
    batch is used and r = 1 this is the exact gradient; afterwards, by design, the derivative of nothing: so
    ``create_graph=True`` raises a ``RuntimeError`` in training. Eval:
    :math:`y = \gamma x / \sqrt{\rho + \epsilon} + \beta`, a batch norm with mean 0 (:meth:`to_batch_norm`).

    No mean is subtracted: the convolution in front has to supply outputs without one, see :mod:`.cen_conv`. A
    convolution whose weight is used as it is makes the layer warn at its first training forward.

    Shapes: x and y ``(N, C, H, W)``, any N >= 0, H, W; N = 0 passes through and is no iteration. State, with the
    published names and shapes: ``weight``, ``bias`` ``(C,)``; ``running_var`` ``(1, C, 1, 1)``, 1 at the start;
    ``iters`` ``(1,)`` int64; ``buffer_x2``, ``buffer_gz`` ``(m, C)``, row ``t mod m`` from the forward and the
    backward of iteration t. Statistics are computed in fp32 for fp16/bf16 inputs; y has the dtype and layout of x.

    What counts as an iteration:

    * Every training forward of the module, with or without grad, with or without backward: each micro-step of
      gradient accumulation, each call of a shared head. The backward of a call writes the row of *that* call and
      averages the rows as they then stand: with several calls before one backward the later calls' rows are new and
      the earlier calls' rows are still those of m iterations ago.
    * Not the recomputation by activation checkpointing (a training forward inside a backward pass): it takes the
      statistics of the call that it repeats, so outputs, gradients and state are those without checkpointing,
      reentrant or not. (Compiled checkpoints find it by its batch moment, among the last 32 calls of the module.)

    Every process of distributed training keeps its own statistics, as published (``broadcast_buffers=False``, which is
    mmengine's default); the checkpoint holds those of rank 0.

    With a loss scaler ``buffer_gz`` is in scaled units: after a change of the scale the window mixes two for m
    iterations unless ``buffer_gz`` is multiplied by new / old. Inf and nan never enter windows or ``running_var``.

    ``torch.optim.swa_utils.update_bn`` and :func:`mmdet_norms.recompute_statistics` make ``running_var`` the average of
    :math:`\chi` over batches, each normalized by its own; ``iters`` and windows stay as they are meanwhile.

    ``load_state_dict`` takes, besides its own and the published files:

    * ``running_var`` of shape ``(C,)``.
    * Windows of another length: the newest rows are kept; where the new window is longer, their mean fills it.
    * A batch norm (``running_mean``, no ``iters``): in eval mode the identical function of the same input, with
      ``bias - weight * running_mean / sqrt(running_var + eps)`` as bias, the batch norm's eps assumed equal. ``iters``
      and both windows start from 0, which a warning says. In training mode x is divided by its second moment
      about 0, so the functions agree as far as its mean is 0. A weight that was trained uncentred gives another x when
      it is loaded into a :class:`~.cen_conv.CenConv2d`; the authors found such weights to train badly.
    * A state without complete windows, or with those of groups (``norm_batch``, and the authors' ImageNet models):
      ``iters`` and windows restart from 0, of the latter with a warning.

    Args:
        num_features: C.
        B: images per process. Default 2, as published.
        real_B: the batch size to imitate, a multiple of B. Default 32, as published: a window of 16.
        warmup_iters: iterations before which the window is not used. Default 100, as published; more if the loss
            diverges at the start.
        momentum: weight of the **old** value in ``running_var``, unlike torch's. Default 0.98, as published.
        eps: added inside the roots. Default 1e-5, as published.
        buffer_size: m, in place of B and real_B.
        norm_batch: images whose statistics are taken together, inside a larger batch: makes a
            :class:`~mmdet_norms.layers.mabn_groups.GroupedMABN`, the published ImageNet variant. Default ``None``.

    The delay of 1000 iterations before r is used and its limits [1/5, 5], which keep training and eval statistics
    from parting while the former still move fast, are fixed as published: ``RENORM_DELAY`` and ``RENORM_LIMITS``.

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
        counters=('iters',),
    )
    RENORM_DELAY = 1000
    RENORM_LIMITS = (1 / 5, 5.0)
    WINDOWS = ('buffer_x2', 'buffer_gz')
    _KINDS = ('iterations', 'groups of images')  # of which the window is, here; and where there is a norm_batch

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
        self._register_state()
        self._handle = handle_of(self)
        self._forget_calls()

    def _register_state(self) -> None:
        self.register_buffer('running_var', torch.ones(1, self.num_features, 1, 1))
        self.register_buffer('iters', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('buffer_x2', torch.zeros(self.buffer_size, self.num_features))
        self.register_buffer('buffer_gz', torch.zeros(self.buffer_size, self.num_features))

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if not self.training or x.numel() == 0:
            moment = self.running_var.flatten().to(statistics_dtype(x))
            weight, bias = self.weight.to(moment.dtype), self.bias.to(moment.dtype)
            return F.batch_norm(x, torch.zeros_like(moment), moment, weight, bias, False, 0.0, self.eps)
        if not is_compiling():
            self._check_conv(x)
        return self._normalize(x, self._statistics(x.detach()))

    def _normalize(self, x: Tensor, call: Call) -> Tensor:
        return _Normalize.apply(
            x, self.weight, self.bias, call.used, call.renorm, call.t, self.buffer_gz, self.warmup_iters, self.eps
        )

    def _second_moment(self, x: Tensor) -> Tensor:
        return map_ops.second_moment(x)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> Call:
        batch = self._second_moment(x)
        if self.averages:
            self._average([(self.running_var, batch.view(-1, self.num_features).mean(0).view_as(self.running_var))])
            return Call(batch, batch, torch.ones_like(batch), self.iters.clone())
        state = self.iters, getattr(self, self.WINDOWS[0]), self.running_var
        if is_compiling():
            return Call(batch, *_compiled_call(batch, *state, self._handle))
        return self._call(batch, *state)

    def _call(self, batch: Tensor, *state: Tensor) -> Call:
        """What to normalize with, given the moment of the batch: a new iteration, or an old one recomputed."""
        if in_backward() and (call := self._calls.recall(batch)):
            return Call(*call)
        call = self._advance(batch, *state)
        self._calls.add(call)
        return call

    def _advance(self, batch: Tensor, iters: Tensor, buffer_x2: Tensor, running_var: Tensor) -> Call:
        iters += 1
        t = iters.clone()
        _push(buffer_x2, t, batch)
        average = buffer_x2.to(batch.dtype).mean(0)
        used = torch.where(_single(t, self.buffer_size, self.warmup_iters), batch, average)
        old = running_var.flatten().to(batch.dtype)
        renorm = ((used + self.eps).sqrt() / (old + self.eps).sqrt()).clamp(*self.RENORM_LIMITS)
        renorm = torch.where(t <= max(self.RENORM_DELAY, self.warmup_iters), torch.ones_like(renorm), renorm)
        new = self.momentum * old + (1 - self.momentum) * used
        running_var.copy_(per_channel(torch.where(new.isfinite(), new, old)))
        return Call(batch, used, renorm, t)

    def _forget_calls(self) -> None:
        self._calls = Calls()

    def _apply(self, fn, recurse=True):
        self._forget_calls()  # they would stay behind on the old device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in _UNSAVED}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._handle = handle_of(self)
        self._forget_calls()

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
        self._forget_calls()
        mean = state.get(prefix + 'running_mean')
        if mean is not None and mean.shape == self.weight.shape and prefix + 'iters' not in state:
            self._take_batch_norm(state, prefix)
        var = state.get(prefix + 'running_var')
        if var is not None and var.numel() == self.num_features:
            state[prefix + 'running_var'] = var.reshape(self.running_var.shape)
        if any(prefix + name in state for name in ('weight', 'bias', 'running_var')):
            self._take_windows(state, prefix, missing if strict else [])
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def _take_batch_norm(self, state, prefix) -> None:
        mean = state.pop(prefix + 'running_mean').double()
        state.pop(prefix + 'num_batches_tracked', None)
        weight, bias, var = (state.get(prefix + name) for name in ('weight', 'bias', 'running_var'))
        if weight is not None and bias is not None and var is not None:
            shift = weight.double() * mean / (var.double().flatten() + self.eps).sqrt()
            state[prefix + 'bias'] = (bias.double() - shift).to(bias.dtype)
        self._restart(state, prefix)
        warnings.warn(
            'MABN loaded a batch norm: its mean went into the bias (the same function in eval mode of what the same '
            f'convolution puts out); {self._restarted()}',
            stacklevel=2,
        )

    def _take_windows(self, state, prefix, missing) -> None:
        state.pop(prefix + 'sta_matrix', None)  # with groups: published with the windows, a constant
        others = [name for name in _ALL_WINDOWS if name not in self.WINDOWS and prefix + name in state]
        for name in others:
            del state[prefix + name]
        absent = [name for name in ('iters', *self.WINDOWS) if prefix + name not in state]
        if absent:  # a counter past the warm-up would average rows that were never written
            self._restart(state, prefix)
            if others:
                own, other = self._KINDS
                warnings.warn(f'MABN loaded a window of {other} into one of {own}; {self._restarted()}', stacklevel=2)
            else:
                missing += [prefix + name for name in absent]
            return
        for name in self.WINDOWS:
            rows = state[prefix + name]
            if rows.dim() == 2 and rows.shape[1] == self.num_features and len(rows) != self.buffer_size:
                state[prefix + name] = self._resized(rows, int(state[prefix + 'iters']))
                warnings.warn(
                    f'MABN loaded a window of {len(rows)} {self._KINDS[0]} into one of {self.buffer_size}: the '
                    'newest rows are kept',
                    stacklevel=2,
                )

    def _restart(self, state, prefix) -> None:
        """Let a state have a counter and windows as of a new layer."""
        fresh = MABN(self.num_features, buffer_size=self.buffer_size, norm_batch=getattr(self, 'norm_batch', None))
        state.update((prefix + name, getattr(fresh, name).to(self.weight.device)) for name in ('iters', *self.WINDOWS))

    def _restarted(self) -> str:
        return f'iters, {self.WINDOWS[0]} and {self.WINDOWS[1]} start from 0'

    def _resized(self, rows: Tensor, t: int) -> Tensor:
        return _resize(rows, t, self.buffer_size)


def _resize(rows: Tensor, t: int, size: int) -> Tensor:
    """Re-slot the newest rows of a window after iteration t into one of ``size`` rows, filled up with their mean."""
    newest = range(t, max(t - min(len(rows), size), 0), -1)
    resized = rows.new_zeros(size, rows.shape[1])
    if newest:
        kept = rows[[i % len(rows) for i in newest]]
        resized += kept.mean(0)
        resized[[i % size for i in newest]] = kept
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
