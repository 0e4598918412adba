"""The published layers, written out step by step from their formulas: the yardstick that gains are measured against.

Each makes the passes over the feature map that its formula names, with ordinary torch operations and no fusing, and
does nothing beyond it: no empty batches, no mixed precision, no checks. Use :mod:`mmdet_norms.layers` for training.
State dicts have the published keys, so that a state of ours loads. Independent implementations from the papers' maths.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceBNET(nn.Module):
    r"""BNET: batch norm without affine step, :math:`\hat x`, then :math:`y_c = K_c * \hat x_c + b_c`, K_c k x k.

    Two operations, so the normalized map is written, read and kept for the backward pass.

    Args:
        num_features: C.
        kernel_size: k.
        eps, momentum: of the batch norm.

    Source: Xu et al., arXiv:2011.14150, section 3.
    """

    def __init__(self, num_features: int, kernel_size: int = 3, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.bnconv = nn.Conv2d(num_features, num_features, kernel_size, padding=kernel_size // 2, groups=num_features)
        _register_statistics(self, num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.bnconv(_batch_norm(self, x))


class ReferenceCBN(nn.Module):
    r"""CBN with lists of everything: statistics and their gradients by the weight, and the old weights themselves.

    With batch mean m and second moment q of every remembered iteration, and the weights W of its time,

    .. math::
        \hat m_t = m_t + \rho \langle \partial m_t, W - W_t \rangle, \qquad
        \hat q_t = q_t + \rho \langle \partial q_t, W - W_t \rangle

    averaged per channel over the entries with :math:`\hat q_t \ge \hat m_t^2`. Both gradients by
    ``torch.autograd.grad``, i.e. two more weight gradients of the convolution in each training forward.

    Args:
        num_features: C.
        buffer_num: remembered iterations.
        burnin: iterations of plain batch norm at the start.
        rho, eps, momentum: as in :class:`mmdet_norms.layers.CBN`; eps is outside the root.

    Source: Yao et al., arXiv:2002.05712, section 3.
    """

    def __init__(
        self,
        num_features: int,
        buffer_num: int = 3,
        burnin: int = 8,
        rho: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__()
        self.buffer_num, self.burnin, self.rho, self.eps, self.momentum = buffer_num, burnin, rho, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))
        self.count = 0
        self.means, self.seconds, self.mean_grads, self.second_grads, self.weights = [], [], [], [], []

    def forward(self, x: Tensor, conv_weight: Tensor | None = None) -> Tensor:
        """Normalize ``x = conv(z; conv_weight)``; without history in eval mode and while burning in."""
        if not self.training:
            return self._normalize(x, self.running_mean, self.running_var)
        if self.burnin > 0:
            self.count += 1
        by_channel = x.transpose(0, 1).contiguous()
        flat = by_channel.view(x.shape[1], -1)
        mean, second, unbiased = flat.mean(1), (flat * flat).mean(1), flat.var(1)
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean.detach()
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased.detach()
        used = mean, unbiased
        if self.buffer_num > 0 and self.count >= self.burnin + (self.burnin > 0) and x.requires_grad:
            used = self._compensated(mean, second, conv_weight)
        return self._normalize(by_channel.transpose(0, 1), *used).contiguous()

    def _compensated(self, mean: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        mean_grad = torch.autograd.grad(mean.sum(), weight, retain_graph=True)[0]
        second_grad = torch.autograd.grad(second.sum(), weight, retain_graph=True)[0]
        now = weight.detach()
        means, seconds = [mean], [second]
        for i, old in enumerate(self.weights):
            means.append(self.means[i] + self.rho * (self.mean_grads[i] * (now - old)).sum((1, 2, 3)))
            seconds.append(self.seconds[i] + self.rho * (self.second_grads[i] * (now - old)).sum((1, 2, 3)))
        means, seconds = torch.stack(means), torch.stack(seconds)
        valid = (seconds - means**2 >= 0).to(mean.dtype)
        entries = valid.sum(0)
        mu = (means * valid).sum(0) / entries
        var = (seconds * valid).sum(0) / entries - mu**2
        newest = (mean.detach(), second.detach(), mean_grad, second_grad, now.clone())
        histories = (self.means, self.seconds, self.mean_grads, self.second_grads, self.weights)
        for history, value in zip(histories, newest):
            history.insert(0, value)
            del history[self.buffer_num :]
        return mu, var

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        x_hat = (x - _per_channel(mean)) / (_per_channel(var).sqrt() + self.eps)
        return x_hat * _per_channel(self.weight) + _per_channel(self.bias)


class ReferenceMABN(nn.Module):
    r"""MABN with a pass over the map for every symbol of its formulas, and a counter that is read on the host.

    .. math::
        z = x / \sqrt{v + \epsilon}, \qquad y = \gamma\, (r z) + \beta, \qquad
        \frac{\partial L}{\partial x} = \frac{\gamma r g - z p}{\sqrt{v + \epsilon}}

    with v, r and p as in :class:`mmdet_norms.layers.MABN`. ``.item()`` waits for the GPU once a forward.

    Args:
        num_features: C.
        B, real_B: images per process and batch size to imitate: a window of ``real_B / B`` iterations.
        warmup_iters, momentum, eps: as in :class:`mmdet_norms.layers.MABN`.

    Source: Yan et al., arXiv:2001.06838, sections 4 and 5.
    """

    def __init__(
        self,
        num_features: int,
        B: int = 2,
        real_B: int = 32,
        warmup_iters: int = 100,
        momentum: float = 0.98,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.window, self.warmup_iters, self.momentum, self.eps = real_B // B, warmup_iters, momentum, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(1, num_features, 1, 1))
        self.register_buffer('iters', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('buffer_x2', torch.zeros(self.window, num_features))
        self.register_buffer('buffer_gz', torch.zeros(self.window, num_features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            z = x / (self.running_var + self.eps).sqrt()
            return _per_channel(self.weight) * z + _per_channel(self.bias)
        return _MovingAverages.apply(x, self.weight, self.bias, self)


class _MovingAverages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        layer.iters += 1
        t = layer.iters.item()
        chi = _nested_mean(x * x)
        layer.buffer_x2[t % layer.window] = chi.flatten()
        single = t <= layer.window or t < layer.warmup_iters
        v = chi if single else _per_channel(layer.buffer_x2.mean(0))
        r = torch.ones_like(v)
        if t > max(1000, layer.warmup_iters):
            r = torch.clamp((v + layer.eps).sqrt() / (layer.running_var + layer.eps).sqrt(), 1 / 5, 5)
        layer.running_var.copy_(layer.momentum * layer.running_var + (1 - layer.momentum) * v)
        z = x / (v + layer.eps).sqrt()
        ctx.save_for_backward(z, weight, v, r)
        ctx.layer, ctx.t, ctx.single = layer, t, single
        return _per_channel(weight) * (r * z) + _per_channel(bias)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError('the backward pass of MABN is the derivative of nothing, so it has none itself')
        z, weight, v, r = ctx.saved_tensors
        layer = ctx.layer
        g_hat = g * _per_channel(weight) * r
        psi = _nested_mean(g_hat * z)
        layer.buffer_gz[ctx.t % layer.window] = psi.flatten()
        p = psi if ctx.single else _per_channel(layer.buffer_gz.mean(0))
        grad_x = (g_hat - z * p) / (v + layer.eps).sqrt()
        return grad_x, (g * r * z).sum((0, 2, 3)), g.sum((0, 2, 3)), None


class ReferenceAN(nn.Module):
    r"""AN: normalize, describe every instance of the raw input, attend, mix. Each reads the map for itself.

    .. math::
        y_{nc} = \Bigl(\sum_k \lambda_{nk}\, \gamma_{kc}\Bigr) \hat x_{nc} + \sum_k \lambda_{nk}\, \beta_{kc}

    with :math:`\lambda` as in :class:`mmdet_norms.layers.AN`. The variance of the description is left to autograd.

    Args:
        num_features: C.
        norm: 'BN' or 'GN'.
        k: number of affine transforms.
        num_groups, eps, momentum: as in :class:`mmdet_norms.layers.AN`.

    Source: Li, Sun, Wu, arXiv:1908.01259, section 3. Independent implementation from the paper's maths.
    """

    def __init__(
        self,
        num_features: int,
        norm: str = 'BN',
        k: int = 10,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__()
        self.norm, self.num_groups, self.eps, self.momentum = norm, num_groups, eps, momentum
        self.weight_ = nn.Parameter(torch.randn(k, num_features) * 0.1 + 1)
        self.bias_ = nn.Parameter(torch.randn(k, num_features) * 0.1)
        self.attention_weights = nn.Module()
        conv = nn.Conv2d(num_features, k, 1, bias=norm == 'GN')
        self.attention_weights.attention = nn.Sequential(conv, *([nn.BatchNorm2d(k)] if norm == 'BN' else []))
        if norm == 'BN':
            _register_statistics(self, num_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == 'BN':
            x_hat = _batch_norm(self, x)
        else:
            x_hat = F.group_norm(x, self.num_groups, None, None, self.eps)
        mean = x.mean((2, 3), keepdim=True)
        var = x.var((2, 3), keepdim=True)
        logits = self.attention_weights.attention(mean / (var + 1e-3).sqrt())
        lam = (F.relu6(logits + 3) / 6).flatten(1)
        gamma, beta = lam @ self.weight_, lam @ self.bias_
        return gamma[..., None, None] * x_hat + beta[..., None, None]


REFERENCES = dict(BNET=ReferenceBNET, CBN=ReferenceCBN, MABN=ReferenceMABN, AN=ReferenceAN)
"""The yardstick of each layer by the name that ``norm_cfg.type`` takes."""


def _register_statistics(layer: nn.Module, num_features: int) -> None:
    layer.register_buffer('running_mean', torch.zeros(num_features))
    layer.register_buffer('running_var', torch.ones(num_features))
    layer.register_buffer('num_batches_tracked', torch.tensor(0))


def _batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    if layer.training:
        layer.num_batches_tracked += 1
    running = layer.running_mean, layer.running_var
    return F.batch_norm(x, *running, None, None, layer.training, layer.momentum, layer.eps)


def _nested_mean(x: Tensor) -> Tensor:
    return x.mean(3, keepdim=True).mean(2, keepdim=True).mean(0, keepdim=True)


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
