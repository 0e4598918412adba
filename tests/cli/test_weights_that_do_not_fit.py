"""Weights that do not fit are said and not used; what fits in every way that counts needs no option."""

import json
import os
import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from helpers import tiny
from helpers.choice import in_turn
from mmdet_norms import apply_norm, fuse
from mmdet_norms.cli import export, test, train, weights
from mmdet_norms.deploy import save_fused
from mmdet_norms.errors import UserError

CLASSES = dict(dataset_meta=dict(classes=tiny.CLASSES))


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp('fit'))


@pytest.fixture(scope='module')
def models(config):
    """A function that gives the state dict of the tiny detector with a norm."""
    known = {}

    def state_of(norm=None, **backbone):
        key = norm, *backbone.items()
        if key not in known:
            torch.manual_seed(0)
            known[key] = weights.built(model_cfg(config, norm, **backbone), device='cpu').state_dict()
        return dict(known[key])

    return state_of


def model_cfg(config, norm=None, **backbone):
    cfg = Config.fromfile(config).model
    classes = backbone.pop('classes', len(tiny.CLASSES))
    cfg.roi_head.bbox_head.num_classes = cfg.roi_head.mask_head.num_classes = classes
    cfg.backbone.update(backbone)
    return cfg if norm is None else apply_norm(cfg, norm)


def save(path, state, **more):
    meta = {**dict(epoch=1, iter=2), **CLASSES, **more.pop('meta', {})}
    rest = dict(optimizer=dict(state={}, param_groups=[]), message_hub=dict(log_scalars={}, runtime_info={}))
    torch.save(dict(meta=meta, state_dict=state, **rest, **more), path)
    return str(path)


def ask(tool, config, checkpoint, *options):
    """What a tool makes of a checkpoint before it builds anything; the config that it goes on with."""
    if tool == 'test':
        args = test.parse_args([str(config), checkpoint, *options])
        cfg = test.test_config(args)
        weights.check_test(cfg, args)
        return cfg
    given = {'resume': ['--resume', checkpoint], 'load_from': [], 'init_cfg': []}[tool]
    args = train.parse_args([str(config), *given, *options])
    cfg = train.train_config(args)
    if tool == 'load_from':
        cfg.load_from = checkpoint
    if tool == 'init_cfg':
        cfg.model.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    weights.check_training(cfg, args)
    return cfg


@pytest.fixture
def without_advice(monkeypatch):
    """Which norm would fit is tried out, which takes a second."""
    monkeypatch.setattr(weights, 'PLACEMENTS', ())


TOOLS = ['test', 'load_from', 'resume', 'init_cfg']


def refused(*arguments):
    with pytest.raises(UserError) as error:
        ask(*arguments)
    return str(error.value)


MISFITS = {
    'norm bnet in bn': (dict(norm='bnet3'), [], '--norm bnet3'),
    'norm bnet of another kernel': (dict(norm='bnet5'), ['--norm', 'bnet3'], 'with --norm bnet5\n'),
    'norm bn in sn': ({}, ['--norm', 'sn'], 'It would fit without --norm sn or with --norm bn'),
    'norm sn in bn': (dict(norm='sn'), [], '--norm sn'),
    'norm mabn in bn': (dict(norm='mabn'), [], '--norm mabn'),
    'norm an in bn': (dict(norm='an'), [], '--norm an'),
    'depth 34 in 18': (dict(depth=34), [], 'layer1.2.'),
    'depth 18 in 34': ({}, ['--cfg-options', 'model.backbone.depth=34'], 'layer*.*.conv*'),
    'width': (dict(base_channels=8), ['--cfg-options', 'model.neck.out_channels=8'], 'another shape'),
    'classes': (dict(classes=5), [], 'fc_cls.weight: (6, 32) in the'),
    'architecture': ({}, ['--cfg-options', 'model.backbone.type=ResNetV1d'], 'backbone.stem'),
    'a part that is missing': (dict(without='neck.'), [], '16 weights of the model are not in the checkpoint'),
    'a norm that is missing': (dict(without='backbone.bn1.running_var'), [], 'backbone.bn1.running_var'),
    'another model': (dict(only='backbone.', prefix='encoder.'), [], 'not in the checkpoint'),
}


