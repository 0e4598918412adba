"""Times, memory and the machine: how anything here is measured."""

import datetime
import gc
import os
import platform
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .. import cores
from ..kernels import compiled

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU of today
_HEAD_START = 1_000_000  # GPU cycles, about half a millisecond, in which the host fills the queue


def _nothing() -> None:
    pass


@dataclass
class Case:
    """One thing to time.

    Args:
        name: unique within a measurement.
        run: what is timed.
        reset: called before every ``run`` and not timed, e.g. drops the gradients of the call before.
        settle: called once, after the first call: brings a layer with a history into its steady state.
        settle_calls: calls before the warm-up that the steady state takes.
    """

    name: str
    run: Callable[[], object]
    reset: Callable[[], None] = _nothing
    settle: Callable[[], None] = _nothing
    settle_calls: int = 0


@dataclass
class Times:
    """What :func:`interleave` measured: milliseconds per case in the order of the repeats, and what failed.

    Args:
        ms: case name -> one time per repeat. Position i of all cases is from the same repeat.
        failed: case name -> the error's text. Such a case has no times.
    """

    ms: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def interleave(
    cases: Sequence[Case],
    repeats: int,
    warmup: int = 3,
    device: torch.device | str = 'cpu',
    on_call: Callable[[str], None] | None = None,
) -> Times:
    """Time every case ``repeats`` times, each once per repeat, so that a drift of the machine hits all alike.

    The order within a repeat is shuffled (always in the same way), so that no case has the same one before it each
    time. The garbage collector is off between the first and the last timed call. A case that raises is left out from
    there on, with its reason; the others go on.

    Args:
        cases: what to time.
        repeats: timed calls of each case.
        warmup: calls of each case before, beside those that its steady state takes.
        device: whose clock is used, see :func:`time_call`.
        on_call: told the name of a case before each of its calls; :func:`count_calls` says how many there will be.
    """
    device = torch.device(device)
    on_call = on_call or (lambda name: None)
    times = Times(ms={case.name: [] for case in cases})
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == 'cuda' else None

    def attempt(case: Case, call: Callable[[Case], object]) -> None:
        if case.name in times.failed:
            return
        on_call(case.name)
        try:
            case.reset()
            call(case)
        except Exception as error:
            times.failed[case.name] = explain(error)

    def first(case: Case) -> None:
        case.run()
        case.settle()

    def again(case: Case) -> None:
        case.run()

    def timed(case: Case) -> None:
        times.ms[case.name].append(time_call(case.run, device, flush))

    for case in cases:
        for i in range(case.settle_calls + warmup):
            attempt(case, first if i == 0 else again)
    with _no_garbage_collection():
        for repeat in range(repeats):
            for case in random.Random(repeat).sample(list(cases), len(cases)):
                attempt(case, timed)
    for name in times.failed:
        del times.ms[name]
    return times


def count_calls(cases: Iterable[Case], repeats: int, warmup: int) -> int:
    """How many calls :func:`interleave` makes if nothing fails."""
    return sum(case.settle_calls + warmup + repeats for case in cases)


def time_call(run: Callable[[], object], device: torch.device, flush: Tensor | None = None) -> float:
    """Milliseconds of one call.

    On a CPU by the clock. On a GPU between two CUDA events: before the first, ``flush`` is overwritten, which empties
    the cache, and the GPU is kept busy for half a millisecond, so that what counts is its own time and not the host's
    launching, except where ``run`` itself waits for the GPU.
    """
    if device.type != 'cuda':
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    if flush is not None:
        flush.zero_()
    if hasattr(torch.cuda, '_sleep'):
        torch.cuda._sleep(_HEAD_START)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


@contextmanager
def _no_garbage_collection():
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def explain(error: Exception) -> str:
    """Type and first line of an error, for a note in a table."""
    text = str(error).strip().splitlines()
    return f'{type(error).__name__}: {text[0]}' if text else type(error).__name__


# ------------------------------------------------------------------------------------------------ summaries


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile (linear interpolation between the values)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method='inclusive'))


def ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Ratio to the baseline of the same repeat, for every repeat."""
    return [value / base for value, base in zip(values, baseline)]


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes(run: Callable[[], object], owned: Iterable[Tensor] = ()) -> int:
    """Bytes that the graph of ``run()`` keeps for the backward pass, every storage counted once and as a whole.

    Counted is what operations and ``autograd.Function.save_for_backward`` save, and tensors that a custom Function
    keeps as attributes of its context. The input of the layer counts where it is saved: it is alive because of that.

    Args:
        run: a forward pass; returns tensors in any nesting of dicts, lists and tuples.
        owned: tensors that exist anyway, such as parameters and buffers; not counted.
    """
    storages: dict[int, int] = {}
    alive = []  # an address must not be used twice while counting

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor.detach()  # the tensor itself may be an output, which would then hold itself

    with saved_tensors_hooks(count, lambda tensor: tensor):
        output = run()
    for node in _nodes(output):
        for value in getattr(node, '__dict__', {}).values():
            for tensor in _tensors(value):
                count(tensor)
    for tensor in owned:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def held_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that a module keeps between iterations, except its parameters.

    Buffers, and whatever else its attributes reach through lists, dicts and plain objects: histories live there.
    """
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}
    for child in module.modules():
        own = {key: value for key, value in vars(child).items() if key != '_parameters'}
        for tensor in _tensors(own):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def owned_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers: what exists with or without a graph."""
    return [*module.parameters(), *module.buffers()]


def peak_bytes(run: Callable[[], object], device: torch.device | str = 'cpu') -> int:
    """The most bytes that ``run()`` holds at any moment beyond those held before it.

    GPU: ``torch.cuda.max_memory_allocated``. CPU: the allocations that torch's profiler records, added up in their
    order; scratch memory that oneDNN takes from the system itself is not among them.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # its start and stop are no news
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    start = 'start_ns' if events and hasattr(events[0], 'start_ns') else 'start_us'
    held = peak = 0
    for event in sorted(events, key=lambda event: getattr(event, start)()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _nodes(output: object) -> list:
    """All nodes of the autograd graph behind ``output``."""
    waiting = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return list(seen)


# Python's modules too: what an autograd function remembers of who computes it leads to all of torch.
_NO_HOLDERS = (str, bytes, int, float, type, ModuleType, nn.Module)


def _tensors(value: object, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors that ``value`` reaches through containers and plain objects, but not through modules."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, _NO_HOLDERS) or value is None:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        children = list(value)
    elif callable(value):
        return []
    else:
        children = list(getattr(value, '__dict__', {}).values())
    return [tensor for child in children for tensor in _tensors(child, seen)]


# ------------------------------------------------------------------------------------------------ the machine


def describe_machine(device: torch.device | str) -> dict[str, str | int | None]:
    """What a number depends on: processor, threads, versions, GPU."""
    gpu = cuda = None
    if torch.device(device).type == 'cuda':
        gpu, cuda = torch.cuda.get_device_name(device), torch.version.cuda
    return dict(
        cpu=_cpu_name(),
        cores=len(cores.allowed()),
        threads=torch.get_num_threads(),
        spincount=os.environ.get('GOMP_SPINCOUNT'),
        compiled=compiled.library() is not None,
        load=round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        gpu=gpu,
        cuda=cuda,
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.platform(),
    )


def now() -> str:
    """Date and time of day with its zone, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def _cpu_name() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
