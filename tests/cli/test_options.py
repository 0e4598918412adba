"""--cfg-options: what nothing would read is an error with the nearest key; what something reads is taken."""

import argparse
from pathlib import Path

import pytest
from mmengine.config import Config
from torch import nn

from helpers import tiny
from helpers.python_style import with_classes
from mmdet_norms.cli import benchmark, export, picture_sheet, test, train
from mmdet_norms.cli.common import load_config, read_config
from mmdet_norms.cli.options import add_option_arguments, merge_options
from mmdet_norms.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r50_fpn_bnet5_shapes.py'
CASCADE = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'


@pytest.fixture(scope='module')
def tiny_config(tmp_path_factory):
    return Config.fromfile(tiny.write_config(tmp_path_factory.mktemp('options')))


@pytest.fixture(scope='module')
def cascade():
    return read_config(CASCADE)


def parsed(*options):
    parser = argparse.ArgumentParser()
    add_option_arguments(parser)
    return parser.parse_args([str(option) for option in options])


def merged(cfg, *options):
    cfg = cfg._cfg_dict.copy() if not isinstance(cfg, Config) else Config(cfg.to_dict(), filename=cfg.filename)
    merge_options(cfg, parsed('--cfg-options', *options))
    return cfg


def refused(cfg, *options):
    before = cfg.to_dict()
    with pytest.raises(UserError) as error:
        merged(cfg, *options)
    assert cfg.to_dict() == before and '\n' not in str(error.value)
    return str(error.value)


# Not in the config, and read: by mmengine's runner, by builders, or as an argument of the class that the entry names.
TAKEN = [
    'model.backbone.with_cp=True',
    'model.backbone.zero_init_residual=False',
    'model.backbone.init_cfg=None',
    'model.backbone.dcn.deform_groups=1',
    'model.backbone.norm_cfg.momentum=0.01',
    'model.backbone.norm_cfg.requires_grad=False',
    'model.backbone.plugins=None',
    'model.neck.norm_cfg.type=GN',
    'model.neck.relu_before_extra_convs=True',
    'model.rpn_head.num_convs=2',
    'model.roi_head.bbox_head.reg_class_agnostic=True',
    'model.roi_head.bbox_head.norm_cfg=None',
    'model.data_preprocessor.batch_augments=None',
    'model.roi_head.mask_head.loss_mask.loss_weight=2.0',
    'model.rpn_head.loss_cls.class_weight=None',
    'optim_wrapper.clip_grad.max_norm=35',
    'optim_wrapper.accumulative_counts=4',
    'optim_wrapper.paramwise_cfg.norm_decay_mult=0',
    'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult=0.1',
    'optim_wrapper.optimizer.weight_decay=0.1',
    'optim_wrapper.optimizer.betas="(0.9, 0.99)"',
    'optim_wrapper.constructor=DefaultOptimWrapperConstructor',
    'optim_wrapper.type=AmpOptimWrapper',
    'train_cfg.val_begin=5',
    'train_cfg.dynamic_intervals="[(1,2)]"',
    'val_cfg.fp16=True',
    'train_dataloader.drop_last=True',
    'train_dataloader.prefetch_factor=2',
    'train_dataloader.num_batch_per_epoch=2',
    'train_dataloader.dataset.indices=2',
    'train_dataloader.dataset.filter_cfg.min_size=32',
    'train_dataloader.dataset.metainfo.palette=None',
    'train_dataloader.dataset.lazy_init=False',
    'train_dataloader.dataset.pipeline.1.poly2mask=False',
    'train_dataloader.sampler.seed=3',
    'val_evaluator.classwise=True',
    'test_evaluator.proposal_nums="[1,2,3]"',
    'test_evaluator.outfile_prefix=out',
    'default_hooks.checkpoint.max_keep_ckpts=1',
    'default_hooks.checkpoint.save_best=auto',
    'default_hooks.logger.interval=1',
    'default_hooks.visualization.draw=True',
    'default_hooks.checkpoint.priority=LOW',
    'auto_scale_lr.base_batch_size=16',
    'auto_scale_lr.enable=True',
    'randomness.seed=3',
    'randomness.diff_rank_seed=True',
    'env_cfg.cudnn_benchmark=True',
    'env_cfg.mp_cfg.mp_start_method=spawn',
    'env_cfg.mp_cfg.opencv_num_threads=2',
    'env_cfg.dist_cfg.backend=gloo',
    'env_cfg.dist_cfg.timeout=60',
    'visualizer.vis_backends="[]"',
    'visualizer.name=other',
    'log_processor.window_size=5',
    'log_level=ERROR',
    'load_from=weights.pth',
    'resume=True',
    'work_dir=elsewhere',
    'experiment_name=mine',
    'find_unused_parameters=True',
    'compile=True',
    'compile.mode=default',
    'sync_bn=torch',
    'efficient_conv_bn_eval="[backbone]"',
    'model_wrapper_cfg.static_graph=True',
    'custom_imports.imports=os',
    'param_scheduler="[]"',
    'custom_hooks="[]"',
    'model.train_cfg.rcnn.sampler.pos_fraction=0.5',
    'model.test_cfg.rcnn.nms.iou_threshold=0.4',
    'model.test_cfg.rcnn.score_thr=0.1',
]


