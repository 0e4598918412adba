"""Shared fixtures."""

import functools
import gc
import os
import pickle
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

# One thread here and in every process that a test starts: tiny tensors gain nothing from more, and sums in another
# order would not resume bit for bit. Before torch is imported, which reads it once.
os.environ['OMP_NUM_THREADS'] = '1'

import mmengine.config.config as mmengine_config
import mmengine.config.utils as config_utils
import mmengine.dataset.base_dataset as base_dataset
import numpy as np
import pytest
import torch
import torch.utils.data._utils as torch_data
from hypothesis import settings
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import Runner
from mmengine.utils import get_installed_path
from mmengine.visualization import Visualizer

import mmdet_norms  # noqa: F401  (before any test imports mmdet's models, which need mmcv's ops)
from helpers import warm

ROOT = Path(__file__).resolve().parents[1]
# Numbers recorded from the published layers: a small copy in the repository, the full set beside the checkout.
_GOLDEN = (ROOT / 'tests' / 'data' / 'golden', ROOT.parent / 'shared' / 'golden')

# The same few examples in every run; HYPOTHESIS_PROFILE=long draws other ones each time, and many.
settings.register_profile('short', derandomize=True, max_examples=30, deadline=None)
settings.register_profile('long', max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'short'))


def _only_checked(text, style_config):
    """A run formats its config some five times, which takes longer than training a tiny detector."""
    compile(text, 'config', 'exec')
    return text, False


mmengine_config.FormatCode = _only_checked
# mmengine collects garbage for every data set, which took a third of a tiny run's time; loads pkg_resources anew for
# every config that has a base; reads a hundred metafiles to find it; and asks the disk for every file that is written.
base_dataset.gc = SimpleNamespace(collect=lambda: 0)
mmengine_config.is_installed = functools.cache(mmengine_config.is_installed)
config_utils.load = functools.cache(config_utils.load)
os.fsync = lambda handle: None


def _once_per_file(file2dict):
    """Most configs are read from the same few files, five for each of mmdet's, and none of these changes meanwhile."""
    known, unchanging = {}, (f'{get_installed_path("mmdet")}{os.sep}', f'{ROOT / "configs"}{os.sep}')

    @functools.wraps(file2dict)
    def read_once(filename, *args, **options):
        path = os.path.abspath(os.path.expanduser(filename))
        if not path.startswith(unchanging):
            return file2dict(filename, *args, **options)
        key = (path, args, tuple(sorted(options.items())))
        if key not in known:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter('always')
                answer = file2dict(filename, *args, **options)
            for warning in said:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            if said or answer[2]:  # it warns each time, or reads environment variables
                return answer
            known[key] = pickle.dumps(answer)
        return pickle.loads(known[key])

    return read_once


mmengine_config.Config._file2dict = staticmethod(_once_per_file(mmengine_config.Config._file2dict))


def _apart(init):
    """Runs are told apart by config and second: one within a second of another would write into the other's log."""

    @functools.wraps(init)
    def begin(self, *args, **kwargs):
        # hooks take the newest, which need not be that of their run; each class has its own
        for known in (MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
            known._instance_dict.clear()
        init(self, *args, **kwargs)

    return begin


Runner.__init__ = _apart(Runner.__init__)

# A loader that garbage collection ends has told its workers nothing, and waits so many seconds for each of them.
torch_data.MP_STATUS_CHECK_INTERVAL = 0.1

# While this process has one thread.
warm.start()


def pytest_collection_modifyitems(config, items):
    if os.environ.get('MMDET_NORMS_TESTS') != 'all':
        further = [item for item in items if item.get_closest_marker('full')]
        config.hook.pytest_deselected(items=further)
        items[:] = [item for item in items if not item.get_closest_marker('full')]


# What imports have made stays.
def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def _seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


# The same numbers in every order and division of the tests among processes: first for fixtures of whole files, then for
# each test, from another seed, or the two would draw the same.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    _seed(1)
    MMLogger._instance_dict.clear()
    Visualizer._instance_dict.clear()
    if torch.are_deterministic_algorithms_enabled():  # as a run with --deterministic in this process leaves it
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    _seed(0)


@pytest.fixture
def golden():
    """Load a file of golden numbers by name as a dict of arrays; skip where it is not to be had."""

    def load(name: str) -> dict[str, np.ndarray]:
        for folder in _GOLDEN:
            if (folder / name).exists():
                with np.load(folder / name) as data:
                    return dict(data)
        pytest.skip(f'golden numbers {name} are not in this checkout')

    return load
