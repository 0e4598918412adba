"""``--epochs`` and ``--lr`` scale the schedule; what of a schedule does not fit the training is said."""

import copy
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope

from helpers import tiny
from mmdet_norms.cli import schedule, train
from mmdet_norms.cli.common import UserError
from mmdet_norms.cli.schedule import scale_to, set_learning_rate
from mmdet_norms.engine.schedule import schedule_problems

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
OURS = Path(__file__).resolve().parents[2] / 'configs'
LENGTH = 100  # iterations of an epoch

WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50)
STEPS = dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11], gamma=0.1)
COSINE = dict(type='CosineAnnealingLR', begin=0, end=12, T_max=12, eta_min=0)


@pytest.fixture(autouse=True)
def length(monkeypatch):
    """Of the epochs; no data set is built."""
    monkeypatch.setattr(schedule, 'epoch_length', lambda cfg, launcher: LENGTH)


def config(*schedulers, epochs=12, iters=None, **more):
    loop = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
    if iters is not None:
        loop = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters // 10)
    more = {'optim_wrapper': dict(optimizer=dict(type='SGD', lr=0.02)), **more}
    return Config(dict(train_cfg=loop, param_scheduler=list(copy.deepcopy(schedulers)), **more))


def ends(cfg):
    """Epochs, None where they do not count, and iterations of a training."""
    epochs = cfg.train_cfg.get('max_epochs')
    return epochs, (cfg.train_cfg.max_iters if epochs is None else epochs * LENGTH)


