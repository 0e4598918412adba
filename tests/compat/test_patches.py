"""What ``import mmdet_norms`` changes in other packages is what ``compat/patches.py`` says it changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import warm
from mmdet_norms.compat.patches import CHANGES, put

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'changed-modules.md'
# Everything that modules of torch, mmengine, mmcv and mmdet hold, before and after; counters and caches are no changes.
COMPARE = """
import importlib, sys
from mmdet_norms_start import hook
sys.meta_path.remove(hook.Finder)  # the other finder stands in for ops that mmcv lacks

def snapshot():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition('.')[0] not in ('torch', 'mmengine', 'mmcv', 'mmdet'):
            continue
        for name, value in list(vars(module).items()):
            where = f'{module_name}.{name}'
            found[where] = value
            if isinstance(value, type) and value.__module__ == module_name:
                found |= {f'{where}.{key}': held for key, held in vars(value).items()}
            elif isinstance(value, Registry) and module_name == 'mmengine.registry':
                found |= {f'{where}[{key}]': held for key, held in value.module_dict.items()}
    found[hooks] = len(torch.nn.modules.module._global_module_registration_hooks)
    return found

hooks = 'torch.nn.modules.module._global_module_registration_hooks'
for name in sys.stdin.read().split():
    importlib.import_module(name)
import torch
from mmengine.registry import Registry
before = snapshot()
import mmdet_norms
for where, value in snapshot().items():
    same = before.get(where, value) is value or where == hooks and value == before[where]
    if not same and where.rpartition('.')[2] not in ('__dict__', '_abc_impl', '_dir', 'next_id'):
        print(where)
"""


def run(code, given='', run=subprocess.run, **environment):
    command = [sys.executable, '-W', 'ignore', '-c', code]
    done = run(command, input=given, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_what_is_changed_is_what_is_listed():
    loaded = run('import mmdet_norms, sys; print(*sys.modules)', run=warm.run)
    names = [name for name in loaded if name.startswith(('mmengine.', 'mmdet.'))]
    changed = run(COMPARE, ' '.join(names), MMDET_NORMS_HOOK='0')
    changed = {'mmcv._ext' if where.startswith('mmcv._ext.') else where for where in changed}
    assert changed - set(CHANGES) == set(), 'changed without a reason'
    assert set(CHANGES) - changed == set(), 'listed and not changed'


def test_the_page_shows_every_change():
    rows = [f'| `{where}` | {why} |' for where, why in CHANGES.items()]
    shown = [line for line in PAGE.read_text(encoding='utf-8').splitlines() if line.startswith('| `')]
    assert shown == rows, 'the table should be:\n' + '\n'.join(rows)


def test_no_change_without_a_reason():
    with pytest.raises(AssertionError, match='has to be said in CHANGES'):
        put('mmengine.config.config.Config.pretty_text', None)
