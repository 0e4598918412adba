"""The weight gradient of a 3 x 3 convolution by a quarter of the multiplications (Winograd 1980), in fp32 on a CPU.

For each tile of 4 x 4 output positions, the 3 x 3 taps are a correlation of the gradient there with the 6 x 6 inputs
around. In one dimension, with the Vandermonde matrix V of 6 points (one at infinity), whose first n columns are V_n,

    taps = V_3^T ((V_4 gradient) * (V^-T input))

since the transpose of "polynomials multiply as their values at the points do" says so; in two dimensions each matrix
acts on rows and columns. Between the transforms there are 36 products where the definition has 144, and as sums over
tiles they are 36 matrix products. oneDNN has this for inference only.

The points are those of small matrix entries: in fp32 the result is as exact as that of the direct method.
"""

import math

import torch
from torch import Tensor

_TILE = 4
_SPAN = _TILE + 2
_POINTS = (0, 1, -1, 2, -0.5)
_TILES_AT_ONCE = 160  # so that they fit in a cache


def serves(grad: Tensor, x: Tensor, weight: Tensor, stride: tuple, dilation: tuple, groups: int) -> bool:
    """Is this a convolution for :func:`weight_gradient`, and large enough to gain?"""
    positions = grad.numel() // grad.shape[1]
    tiles = len(grad) * math.prod(-(-size // _TILE) for size in grad.shape[2:])
    return (
        weight.shape[2:] == (3, 3)
        and (*stride, *dilation, groups) == (1, 1, 1, 1, 1)
        and grad.device.type == x.device.type == 'cpu'
        and grad.dtype == x.dtype == torch.float32
        and min(weight.shape[:2]) >= 128
        and tiles >= 128
        and tiles * _TILE**2 <= 1.5 * positions
    )


def weight_gradient(grad: Tensor, x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Gradient by the weight, ``(C_out, C_in, 3, 3)``, of a convolution with stride 1 and zero padding.

    Args:
        grad: gradient by the output, ``(N, C_out, H + 2 padding - 2, W + 2 padding - 2)``.
        x: the input, ``(N, C_in, H, W)``.
    """
    high, wide = (-(-size // _TILE) for size in grad.shape[2:])  # in tiles
    grad = _padded(grad, (0, 0), high * _TILE, wide * _TILE)
    x = _padded(x, padding, high * _TILE + 2, wide * _TILE + 2)
    of_grad, of_x, of_taps = _transforms()
    total = grad.new_zeros(_SPAN**2, grad.shape[3], x.shape[3])
    images = max(1, _TILES_AT_ONCE // (high * wide))
    rows = max(1, _TILES_AT_ONCE // (images * wide))
    for some_grad, some_x in zip(grad.split(images), x.split(images)):
        for top in range(0, high, rows):
            bottom = min(top + rows, high)
            tiles = _transformed(of_grad, some_grad[:, top * _TILE : bottom * _TILE], _TILE)
            spans = _transformed(of_x, some_x[:, top * _TILE : bottom * _TILE + 2], _SPAN)
            total.baddbmm_(tiles.transpose(1, 2), spans)
    return (of_taps @ total.flatten(1)).view(3, 3, *total.shape[1:]).permute(2, 3, 0, 1).contiguous()


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    points = torch.tensor(_POINTS, dtype=torch.float64)
    values = torch.vander(points, _SPAN, increasing=True)
    at_infinity = values.new_zeros(1, _SPAN)
    at_infinity[0, -1] = 1

    def leading(columns: int) -> Tensor:
        return torch.cat([values[:, :columns], at_infinity[:, -columns:]])

    one_dimensional = leading(_TILE), torch.linalg.inv(leading(_SPAN)).T, leading(3).T
    return tuple(torch.kron(matrix.contiguous(), matrix.contiguous()).float() for matrix in one_dimensional)


def _padded(x: Tensor, before: tuple[int, int], height: int, width: int) -> Tensor:
    """``(N, height, width, C)`` with ``x`` in it and zeros around."""
    top, left = before
    padded = x.new_zeros(len(x), height, width, x.shape[1])
    padded[:, top : top + x.shape[2], left : left + x.shape[3]] = x.permute(0, 2, 3, 1)
    return padded


def _transformed(matrix: Tensor, x: Tensor, size: int) -> Tensor:
    """``(36, tiles, C)``: the transform of every ``size`` x ``size`` tile, one each 4 steps."""
    tiles = x.unfold(1, size, _TILE).unfold(2, size, _TILE)  # (N, rows, columns, C, size, size)
    tiles = tiles.permute(4, 5, 0, 1, 2, 3).reshape(size**2, -1)
    return (matrix @ tiles).view(_SPAN**2, -1, x.shape[3])