def misfit(models, tmp_path, name):
    source, options, said = MISFITS[name]
    source = dict(source)
    without, only, prefix = (source.pop(key, None) for key in ('without', 'only', 'prefix'))
    state = models(**source)
    if without:
        state = {key: value for key, value in state.items() if not key.startswith(without)}
    if only:
        state = {prefix + key: value for key, value in state.items() if key.startswith(only)}
    return save(tmp_path / 'a.pth', state), options, said


@pytest.mark.parametrize('name', MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_with_what_differs(models, config, tmp_path, name):
    checkpoint, options, said = misfit(models, tmp_path, name)
    message = refused('test', config, checkpoint, *options)
    assert message.startswith(f'CKPT: {checkpoint} does not fit the model of {config}')
    assert said in message and '--allow-partial' in message


@pytest.mark.parametrize('name, tool', in_turn(MISFITS, TOOLS[1:]))
def test_training_from_it_is_refused_as_well(models, config, tmp_path, name, tool, without_advice):
    checkpoint, options, _ = misfit(models, tmp_path, name)
    message = refused(tool, config, checkpoint, *options)
    assert 'a.pth does not fit' in message and '--allow-partial' in message


def each_number(change):
    return lambda state: {key: change(value) if value.is_floating_point() else value for key, value in state.items()}


def one(key, change):
    return lambda state: {**state, key: change(state[key])}


SPOILT = {
    'whole numbers': (each_number(lambda v: (v * 10).to(torch.int8)), 'backbone.conv1.weight: int8'),
    'truth values': (each_number(lambda v: v.bool()), 'backbone.conv1.weight: bool'),
    'complex numbers': (each_number(lambda v: v.to(torch.complex64)), 'backbone.conv1.weight: complex64'),
    'quantized': (
        one('backbone.conv1.weight', lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)),
        'backbone.conv1.weight: qint8',
    ),
    'sparse': (one('backbone.conv1.weight', torch.Tensor.to_sparse), 'backbone.conv1.weight: sparse_coo'),
    'nan': (each_number(lambda v: v * float('nan')), 'backbone.conv1.weight: NaN or infinite'),
    'nan of eight bits': (
        one('backbone.conv1.weight', lambda v: (v * float('nan')).to(torch.float8_e5m2)),
        'backbone.conv1.weight: NaN or infinite',
    ),
    'infinite statistics': (one('backbone.bn1.running_var', lambda v: v / 0), 'backbone.bn1.running_var: NaN or inf'),
}


@pytest.mark.parametrize('name, tool', in_turn(SPOILT, TOOLS))
def test_weights_that_are_no_numbers_are_refused(models, config, tmp_path, name, tool, without_advice):
    change, said = SPOILT[name]
    assert said in refused(tool, config, save(tmp_path / 'a.pth', change(models())))


@pytest.mark.parametrize('prefix', ['teacher.', 'model.', '_orig_mod.', 'module.module.'])
def test_weights_under_another_prefix_are_pointed_out(models, config, tmp_path, prefix, without_advice):
    state = {prefix + key: value for key, value in models().items()}
    message = refused('test', config, save(tmp_path / 'a.pth', {**state, 'student.x': torch.zeros(1)}))
    assert f'Those that start with {prefix.split(".")[0]}. fit' in message


