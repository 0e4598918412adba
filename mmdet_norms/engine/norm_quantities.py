"""What one training step shows of a norm: statistics of the batch, those of the backward pass, a method's own.

Every formula is in docs/analyze.md. Nothing here changes a layer, a gradient or a random state.
"""

import copy
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..compat.torch_internals import Convolution
from ..kernels import map_ops
from ..layers import AN, BNET, CBN, MABN
from ..layers._numerics import no_autocast, statistics_dtype
from ..layers.an_folded import DESCRIPTOR_EPS

MEAN, VAR, G, PSI = 'mean', 'var', 'g', 'psi'

WITHOUT_CHANNELS = ('energy', 'weights')

# How a quantity with a value for each channel becomes one number. Signed ones would cancel in an average.
_BY_ROOT_MEAN_SQUARE = ('mean', 'g', 'psi', 'psi_used', 'compensated_mean', 'naive_mean', 'exact_mean')


@dataclass
class Past:
    """The batches that a CBN remembers, as its convolution got them.

    Args:
        calls: convolution, and mean ``(C,)`` of its output at that time; the newest last.
    """

    calls: deque[tuple[Convolution, Tensor]]

    def find(self, mean: Tensor) -> Convolution | None:
        """The call whose output had this mean: after a resume and skipped steps, a place in the row would not tell."""
        return next((conv for conv, own in reversed(self.calls) if torch.equal(own.to(mean), mean)), None)

    @torch.no_grad()
    def take(self, norm: CBN, x: Tensor) -> None:
        """A call that is not looked at."""
        conv = norm._conv_in_front(x, norm._linked_call, may_be_bare=True) if norm.coming_window() else None
        if conv is not None:
            with no_autocast(x):
                self.calls.append((conv, map_ops.moments(x.detach())[0]))


