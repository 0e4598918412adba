"""From pretraining into detection: a classifier's checkpoint fills the backbone, or one message says what does not."""

import json
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement

from helpers import tiny
from mmdet_norms import apply_norm
from mmdet_norms.cli import train
from mmdet_norms.cli.weights import check_training
from mmdet_norms.datasets.shapes_cls import make_shapes_cls

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
CLASSIFIER = CONFIGS / 'demo' / 'resnet50_bnet5_shapes-cls.py'

RESNET = dict(
    type='ResNet', depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), norm_eval=False,
    frozen_stages=-1, norm_cfg=dict(type='BN'))  # fmt: skip
BACKBONES = {
    'AOGNet': dict(
        type='AOGNet', arch=dict(filter_list=(8, 8, 16, 32, 64), blocks=(1, 1, 1, 1)), norm='AN', frozen_stages=-1,
        norm_eval=False),
    'GN': dict(RESNET, norm_cfg=dict(type='GN', num_groups=4)),
    'CBN': dict(RESNET, norm_cfg=dict(type='CBN', buffer_num=3, burnin=1)),
    'MABN without CenConv': dict(RESNET, norm_cfg=dict(type='MABN', B=2, real_B=4)),
}  # fmt: skip
"""Those that no ``--norm`` gives to classifier and detector alike."""

NORMS = ('bn', 'bnet3', 'bnet5', 'bnet7', 'syncbn', 'mabn', 'brn', 'sn', 'an', 'frozen')
STEPS = 3


def build(model):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(model)


