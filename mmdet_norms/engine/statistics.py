"""Running statistics computed anew from batches: after weights were averaged, or for figures that are exact."""

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.model import BaseAveragedModel, is_model_wrapper
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError, some
from ..layers._averaging import AveragesOnRequest


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[str]:
    """Make the running statistics of every norm that training updates their average over ``batches``.

    Batches count alike; variances are those that the norm averages in training (unbiased but in SN), for MABN it is the
    second moment. Everything else stays: weights, counters (BRN's schedule), CBN's history, MABN's windows, and norms
    that ``norm_eval``, ``frozen_stages`` or ``eval()`` hold at their running statistics. A batch with an inf or nan in
    a norm is left out there. With several processes the average is over the batches of all; give each as many.

    ``torch.optim.swa_utils.update_bn`` gives the same statistics, except that it resets the norms that
    ``norm_eval`` keeps from being updated, and BRN's schedule.

    Args:
        model: any module, wrapped for several processes or not; of an EMA, its averaged model.
        batches: what is fed, for instance a data loader. It is run through once.
        forward: ``forward(model, batch)`` runs a batch. By default, mmengine's models compute their loss; others get
            the batch, or its first part if it is a list or tuple, as in torch's ``update_bn``.

    Returns:
        The names of the norms that have new statistics. One that no batch reached keeps its own, which a warning says.

    Raises:
        UserError: no batch, or none that is finite in any norm. The statistics are then as before, as after any error.
    """
    while is_model_wrapper(model) or isinstance(model, BaseAveragedModel):
        model = model.module
    modes = {module: module.training for module in model.modules()}
    model.train()
    norms = updated_norms(model)
    before = {name: {key: value.clone() for key, value in _buffers(norm).items()} for name, norm in norms.items()}
    momenta = {name: _batch_norm(norm).momentum for name, norm in norms.items()}
    done, failed = [], True
    try:
        for norm in norms.values():
            _batch_norm(norm).reset_running_stats()
            _batch_norm(norm).momentum = None
        for batch in batches:
            (forward or _run)(model, batch)
        counts = _averaged_over_processes(norms)
        done = [name for name, count in counts.items() if count]
        if norms and not done:
            raise UserError('recompute_statistics: there was no batch that is finite; the statistics are as before')
        failed = False
    finally:
        for name, norm in norms.items():
            _batch_norm(norm).momentum = momenta[name]
            for key, value in _buffers(norm).items():
                counter = key == 'num_batches_tracked' and momenta[name] is not None
                if failed or counter or name not in done:
                    value.copy_(before[name][key])
        for module, mode in modes.items():
            module.training = mode
    if len(done) < len(norms):
        left = [name for name in norms if name not in done]
        warnings.warn(
            f'recompute_statistics: no finite batch reached {some(left, 5)}; they keep their statistics',
            stacklevel=2,
        )
    return done


def updated_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms whose running statistics a training forward moves, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if module.training
        and (
            isinstance(module, AveragesOnRequest)
            or (isinstance(module, _BatchNorm) and module.running_mean is not None)
        )
    }


def _batch_norm(norm: nn.Module) -> _BatchNorm:
    return norm.statistics if isinstance(norm, AveragesOnRequest) else norm


def _buffers(norm: nn.Module) -> dict[str, Tensor]:
    names = ('running_mean', 'running_var', 'num_batches_tracked')
    return {name: value for name in names if (value := getattr(norm, name, None)) is not None}


def _averaged_over_processes(norms: dict[str, nn.Module]) -> dict[str, int]:
    """The number of batches that each norm saw; in all processes, whose statistics are averaged by it."""
    counts = {}
    for name, norm in norms.items():
        count = norm._averaged if isinstance(norm, AveragesOnRequest) else norm.num_batches_tracked
        statistics = [value for key, value in _buffers(norm).items() if key.startswith('running')]
        count = statistics[0].new_tensor(0 if count is None else int(count), dtype=torch.float64)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            weighted = torch.cat([count.view(1), *(value.double().flatten() * count for value in statistics)])
            dist.all_reduce(weighted)
            count, weighted = weighted[0], weighted[1:] / weighted[0].clamp(min=1)
            for value, average in zip(statistics, weighted.split([value.numel() for value in statistics])):
                value.copy_(average.view_as(value))
        counts[name] = int(count)
    return counts


def _run(model: nn.Module, batch: Any) -> None:
    if hasattr(model, 'data_preprocessor') and 'mode' in inspect.signature(model.forward).parameters:
        data = model.data_preprocessor(batch, True)
        model(**data, mode='loss') if isinstance(data, dict) else model(*data, mode='loss')
    else:
        model(batch[0] if isinstance(batch, (list, tuple)) else batch)
