"""A resumed run is the run that was stopped: random states, and data that are a function of seed and iteration."""

import itertools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from ..compat.loading import InfiniteBatches, finish_epoch, has_batches, replace_batch_sampler, set_epoch
from .optim import accumulated_batches
from .resumed import differences
from .threads import take_threads
from .together import announce_saving, model_of

KEY = 'random_states'
"""Where a checkpoint has them: ``dict(version, processes)``, with one entry for each process."""


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Save what is random in a checkpoint and go on from it; ``tools/train.py`` adds the hook to every run.

    After ``--resume`` weights, optimizer, averages, losses and the order and augmentation of the images are, bit by
    bit, those of a run that never stopped: from checkpoints of epochs and of iterations, also within an epoch, in both
    loops, with one process and with several. To that end

    * each image is loaded with Python's, NumPy's and torch's generators seeded from the run's seed, the process, the
      iteration and the place in the batch, so the number of workers does not matter, nor what they did before;
    * the states of the generators of every process, the sampler's seed and place, and gradients that are being
      accumulated are saved, under ``random_states``;
    * so is the number of threads on a CPU, in whose order sums are formed: a resumed run computes with as many, unless
      the user says otherwise or there are not so many cores;
    * a validation leaves the generators as they were.

    Skipped batches are not loaded again. The log says so where the run cannot go on identically: a checkpoint without
    states or without the gradients of an accumulation, another number of processes or ``accumulative_counts``, other
    data, an own loop, transforms that keep images of earlier batches, an optimizer, schedules or averages that the
    config has otherwise (those of the checkpoint are used).
    Operations that are not deterministic themselves (some on GPUs, see ``--deterministic``) stay so.

    In a config for mmdet's own tools: ``custom_hooks=[dict(type='RandomStateHook')]``.
    """

    priority = 'VERY_LOW'  # when all others are ready to train; before a validation that a stopped run still owes

    def __init__(self) -> None:
        self._batches: NumberedBatches | None = None
        self._epoch = 0
        self._loaded: dict | None = None
        self._resumed = False
        self._differences: list[str] = []
        self._before_val: tuple | None = None
        self._states: list | None = None

    def before_run(self, runner: Runner) -> None:
        """Be told before every checkpoint."""
        announce_saving(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the states out of a checkpoint to resume from."""
        if runner._resume:
            self._resumed, self._loaded = True, checkpoint.pop(KEY, None)
            self._differences = differences(runner, checkpoint)
            self._take_threads(runner)
            runner.logger.addFilter(_leave_to_the_hook)

    def before_train(self, runner: Runner) -> None:
        """Number the batches; after a resume, go on where the checkpoint was saved."""
        loader = runner.train_dataloader
        if has_batches(loader) and not isinstance(loader.batch_sampler, NumberedBatches):
            self._batches = NumberedBatches(loader.batch_sampler, runner.seed, get_rank())
            replace_batch_sampler(loader, self._batches, runner.seed)
        if self._resumed:
            self._resumed = False
            runner.logger.removeFilter(_leave_to_the_hook)
            told = self._go_on(runner)
            reasons = self._differences + _short_step(runner)
            reasons += [] if told is None else [f'{told}. It goes on with other random numbers']
            if reasons:
                runner.logger.warning(
                    f'The resumed run is not bit by bit the one that was stopped: {"; ".join(reasons)}'
                )
            else:
                runner.logger.info('Random states of the checkpoint restored: the run goes on as if it had not stopped')
        self._loaded = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Know to which epoch the coming pass belongs."""
        self._epoch = runner.epoch

    def before_val(self, runner: Runner) -> None:
        """Remember the generators."""
        self._before_val = random_state()

    def after_val(self, runner: Runner) -> None:
        """Forget what the validation drew."""
        if self._before_val is not None:
            set_random_state(self._before_val)
            self._before_val = None

    def before_saving(self, runner: Runner) -> None:
        """Called in all processes before a checkpoint is written."""
        mine = dict(
            rng=pack(self._before_val or random_state()),
            images=_describe(runner),
            gradients=_gradients(runner),
            counts=accumulated_batches(runner.optim_wrapper),
            sizes={name: list(m._input_size) for name, m in _sized(runner)},
        )
        if get_device() == 'cpu':
            mine['threads'] = torch.get_num_threads()
        if self._batches is not None:
            mine['pass'] = self._batches.place(self._pass_number(runner))
        self._states = all_gather_object(mine)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the states of all processes into the checkpoint."""
        if self._states is not None:
            states = self._states
            if 'optimizer' not in checkpoint:  # not to be resumed from
                states = [{**state, 'gradients': {}} for state in states]
            checkpoint[KEY] = dict(version=1, processes=states)

    def _take_threads(self, runner: Runner) -> None:
        """Compute with as many threads as the run that was stopped."""
        processes = self._loaded['processes'] if _is_whole(self._loaded) else []
        threads = processes[get_rank()].get('threads') if len(processes) == get_world_size() else None
        if get_device() == 'cpu' and isinstance(threads, int) and 0 < threads != torch.get_num_threads():
            told = take_threads(threads)
            if told is None:
                runner.logger.info(f'CPU threads: {threads}, as in the run that was stopped')
            else:
                self._differences.append(told)

    def _pass_number(self, runner: Runner) -> int:
        iterator = getattr(runner.train_loop, 'dataloader_iterator', None)
        return iterator.epoch if isinstance(iterator, InfiniteBatches) else self._epoch

    def _go_on(self, runner: Runner) -> str | None:
        """Restore the states; what is in the way of it."""
        if self._loaded is None:
            return 'the checkpoint has no random states (it was saved without RandomStateHook)'
        if not _is_whole(self._loaded):
            return 'the random states of the checkpoint are of another form'
        processes = self._loaded['processes']
        if len(processes) != get_world_size():
            return f'it was saved by {len(processes)} processes, and this run has {get_world_size()}'
        mine = processes[get_rank()]
        modules = dict(model_of(runner).named_modules())
        for name, size in mine['sizes'].items():
            if name in modules:
                modules[name]._input_size = tuple(size)
        self._restore_gradients(runner, mine)
        state = unpack(mine['rng'])
        set_random_state(state)
        if self._batches is None or 'pass' not in mine:
            return 'its data loader does not choose images by a batch sampler'
        if mine['images'] != _describe(runner):
            return f'its data are other ones, {mine["images"]} in the checkpoint and {_describe(runner)} now'
        begin = mine['pass']
        loop = runner.train_loop
        self._batches.resume(begin)
        self._epoch = begin['epoch']
        iterator = getattr(loop, 'dataloader_iterator', None)

        def go_on() -> Iterator:
            set_epoch(runner.train_dataloader, begin['epoch'])
            set_random_state(state)
            self._batches.begin_within(runner.iter - begin['number'])
            return iter(runner.train_dataloader)

        if isinstance(iterator, InfiniteBatches):
            loop.dataloader_iterator = InfiniteBatches(runner.train_dataloader, begin['epoch'], runner.iter, go_on)
        elif not isinstance(loop, EpochBasedTrainLoop):
            return f'{type(loop).__name__} is a loop of its own'
        elif begin['epoch'] == runner.epoch:
            if not finish_epoch(loop, go_on, runner.iter - begin['number']):
                return f'{type(loop).__name__} has a run_epoch of its own, which cannot begin within an epoch'
        else:
            self._batches.next = runner.iter
        keeping = _transforms_with_memory(runner.train_dataloader.dataset)
        if keeping:
            return f'{", ".join(keeping)} mix images of earlier batches, which are not saved, into new ones'
        return None

    def _restore_gradients(self, runner: Runner, mine: dict) -> None:
        """Those of an accumulation, unless steps have another number of batches now, whose part they are not."""
        counts = accumulated_batches(runner.optim_wrapper)
        saved = mine.get('counts', counts)  # older checkpoints do not say
        if saved != counts:
            told = f'its optimizer steps every {counts} iterations (accumulative_counts), not every {saved} as before'
            self._differences.append(
                told + (', so that gradients of a begun step are left out' if mine['gradients'] else '')
            )
            return
        parameters = dict(model_of(runner).named_parameters())
        for name, gradient in mine['gradients'].items():
            if name in parameters:
                parameters[name].grad = torch.empty_like(parameters[name]).copy_(gradient)


