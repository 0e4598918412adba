"""How many cores this process may use, and how many of them others keep busy. Standard library only.

``python cores.py PROCESSES`` prints how many threads each of so many processes should take, for ``tools/launch.sh``.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

# How much of a core others may use while it still counts as free. A step on two cores takes four times longer while one
# of them is busy, and a fourth longer on one core: a core that is busy for a tenth of the time is no gain.
_SPARE = 0.15
_SHORTEST = 0.3  # seconds; the system counts in hundredths
_GROUPS = Path('/sys/fs/cgroup')


@dataclass(frozen=True)
class Usage:
    """What has been used since the machine was started, at one moment. Two of them say what happened in between.

    Args:
        moment: seconds of a clock.
        busy: seconds that the cores of :func:`allowed` were busy, all added; None where the system does not say.
        group: the same of the control group (container) of this process.
        own: seconds of this process and of children that have ended.
    """

    moment: float = field(default_factory=time.monotonic)
    busy: float | None = field(default_factory=lambda: _busy_seconds())
    group: float | None = field(default_factory=lambda: _group_seconds())
    own: float = field(default_factory=lambda: sum(os.times()[:4]))


@dataclass(frozen=True)
class Load:
    """How busy the machine was.

    Args:
        cores: that this process may use; with a quota, a fraction.
        others: cores of these that other processes kept busy; None where the system does not say.
    """

    cores: float
    others: float | None

    @property
    def free(self) -> float:
        """Cores that others left."""
        return max(0.0, self.cores - (self.others or 0.0))


_start: Usage | None = None


def begin() -> None:
    """Look at the machine now; :func:`load_since_begin` says what others did from here on."""
    global _start
    _start = Usage()


def load_since_begin() -> Load:
    """What others did since :func:`begin`, or for a moment from now on if that was only just, or never."""
    since = _start or Usage()
    time.sleep(max(0.0, since.moment + _SHORTEST - time.monotonic()))
    return load_between(since, Usage())


def load_between(since: Usage, until: Usage) -> Load:
    """What others did between two moments, in cores."""
    cores, seconds, own = float(len(allowed())), max(until.moment - since.moment, 1e-6), until.own - since.own

    def others(before: float | None, after: float | None) -> float | None:
        return None if before is None or after is None else max(0.0, (after - before - own) / seconds)

    busy = others(since.busy, until.busy)
    if busy is None and hasattr(os, 'getloadavg'):  # of the last minute, in which this process was one of them
        busy = max(0.0, os.getloadavg()[0] - 1)
    busy = busy if busy is None else min(busy, cores)
    limit = quota()
    if limit is not None and limit < cores:
        in_group = others(since.group, until.group) or 0.0
        free = min(cores - (busy or 0.0), limit - in_group)
        return Load(limit, max(0.0, limit - free))
    return Load(cores, busy)


def threads_for(load: Load, processes: int = 1) -> int:
    """Threads that each of ``processes`` should take: the free cores, at least one."""
    return max(1, int((load.free + _SPARE) / processes))


@cache
def allowed() -> frozenset[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@cache
def quota() -> float | None:
    """Cores' worth of time that the control groups of this process grant it (``docker run --cpus``); None for all."""
    limits = []
    for folder in _folders_of_groups():
        with suppress(OSError, ValueError):
            granted, period = (folder / 'cpu.max').read_text().split()
            limits.append(float(granted) / float(period))  # no number: 'max'
        with suppress(OSError, ValueError):
            granted = float((folder / 'cpu.cfs_quota_us').read_text())
            limits.append(granted / float((folder / 'cpu.cfs_period_us').read_text()))
    return min((limit for limit in limits if limit > 0), default=None)


def _folders_of_groups() -> list[Path]:
    """Of the group of this process, those around it, and the root, which is its own in a container."""
    folders = [_GROUPS, _GROUPS / 'cpu', _GROUPS / 'cpu,cpuacct']
    with suppress(OSError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            for mount in ('', 'unified') if not controllers else (controllers,) if 'cpu' in controllers else ():
                inner = _GROUPS / mount / path.lstrip('/')
                folders += [f for f in (inner, *inner.parents) if f.is_relative_to(_GROUPS)]
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _busy_seconds() -> float | None:
    """Seconds in which the allowed cores were not idle."""
    ticks = 0
    try:
        with open('/proc/stat', encoding='ascii') as file:
            for line in file:
                name, *numbers = line.split()
                if name.startswith('cpu') and name[3:].isdigit() and int(name[3:]) in allowed():
                    user, nice, system, _, _, irq, softirq, steal = map(int, numbers[:8])
                    ticks += user + nice + system + irq + softirq + steal
        return ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, ValueError):  # not Linux, or one of its own kind
        return None


def _group_seconds() -> float | None:
    for folder in _folders_of_groups() if quota() else ():
        with suppress(OSError, ValueError, StopIteration):
            lines = (folder / 'cpu.stat').read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith('usage_usec')) / 1e6
        with suppress(OSError, ValueError):
            return int((folder / 'cpuacct.usage').read_text()) / 1e9
    return None


if __name__ == '__main__':
    print(threads_for(load_since_begin(), int(sys.argv[1])))
