"""Vectors of groups of images ``(G, C)`` from and to those of images ``(N, C)``, for kernels that know the latter.

Everywhere, ``groups`` None stands for the whole batch, whose vectors are ``(C,)``.
"""

from torch import Tensor


def groups_of(vector: Tensor) -> int | None:
    """G of a vector ``(G, C)``; None for ``(C,)``."""
    return vector.shape[0] if vector.dim() == 2 else None


def by_group(x: Tensor, groups: int) -> Tensor:
    """``(G, N / G, ...)`` of ``(N, ...)``. (By view, as unflatten has no rule for ``is_grads_batched``.)"""
    return x.unsqueeze(1) if groups == x.shape[0] else x.view(groups, -1, *x.shape[1:])


def of_images(rows: Tensor, images: int) -> Tensor:
    """``(N, C)``: what each of N images takes from the rows ``(G, C)`` of the groups."""
    return rows if rows.shape[0] == images else rows.repeat_interleave(images // rows.shape[0], 0)


def sums_of_groups(rows: Tensor, groups: int | None) -> Tensor:
    """Sums over groups from those over images ``(N, C)``."""
    return rows.sum(0) if groups is None else by_group(rows, groups).sum(1)


def moments_of_groups(mean: Tensor, var: Tensor, groups: int | None) -> tuple[Tensor, Tensor]:
    """Means and biased variances of groups from those of images ``(N, C)``."""
    if groups is None:
        return tuple(rows.squeeze(0) for rows in pooled(mean, var, 0))
    return tuple(rows.squeeze(1) for rows in pooled(by_group(mean, groups), by_group(var, groups), 1))


def pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the union of equally large sets along ``dim``, which is kept.

    From deviations: a mean that is large against them costs no digits.
    """
    of_all = mean.mean(dim, keepdim=True)
    return of_all, (var + (mean - of_all).square()).mean(dim, keepdim=True)
