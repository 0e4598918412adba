"""``tools/norm_batch.py``: killed, started again, and what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import warm
from mmdet_norms.cli import norm_batch
from mmdet_norms.datasets.shapes_cls import make_shapes_cls
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import Outcome, grid

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'demo'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_shapes_cls(tmp_path_factory.mktemp('data') / 'shapes-cls', 24, 12, size=32)


def options(data):
    return [
        *(f'{split}_dataloader.dataset.data_root={data}' for split in ('train', 'val')),
        'train_dataloader.batch_size=4',
        'train_cfg.max_iters=3',
        'train_cfg.val_interval=3',
    ]


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_trains_nothing_twice(data, tmp_path):
    out = tmp_path / 'out'
    code = "from helpers import warm; warm.begin_warm(); from mmdet_norms_start.commands import run; run('norm-batch')"
    call = [sys.executable, '-c', code, '--norms', 'bn', 'mabn', '--batches', '2', '--seeds', '0', '--out', out]
    call += ['--cfg-options', *options(data)]
    first, second = out / 'bn-2-seed0' / grid.FINISHED, out / 'mabn-2-seed0' / grid.LOG
    with warm.Popen(call, stdout=subprocess.DEVNULL) as killed:
        end = time.monotonic() + 300
        while not second.exists() and killed.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        killed.kill()  # the second has begun, and goes on
    written = first.stat().st_mtime_ns
    again = warm.run(call, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert first.stat().st_mtime_ns == written
    assert ' of them kept: ' in again.stdout and '| images per group | BN | MABN |' in again.stdout
    for cell in ('bn-2-seed0', 'mabn-2-seed0'):
        said = (out / cell / grid.LOG).read_text()
        assert said.count('Exp name') or said.count('Iter(val)'), said
        assert json.loads((out / cell / 'results.json').read_text())['iter'] == 3
    found = json.loads((out / 'norm-batch.json').read_text())
    assert [cell['failed'] for cell in found['cells']] == [None] * 2
    assert all(0 <= cell['error_percent'] <= 100 for cell in found['cells'])
    assert {path.name for path in out.glob('norm-batch.*')} == {'norm-batch.json', 'norm-batch.md', 'norm-batch.svg'}


def test_a_failed_training_is_named_and_the_status_says_so(data, tmp_path, monkeypatch, capsys):
    def run(cells, folder, jobs, more, on_end, *_, data):
        assert {Path(path).name for path in data(cells[0])} == {'train', 'val'}
        outcomes = [Outcome(cells[0], {'accuracy/top1': 0.75}, None, 3.0), Outcome(cells[1], None, 'error: no', 3.0)]
        for outcome in outcomes:
            on_end(outcome)
        return outcomes

    monkeypatch.setattr(norm_batch, 'run', run)
    arguments = ['--norms', 'bn', 'brn', '--batches', '2', '--seeds', '0', '--out', str(tmp_path / 'out')]
    with pytest.raises(SystemExit) as ended:
        norm_batch.main([*arguments, '--cfg-options', *options(data)])
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert '1/2: bn-2-seed0: error 25.0 % (3 s)' in said and '2/2: brn-2-seed0: failed: error: no' in said
    assert '| 2 | 25.0 | failed |' in said and '1 of 2 trainings failed' in said and 'brn-2-seed0/output.txt' in said


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--batches', '0'], '--batches 0: must be different whole numbers of at least 1'),
        (['--batches', '2', '2'], '--batches 2 2: must be different'),
        (['--seeds', '-1'], '--seeds -1: must be different whole numbers of at least 0'),
        (['--jobs', '0'], '--jobs 0: must be at least 1'),
        (['--configs', 'no.py'], 'there is no config file no.py'),
        (['--configs', str(CONFIGS / 'resnet50_bnet5_shapes-cls.py')], 'model.backbone.norm_cfg.norm_batch is varied'),
        (['--cfg-options', 'train_cfg.max_iter=3'], 'max_iters'),
        (['--data-root', 'nowhere'], 'there is no folder nowhere; python tools/make_shapes.py --classification'),
    ],
)
def test_what_is_wrong_is_one_error_before_anything_is_trained(arguments, said, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(norm_batch, 'run', lambda *_, **__: pytest.fail('trained'))
    with pytest.raises(SystemExit) as ended:
        norm_batch.main(['--out', str(tmp_path / 'out'), *arguments])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and said in message and message.count('error:') == 1


def test_norms_are_called_by_their_type_and_two_of_one_type_by_their_files():
    configs = [norm_batch.CONFIG.format(norm) for norm in norm_batch.NORMS]
    assert list(norm_batch._by_norm(configs)) == ['BN', 'BRN', 'MABN']


def test_two_configs_of_one_norm_are_called_by_their_files(tmp_path):
    base = CONFIGS / 'resnet18_bn_norm-batch_shapes-cls.py'
    other = tmp_path / 'other.py'
    other.write_text(f"_base_ = '{base}'\nmodel = dict(backbone=dict(depth=34))")
    mabn = norm_batch.CONFIG.format('mabn')
    assert list(norm_batch._by_norm([str(base), mabn, str(other)])) == [base.stem, 'MABN', 'other']
    (tmp_path / 'more').mkdir()
    (tmp_path / 'more' / 'other.py').write_text(other.read_text())
    with pytest.raises(UserError, match='two files have the same name'):
        norm_batch._by_norm([str(other), str(tmp_path / 'more' / 'other.py')])
