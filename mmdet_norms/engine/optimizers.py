"""Optimizers of pytorch-optimizer by name: ``optim_wrapper.optimizer=dict(type='RangerLars', lr=...)``.

Each is a function with the options that it takes, which imports pytorch-optimizer when a run asks for it: the package
works without. Their arguments are set so that the names mean what the literature calls them; where pytorch-optimizer
differs from a formula, the docstring says so.
"""

from collections.abc import Callable, Iterable
from types import ModuleType

from mmengine.registry import OPTIMIZERS
from torch.optim import Optimizer

from mmdet_norms_start.requirements import optional

from ..errors import UserError

Betas = tuple[float, float]


@OPTIMIZERS.register_module()
def Ranger(
    params: Iterable,
    lr: float = 1e-3,
    betas: Betas = (0.95, 0.999),
    eps: float = 1e-5,
    weight_decay: float = 0.0,
    k: int = 6,
    alpha: float = 0.5,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    n_sma_threshold: int = 5,
    use_gc: bool = False,
    gc_conv_only: bool = False,
    foreach: bool | None = None,
) -> Optimizer:
    """Lookahead around RAdam (Zhang et al. 2019, arXiv:1907.08610; Liu et al. 2020, arXiv:1908.03265).

    RAdam, with ``rho = 2 / (1 - b2) - 1 - 2 t b2^t / (1 - b2^t)``: where ``rho >= n_sma_threshold``, the step is
    ``lr r m / ((1 - b1^t) (sqrt(v) + eps))``, before that ``lr m / (1 - b1^t)``. Every ``k`` steps the slow weights
    go ``alpha`` of the way to the weights, which go on from there.

    Unlike in pytorch-optimizer, gradients are not centralized unless ``use_gc=True``, and the first steps go down: its
    ``degenerated_to_sgd=False`` makes its Ranger climb until ``rho`` reaches the threshold. ``eps`` stands beside the
    uncorrected ``sqrt(v)``, as in the published code.

    Args:
        params: parameters or groups.
        lr, betas, eps: as above.
        weight_decay: ``w -= lr weight_decay w`` before each step; without ``lr`` if ``fixed_decay``; added to the
            gradient if not ``weight_decouple``.
        k, alpha: of Lookahead. Published: 6 and 0.5.
        n_sma_threshold: published: 5, where the formula would do from 4 on.
        use_gc, gc_conv_only: subtract the mean of each filter's gradient, of all layers or of convolutions.
        foreach: whether tensors are updated together; default: where they can be.
    """
    return _build('Ranger', 'Ranger', degenerated_to_sgd=True, **locals())


@OPTIMIZERS.register_module()
def Ralamb(
    params: Iterable,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    fixed_decay: bool = False,
    n_sma_threshold: int = 5,
    degenerated_to_sgd: bool = True,
) -> Optimizer:
    """RAdam (see :func:`Ranger`) whose step is scaled for each parameter tensor by a trust ratio, as in LAMB and LARS.

    pytorch-optimizer's ratio, ``min(|w|, 10) / (|w - s| + eps)`` with RAdam's step ``s``, is that of the published code
    of this name: it compares the weights with those after the step, where LAMB (You et al. 2020, arXiv:1904.00962)
    takes the norm of the step itself. So it is about 1 for weights of a norm below 10, smaller above and for tensors
    that a step would make much larger, and 1 for tensors that are all 0.

    Args:
        params, lr, betas, eps, n_sma_threshold: as in :func:`Ranger`.
        weight_decay: ``w -= lr weight_decay w`` before each step; without ``lr`` if ``fixed_decay``.
        degenerated_to_sgd: whether the first steps are taken without a denominator; False waits until there is one.
    """
    return _build('Ralamb', 'Lamb', rectify=True, **locals())


@OPTIMIZERS.register_module()
def RangerLars(
    params: Iterable,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    k: int = 6,
    alpha: float = 0.5,
    fixed_decay: bool = False,
    n_sma_threshold: int = 5,
    degenerated_to_sgd: bool = True,
) -> Optimizer:
    """Lookahead around :func:`Ralamb`; the Imagenette example takes lr 1e-2, wd 1e-3, betas (0.9, 0.99), eps 1e-6.

    Args:
        params, lr, betas, eps, weight_decay, fixed_decay, n_sma_threshold, degenerated_to_sgd: as in :func:`Ralamb`.
        k, alpha: every ``k`` steps the slow weights go ``alpha`` of the way to the weights, which go on from there.
    """
    options = {key: value for key, value in locals().items() if key not in ('k', 'alpha')}
    inner = _build('RangerLars', 'Lamb', rectify=True, **options)
    from .wrapped_optimizers import Lookahead

    return _checked('RangerLars', Lookahead, inner, k=k, alpha=alpha)


@OPTIMIZERS.register_module()
def AdaHessian(
    params: Iterable,
    lr: float = 0.1,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    hessian_power: float = 1.0,
    update_period: int = 1,
    num_samples: int = 1,
    hessian_distribution: str = 'rademacher',
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    foreach: bool | None = None,
) -> Optimizer:
    """Adam with the Hessian's diagonal D in the denominator (Yao et al. 2021, arXiv:2006.00719).

    ``w -= lr m / (1 - b1^t) / ((v / (1 - b2^t))^(hessian_power / 2) + eps)``, with the averages m of the gradient and v
    of D^2. :class:`SecondOrderOptimWrapper`, which is chosen by itself, estimates D. Unlike the paper's own code,
    pytorch-optimizer does not average D over the elements of a kernel. A step costs about three of SGD's.

    Args:
        params, lr, betas, eps: as above. With the 1e-16 of pytorch-optimizer, weights whose curvature rounds to 0 (in
            bfloat16, or in the straight part of a SmoothL1Loss) jump.
        weight_decay, weight_decouple, fixed_decay, foreach: as in :func:`Ranger`.
        hessian_power: 1 for Newton's step, less for a smaller part of it.
        update_period: v is renewed in every so manyth step, the others cost what SGD's do. The correction
            ``1 - b2^t`` counts all steps, as in pytorch-optimizer, so that early steps are larger then.
        num_samples, hessian_distribution: how D is estimated: how often, ``'rademacher'`` or ``'gaussian'``.
    """
    _library('AdaHessian')
    from .wrapped_optimizers import AdaHessian as cls

    if hessian_distribution not in ('rademacher', 'gaussian'):
        raise UserError(
            "optim_wrapper.optimizer of type 'AdaHessian': "
            f"hessian_distribution={hessian_distribution!r} must be 'rademacher' or 'gaussian'"
        )
    for key, value in dict(update_period=update_period, num_samples=num_samples).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"optim_wrapper.optimizer of type 'AdaHessian': {key}={value!r} must be an integer of at least 1"
            )
    options = {key: value for key, value in locals().items() if key not in ('cls', 'params', 'key', 'value')}
    return _checked('AdaHessian', cls, params, **options)


def _build(name: str, theirs: str, **options) -> Optimizer:
    return _checked(name, getattr(_library(name), theirs), options.pop('params'), **options)


def _library(name: str) -> ModuleType:
    """pytorch-optimizer, or what to install."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UserError(
            f'optim_wrapper.optimizer.type={name!r} needs pytorch-optimizer, which cannot be imported '
            f'({error}). Install it: pip install {optional("optim")}'
        ) from error
    return pytorch_optimizer


def _checked(name: str, build: Callable, *args, **options) -> Optimizer:
    try:
        return build(*args, **options)
    except Exception as error:  # its errors have no common base
        raise UserError(f'optim_wrapper.optimizer of type {name!r}: {error}') from error
