"""CBN: batch norm whose statistics span the last few iterations, corrected for the weight updates in between.

Yao et al., "Cross-Iteration Batch Normalization", CVPR 2021, https://arxiv.org/abs/2002.05712.
"""

import re
import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler with this file
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointFunction

from ..kernels import map_ops
from ..kernels.second import is_wanted, spread
from ._args import ConfigError, check_map, check_number, reject_unknown
from ._averaging import AveragesOnRequest
from ._contract import Contract
from ._fold import float64, fold_affine
from ._loading import check_kind
from ._recompute import all_finite, in_backward
from ._replay import Calls

_HISTORY = ('history_patch', 'history_grad', 'history_moments', 'history_index')


class CBN(AveragesOnRequest):
    r"""Cross-iteration batch norm: each iteration normalizes with the statistics of itself and of a few before it.

    For ``x = conv(z; W)`` and each remembered iteration t, with batch mean :math:`m_t` and biased variance :math:`v_t`
    under the weights :math:`W_t` of its time, first-order Taylor expansion of mean and second moment gives

    .. math::
        \hat m_t = m_t + \rho \langle P_t, W - W_t \rangle, \qquad
        \hat s_t = v_t + \rho \langle \partial v_t, W - W_t \rangle - \rho^2 \langle P_t, W - W_t \rangle^2

    per output channel, where :math:`P_t` is the mean input patch (the gradient of the mean) and :math:`\partial v_t`
    the gradient of the variance with respect to W. With the current batch, and per channel only over the k entries
    that have :math:`\hat s_t \ge 0`,

    .. math::
        \mu = \tfrac1k \sum \hat m_t, \quad \sigma^2 = \tfrac1k \sum (\hat s_t + \hat m_t^2) - \mu^2, \quad
        y = \gamma \frac{x - \mu}{\sigma + \epsilon} + \beta

    Gradients flow through the current batch's statistics only; what is remembered is constant, as in second derivatives
    (``create_graph=True``), which are exact with that. This equals the published second-moment form, but keeps
    its digits where the mean is large against the standard deviation: there the published layer drops every entry in
    fp32 and returns NaN, here the current batch always counts. A channel of zero variance has finite gradients.

    During burn-in, and wherever x does not require grad, it is batch norm as published: the batch's mean and
    *unbiased* variance. Running statistics always follow the current batch (mean and unbiased variance, torch's
    momentum), never the compensated values. Eval is plain batch norm; :meth:`to_batch_norm` returns it.

    Shapes: x and y ``(N, C, H, W)``; all published state ``(C,)``. Statistics and history are fp32 for fp16 and bf16
    inputs; y has dtype and layout of x. N = 0 passes through and counts as nothing. With one value per channel
    (``N H W = 1``) y is the bias and ``running_var`` stays as it is.

    **The convolution** is found through autograd: ``x.grad_fn`` knows its input and weight (effective weights too, as
    of weight-standardized convolutions). Where autograd cannot tell -- inside activation checkpointing and
    ``torch.compile`` -- call :func:`link_convs` once on the model. Channels with a conv bias are compensated for weight
    moves only, as published. Activation checkpointing gives the outputs and statistics of a run without; a recomputed
    forward neither counts nor enters the history. (The reentrant kind cannot tell a forward under ``no_grad`` inside,
    which then enters it, too.)

    **An iteration is a training forward of this module**: a module shared by several feature levels counts each call,
    gradient accumulation counts each micro-batch (its weights did not move, so the window just covers fewer updates).
    Under DDP every rank has its own statistics and history. ``norm_eval`` of mmdet's backbones looks for torch's batch
    norms and leaves this layer in training; ``frozen_stages`` and ``eval()`` use the running statistics.

    ``torch.optim.swa_utils.update_bn`` and :func:`mmdet_norms.recompute_statistics` average the running statistics over
    batches; counter and history stay as they are meanwhile.

    State dict: the published ``weight, bias, running_mean, running_var``; ``iter_count``; and once the history exists
    ``history_patch`` (K, groups, F), ``history_grad`` (K, C, F), ``history_moments`` (K, 4, C), ``history_index`` (2,),
    with K = buffer_num and F the size of one filter. Resuming is bit-exact. A checkpoint without counter and history
    (published, or a plain batch norm's) loads strictly: burn-in starts again and the history is empty.
    :meth:`drop_history` makes such a checkpoint. The history is in no ``buffers()``: its shape is unknown until the
    first use, and tools that pair the buffers of two models (EMA, DDP) must not meet ones that come late.

    Args:
        num_features: C.
        buffer_num: remembered iterations besides the current one. Default 3, as published; 0 is batch norm.
        burnin: iterations of plain batch norm before the history is used, while weights still move fast. Default 8, as
            the published code *runs*. Its configs mean 8 epochs: write ``'8e'`` and have :meth:`resolve_burnin` called
            before training (until then the layer warns once and keeps burning in). 0 starts with the history on.
        two_stage: True switches the window from 0 to ``buffer_num`` at the end of burn-in, as published; False grows
            it as ``int(buffer_num * t / burnin)``.
        rho: weight of the correction. 1 (default, as published) is the Taylor expansion, 0 averages uncorrected.
        eps: default 1e-5, as published.
        eps_in_sqrt: divide by ``sqrt(var + eps)`` instead of the published ``sqrt(var) + eps``. Default False.
        momentum: weight of the newest batch in the running statistics. Default 0.1, as published.

    Raises:
        ValueError: an argument out of range; an input that is not ``(N, num_features, H, W)``.
        TypeError: an unknown key.
        RuntimeError: in training, where x requires grad and does not come from a convolution. (Before the end of
            burn-in, an x without any history, as when the layer is tried alone, is let through.)

    Source: Yao et al., arXiv:2002.05712, section 3.
    """

    _abbr_ = 'bn'  # mmcv names the attribute after it, as in the published checkpoints
    contract = Contract(
        'CBN',
        marks=('iter_count', 'history_patch', 'history_grad', 'history_moments', 'history_index'),
        loads=('BN',),
        as_in_bn=('eps',),
        behind='Conv2d',
        counters=('iter_count',),
    )

    def __init__(
        self,
        num_features: int,
        buffer_num: int = 3,
        burnin: int | str = 8,
        two_stage: bool = True,
        rho: float = 1.0,
        eps: float = 1e-5,
        eps_in_sqrt: bool = False,
        momentum: float = 0.1,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        check_number(type(self), 'eps', eps, 0)
        check_number(type(self), 'momentum', momentum, 0, 1)
        super().__init__(num_features, eps, momentum)
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho < float('inf'):
            raise ConfigError(f"norm_cfg of type 'CBN': rho={rho!r} must be a number of at least 0; the paper uses 1")
        if isinstance(buffer_num, bool) or not isinstance(buffer_num, int) or buffer_num < 0:
            raise ConfigError(
                f"norm_cfg of type 'CBN': buffer_num={buffer_num!r} must be an integer of at least 0; the paper uses 3"
            )
        self.num_features = num_features
        self.buffer_num = buffer_num
        self.burnin = burnin
        self.burnin_iters = _parse_burnin(burnin)
        self.two_stage = two_stage
        self.rho = rho
        self.eps = eps
        self.eps_in_sqrt = eps_in_sqrt
        self.momentum = momentum
        self.name: str | None = None  # place in the model, for messages; link_convs sets it
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))
        self.register_buffer('iter_count', torch.zeros((), dtype=torch.long))
        # The window depends on the counter, and reading a device buffer each step would stall the GPU. So this copy
        # runs along on the host; the buffer is what is saved, and read again after a load (None).
        self._count: int | None = None
        self._history: _History | None = None
        self._conv_call: tuple | None = None
        self._calls = Calls()

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if self.training:
            return self._forward_train(x)
        dtype = _statistics_dtype(x)
        state = (self.running_mean, self._plain_running_var(dtype), self.weight, self.bias)
        return F.batch_norm(x, *(v.to(dtype) for v in state), training=False, eps=self.eps)

    @_disable_dynamo  # grad_fn and the host counter do not exist inside a compiled graph
    def _forward_train(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            self._conv_call = None
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            mean, var = map_ops.moments(x.detach())
            if in_backward():
                # A forward inside a backward is activation checkpointing computing a forward again.
                self._conv_call = None
                call = self._calls.recall(mean)
                if call is None:
                    raise RuntimeError(
                        f'{self._called()} is recomputed by activation checkpointing but has no forward to recompute'
                    )
            else:
                call = self._statistics(x, mean, var)
                self._calls.add(call)
                self._update_running(mean, var, x.numel() // self.num_features)
        outer = 0.0 if self.eps_in_sqrt else self.eps
        return _Normalize.apply(x, self.weight, self.bias, *call[1:], outer)

    def _statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        """Count this iteration, look back, remember it. Returns the batch mean, then the arguments of _Normalize."""
        positions = x.numel() // self.num_features
        window = 0 if self.averages else self._next_window()
        conv = None if self.averages else self._find_conv(x, window)
        if window and conv is not None:
            used_mean, used_var, entries = mean, var, torch.ones_like(mean)
            weight = conv.weight.to(mean.dtype).flatten(1)
            if self._history is None:
                self._history = _History.empty(self.buffer_num, weight, conv.groups)
            self._history.check(self.buffer_num, weight, conv.groups, self._called())
            self._history.to(mean)
            if self._history.length:
                used_mean, used_var, entries = self._history.combine(mean, var, weight, self.rho)
            self._history.push(conv, x.detach(), mean, var, weight, keep=window)
            mean_share = var_share = 1 / (entries * positions)
        else:
            used_mean, used_var = mean, var * (positions / max(positions - 1, 1))
            mean_share = torch.full_like(mean, 1 / positions)
            var_share = torch.full_like(mean, 1 / max(positions - 1, 1))
        if self.eps_in_sqrt:
            denominator, slope = (used_var + self.eps).sqrt(), 1
        else:
            std = used_var.sqrt()
            denominator, slope = std + self.eps, (std + self.eps) / std
        # The slope of the root is infinite at zero variance; there x is constant and the variance has no gradient.
        var_share = torch.where(used_var > 0, var_share * slope, 0)
        return mean, used_mean, denominator, mean_share, var_share

    def _update_running(self, mean: Tensor, var: Tensor, positions: int) -> None:
        """A batch with an inf or nan changes nothing: its step will be skipped."""
        old = [self.running_mean] if positions == 1 else [self.running_mean, self.running_var]
        unbiased = var * (positions / max(positions - 1, 1))
        if self.averages:
            if positions > 1:
                self._average([(self.running_mean, mean), (self.running_var, unbiased)])
            return
        new = [buffer.lerp(now.to(buffer), self.momentum) for buffer, now in zip(old, (mean, unbiased))]
        good = all_finite(*new)
        for buffer, moved in zip(old, new):
            buffer.copy_(torch.where(good, moved, buffer))

    def _plain_running_var(self, dtype: torch.dtype) -> Tensor:
        """The variance that batch norm, with eps inside its root, needs for the same denominator."""
        var = self.running_var.to(dtype)
        return var if self.eps_in_sqrt else (var.sqrt() + self.eps).square() - self.eps

    def to_batch_norm(self) -> nn.BatchNorm2d:
        """An ``nn.BatchNorm2d`` in eval mode that computes what this layer computes in eval mode."""
        plain = nn.BatchNorm2d(self.num_features, eps=self.eps, momentum=self.momentum).to(self.running_mean)
        with torch.no_grad():
            plain.weight.copy_(self.weight)
            plain.bias.copy_(self.bias)
            plain.running_mean.copy_(self.running_mean)
            plain.running_var.copy_(self._plain_running_var(torch.float64))
        return plain.eval()

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: nothing of the layer remains."""
        var = float64(self.running_var)
        denominator = (var + self.eps).sqrt() if self.eps_in_sqrt else var.sqrt() + self.eps
        scale = float64(self.weight) / denominator
        fold_affine(conv, scale, float64(self.bias) - scale * float64(self.running_mean))

    # ------------------------------------------------------------------------------------------------ burn-in

    def resolve_burnin(self, iters_per_epoch: int) -> None:
        """Turn a burn-in of epochs into iterations. Call before training with the length of the loader.

        Nothing happens where ``burnin`` is given in iterations already.
        """
        if isinstance(self.burnin, str):
            self.burnin_iters = round(float(self.burnin[:-1]) * iters_per_epoch)

    def _next_window(self) -> int:
        """Count one iteration; how many earlier ones to look back on."""
        if self.burnin_iters == 0:
            return self.buffer_num
        if self._count is None:
            self._count = int(self.iter_count)
        self._count += 1
        self.iter_count.add_(1)
        if self.burnin_iters is None:
            warnings.warn(
                f'CBN: burnin={self.burnin!r} is in epochs and nobody has said how long one is, so burn-in does not '
                'end: call resolve_burnin(len(train_dataloader)) on every CBN, or write a number of iterations',
                stacklevel=2,
            )
            return 0
        if self.two_stage:
            return self.buffer_num if self._count > self.burnin_iters else 0
        return int(self.buffer_num * min(self._count / self.burnin_iters, 1))

    # ------------------------------------------------------------------------------------------------ convolution

    def _find_conv(self, x: Tensor, window: int) -> '_Conv | None':
        """The convolution that made x; None where the layer is plain batch norm as published."""
        call, self._conv_call = self._conv_call, None
        if not (x.requires_grad or _in_reentrant_checkpoint()):
            return None
        if call is not None and call[2] is x:
            conv, source, _ = call
            return _Conv(
                source.detach().to(x.dtype), conv.weight.detach(), conv.stride, conv.padding, conv.dilation, conv.groups
            )
        node = x.grad_fn
        if node is None and x.requires_grad and not window:
            return None
        if node is None and not x.requires_grad:
            self._fail('runs inside reentrant activation checkpointing, where its convolution cannot be found')
        if type(node).__name__ != 'ConvolutionBackward0' or node._saved_transposed:
            origin = 'nothing' if node is None else f"'{type(node).__name__}'"
            self._fail(f'must follow a convolution directly, but autograd says its input comes from {origin}')
        if _is_checkpointed(node):
            self._fail('runs inside activation checkpointing, where its convolution cannot be found')
        return _Conv(
            node._saved_input.detach(),
            _full_precision_weight(node),
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            node._saved_groups,
        )

    def _fail(self, what: str):
        raise RuntimeError(
            f'{self._called()} {what}. Put it right behind an nn.Conv2d (order conv, norm, act); under activation '
            'checkpointing or torch.compile call mmdet_norms.layers.cbn.link_convs(model) before training; elsewhere '
            'use another norm'
        )

    def _called(self) -> str:
        return f'CBN(num_features={self.num_features})' + (f' {self.name!r}' if self.name else '')

    def _remember_conv(self, conv: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the linked convolution."""
        if self.training:
            self._conv_call = (conv, args[0], output)

    # ------------------------------------------------------------------------------------------------ state

    def extra_repr(self) -> str:
        return f'{self.num_features}, buffer_num={self.buffer_num}, burnin={self.burnin!r}, eps={self.eps}'

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(_conv_call=None)

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self._history is not None:
            self._history.apply(fn)
        return self

    @staticmethod
    def drop_history(state: dict) -> dict:
        """``state`` without the counters and histories of CBN layers: the published keys, for inference.

        Args:
            state: a model's state dict. Not changed.
        """
        marker = _HISTORY[-1]
        owners = {key[: -len('iter_count')] for key in state if re.search(r'(^|\.)iter_count$', key)}
        owners |= {key[: -len(marker)] for key in state if re.search(rf'(^|\.){marker}$', key)}
        # 'iter_count' alone could be anybody's
        owners = {owner for owner in owners if owner + 'running_var' in state}
        dropped = {owner + name for owner in owners for name in ('iter_count', *_HISTORY)}
        kept = type(state)((key, value) for key, value in state.items() if key not in dropped)
        if hasattr(state, '_metadata'):
            kept._metadata = state._metadata
        return kept

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._history is not None:
            destination.update((prefix + name, value) for name, value in zip(_HISTORY, self._history.tensors()))

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        if f'{prefix}num_batches_tracked' in state and f'{prefix}running_var' in state and not self.eps_in_sqrt:
            self._take_batch_norm(state, f'{prefix}running_var')
        ours = any(prefix + name in state for name in ('weight', 'bias', 'running_mean', 'running_var', 'iter_count'))
        state.pop(prefix + 'num_batches_tracked', None)  # a plain batch norm's; it counts something else
        if prefix + 'iter_count' not in state:
            state[prefix + 'iter_count'] = torch.zeros_like(self.iter_count) if ours else self.iter_count
        history = {name: state.pop(prefix + name) for name in _HISTORY if prefix + name in state}
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        self._count = None
        if history and len(history) < len(_HISTORY):
            missing.extend(prefix + name for name in _HISTORY if name not in history)
        elif history:
            self._history = _History.load(*history.values(), self.buffer_num, self.running_mean.device)
        elif ours:
            self._history = None

    def _take_batch_norm(self, state: dict, key: str) -> None:
        """Its denominator is ``sqrt(var + eps)``, this layer's ``sqrt(var) + eps``: the variance makes them equal."""
        var = state[key]
        state[key] = ((var.double() + self.eps).sqrt() - self.eps).square().to(var.dtype)


def link_convs(model: nn.Module) -> list[str]:
    """Tell every CBN of a model its name and the convolution before it. Call once after building, or again.

    Needed where autograd cannot lead from a norm to its convolution: activation checkpointing (both kinds) and
    ``torch.compile``. Linked is the child right before the norm among the children of its parent -- ``conv, bn`` of a
    ``ConvModule``, ``conv1, bn1, conv2, bn2`` of a residual block, a ``Sequential`` -- if it is a plain ``Conv2d`` with
    zero padding. A convolution that computes with weights other than its ``weight`` is left to autograd. Links follow
    ``deepcopy`` and pickling, and are in no state dict.

    Returns:
        Names of the CBN layers without a link.
    """
    unlinked = []
    for parent_name, parent in model.named_modules():
        previous = None
        for child_name, child in parent.named_children():
            if isinstance(child, CBN):
                child.name = f'{parent_name}.{child_name}'.lstrip('.')
                if not _is_plain_conv(previous):
                    unlinked.append(child.name)
                elif child._remember_conv not in previous._forward_hooks.values():
                    previous.register_forward_hook(child._remember_conv)
            previous = child
    return unlinked


class _Conv(NamedTuple):
    """One call of a convolution: what is needed to differentiate it by its weight."""

    input: Tensor
    weight: Tensor
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int


class _History:
    """Ring of the last iterations; one row of each tensor per iteration, ``length`` rows up to ``next`` are filled.

    Old weights are not kept: ``<P, W - W_t> = <P, W> - <P, W_t>``, so a number per channel stands in for ``W_t``.

    Args:
        patch: ``(K, groups, F)`` mean input patch, the same for all output channels of a group.
        grad: ``(K, C, F)`` gradient of the variance by the weight.
        moments: ``(K, 4, C)`` mean, variance, ``<P, W_t>``, ``<grad, W_t>``.
    """

    def __init__(self, patch: Tensor, grad: Tensor, moments: Tensor, next_row: int = 0, length: int = 0):
        self.patch, self.grad, self.moments = patch, grad, moments
        self.next, self.length = next_row, length

    @classmethod
    def empty(cls, rows: int, weight: Tensor, groups: int) -> '_History':
        channels, size = weight.shape
        return cls(
            weight.new_zeros(rows, groups, size),
            weight.new_zeros(rows, channels, size),
            weight.new_zeros(rows, 4, channels),
        )

    @classmethod
    def load(cls, patch, grad, moments, index, rows: int, device) -> '_History':
        patch, grad, moments = (t.detach().to(device, copy=True) for t in (patch, grad, moments))
        next_row, length = index.tolist()
        if len(patch) != rows:  # saved with another buffer_num: keep the newest
            kept = [(next_row - 1 - i) % len(patch) for i in range(min(length, rows))][::-1]
            grown = [t.new_zeros(rows, *t.shape[1:]) for t in (patch, grad, moments)]
            for old, new in zip((patch, grad, moments), grown):
                new[: len(kept)] = old[kept]
            (patch, grad, moments), next_row, length = grown, len(kept) % max(rows, 1), len(kept)
        return cls(patch, grad, moments, next_row, length)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.patch, self.grad, self.moments, torch.tensor([self.next, self.length])

    def apply(self, fn) -> None:
        """``module.to(...)``: follow the device and float64, but never go below fp32."""
        for name in ('patch', 'grad', 'moments'):
            old = getattr(self, name)
            new = fn(old)
            setattr(self, name, new if new.dtype in (torch.float32, torch.float64) else old.to(new.device))

    def to(self, like: Tensor) -> None:
        if self.grad.dtype != like.dtype or self.grad.device != like.device:
            self.patch, self.grad, self.moments = (t.to(like) for t in (self.patch, self.grad, self.moments))

    def check(self, rows: int, weight: Tensor, groups: int, owner: str) -> None:
        expected = (rows, *weight.shape), (rows, groups, weight.shape[1])
        if (tuple(self.grad.shape), tuple(self.patch.shape)) != expected:
            raise RuntimeError(
                f'{owner} remembers a convolution of other shape: its history is {tuple(self.grad.shape)} and '
                f'{tuple(self.patch.shape)}, this convolution needs {expected[0]} and {expected[1]}. A CBN belongs to '
                'one convolution; load the checkpoint into the model it was saved from, or drop its history'
            )

    def combine(self, mean: Tensor, var: Tensor, weight: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of entries over this batch and the remembered ones under ``weight``."""
        # Products by hand: a matmul would be at the mercy of TF32 settings.
        by_group = weight.unflatten(0, (self.patch.shape[1], -1))
        patch_now = (self.patch.unsqueeze(2) * by_group).sum(-1).flatten(1)
        grad_now = (self.grad * weight).sum(-1)
        old_mean, old_var, patch_then, grad_then = self.moments.unbind(1)
        mean_move = rho * (patch_now - patch_then)
        moved_mean = old_mean + mean_move
        moved_var = old_var + rho * (grad_now - grad_then) - mean_move.square()
        # Newest first wherever the ring stands, so that sums round alike.
        order = [(self.next - 1 - i) % len(self.grad) for i in range(self.length)]
        moved_mean, moved_var = (torch.stack([t[row] for row in order]) for t in (moved_mean, moved_var))

        valid = (moved_var >= 0) & (moved_var < float('inf'))
        entries = 1 + valid.sum(0, dtype=mean.dtype)
        offset = torch.where(valid, moved_mean - mean, 0)
        shift = offset.sum(0) / entries
        within = (var + torch.where(valid, moved_var, 0).sum(0)) / entries
        between = offset.square().sum(0) / entries - shift.square()
        return mean + shift, (within + between).clamp_(min=0), entries

    def push(self, conv: _Conv, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, keep: int) -> None:
        patch = _mean_patch(conv, x).view(self.patch.shape[1:])
        grad = _variance_gradient(conv, x, mean, var)
        by_group = weight.unflatten(0, (len(patch), -1))
        moments = torch.stack((mean, var, (patch.unsqueeze(1) * by_group).sum(-1).flatten(), (grad * weight).sum(-1)))
        # An iteration with an inf or nan becomes a row that no later one counts: its variance stays negative.
        good = all_finite(patch, grad, moments)
        self.patch[self.next].copy_(torch.where(good, patch, 0))
        self.grad[self.next].copy_(torch.where(good, grad, 0))
        self.moments[self.next].copy_(torch.where(good, moments, -1))
        self.next = (self.next + 1) % len(self.grad)
        self.length = min(self.length + 1, keep)


class _Normalize(torch.autograd.Function):
    """``weight * (x - mean) / denominator + bias``, with the gradient through the batch's part in both statistics.

    ``mean_share`` and ``var_share`` say how much one value of x moves mean and variance: 1 / M each in batch norm,
    1 / (k M) with k entries in the window. ``var_share`` carries the slope of the root where eps is outside, and is 0
    where x is constant. ``outer`` is the eps outside of the root.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, denominator, mean_share, var_share, outer):
        ctx.save_for_backward(x, weight, mean, denominator, mean_share, var_share)
        ctx.outer = outer
        # A constant channel becomes the bias exactly, not 1 / eps times what rounding leaves of x - mean.
        scale = torch.where(var_share > 0, weight.to(mean.dtype) / denominator, 0)
        return map_ops.affine(x, mean, scale, bias.to(mean.dtype))

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        if is_wanted(grad):
            return *_gradients(grad, *saved, ctx.outer), None, None, None, None, None
        x, weight, mean, denominator, mean_share, var_share = saved
        grad_bias, centred = map_ops.gradient_sums(grad, x, mean)
        grad_weight = centred / denominator
        grad_x = None
        if ctx.needs_input_grad[0]:
            scale = weight.to(mean.dtype) / denominator
            through_var = -scale * var_share * grad_weight / denominator
            through_mean = -scale * mean_share * grad_bias
            grad_x = map_ops.gradient(grad, x, scale, mean, through_var, through_mean)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None, None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    denominator: Tensor,
    mean_share: Tensor,
    var_share: Tensor,
    outer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of :class:`_Normalize` as a differentiable function of ``grad``, ``x`` and ``weight``.

    Mean and root of the variance are written as functions of x, with the values that they have at this x. What earlier
    iterations put into them is constant, as it is in the gradient itself.
    """
    over = (0, 2, 3)
    grad, here, x_dtype = grad.to(mean.dtype), x.detach().to(mean.dtype), x.dtype
    x = x.to(mean.dtype)
    root = denominator - outer
    varies = (var_share > 0) & (root > 0)
    share = torch.where(varies, var_share * root / denominator, 0)  # without the slope of the root
    about, moved = here - spread(mean), (x - here).sum(over) * mean_share
    squares = ((x - spread(mean)).square() - about.square()).sum(over)
    variance = torch.where(varies, root.square(), 1) + share * squares - (share / mean_share) * moved.square()
    root = variance.sqrt()
    denominator = torch.where(varies, root + outer, denominator)
    centred = x - spread(mean + moved)
    grad_bias, grad_weight = grad.sum(over), (grad * centred).sum(over) / denominator
    scale = weight.to(mean.dtype) / denominator
    through_var, through_mean = -scale * share * grad_weight / root, -scale * mean_share * grad_bias
    grad_x = spread(scale) * grad + spread(through_var) * centred + spread(through_mean)
    return grad_x.to(x_dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _mean_patch(conv: _Conv, x: Tensor) -> Tensor:
    """Mean over all output positions of the input patch there, ``(C_in, kh, kw)``; padding counts as zeros."""
    # Output positions of a tap form a strided window of the padded map, so sums of windows do: over the batch first.
    pad_h, pad_w = conv.padding
    if map_ops.is_channels_last(conv.input):  # of which sum(0) takes 10 times as long
        total = conv.input.permute(0, 2, 3, 1).sum(0, dtype=_statistics_dtype(x)).permute(2, 0, 1)
    else:
        total = conv.input.sum(0, dtype=_statistics_dtype(x))
    total = F.pad(total, (pad_w, pad_w, pad_h, pad_h))
    for axis in (1, 0):  # columns, then rows: each sum goes and the taps come last
        taps, stride, dilation = conv.weight.shape[2 + axis], conv.stride[axis], conv.dilation[axis]
        span = (x.shape[2 + axis] - 1) * stride + 1
        windows = total.unfold(1 + axis, span, dilation).narrow(1 + axis, 0, taps)
        total = windows[..., ::stride].sum(-1)
    return total / (len(x) * x.shape[2] * x.shape[3])


def _variance_gradient(conv: _Conv, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Gradient of each channel's biased variance by its filter, ``(C, F)``: the weight gradient under 2 (x - mean) / M.

    The upstream gradient is scaled to about M^-3/4, where neither it nor the result leaves fp16's range.
    """
    positions = x.numel() // x.shape[1]
    std = (var + 1e-12).sqrt()
    upstream = map_ops.affine(x, mean, positions**-0.75 / std, torch.zeros_like(mean))
    grad = _weight_gradient(conv, upstream)
    return grad.to(mean.dtype).flatten(1) * (2 * positions**-0.25 * std).unsqueeze(1)


def _weight_gradient(conv: _Conv, upstream: Tensor) -> Tensor:
    return torch.ops.aten.convolution_backward(
        upstream,
        conv.input,
        upstream.new_empty(1).expand(conv.weight.shape),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        (False, True, False),
    )[1]


def _full_precision_weight(node) -> Tensor:
    """The weight of a convolution. Autocast convolves with a rounded copy; the parameter hangs behind the cast."""
    used = node._saved_weight.detach()
    source = node.next_functions[1][0]
    while type(source).__name__ == 'ToCopyBackward0':
        source = source.next_functions[0][0]
    parameter = getattr(source, 'variable', None)
    # A frozen parameter leaves no trace: then its rounded copy does not move either.
    return used if parameter is None else parameter.detach()


def _is_checkpointed(node) -> bool:
    """Whether unpacking the node's tensors would make non-reentrant checkpointing recompute, here, mid-forward."""
    top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)  # not in old versions
    hooks = top_hooks(False) if top_hooks else None
    if hooks is None or hooks[0].__module__ != 'torch.utils.checkpoint':
        return False
    return getattr(node._raw_saved_input, 'unpack_hook', True) is not None


def _in_reentrant_checkpoint() -> bool:
    """Whether this is the first pass of reentrant checkpointing, which hides from autograd what will be trained."""
    if torch.is_grad_enabled():
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _is_plain_conv(module: nn.Module | None) -> bool:
    # mmcv's wrapper of the same name only adds empty inputs for old versions of torch
    plain = type(module) is nn.Conv2d or type(module).__module__ == 'mmcv.cnn.bricks.wrappers'
    return (
        plain
        and isinstance(module, nn.Conv2d)
        and (module.padding_mode == 'zeros' and not isinstance(module.padding, str))
    )


def _parse_burnin(burnin) -> int | None:
    """Iterations, or None for epochs that are not resolved yet."""
    if isinstance(burnin, int) and not isinstance(burnin, bool) and burnin >= 0:
        return burnin
    if isinstance(burnin, str) and re.fullmatch(r'\d+(\.\d+)?e', burnin):
        return None
    raise ConfigError(
        f"norm_cfg of type 'CBN': burnin={burnin!r} must be a number of iterations (an integer of at least 0) or of "
        "epochs (a string such as '8e')"
    )