class NumberedBatches:
    """A batch sampler whose batches know the number of their iteration in the run, and can begin anywhere.

    Args:
        batch_sampler: what chooses the images; attributes that are not here are its own.
        seed: of the run.
        rank: of the process.
    """

    def __init__(self, batch_sampler, seed: int, rank: int):
        self.batch_sampler, self.seed, self.rank = batch_sampler, seed, rank
        self.next = 0
        self._skip: int | None = None
        self._stream = (*random_state()[:3], None)
        self._first, self._at_first = 0, self._stream

    def __getattr__(self, name: str):
        if name == 'batch_sampler':
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator['SeededBatch']:
        # All of it waits for the first batch: a loader with workers calls iter() twice and uses the second.
        skip, self._skip = self._skip, None
        if skip is None:
            self._first, self._at_first = self.next, self._stream
        else:
            self.next, self._stream = self._first + skip, self._at_first
        with self._drawing():
            batches = iter(self.batch_sampler)
            for _ in itertools.islice(batches, skip or 0):
                pass
        while True:
            with self._drawing():
                batch = next(batches, None)
            if batch is None:
                return
            self.next += 1
            yield SeededBatch(batch, (self.seed, self.rank, self.next - 1))

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Samplers that use the generators of the process have a stream of their own.

        With workers they draw some batches ahead, which the main stream must not notice.
        """
        with kept_random_state():
            set_random_state(self._stream)
            yield
            self._stream = (*random_state()[:3], None)

    def begin_within(self, skip: int) -> None:
        """Have the coming pass be the one that was resumed, without its first ``skip`` batches."""
        self._skip = skip

    def place(self, epoch: int) -> dict:
        """Where the current pass began, which is all that is needed to find a place in it again."""
        sampler_seed = getattr(_sampler(self), 'seed', None)
        seeds = dict(seed=self.seed, sampler_seed=sampler_seed if isinstance(sampler_seed, int) else None)
        return dict(number=self._first, epoch=epoch, rng=pack(self._at_first), stream=pack(self._stream), **seeds)

    def resume(self, place: dict) -> None:
        """Take over seeds and number of the run that was stopped."""
        self.seed, self.next = place['seed'], place['number']
        self._first, self._at_first = place['number'], unpack(place['rng'])
        self._stream = unpack(place['stream'])
        if place['sampler_seed'] is not None:
            _sampler(self).seed = place['sampler_seed']


class SeededBatch(Sequence):
    """The images of a batch; whoever goes through it to load them has all generators seeded for each.

    torch's loader does so, in a worker or in the main process, whose generators are as before in the end.
    """

    def __init__(self, indices: Sequence, seed: tuple[int, int, int]):
        self.indices, self.seed = indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place):
        return self.indices[place]

    def __iter__(self) -> Iterator:
        with kept_random_state():
            for place, index in enumerate(self.indices):
                _seed_generators((*self.seed, place))
                yield index


def _seed_generators(entropy: tuple[int, ...]) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


# ------------------------------------------------------------------------------------------------ generators


def random_state() -> tuple:
    """The states of the generators of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Restore what :func:`random_state` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn inside leaves no trace."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state(), None
    try:
        yield
    finally:
        set_random_state(state)