def built(cfg, length=None):
    """The schedulers as mmengine's runner builds them, and their optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    optimizer.step()
    epochs, iters = ends(cfg)
    found, entries = [], cfg.param_scheduler
    with DefaultScope.overwrite_default_scope('mmdet'):
        for entry in [entries] if isinstance(entries, dict) else entries:
            entry = dict(copy.deepcopy(entry))
            entry.setdefault('end', (epochs or 1) if entry.get('by_epoch', True) else iters)
            found.append(
                PARAM_SCHEDULERS.build(entry, default_args=dict(optimizer=optimizer, epoch_length=length or LENGTH))
            )
    return found, optimizer


def problems(cfg):
    return schedule_problems(built(cfg)[0], *ends(cfg), LENGTH)


def rates(cfg):
    """The learning rate of every iteration."""
    found, optimizer = built(cfg)
    rates = []
    for i in range(ends(cfg)[1]):
        rates.append(optimizer.param_groups[0]['lr'])
        for s in found:
            if not s.by_epoch or (i + 1) % LENGTH == 0:
                s.step()
    return rates


# -------------------------------------------------------------------------------------------------- what is said of it


@pytest.mark.parametrize(
    'schedulers, epochs, said',
    [
        ([WARM_UP, COSINE], 12, []),
        ([WARM_UP, COSINE], 48, ['schedule of the learning rate ends at epoch 12 and the training at epoch 48']),
        ([WARM_UP, COSINE], 6, ['is made for epoch 12 and the training ends at epoch 6']),
        ([WARM_UP, STEPS], 24, ['it stays at 0.0002 from then on. --epochs N of tools/train.py']),
        ([WARM_UP, STEPS], 10, ['MultiStepLR never comes to its step at epoch 11: it is over at epoch 10']),
        ([WARM_UP, dict(STEPS, end=9)], 9, ['never comes to its step at epoch 11: it is over at epoch 9']),
        ([{k: v for k, v in STEPS.items() if k != 'end'}], 40, ['last step of the learning rate is at epoch 11']),
        ([dict(WARM_UP, end=5000), STEPS], 12, ['warm-up ends at iteration 5000 (epoch 50) and the training at']),
        ([dict(WARM_UP, end=700), STEPS], 12, ['the warm-up takes iteration 700 (epoch 7) of epoch 12']),
        ([dict(WARM_UP, by_epoch=True, end=5)], 4, ['the warm-up ends at epoch 5']),
        ([WARM_UP, dict(COSINE, begin=12, end=24)], 12, ['CosineAnnealingLR begins at epoch 12, which the training']),
        ([dict(COSINE, T_max=5)], 12, ['at its lowest at epoch 5 and rises again']),
        ([dict(COSINE, T_max=1, end=1)], 1, ['the learning rate after each epoch and has one only']),
        ([dict(COSINE, T_max=1, end=1, convert_to_iter_based=True)], 1, []),
        ([dict(WARM_UP, end=1)], 12, ['LinearLR of one iteration never ends: the learning rate stays at 0.001 of']),
        ([dict(WARM_UP, end=1, start_factor=1.0)], 12, []),
        ([dict(WARM_UP, end=2)], 12, []),
        ([dict(COSINE, convert_to_iter_based=True)], 24, ['ends at iteration 1200 (epoch 12) and the']),
        ([dict(COSINE, by_epoch=False, end=900, T_max=900)], 12, ['ends at iteration 900 (epoch 9) and the']),
        ([dict(type='StepLR', step_size=20)], 12, ['StepLR never comes to its step at epoch 20']),
        ([dict(type='PolyLR', end=6)], 12, ['schedule of the learning rate ends at epoch 6']),
        ([dict(type='LinearLR', start_factor=1.0, end_factor=0.0, end=20)], 12, ['LinearLR is made for epoch 20']),
        ([dict(type='OneCycleLR', eta_max=0.1, total_steps=20)], 12, ['OneCycleLR is made for epoch 20']),
        ([dict(type='CosineRestartLR', periods=[2, 4], restart_weights=[1, 1], eta_min=0)], 12, ['ends at epoch 6']),
        ([dict(type='ConstantLR', factor=0.1, by_epoch=False, begin=0, end=5000)], 12, ['the warm-up ends at iter']),
        ([dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, end=5000)], 12, ['the warm-up ends at iter']),
        ([dict(type='ReduceOnPlateauLR', monitor='loss')], 12, []),
        ([dict(type='ExponentialLR', gamma=0.9)], 12, []),
        ([WARM_UP], 12, []),
        ([], 12, []),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(schedulers, epochs, said):
    found = problems(config(*schedulers, epochs=epochs))
    assert len(found) == len(said), found
    assert all(wanted in sentence for wanted, sentence in zip(said, found)), found


def test_epochs_never_pass_in_a_training_that_counts_iterations():
    (found,) = problems(config(STEPS, iters=1200))
    assert 'counts epochs and this training counts iterations' in found
    assert not problems(config(dict(STEPS, convert_to_iter_based=True), iters=1200))


# mmdet 3.3's own: schedules whose `end` is that of the config that they are made from, so that the rate never falls (or
# is over at 90,000 of 270,000 iterations).
KNOWN = (
    'faster-rcnn_r50-caffe-dc5_ms-3x',
    'faster-rcnn_r50-caffe_fpn_ms-2x',
    'mask-rcnn_r50-caffe_fpn_ms-poly-3x',
    'mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj',
    'mask-rcnn_r50-caffe_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-400e',
)


def test_all_of_mmdets_schedules_come_through(monkeypatch):
    monkeypatch.setattr('test_schedule.LENGTH', 7330)
    monkeypatch.setattr(schedule, 'epoch_length', lambda cfg, launcher: LENGTH)
    files = [*CONFIGS.rglob('*.py'), *OURS.rglob('*.py')]
    seen, said = {}, set()
    for file in files:
        if 'param_scheduler' not in file.read_text(encoding='utf-8') or 'classification' in file.parts:
            continue
        try:
            cfg = Config.fromfile(file)
        except (ImportError, FileNotFoundError):  # of packages that are not there; a few of mmdet's are broken
            continue
        if cfg.get('train_cfg') and cfg.get('param_scheduler') and ends(cfg)[1]:
            seen.setdefault((str(cfg.train_cfg), str(cfg.param_scheduler)), (file, cfg))
    assert len(seen) > 60
    for file, cfg in seen.values():
        if problems(cfg):
            said.add(file.stem)
            continue
        for epochs in (1, 7, 72):
            other = copy.deepcopy(cfg)
            scale_to(other, epochs)
            assert problems(other) == [], (file, epochs)
    assert sorted(name for name in said if not name.startswith(KNOWN)) == []
    assert said


# ------------------------------------------------------------------------------------------------------------ --epochs


@pytest.mark.parametrize(
    'warm_up',
    [
        WARM_UP,
        dict(type='ConstantLR', factor=0.1, by_epoch=False, begin=0, end=50),
        dict(WARM_UP, by_epoch=True, convert_to_iter_based=True, end=3),
    ],
    ids=['linear', 'constant', 'epochs of one iteration'],
)
def test_a_warm_up_that_becomes_one_iteration_leaves_the_rate_alone(warm_up, monkeypatch):
    """mmengine's of one iteration never comes to its end: few images were trained at a thousandth of the rate."""
    length = 1 if warm_up['by_epoch'] else 3
    monkeypatch.setattr(schedule, 'epoch_length', lambda cfg, launcher: length)
    cfg = config(warm_up)
    scale_to(cfg, 4)
    (scheduler,), optimizer = built(cfg, length)
    assert optimizer.param_groups[0]['lr'] == 0.02
    scheduler.step()
    assert optimizer.param_groups[0]['lr'] == 0.02


