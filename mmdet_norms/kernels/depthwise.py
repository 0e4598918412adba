r"""BNET's convolution: a depthwise one (one k x k kernel per channel) of the normalized map, in few passes over it.

.. math::
    y_c = W_c * \hat x_c + b_c, \qquad \hat x_c = \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}

with zero padding, so that y has the shape of x. Only x is saved for the backward pass. That needs no reduction for the
second term of batch norm, because per channel

.. math::
    \sum \frac{\partial L}{\partial \hat x} \, \hat x = \sum_{k \times k} W_c \, \frac{\partial L}{\partial W_c}.

:mod:`.choose` says who computes it.
"""

from torch import Tensor

from . import choose


def normalize_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Depthwise convolution of the normalized map, with statistics of the batch unless some are given.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, k, k), k odd.
        bias: (C,).
        eps: added to the variance inside the root, in units of x squared.
        mean, var: (C,), constants to normalize with.

    Returns:
        y (N, C, H, W), and the mean and biased variance (C,) that were used, which carry no gradient. None: nobody
        computes it, as :func:`.choose.depthwise` says, or a channel has one value, which has no variance.
    """
    statistics = () if mean is None else (mean, var)
    computed_by = choose.depthwise(x, weight, bias, *statistics)
    if computed_by is None or (mean is None and x.numel() <= x.shape[1]):
        return None
    return computed_by.normalize_and_convolve(x, weight, bias, eps, mean, var)


def inference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    inplace: bool = False,
) -> Tensor:
    r"""What is left of BNET behind a folded convolution, and the end of a residual block with it.

    .. math::
        y_c = \mathrm{relu}(W_c * x_c + b_c + r_c)

    Args:
        x: (N, C, H, W), normalized by the convolution in front; padded with zeros.
        weight: (C, 1, k, k), k odd.
        bias: (C,).
        residual: (N, C, H, W), added; None for none.
        relu: whether to end with it.
        inplace: whether y may take the memory of x.

    Returns:
        y (N, C, H, W) in the dtype of x, accumulated in fp32 for halves.
    """
    computed_by = choose.depthwise_inference(x, weight, bias, residual)
    return computed_by.inference(x, weight, bias, residual, relu, inplace)
