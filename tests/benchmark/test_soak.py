"""The soak of tools/soak.py, short: state stays finite and nothing piles up."""

import pytest
import torch
from torch import nn

from mmdet_norms.benchmark import soak as module
from mmdet_norms.benchmark.soak import HEADER, NORMS, row, soak


@pytest.mark.parametrize('name', NORMS)
@pytest.mark.filterwarnings('ignore:MABN')
def test_tensors_do_not_pile_up_and_state_stays_finite(name):
    remembers = name in ('BRN', 'CBN', 'MABN')  # 32 calls that may be repeated
    result = soak(name, iterations=196 if remembers else 60, samples=8, save_every=99 if remembers else 25)
    assert result.finite and result.tensors <= 0 and result.empty > 5 and result.bad
    assert len(row(result)) == len(HEADER) and row(result).split()[-1] == f'{result.tensors:+}'


def test_what_piles_up_or_is_not_finite_is_seen(monkeypatch):
    class Leaky(nn.BatchNorm2d):
        kept = []

        def forward(self, x):
            self.kept.append(x.detach().sum())
            self.running_mean += x.sum() * 0
            return x * self.weight.view(-1, 1, 1)

    monkeypatch.setitem(module.NORMS, 'leaky', lambda: Leaky(8))
    result = soak('leaky', iterations=80, samples=8)
    assert not result.finite and result.tensors > 5 and result.python > 100
    assert torch.is_tensor(Leaky.kept[0])