def test_whole_epochs_stay_epochs_and_others_become_iterations():
    cfg = config(WARM_UP, STEPS)
    (note,) = scale_to(cfg, 24)
    assert cfg.param_scheduler[1].milestones == [16, 22] and cfg.param_scheduler[1].end == 24
    assert cfg.param_scheduler[0] == WARM_UP and cfg.train_cfg.max_epochs == 24 and cfg.train_cfg.val_interval == 2
    assert 'MultiStepLR 0 to 24, milestones [16, 22] epochs' in note
    cfg = config(WARM_UP, STEPS)
    scale_to(cfg, 3)
    steps = cfg.param_scheduler[1]
    assert (steps.by_epoch, steps.milestones, steps.end) == (False, [200, 275], 300)
    assert cfg.param_scheduler[0].end == 30 and cfg.train_cfg.val_interval == 1


SHAPES = {
    'steps': [STEPS],
    'cosine': [COSINE],
    'cosine per iteration': [dict(COSINE, convert_to_iter_based=True)],
    'late cosine': [dict(COSINE, begin=6, T_max=6, convert_to_iter_based=True)],
    'yolox': [
        dict(type='QuadraticWarmupLR', begin=0, end=4, convert_to_iter_based=True),
        dict(COSINE, begin=4, end=10, T_max=6, eta_min=0.001, convert_to_iter_based=True),
        dict(type='ConstantLR', factor=1, begin=10, end=12),
    ],
    'exponential': [dict(type='ExponentialLR', gamma=0.8)],
    'step': [dict(type='StepLR', step_size=4)],
    'poly': [dict(type='PolyLR', end=12, convert_to_iter_based=True)],
    'linear': [dict(type='LinearLR', start_factor=1.0, end_factor=0.1, end=12, convert_to_iter_based=True)],
    'one cycle': [dict(type='OneCycleLR', eta_max=0.1, total_steps=12, convert_to_iter_based=True)],
    'restarts': [
        dict(type='CosineRestartLR', periods=[4, 8], restart_weights=[1, 1], eta_min=0.001, convert_to_iter_based=True)
    ],
    'in iterations': [dict(STEPS, by_epoch=False, end=1200, milestones=[800, 1100])],
}


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('epochs', [5, 24])
def test_the_curve_keeps_its_shape(name, epochs):
    cfg = config(*SHAPES[name])
    before = rates(cfg)
    scale_to(cfg, epochs)
    after = rates(cfg)
    assert len(after) == epochs * LENGTH and problems(cfg) == []
    for part in (0.05, 0.3, 0.45, 0.7, 0.8, 0.95):
        was, now = before[int(part * len(before))], after[int(part * len(after))]
        # what moves once in an epoch may be a new epoch early or late
        wide = len(before) // epochs
        near = [before[min(len(before) - 1, max(0, int(part * len(before)) + i))] for i in (-wide, wide)]
        assert min(was, *near) * 0.97 <= now <= max(was, *near) * 1.03, (part, was, now)


CURVES = {
    'cosine': COSINE,
    'restart': dict(type='CosineRestartLR', periods=[12], restart_weights=[1], eta_min=0.001),
    'restarts': dict(type='CosineRestartLR', periods=[4, 4, 4], restart_weights=[1, 1, 1], eta_min=0.001),
    'poly': dict(type='PolyLR', end=12),
    'linear': dict(type='LinearLR', start_factor=1.0, end_factor=0.1, end=12),
    'exponential': dict(type='ExponentialLR', gamma=0.8),
    'one cycle': dict(type='OneCycleLR', eta_max=0.1, total_steps=12),
}