@pytest.mark.parametrize('name', ['norm bnet of another kernel', 'depth 34 in 18', 'a norm that is missing', 'classes'])
def test_export_says_the_same_and_writes_nothing(models, config, tmp_path, name, capsys):
    checkpoint, options, said = misfit(models, tmp_path, name)
    with pytest.raises(SystemExit) as stopped:
        export.main([str(config), checkpoint, str(tmp_path / 'out.pth'), *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith('error: CKPT: ') and said in error
    assert '--allow-partial' not in error and not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('tool', ['test', 'load_from', 'init_cfg'])
@pytest.mark.parametrize('name', ['norm bnet in bn', 'depth 34 in 18', 'classes', 'a part that is missing'])
def test_who_means_it_goes_on_and_the_result_says_so(models, config, tmp_path, name, tool, capsys):
    checkpoint, options, _ = misfit(models, tmp_path, name)
    cfg = ask(tool, config, checkpoint, '--allow-partial', *options)
    if tool != 'init_cfg':
        assert f'--allow-partial: {checkpoint} does not fit' in capsys.readouterr().out
        [hook] = [hook for hook in cfg.custom_hooks if hook.type == 'StartHook']
        assert hook.partial.checkpoint == checkpoint
        assert hook.partial.missing + hook.partial.other_shape + hook.partial.left_over > 0


def test_going_on_needs_all_of_it_and_a_model_of_which_nothing_fits_is_never_taken(
    models, config, tmp_path, without_advice
):
    checkpoint, options, _ = misfit(models, tmp_path, 'classes')
    assert 'write instead of --resume: --cfg-options load_from=' in refused(
        'resume', config, checkpoint, '--allow-partial', *options
    )
    checkpoint = save(tmp_path / 'other.pth', {'x.weight': torch.zeros(3)})
    for tool in ('test', 'load_from', 'resume'):
        assert 'does not fit' in refused(tool, config, checkpoint, '--allow-partial')


# --- what fits ------------------------------------------------------------------------------------------------------


FITS = {
    'as it is': lambda state: state,
    'parallel': lambda state: {f'module.{key}': value for key, value in state.items()},
    'without counters': lambda state: {key: v for key, v in state.items() if 'num_batches_tracked' not in key},
    'half precision': lambda state: {key: v.half() if v.is_floating_point() else v for key, v in state.items()},
    'with a counter more': lambda state: {**state, 'backbone.bn1.iter_count': torch.tensor(3)},
}


@pytest.mark.parametrize('name, tool', in_turn(FITS, TOOLS, each=2))
def test_what_fits_needs_no_option(models, config, tmp_path, name, tool):
    ask(tool, config, save(tmp_path / 'a.pth', FITS[name](models())))


@pytest.mark.parametrize('tool', ['test', 'load_from'])
@pytest.mark.parametrize('wrap', [lambda state: state, lambda state: dict(model=state)], ids=['bare', 'model'])
def test_weights_alone_are_a_start_and_no_state(models, config, tmp_path, tool, wrap, without_advice):
    torch.save(wrap(models()), tmp_path / 'a.pth')
    ask(tool, config, str(tmp_path / 'a.pth'))
    assert 'is not a state of training' in refused('resume', config, str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('norm', ['bn', 'bnet3', 'an', 'frozen'])
def test_batch_norm_where_the_layers_say_it_is_the_same_function(models, config, tmp_path, norm):
    ask('test', config, save(tmp_path / 'a.pth', models()), '--norm', norm)


@pytest.mark.parametrize('norm', ['bn', 'bnet3', 'cbn', 'mabn', 'sn', 'an', 'brn', 'syncbn', 'frozen'])
def test_every_norm_takes_its_own(models, config, tmp_path, norm):
    for tool in ('test', 'resume'):
        ask(tool, config, save(tmp_path / 'a.pth', models(norm)), '--norm', norm)


def test_a_part_that_the_model_does_not_have_is_left_out_with_a_word(models, config, tmp_path, capsys, without_advice):
    checkpoint = save(tmp_path / 'a.pth', models())
    options = [
        '--eval',
        'bbox',
        '--cfg-options',
        'model.roi_head.mask_head=None',
        'model.roi_head.mask_roi_extractor=None',
    ]
    ask('test', config, checkpoint, *options)
    assert 'weights are not used, e.g. roi_head.mask_head.' in capsys.readouterr().out
    args = [config, checkpoint, *options[2:], 'val_evaluator.metric=bbox']
    assert 'have no place in the model' in refused('resume', *args)


def test_a_fused_checkpoint_fits_its_own_norm_only(models, config, tmp_path):
    for norm, other in (('bnet3', 'bn'), ('bn', 'bnet3')):
        model = weights.built(model_cfg(config, norm), device='cpu')
        save_fused(
            fuse(model), tmp_path / 'fused.pth', dict(cfg='model = dict(norm_cfg=dict(type="BNET", kernel_size=3))')
        )
        ask('test', config, str(tmp_path / 'fused.pth'), '--norm', norm)
        message = refused('test', config, str(tmp_path / 'fused.pth'), '--norm', other)
        assert 'trained with has the norms BNET(kernel_size=3)' in message
        assert 'the config, and the --norm if any, that it was exported with' in message


def test_the_averages_of_a_run_with_ema_are_what_is_tested(models, config, tmp_path):
    state = models()
    average = {'steps': torch.tensor(3), **{f'module.{key}': value for key, value in state.items()}}
    ask('test', config, save(tmp_path / 'a.pth', state, ema_state_dict=average))


# --- pretrained weights of a backbone --------------------------------------------------------------------------------


def pretrained(config, state, tmp_path, *options, prefix=None, **backbone):
    torch.save(state, tmp_path / 'r18.pth')
    args = train.parse_args([str(config), *options])
    cfg = train.train_config(args)
    cfg.model.backbone.update(backbone)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'r18.pth'))
    if prefix:
        cfg.model.backbone.init_cfg.prefix = prefix
    weights.check_training(cfg, args)


def backbone_of(state):
    return {key[9:]: value for key, value in state.items() if key.startswith('backbone.')}


DCN = dict(dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False), stage_with_dcn=(False, True, True, True))