def pretrained(kind, path):
    """Train a classifier for some steps, which all its counters count; write its checkpoint, return its backbone."""
    head = dict(type='LinearClsHead', num_classes=3, in_channels=64)
    model = dict(type='ImageClassifier', backbone=dict(BACKBONES.get(kind, RESNET)), head=head)
    torch.manual_seed(0)
    model = apply_norm(model, kind) if kind in NORMS else model
    net = build(model).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    samples = [BaseDataElement(gt_label=torch.tensor(i % 3)) for i in range(6)]
    for _ in range(STEPS):
        net(torch.randn(6, 3, 32, 32), samples, mode='loss')['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    meta = dict(epoch=1, iter=STEPS, cfg=Config(dict(model=model)).pretty_text)
    torch.save(dict(meta=meta, state_dict=net.state_dict()), path)
    return net.backbone


def detector(folder, kind, checkpoint, prefix='backbone.'):
    """The detector's config as ``tools/train.py`` makes it, which looks at the checkpoint."""
    more = f'\nmodel["backbone"] = dict(_delete_=True, **{BACKBONES[kind]!r})' if kind in BACKBONES else ''
    config = tiny.write_config(folder, more)
    start = [f'model.backbone.init_cfg.{key}' for key in ('type=Pretrained', f'checkpoint={checkpoint}')]
    norm = ['--norm', kind] if kind in NORMS else []
    arguments = [str(config), *norm, '--cfg-options', *start, f'model.backbone.init_cfg.prefix={prefix}']
    args = train.parse_args([*arguments, '--allow-data-faults'])
    cfg = train.train_config(args)
    check_training(cfg, args)
    return cfg


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Of each kind, made when it is first asked for: its file and its backbone."""
    folder, made = tmp_path_factory.mktemp('checkpoints'), {}

    def of(kind):
        if kind not in made:
            path = folder / f'{kind.replace(" ", "_")}.pth'
            made[kind] = path, pretrained(kind, path)
        return made[kind]

    return of


@pytest.mark.parametrize('kind', [*NORMS, *BACKBONES])
def test_a_classifier_fills_the_whole_backbone_of_a_detector(kind, checkpoints, tmp_path, capsys):
    path, theirs = checkpoints(kind)
    cfg = detector(tmp_path, kind, path)
    said = capsys.readouterr().out
    assert said.count(f'model.backbone.init_cfg: all weights and statistics come from {path}') == 1, said
    net = build(cfg.model)
    net.init_weights()
    ours, theirs = net.backbone.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    counts = {
        key.rpartition('.')[2]: int(value)
        for key, value in ours.items()
        if not value.is_floating_point() and value.numel() == 1
    }
    expected = dict(frozen={'num_batches_tracked': 0}, GN={}, mabn={'iters': STEPS}, CBN={'iter_count': STEPS})
    expected['MABN without CenConv'] = expected['mabn']
    assert counts == expected.get(kind, {'num_batches_tracked': STEPS})


@pytest.mark.parametrize('kind', ['bnet5', 'an'])
def test_batch_norm_starts_another_norm_as_the_identical_function(kind, checkpoints, tmp_path, capsys):
    path, theirs = checkpoints('bn')
    cfg = detector(tmp_path, kind, path)
    said = capsys.readouterr().out
    assert 'start as the identical function of another norm' in said and 'no place' not in said, said
    net = build(cfg.model)
    net.init_weights()
    x = torch.randn(2, 3, 64, 64)
    ours = net.backbone
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for one, other in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'of, kind, said',
    [
        ('bnet5', 'bn', 'bnconv'),  # what the model lacks
        ('an', 'bn', 'weight_'),
        ('bnet3', 'bnet5', 'have another shape'),
        ('GN', 'bn', 'running_mean'),
        ('GN', 'bnet5', 'another function'),
        ('bn', 'mabn', 'CenConv, in front, takes the mean of each filter away'),
        ('sn', 'bn', 'mean_weight'),
        ('AOGNet', 'bn', 'not in the checkpoint'),
    ],
)
def test_another_norms_checkpoint_is_one_message(of, kind, said, checkpoints, tmp_path):
    path, _ = checkpoints(of)
    with pytest.raises(train.UserError) as error:
        detector(tmp_path, kind, path)
    message = str(error.value)
    assert message.startswith(f'model.backbone.init_cfg: {path} does not fit') and said in message
    assert 'model.backbone.init_cfg=None' in message and '--allow-partial' in message
    keys = [line for line in message.splitlines() if line.startswith('  ')]
    assert len(keys) == len(set(keys))  # each of them is listed once


def test_what_has_no_place_and_what_starts_anew_are_listed_once(checkpoints, tmp_path, capsys):
    path, theirs = checkpoints('bn')
    content = torch.load(path, weights_only=True)
    state = content['state_dict']
    for key in [key for key in state if key.endswith('num_batches_tracked')]:  # as of weights of torch < 0.4.1
        del state[key]
    state['backbone.fc.weight'] = torch.zeros(10, 64)
    torch.save(content, tmp_path / 'old.pth')
    detector(tmp_path, 'bn', tmp_path / 'old.pth')
    said = capsys.readouterr().out
    assert f'of {tmp_path / "old.pth"} come all weights and statistics but what is listed here' in said
    norms = sum(key.endswith('num_batches_tracked') for key in theirs.state_dict())
    assert f'{norms} start anew:' in said and said.count('bn1.num_batches_tracked') <= 3
    assert '1 of the checkpoint have no place:\n  fc.weight\n' in said


def test_mabn_that_was_pretrained_uncentred_is_warned_of(checkpoints, tmp_path, capsys):
    path, _ = checkpoints('MABN without CenConv')
    detector(tmp_path, 'mabn', path)
    said = capsys.readouterr().err
    assert said.count('was trained without centred convolutions in front of MABN') == 1 and "type='CenConv'" in said
    path, _ = checkpoints('mabn')
    detector(tmp_path, 'MABN without CenConv', path)
    assert 'was trained with centred convolutions' in capsys.readouterr().err
    detector(tmp_path, 'mabn', path)
    assert 'centred' not in capsys.readouterr().err


@pytest.mark.parametrize('wrapper', ['_orig_mod', 'module'])
def test_of_a_wrapped_classifier_the_prefix_is_said(wrapper, checkpoints, tmp_path, capsys):
    """``torch.compile(model).state_dict()``, or DDP's; what mmengine compiles or wraps keeps its names."""
    path, _ = checkpoints('bnet5')
    content = torch.load(path, weights_only=True)
    content['state_dict'] = {f'{wrapper}.{key}': value for key, value in content['state_dict'].items()}
    torch.save(content, tmp_path / 'wrapped.pth')
    with pytest.raises(train.UserError) as error:
        detector(tmp_path, 'bnet5', tmp_path / 'wrapped.pth')
    assert str(error.value).endswith(f"they start with {wrapper}: write prefix='{wrapper}.backbone.'")
    cfg = detector(tmp_path, 'bnet5', tmp_path / 'wrapped.pth', prefix=f'{wrapper}.backbone.')
    assert 'all weights and statistics come from' in capsys.readouterr().out
    net = build(cfg.model)
    net.init_weights()
    state = content['state_dict']
    assert all(
        torch.equal(value, state[f'{wrapper}.backbone.{key}']) for key, value in net.backbone.state_dict().items()
    )


def test_two_runs_from_pictures_to_a_detector(tmp_path, capsys):
    """The classifier is trained with averaged weights, which are those that its checkpoint has for others."""
    data = make_shapes_cls(tmp_path / 'shapes-cls', 12, 6, size=32)
    small = ['model.backbone.depth=18', 'model.backbone.base_channels=8', 'model.head.in_channels=64']
    small += ['custom_hooks=[dict(type="EMAHook", momentum=0.5)]', 'train_dataloader.batch_size=6']
    for split in ('train', 'val'):
        loader = f'{split}_dataloader'
        small += [f'{loader}.num_workers=0', f'{loader}.persistent_workers=False', f'{loader}.dataset.data_root={data}']
    work_dir = tmp_path / 'first'
    train.main([str(CLASSIFIER), '--work-dir', str(work_dir), '--epochs', '1', '--cfg-options', *small])
    path = (work_dir / 'last_checkpoint').read_text()
    state = torch.load(path, weights_only=True)['state_dict']
    assert 'accuracy/top1' in (work_dir / 'results.json').read_text()
    capsys.readouterr()
    cfg = detector(tmp_path, 'bnet5', path)
    assert f'all weights and statistics come from {path}' in capsys.readouterr().out
    net = build(cfg.model)
    net.init_weights()
    ours = net.backbone.state_dict()
    assert len(ours) == sum(key.startswith('backbone.') for key in state)
    assert [key for key in ours if not torch.equal(ours[key], state[f'backbone.{key}'])] == []


def test_the_table_runs_what_is_not_there_and_has_a_line_for_each_norm(tmp_path, monkeypatch, capsys):
    tool = runpy.run_path(str(CONFIGS.parent / 'tools' / 'pretrain_table.py'))
    commands, killed = [], True

    def fake(command, **_):
        options = dict(pair.split('=') for pair in command if '=' in pair)
        commands.append(command)
        if '--work-dir' not in command:
            return SimpleNamespace(returncode=0)
        if killed and 'mabn' in command:
            return SimpleNamespace(returncode=137)
        seed, work_dir = int(command[command.index('--seed') + 1]), Path(command[command.index('--work-dir') + 1])
        assert '--resume' in command
        start = options.get('model.backbone.init_cfg.checkpoint')
        assert (start is None) == (work_dir.name != 'pretrained') and ('=None' in command[-1]) == (
            work_dir.name == 'scratch'
        )
        assert start is None or start == f'{work_dir.parent / "pretrain"}/epoch_1.pth'
        ap = 0.5 if start else 0.25
        work_dir.mkdir(parents=True)
        results = (
            {'accuracy/top1': 0.9 + seed / 50} if work_dir.name == 'pretrain' else dict(bbox_mAP=ap, segm_mAP=ap / 2)
        )
        (work_dir / 'results.json').write_text(json.dumps(results))
        (work_dir / 'finished.json').write_text('{}')
        (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, 'run', fake)
    arguments = ['--work-dir', str(tmp_path), '--norms', 'bn', 'mabn', '--seeds', '0', '1']
    with pytest.raises(SystemExit) as stopped:
        tool['main'](arguments)
    assert stopped.value.code == 137 and len(commands) == 2 + 3 + 1
    killed = False
    tool['main'](arguments)
    assert len(commands) == 6 + 2 + 3 * 3
    capsys.readouterr()
    tool['main'](arguments)
    assert len(commands) == 17 + 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f'| `{norm}` | 0.910 ± 0.014 | 0.250 ± 0.000 | 0.500 ± 0.000 | 0.125 ± 0.000 | 0.250 ± 0.000 |'
        for norm in ('bn', 'mabn')
    ]