@dataclass
class Seen:
    """One forward of a norm in training, and the gradient that came back to it.

    Args:
        norm: the layer.
        x: its input as a map, detached; of a norm with ``norm_batch`` the first group of images.
        mean, var: of the batch ``(C,)``, biased.
        count: over how many values each.
        images: rows of the whole input: images, or the regions of a head.
        own: what only its method has.
    """

    norm: nn.Module
    x: Tensor
    mean: Tensor
    var: Tensor
    count: int
    images: int
    own: dict[str, Tensor] = field(default_factory=dict)
    sums: tuple[Tensor, Tensor] | None = None
    waits: bool = True
    hooked: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, x: Tensor, past: Past | None = None) -> 'Seen':
        """Look at the input of a forward that is about to run.

        Args:
            x: as the layer gets it.
            past: of a CBN, which also gets this call.
        """
        whole = as_map(norm, x.detach())
        first = first_group(norm, whole)
        with no_autocast(x):
            mean, var = map_ops.moments(first)
            seen = cls(norm, first, mean, var, first.numel() // first.shape[1], len(whole))
            if isinstance(norm, CBN):
                seen.own = _of_cbn(norm, x, mean, var, past)
            elif isinstance(norm, MABN) and norm.training and not norm.averages:
                seen.own = _of_mabn(norm, whole)
            elif isinstance(norm, BNET):
                energy = norm.bnconv.weight.detach().to(mean.dtype).square().mean((0, 1))
                seen.own = dict(energy=energy / energy.sum())
            elif isinstance(norm, AN):
                weights = mixture_weights(norm, first)
                seen.own = {} if weights is None else dict(weights=weights)
        return seen

    @classmethod
    def nothing(cls, norm: nn.Module) -> 'Seen':
        """What a process has to add to the union of all batches whose own batch is empty."""
        zeros = torch.zeros_like(norm.running_mean if hasattr(norm, 'running_mean') else norm.bn.running_mean)
        return cls(norm, zeros, zeros, zeros, 0, 0, sums=(zeros, zeros))

    @torch.no_grad()
    def take_gradient(self, grad: Tensor) -> None:
        """Hook of the output: sums of the gradient at the normalized input, before the step moves the weights."""
        if not self.waits:  # a second backward pass, of second derivatives
            return
        self.waits = False
        grad = first_group(self.norm, as_map(self.norm, grad.detach())).to(self.x.dtype)
        with no_autocast(self.x):
            self.sums = self._sums(grad)
        self.x = self.x.new_empty(0)  # the map is not needed any more

    def _sums(self, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of ``h`` and of ``h (x - centre)``, with h the gradient at the normalized input; ``(C,)`` each."""
        norm, x, centre = self.norm, self.x, self._centre()
        if isinstance(norm, BNET):
            kernel, dtype = norm.bnconv.weight.detach(), self.mean.dtype
            wide = torch.nn.grad.conv2d_input(
                x.shape, kernel.to(dtype), grad.to(dtype), padding=kernel.shape[-1] // 2, groups=len(kernel)
            )
            return map_ops.gradient_sums(wide, x.to(dtype), centre)
        if isinstance(norm, AN):
            if 'weights' not in self.own:
                return None
            gain = self.own['weights'] @ norm.weight_.detach().to(self.mean.dtype)
            of_images = map_ops.gradient_sums(grad, x, centre.expand(len(x), -1).contiguous())
            return tuple((gain * part).sum(0) for part in of_images)
        gain = _weight(norm, self.mean)
        if 'r' in self.own:
            gain = gain * self.own['r']
        return tuple(gain * part for part in map_ops.gradient_sums(grad, x, centre))

    def _centre(self) -> Tensor:
        return torch.zeros_like(self.mean) if 'second_moment_used' in self.own else self.mean

    @torch.no_grad()
    def values(self, loss_scale: float = 1.0, everywhere: bool = False) -> dict[str, Tensor]:
        """All quantities, after the backward pass.

        Args:
            loss_scale: by which the gradients are too large.
            everywhere: the union of the batches of all processes, for a synchronized norm. A collective call.
        """
        count = self.mean.new_tensor(self.count, dtype=torch.float64)
        mean, var = self.mean.double(), self.var.double()
        sums = None if self.sums is None else [part.double() / loss_scale for part in self.sums]
        if everywhere:
            count, mean, var, sums = _of_all(self.norm, count, mean, var, sums)
        found = dict(mean=mean, var=var)
        if sums is not None:
            square = self.own['second_moment_used'].double() if 'second_moment_used' in self.own else var
            found.update(g=sums[0] / count, psi=sums[1] / (count * (square + eps_of(self.norm)).sqrt()))
        found.update(self.own)
        if 'second_moment_used' in self.own and 'psi' in found and self.norm.WINDOWS[1] == 'buffer_gz':
            found['psi_used'] = _psi_used(self.norm, found['psi'], loss_scale)
        return found


def as_map(norm: nn.Module, x: Tensor) -> Tensor:
    """``(N, C, H, W)`` of whatever the norm takes: ``(N, C)``, ``(N, C, L)``, and with channels last, of torch's LN."""
    if type(norm) is nn.LayerNorm:
        x = x.movedim(-1, 1)
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1)


def eps_of(norm: nn.Module) -> float:
    """What the norm adds to a variance."""
    return next(float(layer.eps) for layer in (norm, getattr(norm, 'bn', None)) if hasattr(layer, 'eps'))


def _weight(norm: nn.Module, like: Tensor) -> Tensor:
    """By which a norm multiplies its normalized input, ``(C,)``; 1 where it has no such vector."""
    for layer in (norm, getattr(norm, 'bn', None)):
        weight = getattr(layer, 'weight', None)
        if isinstance(weight, Tensor) and weight.numel() == like.numel():
            return weight.detach().to(like.dtype).flatten()
    return torch.ones_like(like)


def first_group(norm: nn.Module, x: Tensor) -> Tensor:
    """The images of a map that a norm with ``norm_batch`` normalizes together, the first of such groups; else all."""
    norm_batch = getattr(norm, 'norm_batch', None)
    return x if not norm.training or norm_batch is None else x[:norm_batch]


# ------------------------------------------------------------------------------------------------ synchronized norms


def is_synchronized(norm: nn.Module) -> bool:
    """Whether its statistics in training mode are those of several processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    names = {type(layer).__name__ for layer in (norm, getattr(norm, 'bn', None))}
    return bool(names & {'SyncBN', 'SyncBatchNorm'})


def _of_all(norm, count, mean, var, sums):
    """Of the union of the batches; see :meth:`Seen.values`."""
    known = sums is not None
    first, second = sums if known else (torch.zeros_like(mean), torch.zeros_like(mean))
    second = second + mean * first  # about zero, which all share; in float64
    rows = torch.stack([count.expand_as(mean), count * mean, count * (var + mean.square()), first, second])
    layer = norm if hasattr(norm, 'process_group') else getattr(norm, 'bn', norm)
    dist.all_reduce(rows, group=getattr(layer, 'process_group', None))
    count = rows[0]
    mean = rows[1] / count
    return count, mean, rows[2] / count - mean.square(), [rows[3], rows[4] - mean * rows[3]] if known else None


# ------------------------------------------------------------------------------------------------ the methods' own


def mixture_weights(norm: AN, x: Tensor) -> Tensor | None:
    """lambda ``(N, k)`` of the images of a map, as a forward of AN would compute it now.

    None where the batch norm of its logits was replaced and sees more than this batch.
    """
    conv, *norms = norm.attention_weights.attention
    wide = x.to(statistics_dtype(x))
    var, mean = torch.var_mean(wide, (2, 3), correction=1 if wide.shape[2] * wide.shape[3] > 1 else 0)
    d = mean / (var + DESCRIPTOR_EPS).sqrt()
    weight, bias = (None if p is None else p.detach().to(d.dtype) for p in (conv.weight, conv.bias))
    logits = F.linear(d, weight.flatten(1), bias)
    for bn in norms:
        if type(bn) is not nn.BatchNorm2d:
            return None
        state = [None if v is None else v.detach().to(d.dtype) for v in (bn.weight, bn.bias)]
        if bn.training and len(logits) > 1:
            logits = F.batch_norm(logits, None, None, *state, True, 0.0, bn.eps)
        else:
            running = (bn.running_mean.to(d.dtype), bn.running_var.to(d.dtype))
            logits = F.batch_norm(logits, *running, *state, False, 0.0, bn.eps)
    return F.relu6(logits + 3) / 6


def _of_mabn(norm: MABN, x: Tensor) -> dict[str, Tensor]:
    """What this forward will use, by the layer's own code on copies of its state; of groups, of the first."""
    probe = copy.copy(norm)
    probe.__dict__['_buffers'] = {name: value.clone() for name, value in norm._buffers.items()}
    moment = norm._second_moment(x)
    used, r, _ = probe._advance(moment)
    first = [rows.view(-1, norm.num_features)[0] for rows in (moment, used, r)]
    return dict(zip(('second_moment', 'second_moment_used', 'r'), first))


def _psi_used(norm: MABN, psi: Tensor, loss_scale: float) -> Tensor:
    """What the backward pass used in place of psi: the mean of the layer's window, once that counts."""
    t = int(norm.iters)
    alone = t <= len(norm.buffer_gz) or t < norm.warmup_iters
    return psi if alone else norm.buffer_gz.double().mean(0) / loss_scale


def _of_cbn(norm: CBN, x: Tensor, mean: Tensor, var: Tensor, past: Past | None) -> dict[str, Tensor]:
    """The statistics of the window: as CBN takes them, without compensation, and of the images under today's weights.

    They are there once CBN looks back.
    """
    window = 0 if norm.averages or not norm.training else norm.coming_window()
    conv = norm._conv_in_front(x, norm._linked_call, may_be_bare=True) if window else None
    if conv is None:
        return {}
    history, found = norm._history, {}
    if history is not None and history.length:
        history.to(mean)
        weight = conv.weight.to(mean.dtype).flatten(1)
        taken = history.combine(mean, var, weight, norm.rho)
        plain = history.combine(mean, var, weight, 0.0)
        found = dict(zip(('compensated_mean', 'compensated_var', 'entries'), taken))
        found.update(zip(('naive_mean', 'naive_var'), plain))
        exact = None if past is None else _recomputed(history, conv, mean, var, past)
        if exact is not None:
            found.update(zip(('exact_mean', 'exact_var'), exact))
            for name in ('compensated', 'naive'):
                deviation = found[f'{name}_mean'] - exact[0]
                found[f'{name}_error'] = deviation.abs() / (exact[1] + norm.eps).sqrt()
                found[f'{name}_var_error'] = (found[f'{name}_var'] - exact[1]).abs() / (exact[1] + norm.eps)
    if past is not None:
        past.calls.append((conv, mean))
    return found


def _recomputed(history, conv: Convolution, mean: Tensor, var: Tensor, past: Past) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance over this batch and the remembered ones, their images convolved with today's weights.

    None where an image is not at hand.
    """
    rows = [history.moments[row] for row in history._newest(history.length)]
    rows = [row for row in rows if not bool((row[1] < 0).all())]  # a batch with an inf or nan, which nobody counts
    calls = [past.find(row[0]) for row in rows]
    if any(call is None for call in calls):
        return None
    bias = mean - _moments_under(conv, conv.weight, mean)[0]
    moments = [(mean, var)]
    for call in calls:
        again = _moments_under(call, conv.weight, mean)
        moments.append((again[0] + bias, again[1]))
    means, variances = (torch.stack(part) for part in zip(*moments))
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def _moments_under(conv: Convolution, weight: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of the output of a call with another weight, without its bias."""
    y = F.conv2d(conv.input.to(like.dtype), weight.to(like.dtype), None, *conv[2:])
    return map_ops.moments(y)


# ------------------------------------------------------------------------------------------------ one number each


def summary(name: str, values: Tensor) -> float | None:
    """One number for all channels: the mean, of signed quantities the root mean square. None where there are none."""
    if name in WITHOUT_CHANNELS:
        return None
    values = values.double()
    return float(values.square().mean().sqrt() if name in _BY_ROOT_MEAN_SQUARE else values.mean())


def parts(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of what has no channels: ``energy/ROW_COLUMN`` of the taps, and ``weights/COMPONENT`` over images.

    Of a kernel of zeros, whose energy is 0/0, none.
    """
    found = {}
    if 'weights' in values:
        found.update({f'weights/{k}': mean for k, mean in enumerate(values['weights'].double().mean(0).tolist())})
    for i, row in enumerate(values['energy'].double().tolist() if 'energy' in values else ()):
        found.update({f'energy/{i}_{j}': share for j, share in enumerate(row)})
    return {key: number for key, number in found.items() if math.isfinite(number)}