@pytest.mark.parametrize('norm', [None, 'bnet3', 'cbn', 'sn', 'an', 'brn', 'syncbn', 'frozen'])
def test_a_classifier_is_a_start_for_its_backbone(models, config, tmp_path, norm):
    classifier = {**backbone_of(models()), 'fc.weight': torch.zeros(9, 64), 'fc.bias': torch.zeros(9)}
    pretrained(config, classifier, tmp_path, *(['--norm', norm] if norm else []))


def test_a_part_of_a_detector_is_a_start_by_its_prefix(models, config, tmp_path):
    pretrained(config, models(), tmp_path, prefix='backbone')
    with pytest.raises(UserError, match=r"that start with backbone\. fit: write prefix='backbone'"):
        pretrained(config, models(), tmp_path)
    with pytest.raises(UserError, match=r"no weight of .* starts with prefix='body\.'; they start with backbone, neck"):
        pretrained(config, models(), tmp_path, prefix='body.')


def test_what_a_config_adds_to_the_pretrained_network_starts_anew(models, config, tmp_path):
    plugins = [
        dict(cfg=dict(type='ContextBlock', ratio=1 / 4), stages=(False, True, True, True), position='after_conv3')
    ]
    state = backbone_of(models(depth=50))
    pretrained(config, state, tmp_path, depth=50, plugins=plugins)
    pretrained(config, {k: v for k, v in state.items() if not k.startswith('layer4')}, tmp_path, depth=50, num_stages=3)


@pytest.mark.parametrize(
    'source, options',
    [
        (dict(depth=34), []),
        (dict(depth=50), []),
        ({}, ['--cfg-options', 'model.backbone.depth=34']),
        (
            {},
            [
                '--cfg-options',
                'model.backbone.norm_cfg.type=GN',
                'model.backbone.norm_cfg.num_groups=4',
            ],
        ),
        (dict(norm='bnet3'), []),
        (dict(norm='bnet3'), ['--norm', 'bnet5']),
        (dict(norm='sn'), []),
        ({}, ['--norm', 'mabn']),
        (dict(base_channels=16), []),
        (dict(type='ResNetV1d'), []),
    ],
    ids=['34', '50', '18 in 34', 'gn', 'bnet in bn', 'kernel', 'sn in bn', 'bn behind CenConv', 'width', 'stem'],
)
def test_pretrained_weights_of_another_network_are_refused(models, config, tmp_path, source, options):
    state = backbone_of(models(**source))
    with pytest.raises(UserError, match=r'model\.backbone\.init_cfg: .*r18\.pth does not fit') as error:
        pretrained(config, state, tmp_path, *options)
    assert 'init_cfg.checkpoint=FILE' in str(error.value)
    if 'base_channels' not in source:  # of which nothing fits
        pretrained(config, state, tmp_path, '--allow-partial', *options)