@pytest.mark.parametrize('option', TAKEN)
def test_what_something_reads_is_taken(tiny_config, option):
    key, _, text = option.partition('=')
    cfg = merged(tiny_config, *([option, 'model.neck.norm_cfg.num_groups=4'] if 'type=GN' in option else [option]))
    for part in key.split('.'):
        cfg = cfg[int(part)] if isinstance(cfg, list) else cfg[part]
    assert str(cfg) == text.strip('"') or isinstance(cfg, (list, tuple)) or float(cfg) == float(text)


UNKNOWN = {
    'lr=0.1': 'optim_wrapper.optimizer.lr',
    'batch_size=8': 'train_dataloader.batch_size',
    'epochs=3': None,
    'max_epoch=3': 'train_cfg.max_epochs',
    'train_dataloder.batch_size=2': 'train_dataloader.batch_size',
    'train_dataloader.batchsize=2': 'train_dataloader.batch_size',
    'train_dataloader.dataset.anno_file=a.json': 'train_dataloader.dataset.ann_file',
    'train_dataloader.dataset.pipeline.1.with_boxes=True': 'train_dataloader.dataset.pipeline.1.with_bbox',
    'train_cfg.max_epoch=3': 'train_cfg.max_epochs',
    'train_cfg.max_iters=3': None,
    'optim_wrapper.lr=0.1': 'optim_wrapper.optimizer.lr',
    'optim_wrapper.optimizer.learning_rate=0.1': None,
    'optim_wrapper.optimiser.lr=0.1': 'optim_wrapper.optimizer.lr',
    'optim_wrapper.clip_grad.maxnorm=1': 'optim_wrapper.clip_grad.max_norm',
    'optim_wrapper.paramwise_cfg.norm_decay=0': None,
    'optimizer.lr=0.1': 'optim_wrapper.optimizer.lr',
    'model.backbone.freeze_stages=1': 'model.backbone.frozen_stages',
    'model.backbone.norm_eva=True': 'model.backbone.norm_eval',
    'model.backbone.norm_cfg.eps_=1e-3': 'model.backbone.norm_cfg.eps',
    'model.backbon.depth=50': 'model.backbone.depth',
    'model.bbox_head.num_classes=3': 'model.roi_head.bbox_head.num_classes',
    'model.num_classes=3': 'model.roi_head.bbox_head.num_classes',
    'model.roi_head.bbox_head.num_class=3': 'model.roi_head.bbox_head.num_classes',
    'model.test_cfg.rcnn.score_threshold=0.5': 'model.test_cfg.rcnn.score_thr',
    'default_hooks.checkpoint.max_keep_ckpt=1': 'default_hooks.checkpoint.max_keep_ckpts',
    'default_hooks.chekpoint.interval=1': 'default_hooks.checkpoint.interval',
    'default_hook.checkpoint.interval=1': 'default_hooks.checkpoint.interval',
    'val_evaluator.metrics=bbox': 'val_evaluator.metric',
    'test_evaluator.ann_files=a.json': 'test_evaluator.ann_file',
    'randomness.sed=1': 'randomness.seed',
    'seed=1': None,
    'auto_scale_lr.base_batchsize=16': 'auto_scale_lr.base_batch_size',
    'env_cfg.mp_cfg.start_method=fork': None,
    'loadfrom=x.pth': 'load_from',
    'model.backbone.with_cpt=True': 'model.backbone.with_cp',
}


