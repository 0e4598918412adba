"""What a training costs: ``cost.json`` in its work dir."""

import math
import sys
import time
from pathlib import Path
from statistics import median

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from .norms import in_warm_up
from .results import write_json
from .together import model_of

try:
    import resource
except ImportError:  # not a Unix
    resource = None

COST = 'cost.json'

_STATE = 'cost'  # in the message hub, whose content a checkpoint holds
_WARM_UP = 10  # iterations of a process that are slower than those that follow
_KEPT = 1000  # iterations, the latest, that the median is taken of


@HOOKS.register_module()
class CostHook(Hook):
    """Write what the training costs to ``cost.json``, after each validation and at its end. ``tools/train.py`` adds it.

    ``seconds_per_iteration`` is the median of the latest thousand, from the end of one to the end of the next, without
    evaluations, the first iteration of an epoch and the first ten of a process. ``seconds`` is all the time from the
    first iteration on, evaluations included; of a run that was resumed, that up to its checkpoint is added.
    ``peak_memory_mb`` is what tensors took on a GPU, else the resident memory of the process; of several processes,
    that of the one with the most. ``in_warm_up`` names norms that are still another method. All of it changes nothing
    in the training.
    """

    def __init__(self) -> None:
        self._state = dict(seconds=0.0, peak_memory_mb=0.0, times=[])
        self._before = self._seen = 0  # seconds of earlier parts; iterations of this one
        self._first: list[float] = []
        self._start = self._mark = self._begin = None

    def before_train(self, runner: Runner) -> None:
        """Go on from what the checkpoint says."""
        saved = runner.message_hub.runtime_info.get(_STATE)
        self._state.update({key: saved[key] for key in self._state if isinstance(saved, dict) and key in saved})
        self._state['times'] = list(self._state['times'])
        self._before, self._start = self._state['seconds'], time.monotonic()
        # the same dict for good: whoever saves a checkpoint saves what it holds then
        runner.message_hub.update_info(_STATE, self._state)

    def before_train_epoch(self, runner: Runner) -> None:
        """The first iteration of an epoch waits for the data loader to start."""
        self._mark = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Start the clock where nothing else has."""
        self._begin = time.monotonic()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Take the time."""
        now, state = time.monotonic(), self._state
        self._seen += 1
        if self._seen <= _WARM_UP:
            self._first.append(now - self._begin)
        elif self._mark is not None:
            state['times'].append(now - self._mark)
            if len(state['times']) >= 2 * _KEPT:
                del state['times'][:-_KEPT]
        self._mark = now
        state['seconds'] = self._before + now - self._start
        # now, since mmengine forgets the peak with each line that it logs
        state['peak_memory_mb'] = max(state['peak_memory_mb'], peak_memory()[0] / 2**20)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write what it has cost so far."""
        self._mark = None
        if self._start is not None:  # a training
            self._state['seconds'] = self._before + time.monotonic() - self._start
            self._write(runner)

    def after_train(self, runner: Runner) -> None:
        """Write what it has cost."""
        self._write(runner)

    def _write(self, runner: Runner) -> None:
        peak = torch.tensor([self._state['peak_memory_mb']], dtype=torch.float64)
        all_reduce(peak, 'max')
        if is_main_process():
            write_json(Path(runner.work_dir) / COST, self._cost(runner, peak.item()))

    def _cost(self, runner: Runner, peak: float) -> dict:
        model = model_of(runner)
        # of few iterations, all are among the first; the very first is the slowest
        times = self._state['times'][-_KEPT:] or self._first[1:] or self._first
        batch = images_per_iteration(runner)
        each = median(times) if times else None
        return dict(
            parameters=_count(model),
            trainable_parameters=_count(model, trained=True),
            batch_size=batch,
            processes=get_world_size(),
            device=device_name(),
            iterations=runner.iter,
            seconds_per_iteration=each,
            images_per_second=batch / each if batch and each else None,
            seconds=self._state['seconds'],
            peak_memory_mb=round(peak, 1) or None,
            peak_memory_of=peak_memory()[1],
            in_warm_up=in_warm_up(model),
        )


def _count(model: nn.Module, trained: bool = False) -> int:
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad or not trained)


def images_per_iteration(runner: Runner) -> int | None:
    """Of all processes together; None where the data loader does not say."""
    loader = runner.train_dataloader
    size = getattr(loader, 'batch_size', None) or getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    return size * get_world_size() if isinstance(size, int) else None


def device_name() -> str:
    """What computes, such as ``NVIDIA H100 80GB HBM3``, or ``cpu``."""
    return torch.cuda.get_device_name() if get_device() == 'cuda' else get_device()


def peak_memory() -> tuple[int, str]:
    """The most bytes that this process has held so far, and of what: of the GPU, or else of the whole process."""
    if get_device() == 'cuda':
        return torch.cuda.max_memory_allocated(), 'GPU'
    if resource is None:
        return 0, 'process'
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024, 'process'