def test_pretrained_weights_that_a_checkpoint_replaces_must_be_readable_only(models, config, tmp_path, without_advice):
    torch.save(backbone_of(models(depth=34)), tmp_path / 'r34.pth')
    options = ['model.backbone.init_cfg.type=Pretrained', f'model.backbone.init_cfg.checkpoint={tmp_path / "r34.pth"}']
    checkpoint = save(tmp_path / 'a.pth', models())
    ask('load_from', config, checkpoint, '--cfg-options', *options)
    (tmp_path / 'r34.pth').write_bytes(b'<html>')
    assert 'a web page' in refused('load_from', config, checkpoint, '--cfg-options', *options)


# --- the message and the run ----------------------------------------------------------------------------------------


def test_the_config_in_a_checkpoint_is_looked_at_and_not_run(models, config, tmp_path, without_advice):
    mark = tmp_path / 'ran'
    text = f'open({str(mark)!r}, "w")\nmodel = dict(backbone=dict(norm_cfg=dict(type="BNET", kernel_size=3)))'
    for entry in ('cfg', 'config'):
        checkpoint = save(tmp_path / 'a.pth', models('bnet3'), meta={entry: text})
        message = refused('test', config, checkpoint)
        assert 'The config that it was trained with has the norms BNET(kernel_size=3)' in message
    for text in ('model = (', 'x' * 10, '(' * 5000):
        refused('test', config, save(tmp_path / 'a.pth', models('bnet3'), meta=dict(cfg=text)))
    assert not mark.exists()


def test_other_classes_are_named(models, config, tmp_path, without_advice):
    checkpoint = save(
        tmp_path / 'a.pth', models(classes=3), meta=dict(dataset_meta=dict(classes=('cat', 'dog', 'cow')))
    )
    message = refused('test', config, checkpoint)
    assert 'trained for 3 classes (cat, dog, cow), the config is for 2 (disc, box)' in message
    shutil.copy(config, tmp_path / 'own.py')
    message = refused('test', config, checkpoint)
    assert f'The config in its folder, probably the one that it was trained with: {tmp_path / "own.py"}' in message


def test_classes_of_a_concatenation_and_in_capitals_are_compared(models, config, tmp_path):
    checkpoint = save(tmp_path / 'a.pth', models(), meta=dict(dataset_meta=dict(CLASSES=tiny.CLASSES[::-1])))
    several = tmp_path / 'several.py'
    several.write_text(
        f'_base_ = {str(config)!r}\n'
        "test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[{{_base_.dataset}}]))\n"
        'val_dataloader = test_dataloader\ntrain_dataloader = test_dataloader\n'
    )
    for path in (config, several):
        assert 'lists the classes in another order' in refused('test', path, checkpoint)


@pytest.mark.parametrize('tool', ['test', 'load_from', 'resume'])
def test_classes_in_another_order_are_refused_with_both_orders(models, config, tmp_path, tool, capsys):
    checkpoint = save(tmp_path / 'a.pth', models(), meta=dict(dataset_meta=dict(classes=('box', 'disc'))))
    assert 'in another order: (disc, box), not (box, disc)' in refused(tool, config, checkpoint)
    partly = save(tmp_path / 'b.pth', models(), meta=dict(dataset_meta=dict(classes=('box', 'star'))))
    assert 'that box would get another name' in refused(tool, config, partly)
    ask(tool, config, checkpoint, '--allow-partial')
    ask(tool, config, save(tmp_path / 'a.pth', models(), meta=dict(dataset_meta=dict(classes=('cat', 'dog')))))
    assert 'was trained with other names of classes' in capsys.readouterr().out


def test_only_the_first_process_of_a_machine_looks(models, config, tmp_path, monkeypatch):
    checkpoint, options, _ = misfit(models, tmp_path, 'classes')
    monkeypatch.setenv('LOCAL_RANK', '1')
    cfg = ask('test', config, checkpoint, *options)
    assert [hook.type for hook in cfg.custom_hooks].count('StartHook') == 1