@pytest.mark.parametrize('option, nearest', UNKNOWN.items())
def test_what_nothing_reads_is_an_error_with_the_nearest_key(tiny_config, option, nearest):
    message = refused(tiny_config, option)
    key = option.partition('=')[0]
    assert message.startswith(f'--cfg-options {key}: ') and f'--cfg-options-new {key}=' in message
    if nearest is not None:
        assert f'{nearest} or' in message or f'or {nearest}?' in message or f'did you mean {nearest}?' in message, (
            message
        )


@pytest.mark.parametrize('option', UNKNOWN)
def test_so_it_is_in_python_style_configs(tiny_config, option):
    refused(with_classes(Config(tiny_config.to_dict())), option)


def test_what_python_style_configs_take_is_the_same(tiny_config):
    for option in TAKEN:
        if 'type=' not in option:
            merge_options(with_classes(Config(tiny_config.to_dict())), parsed('--cfg-options', option))


def test_the_images_of_a_group_are_a_key_of_batch_norm_by_name_alone(tiny_config):
    option = 'model.backbone.norm_cfg.norm_batch=2'
    assert merged(tiny_config, option).model.backbone.norm_cfg.norm_batch == 2
    refused(tiny_config, option, 'model.backbone.norm_cfg.type=GN')
    by_class = Config(tiny_config.to_dict())
    by_class.model.backbone.norm_cfg.type = nn.BatchNorm2d
    refused(by_class, option)


def test_the_other_option_adds_any_key(tiny_config):
    cfg = Config(tiny_config.to_dict())
    merge_options(
        cfg, parsed('--cfg-options-new', 'mine=1', 'model.backbone.mine.deep=2', '--cfg-options', 'resume=True')
    )
    assert cfg.mine == 1 and cfg.model.backbone.mine.deep == 2 and cfg.resume is True


@pytest.mark.parametrize(
    'option, said',
    [
        ('train_pipeline.0.type=X', 'nothing reads it any more; its value is in train_dataloader.dataset.pipeline'),
        ('metainfo.classes=a', 'its value is in train_dataloader.dataset.metainfo'),
        ('backend_args=None', 'nothing reads it any more'),
        ('data_root=d', 'this key changes nothing; give --data-root DIR'),
        ('launcher=pytorch', 'this key changes nothing; give --launcher NAME'),
    ],
)
def test_a_variable_of_the_config_file_that_nothing_reads_later_is_an_error(tiny_config, option, said):
    assert said in refused(tiny_config, option)


@pytest.mark.parametrize(
    'option, said',
    [
        (
            'model.roi_head.bbox_head.num_classes=3',
            'model.roi_head.bbox_head is a list of 3 in the config; name each entry by its index: '
            'model.roi_head.bbox_head.0.num_classes=... model.roi_head.bbox_head.1.num_classes=... '
            'model.roi_head.bbox_head.2.num_classes=...',
        ),
        (
            'model.roi_head.bbox_head.3.num_classes=3',
            'is a list of 3 in the config, with the entries 0 to 2',
        ),
        ('model.roi_head.bbox_head.-1.num_classes=3', 'is a list of 3 in the config'),
        ('param_scheduler.end=5', 'param_scheduler is a list of 2 in the config'),
        ('train_dataloader.dataset.pipeline.Resize.scale=5', 'pipeline is a list of '),
        ('model.backbone.out_indices.0=1', 'model.backbone.out_indices is the tuple (0, 1, 2, 3); set it as a whole'),
        ('model.backbone.depth.x=1', 'model.backbone.depth is 50 in the config, which has no keys'),
        ('model.backbone=ResNet', 'model.backbone is a dict in the config; set its keys (model.backbone.type, '),
        ('model.backbone=[1,2]', 'model.backbone is a dict in the config'),
        ('model.neck.norm_cfg.num_groups=16', 'the config has no model.neck.norm_cfg, so that its type is missing'),
        ('model.neck.init_cfg.std=0.1', 'set model.neck.init_cfg.type as well'),
    ],
)
def test_what_cannot_be_set_so_is_one_message(cascade, option, said):
    assert said in refused(cascade, option)


