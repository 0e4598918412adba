"""The Winograd weight gradient against the derivative by torch, and where it is used."""

import pytest
import torch
from torch.nn import functional as F

from mmdet_norms.kernels import winograd

SHAPES = [  # N, C_in, C_out, H, W
    (1, 1, 1, 4, 4),
    (2, 3, 5, 9, 6),
    (3, 4, 2, 3, 13),
    (70, 2, 3, 7, 7),  # more instances than are taken at once
    (2, 3, 2, 50, 83),  # more rows than are taken at once
]


def derivative(grad, x, padding):
    weight = torch.zeros(grad.shape[1], x.shape[1], 3, 3, dtype=x.dtype, requires_grad=True)
    F.conv2d(x, weight, padding=padding).backward(grad)
    return weight.grad


def case(shape, padding, dtype=torch.float32):
    n, c_in, c_out, h, w = shape
    torch.manual_seed(h)
    x = torch.randn(n, c_in, h, w, dtype=dtype)
    return torch.randn(n, c_out, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2, dtype=dtype), x


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('padding', [(1, 1), (0, 0), (2, 0), (0, 3)])
@pytest.mark.parametrize('shape', SHAPES)
def test_it_is_the_derivative_by_the_weight(shape, padding, layout):
    grad, x = (t.contiguous(memory_format=layout) for t in case(shape, padding))
    before = grad.clone(), x.clone()
    result = winograd.weight_gradient(grad, x, padding)
    expected = derivative(grad.double(), x.double(), padding)
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(grad, before[0]) and torch.equal(x, before[1])


def test_in_fp32_it_is_about_as_exact_as_the_direct_method():
    grad, x = case((2, 16, 16, 60, 80), (1, 1))
    exact = derivative(grad.double(), x.double(), (1, 1))
    ours, direct = (
        (result - exact).abs().max() / exact.abs().max()
        for result in (winograd.weight_gradient(grad, x, (1, 1)), derivative(grad, x, (1, 1)))
    )
    assert ours <= max(1e-5, 4 * direct)


def test_only_large_plain_fp32_convolutions_on_a_cpu_are_served():
    def served(shape=(2, 128, 128, 40, 40), padding=(1, 1), stride=(1, 1), dilation=(1, 1), groups=1, size=3, **kind):
        grad, x = (torch.empty(t.shape, **kind) for t in case(shape, padding))
        weight = torch.empty(shape[2], shape[1] // groups, size, size, **kind)
        return winograd.serves(grad, x, weight, stride, dilation, groups)

    assert served() and served((128, 128, 256, 7, 7)) and served(stride=[1, 1])
    assert not served((2, 64, 128, 40, 40))  # few channels
    assert not served((2, 128, 128, 10, 10))  # few tiles
    assert not served((200, 128, 128, 5, 5))  # tiles that are half empty
    assert not served(stride=(2, 2)) and not served(dilation=(2, 2)) and not served(groups=2) and not served(size=5)
    assert not served(dtype=torch.float64) and not served(dtype=torch.bfloat16) and not served(device='meta')
