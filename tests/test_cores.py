"""How many cores are free: what the system says, on Linux, in a container, and elsewhere."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdet_norms import cores
from mmdet_norms.cores import Load, Usage, load_between, threads_for


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many cores, and so much of them granted."""

    def make(number, granted=None):
        monkeypatch.setattr(cores, 'allowed', lambda: frozenset(range(number)))
        monkeypatch.setattr(cores, 'quota', lambda: granted)

    return make


def usage(moment, busy=None, own=0.0, group=None):
    return Usage(moment, busy, group, own)


def test_others_are_what_the_cores_did_besides_this_process(machine):
    machine(4)
    load = load_between(usage(10, busy=100, own=5), usage(12, busy=105, own=6))
    assert load == Load(4.0, 2.0) and load.free == 2.0
    assert load_between(usage(0, 0, 0), usage(1, 0.5, 0.6)).others == 0  # clocks that count in hundredths
    assert load_between(usage(0, 0), usage(1, 9)).others == 4.0


def test_a_quota_is_shared_with_the_container_only(machine):
    machine(8, granted=2.0)
    load = load_between(usage(0, 0, 0, group=0), usage(1, busy=3.5, own=1.0, group=1.5))
    assert load == Load(2.0, 0.5)  # the other 2 cores that are busy are not taken from the 2 granted
    machine(8, granted=2.0)
    load = load_between(usage(0, 0, 0, group=0), usage(1, busy=8.0, own=1.0, group=1.0))
    assert load.free == 1.0  # but only one is left of all
    machine(2, granted=16.0)
    assert load_between(usage(0, 0, 0, group=0), usage(1, 1.0, 0.0, group=1.0)) == Load(2.0, 1.0)


def test_where_the_system_does_not_say_its_load_average_does(machine, monkeypatch):
    machine(4)
    monkeypatch.setattr(os, 'getloadavg', lambda: (2.5, 0, 0), raising=False)
    assert load_between(usage(0), usage(1)) == Load(4.0, 1.5)
    monkeypatch.delattr(os, 'getloadavg')
    assert load_between(usage(0), usage(1)) == Load(4.0, None) and Load(4.0, None).free == 4.0


@pytest.mark.parametrize(
    'cores_, others, processes, threads',
    [
        (2, 0.0, 1, 2), (2, 0.1, 1, 2), (2, 0.2, 1, 1), (2, 1.0, 1, 1), (2, 2.0, 1, 1), (1, 0.0, 1, 1),
        (16, 3.9, 1, 12), (2.5, 0.0, 1, 2), (0.5, 0.0, 1, 1), (16, 0.0, 2, 8), (16, 4.0, 4, 3), (2, 0.0, 4, 1),
        (8, None, 1, 8),
    ],
)  # fmt: skip
def test_threads_are_for_the_cores_that_are_free(cores_, others, processes, threads):
    assert threads_for(Load(cores_, others), processes) == threads


def test_a_group_of_either_version_says_what_it_grants(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, '_GROUPS', tmp_path)
    uncached = cores.quota.__wrapped__
    assert uncached() is None
    (tmp_path / 'cpu.max').write_text('max 100000\n')
    assert uncached() is None
    (tmp_path / 'cpu').mkdir()
    (tmp_path / 'cpu' / 'cpu.cfs_quota_us').write_text('-1\n')
    (tmp_path / 'cpu' / 'cpu.cfs_period_us').write_text('100000\n')
    assert uncached() is None
    (tmp_path / 'cpu' / 'cpu.cfs_quota_us').write_text('350000\n')
    assert uncached() == 3.5
    (tmp_path / 'cpu.max').write_text('150000 100000\n')
    assert uncached() == 1.5
    monkeypatch.setattr(cores, 'quota', uncached)
    (tmp_path / 'cpu.stat').write_text('usage_usec 2500000\nuser_usec 1\n')
    assert cores._group_seconds() == 2.5


@pytest.mark.skipif(not Path('/proc/stat').exists(), reason='the system has no /proc/stat')
def test_a_busy_neighbour_is_seen_and_this_process_is_not():
    if Usage().busy in (None, 0.0):
        pytest.skip('this /proc/stat counts nothing')
    neighbour = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        time.sleep(0.2)
        before = Usage()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        load = load_between(before, Usage())
    finally:
        neighbour.kill()
        neighbour.wait()
    share = 0.5 * len(cores.allowed()) / (len(cores.allowed()) + 8)  # of one of many on a machine that is busy anyway
    assert load.cores >= load.others > min(0.5, share)


def test_a_look_is_not_shorter_than_the_system_counts(monkeypatch):
    monkeypatch.setattr(cores, '_start', None)
    begun = time.monotonic()
    cores.load_since_begin()
    assert time.monotonic() - begun >= 0.3
    cores.begin()
    monkeypatch.setattr(time, 'sleep', lambda seconds: seconds and pytest.fail('it waited'))
    monkeypatch.setattr(cores, '_start', usage(time.monotonic() - 5, 0.0, 0.0))
    cores.load_since_begin()


def test_the_launcher_runs_the_file_by_itself():
    path = Path(cores.__file__)
    done = subprocess.run([sys.executable, '-I', '-S', path, '64'], capture_output=True, text=True, check=True)
    assert int(done.stdout) == max(1, len(cores.allowed()) // 64)