@pytest.mark.parametrize(
    'option, kind',
    [
        ('model.backbone.norm_eval=fasle', 'True or False, as True is'),
        ('model.backbone.with_cp=Ture', 'True or False, as False is'),  # not in the config: the default of ResNet
        ('model.backbone.depth=5O', 'a number, as 50 is'),
        ('train_cfg.max_epochs=one', 'a number, as 12 is'),
        ('optim_wrapper.optimizer.lr=0.02.', 'a number, as 0.02 is'),
        ('model.roi_head.bbox_head.1.num_classes=six', 'a number, as 80 is'),
    ],
)
def test_a_word_in_place_of_a_number_or_a_truth_value_is_an_error(cascade, option, kind):
    message = refused(cascade, option)
    assert f'{option}: must be {kind}, which it replaces' in message and f'--cfg-options-new {option}' in message


def test_numbers_of_epochs_are_meant(cascade):
    cfg = Config(cascade.to_dict())
    cfg.model.neck.norm_cfg = dict(type='CBN', burnin=8)
    assert merged(cfg, 'model.neck.norm_cfg.burnin=2e').model.neck.norm_cfg.burnin == '2e'


def test_entries_of_lists_are_set_by_their_index(cascade):
    options = [f'model.roi_head.bbox_head.{i}.num_classes=3' for i in range(3)]
    cfg = merged(cascade, *options, 'param_scheduler.0.end=5', 'model.neck.in_channels.0=128')
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [3, 3, 3]
    assert cfg.param_scheduler[0].end == 5 and cfg.model.neck.in_channels == [128, 512, 1024, 2048]


def test_a_dict_in_braces_replaces_the_old_one(cascade):
    text = "{'type': 'GN', 'num_groups': 16}"
    cfg = merged(
        cascade, f'model.backbone.norm_cfg={text}', f'model.neck.norm_cfg={text}', 'model.backbone.init_cfg=None'
    )
    assert cfg.model.backbone.norm_cfg == cfg.model.neck.norm_cfg == dict(type='GN', num_groups=16)
    assert cfg.model.backbone.init_cfg is None and type(cfg.model.neck.norm_cfg).__name__ == 'ConfigDict'


def test_delete_empties_a_dict_first(cascade):
    cfg = merged(cascade, 'model.backbone.type=SSDVGG', 'model.backbone.depth=16', 'model.backbone._delete_=True')
    assert cfg.model.backbone == dict(type='SSDVGG', depth=16)


def test_another_type_brings_its_own_arguments(cascade):
    cfg = merged(cascade, 'optim_wrapper.optimizer.type=AdamW', 'optim_wrapper.optimizer.betas="(0.9, 0.99)"')
    assert cfg.optim_wrapper.optimizer.betas == (0.9, 0.99)
    message = refused(cascade, 'optim_wrapper.optimizer.type=AdamW', 'optim_wrapper.optimizer.nesterov=True')
    assert "AdamW takes no 'nesterov'" in message


def test_norms_by_name_come_before_their_refinement():
    args = ['--norm', 'bnet5', '--cfg-options', 'model.backbone.norm_at.last.kernel_size=7']
    cfg = load_config(train.parse_args(['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', *args]))
    assert cfg.model.backbone.norm_at.last.kernel_size == 7