def pack(state: tuple) -> dict:
    """A state as tensors and plain numbers, which a checkpoint may hold."""
    (version, words, gauss), (kind, keys, *rest), cpu, cuda = state
    python = dict(version=version, words=torch.tensor(words), gauss=gauss)
    numpy = dict(kind=str(kind), keys=torch.from_numpy(keys.astype(np.int64)), rest=[float(value) for value in rest])
    return dict(python=python, numpy=numpy, torch=cpu, cuda=cuda)


def unpack(packed: dict) -> tuple:
    """The inverse of :func:`pack`; tensors may be on any device."""
    python, numpy = packed['python'], packed['numpy']
    position, has_gauss, gauss = numpy['rest']
    keys = numpy['keys'].cpu().numpy().astype(np.uint32)
    cuda = packed['cuda']
    return (
        (python['version'], tuple(python['words'].tolist()), python['gauss']),
        (numpy['kind'], keys, int(position), int(has_gauss), gauss),
        packed['torch'].cpu(),
        None if cuda is None else cuda.cpu(),
    )


# ------------------------------------------------------------------------------------------------ of a run


def _is_whole(states: object) -> bool:
    """Whether these are states as :meth:`RandomStateHook.before_saving` makes them, not of another program."""
    processes = states.get('processes') if isinstance(states, dict) and states.get('version') == 1 else None
    if not isinstance(processes, list):
        return False
    keys = {'rng', 'images', 'gradients', 'sizes'}
    return all(isinstance(mine, dict) and keys <= mine.keys() and _can_unpack(mine['rng']) for mine in processes)


