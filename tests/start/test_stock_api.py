"""mmdet's own Python API beside mmcv-lite, where nothing imports this package first: by the hook of mmdet_norms.pth."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny, warm
from mmdet_norms.compat import mmcv_ops

ROOT = Path(__file__).resolve().parents[2]
HOOKED = f'import site, sys; site.addsitedir({str(ROOT)!r})\n'  # as the folder of an installation
lite = pytest.mark.skipif(mmcv_ops.active() == 'compiled', reason='mmcv is compiled here')


def run(code, *options, cwd=None, run=subprocess.run, **environment):
    env = {key: value for key, value in os.environ.items() if key != 'MMDET_NORMS_HOOK'}
    env |= dict(CUDA_VISIBLE_DEVICES='', **environment)
    command = [sys.executable, *options, '-c', code]
    return run(command, env=env, capture_output=True, text=True, timeout=200, cwd=cwd)


@lite
@pytest.mark.slow
def test_the_stock_inferencer_finds_what_it_finds_after_our_import(tmp_path):
    config = tiny.write_config(tmp_path)
    lines = [line for line in config.read_text().splitlines() if not line.startswith('custom_imports')]
    config.write_text('\n'.join(lines))
    code = f"""
from mmdet.apis import DetInferencer, init_detector
from mmdet.utils import register_all_modules
print('mmdet_norms' in sys.modules)
import torch
torch.manual_seed(0)
model = init_detector({str(config)!r}, device='cpu', palette='random')
torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('disc', 'box')))), 'a.pth')
found = DetInferencer({str(config)!r}, 'a.pth', device='cpu', palette='random')('images/0.jpg', no_save_vis=True)
print(found['predictions'])
print('mmdet_norms' in sys.modules, type(sys.modules['mmcv._ext']).__module__)
"""
    image = next(path for path in tmp_path.rglob('*') if path.suffix in ('.jpg', '.png'))
    code = code.replace('images/0.jpg', str(image))
    without = run(HOOKED + code, cwd=tmp_path)
    after = run('import sys, mmdet_norms\n' + code, cwd=tmp_path, run=warm.run)
    assert without.returncode == after.returncode == 0, without.stderr[-2000:] + after.stderr[-2000:]
    without, after = ([line for line in done.stdout.splitlines() if 'OneDL' not in line] for done in (without, after))
    assert without[0] == 'False' and after[0] == 'True'
    assert without[-1] == after[-1] == 'True mmdet_norms.compat.mmcv_ops.extension'
    assert without[-2] == after[-2] and 'bboxes' in after[-2] and len(after[-2]) > 1000


@lite
def test_the_hook_can_be_left_out():
    code = HOOKED + 'from mmdet.utils import register_all_modules; register_all_modules(); print(1)'
    assert "No module named 'mmcv._ext'" in run(code, MMDET_NORMS_HOOK='0').stderr


def test_ops_that_are_there_are_left_alone(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    (tmp_path / 'mmcv' / '_ext.py').write_text('here = True')
    code = HOOKED + f'sys.path.insert(0, {str(tmp_path)!r}); import mmcv._ext; print(mmcv._ext.here)'
    assert run(code).stdout == 'True\n'


def test_mmdets_scripts_start_and_what_the_import_of_this_package_puts_in_its_place():
    code = (
        HOOKED + 'from mmdet.utils import register_all_modules; register_all_modules()\n'
        "import mmcv, mmcv._ext; first = mmcv._ext; assert 'mmdet_norms' not in sys.modules\n"
        'import mmdet_norms, torch\n'
        'assert mmcv._ext is not first and type(mmcv._ext).__module__.startswith("mmdet_norms.")\n'
        'boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.1], [5, 5, 6, 6]])\n'
        'print(first.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), iou_threshold=0.5, offset=0).tolist())\n'
        'from mmdet_norms_start import hook; print(hook.MissingOps in sys.meta_path)'
    )
    done = run(code, '-P' if sys.version_info >= (3, 11) else '-u')
    if mmcv_ops.active() == 'compiled':
        pytest.skip('mmcv is compiled here')
    assert done.stdout.endswith('\n[1, 2]\nFalse\n'), done.stderr


def test_the_hook_imports_nothing_and_never_says_anything(tmp_path):
    """Of a Python that has only its standard library; and where the package is gone and its .pth is not."""
    (tmp_path / 'alone').mkdir()
    (tmp_path / 'alone' / 'mmdet_norms.pth').write_bytes((ROOT / 'mmdet_norms.pth').read_bytes())
    code = (
        'import sys, site; before = set(sys.modules)\n'
        'site.addsitedir({!r}); print(sorted(set(sys.modules) - before), len(sys.meta_path))'
    )
    here, alone = (run(code.format(str(folder)), '-I', '-S') for folder in (ROOT, tmp_path / 'alone'))
    assert here.stdout == "['mmdet_norms_start', 'mmdet_norms_start.hook'] 5\n" and here.stderr == ''
    assert alone.stdout == '[] 3\n' and alone.stderr == ''