def test_the_command_stops_with_one_message_and_makes_no_work_dir(models, config, tmp_path, capsys, without_advice):
    checkpoint, options, _ = misfit(models, tmp_path, 'classes')
    for main, given in ((test.main, [checkpoint]), (train.main, ['--resume', checkpoint])):
        with pytest.raises(SystemExit) as stopped:
            main([str(config), *given, '--work-dir', str(tmp_path / 'run'), *options])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f'error: {"CKPT" if main is test.main else "--resume"}: ')
    assert not (tmp_path / 'run').exists()


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_partial_test_runs_and_results_json_says_what_was_missing(models, config, tmp_path):
    state = {key: value for key, value in models().items() if 'fc_cls' not in key}
    torch.save(state, tmp_path / 'bare.pth')
    hooks = "custom_hooks=[dict(type='EMAHook')]"
    (tmp_path / 'ema.py').write_text(f'_base_ = {str(config)!r}\n{hooks}\n')
    arguments = [str(tmp_path / 'ema.py'), str(tmp_path / 'bare.pth'), '--work-dir', str(tmp_path / 'run')]
    test.main([*arguments, '--allow-partial', '--eval', 'bbox'])
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    partial = results['partial_checkpoint']
    assert partial['checkpoint'] == str(tmp_path / 'bare.pth') and partial['missing'] == 2
    assert sorted(partial['examples']) == ['roi_head.bbox_head.fc_cls.bias', 'roi_head.bbox_head.fc_cls.weight']


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_resuming_does_not_run_the_config_in_a_checkpoint(models, config, tmp_path):
    """mmengine runs ``meta.config`` to compare numbers of GPUs."""
    args = train.parse_args([str(config), '--work-dir', str(tmp_path / 'run')])
    cfg = train.train_config(args)
    cfg.update(launcher='none', experiment_name=tmp_path.name, train_cfg=dict(by_epoch=True, max_epochs=1))
    weights.check_training(cfg, args)
    MMLogger._instance_dict.clear()
    runner = Runner.from_cfg(cfg)
    checkpoint = dict(meta=dict(config=f'import os; os.mkdir({str(tmp_path / "ran")!r})'), state_dict=models())
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    assert 'config' not in checkpoint['meta'] and not os.path.exists(tmp_path / 'ran')


def test_keys_that_the_detector_itself_renames_are_left_over(models, config, tmp_path, without_advice):
    # a head of a one-stage detector, which mmdet's two-stage ones take for their rpn_head
    state = {key.removeprefix('roi_head.'): v for key, v in models('sn').items() if key.startswith('roi_head.')}
    assert 'does not fit' in refused('test', config, save(tmp_path / 'a.pth', state))


@pytest.mark.parametrize('tool, whole', [('test', True), ('resume', True), ('load_from', True), ('test', False)])
def test_images_that_were_trained_on_with_another_fraction_are_said(models, tmp_path, tool, whole, capfd):
    config = str(tiny.write_config(tmp_path))
    root = tiny.write_dataset(tmp_path / 'ten images', num_images=10)
    for file in root.rglob('*.json') if not whole else ():  # so that the run reads copies of the two parts
        content = json.loads(file.read_text())
        for annotation in content['annotations']:
            del annotation['area']
        file.write_text(json.dumps(content))

    def arguments(fraction, work):
        return [f'--data-root={root}', f'--val-fraction={fraction}', f'--work-dir={tmp_path / work}']

    def check(fraction, work):
        if tool == 'test':
            args = test.parse_args([config, checkpoint, *arguments(fraction, work)])
            weights.check_test(test.test_config(args), args)
        else:
            how = ['--resume', checkpoint] if tool == 'resume' else ['--cfg-options', f'load_from={checkpoint}']
            args = train.parse_args([config, *arguments(fraction, work), *how])
            weights.check_training(train.train_config(args), args)
        return capfd.readouterr().err

    cfg = train.train_config(train.parse_args([config, *arguments(0.2, 'first')]))
    checkpoint = save(tmp_path / 'trained.pth', models(), meta=dict(cfg=cfg.pretty_text))
    assert 'another division' not in check(0.2, 'first') + check(0.2, 'second') + check(0.1, 'third')
    assert '2 of 4 images are trained on as well' in check(0.4, 'fourth')