@pytest.mark.parametrize('option', ['lr', 'a..b=1', '.a=1', '=1', 'x=[1,(2]', 'x=((1)', "x={'type': ", "x={'a'}"])
def test_a_slip_of_the_command_line_is_an_error_of_the_command_line(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed('--cfg-options', option)
    assert stopped.value.code == 2 and 'argument --cfg-options: ' in capsys.readouterr().err


@pytest.mark.parametrize(
    'main, arguments',
    [
        (train.main, [DEMO]),
        (test.main, [DEMO, __file__]),
        (export.main, [DEMO, __file__, 'out.pth']),
        (picture_sheet.main, [DEMO, 'results.json', '--out', 'sheet.png']),
        (benchmark.main, ['--level', 'detector', '--config', DEMO]),
    ],
)
def test_every_tool_that_takes_options_checks_them(main, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments), '--cfg-options', 'model.backbone.deth=18'])
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    assert 'error: --cfg-options model.backbone.deth: ' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['load_from=x.pth', 'resume=True'])
def test_a_test_is_given_its_checkpoint_by_name(option):
    with pytest.raises(UserError, match='changes nothing in a test; name the checkpoint as CKPT'):
        test.test_config(test.parse_args([str(DEMO), __file__, '--cfg-options', option]))


def test_a_work_dir_is_given_once(tmp_path):
    arguments = [str(DEMO), '--work-dir', str(tmp_path), '--cfg-options', 'work_dir=elsewhere']
    with pytest.raises(UserError, match='--work-dir is given as well'):
        load_config(train.parse_args(arguments))


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ("[dict(type='EMAHook', momentum=0.1)]", [dict(type='EMAHook', momentum=0.1)]),
        ("[{'type': 'EMAHook'}]", [dict(type='EMAHook')]),
        ("dict(type='GN', num_groups=4)", dict(type='GN', num_groups=4)),
        ("dict(type='EMAHook', at=(1, dict(a=[2])))", dict(type='EMAHook', at=(1, dict(a=[2])))),
        ('(traffic light, stop sign)', ('traffic light', 'stop sign')),
        ('traffic light', 'traffic light'),
        ('["a, b", "c"]', ['a, b', 'c']),
        ("('1', '2')", ('1', '2')),
        ('a  b,c', ['a  b', 'c']),
        ('[ (1, 2), [a, b] , c]', [(1, 2), ['a', 'b'], 'c']),
        ('"4"', 4),
        ('/data/my photos/train.json', '/data/my photos/train.json'),
        ('runs [old]/epoch (1).pth', 'runs [old]/epoch (1).pth'),
        ('"a [1]  (b) .pth"', 'a [1]  (b) .pth'),
        ('" 4 "', 4),
    ],
)
def test_values_are_read_as_they_are_written(text, value):
    assert parsed('--cfg-options', f'x={text}').cfg_options['x'] == value


def test_a_dict_that_is_no_python_is_an_error_of_the_command_line(capsys):
    for text in ("dict(type='GN'", '[dict(type=GN)]', 'dict(1)', "[{'a'}]", '[' * 200 + ']' * 199):
        with pytest.raises(SystemExit):
            parsed('--cfg-options', f'x={text}')


@pytest.mark.parametrize(
    ('option', 'near'),
    [
        ('train_dataloader.dataset.metainfo.clases=[a]', 'did you mean train_dataloader.dataset.metainfo.classes?'),
        ('train_dataloader.dataset.metainfo.CLASSES=[a]', 'did you mean train_dataloader.dataset.metainfo.classes?'),
        ('train_dataloader.dataset.data_prefix.image=a/', 'did you mean train_dataloader.dataset.data_prefix.img?'),
        ('seed=1', 'did you mean randomness.seed?'),
        ('lr_config.step=[1]', 'did you mean param_scheduler?'),
        ('data.samples_per_gpu=2', 'did you mean train_dataloader, val_dataloader or test_dataloader?'),
        ('model.roi_head.bbox_head.7.x=1', 'entries 0 to 2'),
    ],
)
def test_slips_of_own_keys_and_keys_of_before(cascade, option, near):
    assert near in refused(cascade, option)


def test_the_entry_of_an_empty_list(tiny_config):
    assert 'is an empty list' in refused(tiny_config, 'param_scheduler.0.end=3')
