"""Names of torch's autograd that are no promise."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmdet_norms.compat.autograd import custom_functions, is_once_differentiable


class Twice(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Once(Twice):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_functions_of_ones_own_are_found_behind_a_loss():
    x = torch.ones(3, requires_grad=True)
    assert custom_functions((Twice.apply(x).exp() + Once.apply(x)).sum()) == {Twice, Once}
    assert custom_functions(x.exp().sum()) == custom_functions(torch.ones(())) == set()


def test_which_can_be_differentiated_once_only():
    assert is_once_differentiable(Once) and not is_once_differentiable(Twice)