def _can_unpack(packed: object) -> bool:
    try:
        unpack(packed)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return True


def trained_batch_size(checkpoint: dict) -> int | None:
    """Images in a batch of one process, in the run that saved a checkpoint; None where it does not say so."""
    states = checkpoint.get(KEY)
    return states['processes'][0]['images'].get('batch_size') if _is_whole(states) and states['processes'] else None


def _sampler(batches: NumberedBatches) -> object:
    return getattr(batches.batch_sampler, 'sampler', batches.batch_sampler)


def _describe(runner: Runner) -> dict:
    """What must be the same for images to come in the same order."""
    loader = runner.train_dataloader
    if not has_batches(loader):
        return {}
    batches = loader.batch_sampler
    sampler = type(getattr(batches, 'sampler', batches)).__name__
    return dict(images=len(loader.dataset), batch_size=getattr(batches, 'batch_size', None), sampler=sampler)


def _gradients(runner: Runner) -> dict[str, torch.Tensor]:
    """Gradients that wait for the rest of an accumulation; after a step there are none."""
    if accumulated_batches(runner.optim_wrapper) == 1:
        return {}
    named = model_of(runner).named_parameters()
    return {name: p.grad.detach().cpu().clone() for name, p in named if p.grad is not None}


def _short_step(runner: Runner) -> list[str]:
    """That the first step of the optimizer lacks batches: the gradients of an accumulation were not there to restore.

    Of a run that had come to its end they were used up, by a step of fewer batches, which matters if it trains longer.
    """
    counts = accumulated_batches(runner.optim_wrapper)
    lacking = runner.iter % counts
    if runner.iter >= getattr(runner.train_loop, 'max_iters', math.inf):
        return []
    if not lacking or any(parameter.grad is not None for parameter in model_of(runner).parameters()):
        return []
    return [f'its first step of the optimizer has {counts - lacking} of {counts} batches']


def _leave_to_the_hook(record: logging.LogRecord) -> bool:
    """Without what mmengine says of every checkpoint amid an accumulation, as if gradients were never restored."""
    return 'the gradient of some iterations is lost' not in record.getMessage()


def _sized(runner: Runner) -> Iterator[tuple[str, nn.Module]]:
    """Modules such as BatchSyncRandomResize, which keep a random size for some iterations."""
    for name, module in model_of(runner).named_modules():
        if isinstance(getattr(module, '_input_size', None), tuple):
            yield name, module


def _transforms_with_memory(node: object, depth: int = 0) -> list[str]:
    """Names of the transforms in a data set that keep results of earlier images (CachedMosaic, CachedMixUp)."""
    found = [type(node).__name__] if isinstance(getattr(node, 'results_cache', None), list) else []
    for name in ('pipeline', 'transforms', 'dataset', '_dataset', 'datasets'):
        inner = vars(node).get(name) if depth < 8 and hasattr(node, '__dict__') else None
        for child in inner if isinstance(inner, (list, tuple)) else [inner]:
            if child is not None:
                found += _transforms_with_memory(child, depth + 1)
    return list(dict.fromkeys(found))
