"""``tools/compare.py run``: from the command line to the cells, and what it refuses."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import tiny, tiny_cls, warm
from mmdet_norms.cli import compare, compare_run
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import Outcome, comparison
from mmdet_norms.experiments.grid import FINISHED, LOG

KERNEL = 'model.backbone.norm_at.last.kernel_size'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return str(tiny.write_config(tmp_path_factory.mktemp('tiny'), 'auto_scale_lr = dict(base_batch_size=4)\n'))


def parsed(config, *arguments):
    args = compare_run.parse_args([config, *arguments])
    return args, list(compare_run._comparison(args).cells())


def test_options_reach_every_training(config):
    args, cells = parsed(
        config,
        *('--norms', 'bn', 'gn', '--batch-sizes', '2', '8', '--seeds', '0', '1', '--budget', 'iters', '--no-scale-lr'),
        *('--epochs', '3', '--lr', '0.1', '--gpus', '2', '--cfg-options', 'train_cfg.val_interval=2'),
        *('--grid', 'optim_wrapper.optimizer.betas=(0.9,0.99),(0.9,0.999)', '--', '--amp'),
    )
    assert len(cells) == 16 and args.jobs == 1 and args.out == 'work_dirs/compare/tiny'
    assert cells[0].options == (
        *('--norm', 'bn', '--batch-size', '2', '--budget', 'iters', '--seed', '0', '--epochs', '3', '--lr', '0.1'),
        *('--no-scale-lr', '--amp', '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=2'),
        *('train_cfg.val_interval=2', 'optim_wrapper.optimizer.betas=(0.9,0.99)'),
    )
    assert cells[0].processes == 2


def test_what_is_left_out_is_that_of_the_config(config):
    _, cells = parsed(config, '--norms', 'bn', '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=1')
    assert [cell.labels for cell in cells] == [dict(norm='bn', batch_size=4, seed=0)]
    assert cells[0].options[-1] == 'default_hooks.checkpoint.max_keep_ckpts=1'


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--norms', 'bn', 'gnn'], '--norms gnn: '),
        (['--norms', 'bn', 'bn'], '--norms bn bn: must be different names'),
        (['--norms', 'bn', '--batch-sizes', '0'], '--batch-sizes 0: must be different whole numbers of at least 1'),
        (['--norms', 'bn', '--batch-sizes', '3', '--gpus', '2'], '--batch-sizes 3: is of all processes together'),
        (['--norms', 'bn', '--seeds', '1', '1'], '--seeds 1 1: must be different'),
        (['--norms', 'bn', '--jobs', '0'], '--jobs 0: must be at least 1'),
        (['--norms', 'bn', '--grid', 'a.b'], '--grid a.b: must be KEY=V1,V2'),
        (['--norms', 'bn', '--grid', 'a=1,1'], '--grid a=1,1: every key once, with different values'),
        (
            ['--norms', 'bn', '--grid', 'optim_wrapper.optimiser.lr=1,2'],
            '--grid optim_wrapper.optimiser.lr: the config',
        ),
        (['--norms', 'bn', '--cfg-options', 'train_cfg.max_epoch=3'], 'train_cfg.max_epochs'),
        (
            ['--norms', 'bn', '--cfg-options', 'train_dataloader.batch_size=3'],
            '--cfg-options train_dataloader.batch_size: --batch-sizes says it',
        ),
        ([], '--norms: names of norms to compare are missing'),
        (['--variant', 'a=bn'], '--variant a=bn: must be NAME=NORM KEY=VALUE'),
        (['--norms', 'bn', '--variant', 'bn=gn', 'train_cfg.val_interval=2'], '--norms bn: must be different names'),
        (['--variant', 'a=gnn', 'train_cfg.val_interval=2'], '--variant a=gnn: '),
        (['--variant', 'a=bnet3', 'model.neck.nrm_cfg.rho=2'], '--variant a=bnet3 model.neck.nrm_cfg.rho'),
        (['--norms', 'bn', '--data-root', 'nowhere'], '--data-root: there is no folder nowhere'),
        (
            ['--norms', 'bn', '--cfg-options', 'train_dataloader.dataset.ann_file=no.json'],
            'there is no annotation file',
        ),
        (['--norms', 'bn', '--slurm', 'partition=gpu'], '--slurm partition=gpu: is for --executor slurm'),
        (['--norms', 'bn', '--', '--seed', '3'], '-- --seed: is for this command to say'),
        (['--norms', 'bn', '--', '--see', '3'], '-- --see: is for this command to say'),
        (['--norms', 'bn', '--grid', 'randomness.seed=3,4'], '--grid randomness.seed: --seeds says it'),
        (['--norms', 'bn', '--cfg-options', 'randomness.seed=3'], '--cfg-options randomness.seed: --seeds says it'),
        (
            ['--norms', 'bn', '--', '--cfg-options', 'randomness.seed=3'],
            '-- --cfg-options randomness.seed: --seeds says it',
        ),
        (['--norms', 'bn', '--cfg-options', 'randomness=dict(seed=3)'], '--cfg-options randomness.seed: --seeds says'),
        (
            ['--norms', 'bn', '--', '--lr', '0.1', '--cfg-options', 'optim_wrapper.optimizer.lr=1'],
            '-- --cfg-options optim_wrapper.optimizer.lr: --lr 0.1 says it',
        ),
        (['--norms', 'bn', '--grid', 'train_dataloader.batch_size=2,4'], 'batch_size: --batch-sizes says it'),
        (
            ['--norms', 'bn', '--lr', '0.1', '--grid', 'optim_wrapper.optimizer.lr=0.1,0.2'],
            '--grid optim_wrapper.optimizer.lr: --lr 0.1 says it',
        ),
        (
            ['--variant', 'v=bnet3', f'{KERNEL}=9', '--grid', f'{KERNEL}=3,5'],
            f'--variant v=bnet3 {KERNEL}: --grid {KERNEL} would replace it',
        ),
        (['--norms', 'bn', '--grid', 'sed=3,4'], 'To add it nevertheless, write it into the config\n'),
        (['--norms', 'bn', '--executor', 'slurm'], '--executor slurm: there is no srun here'),
    ],
)
def test_what_is_wrong_is_one_error_before_anything_is_trained(config, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_run, 'run', lambda *_: pytest.fail('trained'))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit) as ended:
        compare.main(['run', config, '--out', str(tmp_path / 'out'), *arguments])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and said in message and message.count('error:') == 1
    assert not (tmp_path / 'out' / 'grid.json').exists()


INIT = 'model.backbone.init_cfg'


@pytest.mark.parametrize(
    'arguments, said',
    [
        (
            ['--cfg-options', f'{INIT}.type=Pretrained', f'{INIT}.checkpoint=a.pth'],
            f'{INIT}.checkpoint: there is no file a.pth',
        ),
        (['--cfg-options', 'load_from=a.pth'], 'load_from: there is no checkpoint file a.pth'),
        (['--', '--cfg-options', 'load_from=a.pth'], 'load_from: there is no checkpoint file a.pth'),
        (['--grid', 'load_from=a.pth,b.pth'], 'load_from: there is no checkpoint file a.pth'),
        (['--cfg-options', 'model.backbone.pretrained=a.pth'], 'model.backbone.pretrained: there is no file a.pth'),
    ],
)
def test_weights_that_no_training_has_are_one_error(config, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ('--norms', 'bn', 'gn', '--seeds', '0', '1', '--out', 'out', *arguments)
    with pytest.raises(UserError, match=re.escape(said)):
        parsed(config, *given)
    (tmp_path / 'out' / 'gn-b4-s1').mkdir(parents=True)
    (tmp_path / 'out' / 'gn-b4-s1' / 'epoch_1.pth').touch()  # it goes on from that one
    if '--grid' not in arguments:
        parsed(config, *given)


def test_weights_that_only_some_trainings_lack_are_no_error_of_all(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(parsed(config, '--norms', 'bn', '--variant', 'more=bn', 'load_from=a.pth')[1]) == 2
    torch.save({}, 'b.pth')
    assert len(parsed(config, '--norms', 'bn', '--grid', 'load_from=a.pth,b.pth')[1]) == 2


def test_a_key_that_only_some_norms_have_is_no_error_of_the_grid(config):
    _, cells = parsed(config, '--norms', 'bn', 'bnet5', '--grid', 'model.backbone.norm_at.last.kernel_size=3,4')
    assert len(cells) == 4


def test_a_variant_is_a_norm_with_options_of_its_own(config):
    given = ('--variant', 'wide=bnet3', 'model.backbone.norm_at.last.kernel_size=9', 'train_cfg.val_interval=3')
    _, (plain, wide) = parsed(config, '--norms', 'bn', *given, '--cfg-options', 'train_cfg.val_interval=2')
    assert plain.labels['norm'] == 'bn' and 'bnet3' not in plain.options and wide.options[:2] == ('--norm', 'bnet3')
    assert wide.labels == dict(norm='wide', batch_size=4, seed=0) and wide.name == 'wide-b4-s0'
    assert wide.options[-2:] == ('model.backbone.norm_at.last.kernel_size=9', 'train_cfg.val_interval=3')
    assert [cell.labels['norm'] for cell in parsed(config, *given)[1]] == ['wide']


def test_options_of_a_variant_are_read_together(config):
    key = 'model.backbone.norm_cfg'
    _, (cell,) = parsed(config, '--variant', 'gn-all=bn', f'{key}.type=GN', f'{key}.num_groups=4')
    assert cell.options[-2:] == (f'{key}.type=GN', f'{key}.num_groups=4')
    _, cells = parsed(
        config, '--variant', 'gn-all=bn', f'{key}.type=GN', '--norms', 'bn', '--grid', f'{key}.num_groups=4,8'
    )
    assert len(cells) == 4


def test_options_of_a_grid_are_read_together(config):
    key = 'model.backbone.norm_cfg'
    grid = ('--grid', f'{key}.type=GN', f'{key}.num_groups=4,8')
    assert len(parsed(config, '--norms', 'bn', *grid)[1]) == 2
    _, cells = parsed(config, '--variant', 'four=bn', f'{key}.num_groups=4', '--grid', f'{key}.type=GN')
    assert len(cells) == 1
    with pytest.raises(UserError, match=r'--grid .*no_such'):
        parsed(config, '--norms', 'bn', *grid, f'{key}.no_such=1')


def test_a_failed_training_is_named_and_the_status_says_so(config, tmp_path, monkeypatch, capsys):
    def run(cells, folder, jobs, more, on_end, read, on_start, on_look, executor, data):
        assert more == ['--per-class', '--threads', '1'] and [Path(path).name for path in data(cells[0])] == [
            'annotations.json'
        ]
        found = [Outcome(cells[0], {'bbox_mAP': 0.5}, None, 3.0), Outcome(cells[1], None, 'error: no', 3.0)]
        for outcome in found:
            on_start(outcome.cell)
            on_end(outcome)
        return found

    monkeypatch.setattr(compare_run, 'run', run)
    reported = SimpleNamespace(write=lambda *given, **more: [(given, more)], said=lambda paths: ['no difference seen'])
    monkeypatch.setattr(compare_run, 'report', reported)
    with pytest.raises(SystemExit) as ended:
        compare.main(['run', config, '--norms', 'bn', 'gn', '--out', str(tmp_path), '--threads', '1'])
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert '1/2: bn-b4-s0: bbox AP 0.500 (3 s)' in said and '2/2: gn-b4-s0: failed: error: no' in said
    assert 'no difference seen\n' in said
    assert 'failed: gn-b4-s0: error: no (' in said and '1 of 2 trainings failed' in said
    written = json.loads((tmp_path / 'grid.json').read_text())
    assert [cell['status'] for cell in written['cells']] == ['finished', 'failed']
    assert ' run ' in written['command'] and written['threads'] == 1


@pytest.mark.parametrize('full', ['grid.json', 'report'])
def test_failed_trainings_are_named_on_a_full_disk_too(full, config, tmp_path, monkeypatch, capsys):
    def run(cells, folder, jobs, more, on_end, *_):
        found = [Outcome(cells[0], {'bbox_mAP': 0.5}, None, 3.0), Outcome(cells[1], None, 'error: no', 3.0)]
        for outcome in found:
            with suppress(OSError):
                on_end(outcome)
        return found

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device', full)

    monkeypatch.setattr(compare_run, 'run', run)
    where = (comparison, 'write_json') if full == 'grid.json' else (compare_run.report, 'write')
    monkeypatch.setattr(*where, no_room)
    with pytest.raises(SystemExit) as ended:
        compare.main(['run', config, '--norms', 'bn', 'gn', '--out', str(tmp_path), '--threads', '1'])
    said = capsys.readouterr()
    assert (
        ended.value.code == 2
        and said.err == f'error: {full}: No space left on device; make room on that disk, or name another place\n'
    )
    assert '2/2: gn-b4-s0: failed' in said.out and '1 of 2 trainings failed' in said.out


def test_threads_are_chosen_once(config, tmp_path, monkeypatch):
    """The second command would find the machine busy, and the last bits of its results were others."""
    monkeypatch.setattr(compare_run, 'fixed_by', lambda: None)
    monkeypatch.setattr(compare_run, '_device', lambda: 'cpu')
    asked = []
    monkeypatch.setattr(compare_run.cores, 'threads_for', lambda load, number: asked.append(number) or 7)
    given = [config, '--norms', 'bn', '--batch-sizes', '4', '--gpus', '2', '--out', str(tmp_path)]
    assert compare_run._threads(compare_run.parse_args([*given, '--jobs', '3'])) == 7 and asked == [6]
    (tmp_path / 'grid.json').write_text('{"threads": 5, "at_a_time": 6}')
    assert compare_run._threads(compare_run.parse_args([*given, '--jobs', '3'])) == 5
    assert compare_run._threads(compare_run.parse_args([*given, '--jobs', '2'])) == 7
    assert compare_run._threads(compare_run.parse_args([*given, '--threads', '9'])) == 9


def test_the_trainings_are_listed(config, tmp_path, capsys):
    (tmp_path / 'bn-b4-s0').mkdir()
    (tmp_path / 'bn-b4-s0' / 'results.json').write_text('{"x": 1}')
    (tmp_path / 'bn-b4-s0' / FINISHED).write_text('{}')
    compare.main(['run', config, '--norms', 'bn', 'gn', '--out', str(tmp_path), '--dry-run'])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f'2 trainings, 1 of them finished, in {tmp_path}:'
    assert [line.split()[:2] for line in lines] == [['finished', 'bn-b4-s0'], ['waiting', 'gn-b4-s0']]
    assert f'train.py {config} --work-dir {tmp_path}/gn-b4-s0 --resume --norm gn --batch-size 4' in lines[1]
    assert lines[1].endswith(' --per-class')


def _is_there(process, *paths):
    """Wait for files that a grid writes, which is in no hurry on a busy machine; then a moment of no rule."""
    end = time.monotonic() + 300
    while not all(path.exists() for path in paths):
        assert process.poll() is None and time.monotonic() < end, f'{process.poll()}: no {paths}'
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.3))


@pytest.mark.slow
def test_a_grid_that_was_killed_three_times_ends_as_one_that_was_not(tmp_path):
    """Killed with all its trainings: before a checkpoint, behind one, and when one training had finished."""
    config, out = tiny_cls.write_config(tmp_path), tmp_path / 'killed'
    code = "from helpers import warm; warm.begin_warm(); from mmdet_norms_start.commands import run; run('compare')"
    call = [sys.executable, '-c', code, 'run', config, '--norms', 'bn', 'mabn', '--batch-sizes', '6', '--images', '0']
    call += ['--epochs', '3', '--out']
    first, second = out / 'bn-b6-s0', out / 'mabn-b6-s0'
    for waits_for in ([first / LOG], [first / 'epoch_1.pth'], [first / FINISHED, second / LOG]):
        with warm.Popen([*call, out], start_new_session=True, stdout=subprocess.DEVNULL) as grid:
            _is_there(grid, *waits_for)
            os.killpg(grid.pid, signal.SIGKILL)
    log = (first / LOG).read_bytes()
    for folder in (out, tmp_path / 'whole'):
        done = warm.run([*call, folder], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (first / LOG).read_bytes() == log  # it did not run again
    tables = [(f / 'report' / 'report.md').read_text().partition('## Results\n')[2] for f in (out, tmp_path / 'whole')]
    (table, same) = (text.partition('\n## ')[0] for text in tables)
    assert table == same and '| MABN |' in table
    for cell in (first, second):
        whole = tmp_path / 'whole' / cell.name
        assert json.loads((cell / 'results.json').read_text()) == json.loads((whole / 'results.json').read_text())
        weights, others = (torch.load(f / 'epoch_3.pth', weights_only=False)['state_dict'] for f in (cell, whole))
        assert weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.slow
def test_a_planted_failure_leaves_the_other_trainings_and_the_report(tmp_path, capsys):
    config, out = tiny_cls.write_config(tmp_path), tmp_path / 'out'
    call = ['run', str(config), '--norms', 'bn', 'bnet5', '--batch-sizes', '6', '--epochs', '2', '--out', str(out)]
    with pytest.raises(SystemExit) as ended:
        compare.main([*call, '--variant', 'wrong=bnet5', f'{KERNEL}=4', '--images', '0'])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and '1 of 3 trainings failed' in said, said
    cells = {cell['name']: cell for cell in json.loads((out / 'grid.json').read_text())['cells']}
    assert cells['bn-b6-s0']['status'] == cells['bnet5-b6-s0']['status'] == 'finished'
    assert cells['wrong-b6-s0']['status'] == 'failed' and 'kernel_size' in cells['wrong-b6-s0']['error']
    assert json.loads((out / 'bnet5-b6-s0' / 'cost.json').read_text())['batch_size'] == 6
    text = (out / 'report' / 'report.md').read_text()
    assert 'must be an odd positive integer' in text
    assert '| norm | batch size | box | disc | ring |' in text  # without an option for it
    html = (out / 'report' / 'index.html').read_text()
    assert {'figure-progress', 'figure-classes'} <= set(re.findall(r'<section id="([\w-]+)"', html))