@pytest.mark.parametrize('name', CURVES)
def test_one_epoch_has_the_whole_curve(name):
    cfg = config(CURVES[name])
    before = rates(cfg)
    scale_to(cfg, 1)
    after = rates(cfg)
    assert problems(cfg) == [] and after[0] == pytest.approx(before[0])
    assert after[-1] <= before[-1] and len(after) == LENGTH


def test_a_training_in_iterations_gets_those_of_so_many_epochs():
    steps = dict(STEPS, by_epoch=False, end=9000, milestones=[6000, 8000])
    hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000))
    cfg = config(dict(WARM_UP, end=1000), steps, iters=9000, default_hooks=hooks)
    scale_to(cfg, 9)
    assert cfg.train_cfg.max_iters == 900 and cfg.train_cfg.val_interval == 90
    assert cfg.param_scheduler[1].milestones == [600, 800] and cfg.param_scheduler[0].end == 90
    assert cfg.default_hooks.checkpoint.interval == 100


def test_what_begins_where_the_warm_up_ends_goes_on_doing_so():
    cosine = dict(COSINE, by_epoch=False, begin=500, end=1200, T_max=700)
    cfg = config(dict(WARM_UP, end=500), cosine)
    scale_to(cfg, 6)
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 60
    assert cfg.param_scheduler[1].end == 600 and cfg.param_scheduler[1].T_max == 540


def test_intervals_and_hooks_follow():
    hooks = [dict(type='YOLOXModeSwitchHook', num_last_epochs=4), dict(type='EMAHook')]
    checkpoint = dict(checkpoint=dict(type='CheckpointHook', interval=2))
    cfg = config(STEPS, custom_hooks=hooks, default_hooks=checkpoint)
    cfg.train_cfg.update(val_interval=3, val_begin=5, dynamic_intervals=[(10, 1)])
    with DefaultScope.overwrite_default_scope('mmdet'):
        scale_to(cfg, 24)
    assert cfg.custom_hooks[0].num_last_epochs == 8 and cfg.default_hooks.checkpoint.interval == 4
    assert [cfg.train_cfg[key] for key in ('val_interval', 'val_begin', 'dynamic_intervals')] == [6, 10, [(20, 2)]]
    (cfg := config(STEPS)).train_cfg.val_interval = 4
    scale_to(cfg, 7)
    assert cfg.train_cfg.val_interval == 3  # at 3, 6 and 7, not at 2, 4, 6 and 7


def test_a_longer_training_writes_five_checkpoints_at_least():
    cfg = config(STEPS, epochs=1, default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)))
    scale_to(cfg, 36)
    assert cfg.default_hooks.checkpoint.interval == 8 and cfg.train_cfg.val_interval == 36


def test_the_learning_rate_takes_the_rates_beside_it_along():
    cfg = config(WARM_UP, dict(COSINE, eta_min=0.001), dict(type='CosineAnnealingMomentum', T_max=12, eta_min=0.5))
    assert set_learning_rate(cfg, 0.04) == ['--lr 0.04: the learning rate (the config has 0.02)']
    assert cfg.optim_wrapper.optimizer.lr == 0.04
    assert cfg.param_scheduler[1].eta_min == pytest.approx(0.002) and cfg.param_scheduler[2].eta_min == 0.5
    with pytest.raises(UserError, match=r'--lr 0\.1: the config has no optim_wrapper\.optimizer'):
        set_learning_rate(config(optim_wrapper=dict(constructor='Mine')), 0.1)


# ---------------------------------------------------------------------------------------------------------------- runs

SCHEDULE = """
train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = [dict(type='MultiStepLR', milestones=[2], end=4)]
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.002))
"""


@pytest.fixture(scope='module')
def tiny_config(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp('schedule'), SCHEDULE)


def options_of(tiny_config, work_dir, *options):
    args = [str(tiny_config), '--work-dir', str(work_dir), *map(str, options)]
    return train.train_config(train.parse_args(args))


