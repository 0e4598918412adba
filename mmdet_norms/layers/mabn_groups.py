"""MABN with a simulated normalization batch: its window runs over groups of images inside a larger batch.

The method in 60 lines: ``reference/mabn_groups.py``; here exact, fast and resumable.
"""

import torch
from torch import Tensor

from ..kernels import map_ops
from ._args import ConfigError
from ._groups import check_norm_batch, number_of_groups
from .mabn import MABN


class GroupedMABN(MABN):
    r"""What ``MABN(num_features, norm_batch=B)`` and ``norm_cfg=dict(type='MABN', norm_batch=B)`` make.

    Image n belongs to group :math:`i = \lfloor n / B \rfloor` of G, and t counts batches. The formulas are those of
    :class:`MABN` for each group, :math:`\chi_i` and :math:`\psi_i` over ``(B, H, W)``, with

    * a window of the last m groups up to i, those of the batch before included; each group alone while
      :math:`t \le \lceil m / G \rceil`;
    * r = 1 while t < warmup_iters;
    * :math:`\rho \leftarrow \overline v` at t = 1, and later momentum * :math:`\rho` + (1 - momentum) *
      :math:`\overline v`, where :math:`\overline v` is the mean over the groups.

    Published is G = m; another G moves the same window by G groups a batch.

    State, as published: ``weight``, ``bias``, ``running_var`` ``(C,)``; ``iters`` ``(1,)``; ``pre_x2``, ``pre_gz``
    ``(m, C)``: :math:`\chi` and :math:`\psi` of the last m groups, oldest first. A batch with an inf or nan changes
    nothing and is not counted.

    Args:
        Those of :class:`MABN`; ``norm_batch``: B; ``real_B``: the window is m = real_B / B; ``warmup_iters``: batches
        before r is used, default 100 as published.

    Source: Yan et al., arXiv:2001.06838, section 5.1 (ImageNet).
    """

    WINDOWS = ('pre_x2', 'pre_gz')

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

    @property
    def renorm_delay(self) -> int:
        return max(self.warmup_iters - 1, 0)

    def new_state(self) -> dict[str, Tensor]:
        return dict(
            running_var=torch.ones(self.num_features),
            iters=torch.zeros(1, dtype=torch.int64),
            pre_x2=torch.ones(self.buffer_size, self.num_features),
            pre_gz=torch.zeros(self.buffer_size, self.num_features),
        )

    def _second_moment(self, x: Tensor) -> Tensor:
        return map_ops.second_moment(x, number_of_groups('MABN', self.norm_batch, x))

    def _advance(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, old = self.iters + 1, self.running_var.to(moments.dtype)
        used = self._windowed(self.pre_x2, moments, t)
        renorm = self._renorm(used, old, t > self.renorm_delay)
        now = used.mean(0)
        new = torch.where(t == 1, now, self.momentum * old + (1 - self.momentum) * now).to(self.running_var.dtype)
        good = moments.isfinite().all() & new.isfinite().all()
        self.running_var.copy_(torch.where(good, new, self.running_var))
        self.iters += good
        return used, renorm, t

    def _windowed(self, window: Tensor, rows: Tensor, t: Tensor) -> Tensor:
        """Let ``rows`` (G, C) follow in ``window`` (m, C). Returns for each the mean of the last m, or at first itself.

        Inf and nan leave the window as it is, and in the mean count as the window's.
        """
        past, size = window.to(rows.dtype), len(window)
        filled = torch.where(rows.isfinite(), rows, past.mean(0))
        means = torch.cat([past, filled]).unfold(0, size, 1)[1:].mean(-1)
        newest = torch.cat([past, rows])[-size:].to(window.dtype)
        window.copy_(torch.where(rows.isfinite().all() & newest.isfinite().all(), newest, window))
        return torch.where(t <= -(-size // len(rows)), rows, means)

    def resized(self, rows: Tensor, t: int) -> Tensor:
        kept = rows[-self.buffer_size :]
        return torch.cat([kept.mean(0).expand(self.buffer_size - len(kept), -1), kept])

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, norm_batch={self.norm_batch}'
