"""A long training of every norm, with all that a real one does to it: does memory grow, does its state stay finite?"""

import gc
import io
import random
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import AN, BIN, BNET, BRN, CBN, GN, MABN, RBN, SN, CenConv2d, FrozenBN, LN2d, SyncBN

CHANNELS = 8
NORMS: dict[str, Callable[[], nn.Module]] = {
    'AN': lambda: AN(CHANNELS, k=4),
    'AN (GN)': lambda: AN(CHANNELS, norm='GN', k=4, num_groups=2),
    'BIN': lambda: BIN(CHANNELS),
    'BNET': lambda: BNET(CHANNELS),
    'BRN': lambda: BRN(CHANNELS, warmup_iters=10, r_iters=100, d_iters=100),
    'CBN': lambda: CBN(CHANNELS, burnin=8),
    'FrozenBN': lambda: FrozenBN(CHANNELS),
    'GN': lambda: GN(CHANNELS, num_groups=2),
    'LN2d': lambda: LN2d(CHANNELS),
    'MABN': lambda: MABN(CHANNELS, buffer_size=4, warmup_iters=10),
    'RBN': lambda: RBN(CHANNELS),
    'SN': lambda: SN(CHANNELS),
    'SyncBN': lambda: SyncBN(CHANNELS),
}


@dataclass(frozen=True)
class Soak:
    """What a run showed.

    Args:
        norm: its name in :data:`NORMS`.
        iterations: training forwards.
        empty, bad: how many of them had no instance, or an inf or nan.
        finite: whether weights and state were finite after every step.
        python, resident: bytes a step by which Python's memory, and the process's, grew in the second half.
        tensors: how many more are alive at the end than at most before, in the second half.
    """

    norm: str
    iterations: int
    empty: int
    bad: int
    finite: bool
    python: float
    resident: float
    tensors: int


def soak(name: str, iterations: int = 2000, samples: int = 40, save_every: int = 100, seed: int = 0) -> Soak:
    """Train convolution, norm, ReLU on maps of changing size, layout and number of instances.

    Every 10th batch or so is empty, every 50th has an inf or nan and its step is skipped; some forwards are repeated
    by activation checkpointing, some are without gradients or in eval mode; every ``save_every`` steps the state is
    saved and loaded.
    """
    norm, draw, generator = NORMS[name](), random.Random(seed), torch.Generator().manual_seed(seed)
    conv = (CenConv2d if isinstance(norm, MABN) else nn.Conv2d)(3, CHANNELS, 3, padding=1)
    model = nn.Sequential(conv, norm, nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    empty = bad = 0
    finite = True
    taken: list[tuple[int, int, int, int]] = []
    every = max(iterations // samples, 1)
    checkpoint(nn.Identity(), torch.ones(1, requires_grad=True), use_reentrant=False)  # torch imports what it needs
    gc.collect()
    gc.freeze()  # what is there already: a million objects, to look through for every sample
    tracemalloc.start()
    try:
        for step in range(1, iterations + 1):
            x, is_bad = _batch(draw, generator)
            empty, bad = empty + (len(x) == 0), bad + is_bad
            _step(model, optimizer, x, is_bad, draw)
            finite = finite and _is_finite(model)
            if step % save_every == 0:
                _save_and_load(model)
            if step % every == 0:
                taken.append((step, *_memory()))
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    steps, python, resident, tensors = zip(*taken[len(taken) // 2 :])
    growth = tensors[-1] - max(tensors[:-1])
    return Soak(name, iterations, empty, bad, finite, _slope(steps, python), _slope(steps, resident), growth)


def _batch(draw: random.Random, generator: torch.Generator) -> tuple[Tensor, bool]:
    instances = 0 if draw.random() < 0.1 else draw.randint(1, 4)
    x = torch.randn(instances, 3, draw.randint(2, 24), draw.randint(2, 24), generator=generator)
    is_bad = instances > 0 and draw.random() < 0.02
    if is_bad:
        x[0, 0, 0, 0] = draw.choice([float('inf'), float('nan')])
    return (x.to(memory_format=torch.channels_last) if draw.random() < 0.5 else x), is_bad


def _step(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, is_bad: bool, draw: random.Random) -> None:
    way = draw.random()
    if way < 0.1 and not is_bad:
        model.train(way < 0.05)
        with torch.no_grad():
            model(x)
        model.train()
        return
    optimizer.zero_grad()
    y = model[0](x)
    y = checkpoint(model[1:], y, use_reentrant=False) if way > 0.7 else model[1:](y)
    y.square().sum().div(max(y.numel(), 1)).backward()
    if not is_bad:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()


def _is_finite(model: nn.Module) -> bool:
    return all(value.isfinite().all() for value in model.state_dict().values())


def _save_and_load(model: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


def _memory() -> tuple[int, int, int]:
    """Bytes of Python, bytes of the process (0 where the system does not say), tensors alive."""
    gc.collect()
    statm = Path('/proc/self/statm')
    resident = int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0
    return tracemalloc.get_traced_memory()[0], resident, sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def _slope(steps: Iterable[int], values: Iterable[int]) -> float:
    """Of the straight line that fits best."""
    steps, values = torch.tensor(list(steps)).double(), torch.tensor(list(values)).double()
    steps, values = steps - steps.mean(), values - values.mean()
    return float((steps * values).sum() / steps.square().sum().clamp(min=1))


HEADER = f'{"norm":10} {"steps":>6} {"empty":>6} {"bad":>4} finite {"Python B/step":>14} {"process B/step":>15} tensors'


def row(r: Soak) -> str:
    """A line below :data:`HEADER`."""
    finite = 'yes' if r.finite else 'NO'
    start = f'{r.norm:10} {r.iterations:6} {r.empty:6} {r.bad:4} {finite:6}'
    return f'{start} {r.python:14.1f} {r.resident:15.1f} {r.tensors:+7}'