def test_options_of_the_config_have_the_last_word(tiny_config, tmp_path):
    cfg = options_of(tiny_config, tmp_path, '--epochs', 8, '--lr', 0.1, '--cfg-options',
                     'param_scheduler.0.milestones=[5,6]', 'train_cfg.val_interval=3')  # fmt: skip
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[0].end == 8
    assert cfg.param_scheduler[0].milestones == [5, 6] and cfg.train_cfg.val_interval == 3
    assert cfg.optim_wrapper.optimizer.lr == 0.1


@pytest.mark.parametrize(
    'options, said',
    [
        (['--epochs', 0], r'--epochs 0: must be 1 or more'),
        (['--lr', 0], r'--lr 0\.0: must be positive'),
        (['--lr', 'nan'], r'--lr nan: must be positive'),
        (['--epochs', 2, '--cfg-options', 'train_cfg.max_epochs=3'], r'--epochs 2: .*train_cfg\.max_epochs says some'),
        (['--lr', 1, '--cfg-options', 'optim_wrapper.optimizer.lr=3'], r'--lr 1\.0: --cfg-options optim_wrapper\.opt'),
    ],
)  # fmt: skip
def test_numbers_that_are_none_or_given_twice_are_one_message(tiny_config, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        options_of(tiny_config, tmp_path, *options)


@pytest.mark.parametrize('end', ['', ', end=3'])
def test_a_scheduler_that_ends_before_it_begins_is_one_message(tmp_path, end):
    more = f"param_scheduler = [dict(type='CosineAnnealingLR', T_max=4, begin=6{end})]"
    with pytest.raises(UserError, match=r'param_scheduler\.0: CosineAnnealingLR begins at 6 and ends at [13] \(epochs'):
        options_of(tiny.write_config(tmp_path, more), tmp_path)


def run(capsys, *args):
    try:
        train.main([*map(str, args)])
        status = 0
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    return status, out.out + out.err


def test_a_resumed_run_has_the_schedule_that_it_began_with_or_says_so(tiny_config, tmp_path, capsys):
    begun = [tiny_config, '--work-dir', tmp_path / 'run']
    status, said = run(capsys, *begun, '--epochs', 2)
    assert status == 0 and '--epochs 2: the schedule of 4 epochs' in said and 'WARNING - Multi' not in said
    assert (tmp_path / 'run' / 'epoch_2.pth').is_file()
    (tmp_path / 'run' / 'epoch_2.pth').unlink()
    (tmp_path / 'run' / 'last_checkpoint').unlink()
    again = [*begun, '--resume', tmp_path / 'run' / 'epoch_1.pth']
    status, said = run(capsys, *again, '--epochs', 6)
    assert status == 2 and said.count('error: --resume with --epochs 6: a resumed run goes on with the') == 1
    assert 'Traceback' not in said
    status, said = run(capsys, *again, '--epochs', 2, '--lr', 0.5)
    assert status == 2 and 'a learning rate of 0.002 there and 0.5 here' in said
    status, said = run(capsys, *again, '--epochs', 2)
    assert status == 0 and (tmp_path / 'run' / 'epoch_2.pth').is_file() and 'another one' not in said
    status, said = run(capsys, *again, '--cfg-options', 'train_cfg.max_epochs=3')
    assert status == 0 and 'goes on with the schedule of its checkpoint' in said
    assert 'the schedule of the learning rate ends at' in said


def test_a_seed_is_said_once():
    """``--seed`` won over ``--cfg-options`` without a word, and took ``randomness.deterministic`` with it."""

    def randomness(*arguments):
        args = train.parse_args(['config.py', *arguments])
        cfg = Config(dict(randomness=dict(seed=1, deterministic=True)))
        train._use_seed(cfg, args)
        return cfg.randomness

    assert randomness('--seed', '2') == dict(seed=2, deterministic=True)
    assert randomness('--deterministic') == dict(seed=1, deterministic=True)
    assert randomness('--seed', '2', '--cfg-options', 'randomness.seed=2')['seed'] == 2
    with pytest.raises(UserError, match=r'--seed 2: --cfg-options randomness\.seed=3 says something else'):
        randomness('--seed', '2', '--cfg-options', 'randomness.seed=3')
