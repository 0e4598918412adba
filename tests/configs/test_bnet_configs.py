"""configs/bnet and configs/baselines: what they say, and that they agree with ``--norm``; as rows: test_zoo.py."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from helpers.meta import on_meta
from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.layers import BNET

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
ROWS = ROOT.parent / 'shared' / 'reference' / 'published-rows.yml'

FAMILIES = {
    'faster-rcnn': 'faster_rcnn',
    'mask-rcnn': 'mask_rcnn',
    'retinanet': 'retinanet',
    'cascade-rcnn': 'cascade_rcnn',
    'cascade-mask-rcnn': 'cascade_rcnn',
}
NORMS = ('bn', 'bnet3', 'bnet5', 'bnet7')
GRID = [(family, depth, norm) for family in FAMILIES for depth in (50, 101) for norm in NORMS]
FILES = sorted((CONFIGS / 'bnet').glob('*.py')) + sorted((CONFIGS / 'baselines').glob('*.py'))


def path(family, depth, norm, schedule='1x'):
    folder = 'baselines' if norm == 'bn' else 'bnet'
    return CONFIGS / folder / f'{family}_r{depth}_fpn_{norm}_{schedule}_coco.py'


@cache
def load(family, depth, norm, schedule='1x'):
    return Config.fromfile(path(family, depth, norm, schedule))


@cache
def stock(family, depth, schedule='1x'):
    # By `_base_`, because mmengine marks what it reads that way with the package's scope.
    name = f'mmdet::{FAMILIES[family]}/{family}_r{depth}_fpn_{schedule}_coco.py'
    return Config.fromstring(f'_base_ = {name!r}', '.py')


def build(model_cfg):
    """The detector without memory for its weights, and without their values."""
    init_default_scope('mmdet')
    with on_meta():
        return MODELS.build(copy.deepcopy(model_cfg))  # building changes it


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope='module')
def models():
    """The entries of the metafiles by name."""
    files = [CONFIGS / folder / 'metafile.yml' for folder in ('baselines', 'bnet')]
    entries = [entry for file in files for entry in yaml.safe_load(file.read_text())['Models']]
    by_name = {entry['Name']: entry for entry in entries}
    assert len(by_name) == len(entries)
    return by_name


@pytest.fixture(scope='module')
def rows():
    """The published rows of BNET by id."""
    if not ROWS.exists():
        pytest.skip('published-rows.yml, the transcript of the published tables, is not beside this checkout')
    return {row['id']: row for row in yaml.safe_load(ROWS.read_text())['bnet']}


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family, depth, norm', GRID)
def test_a_config_is_the_stock_config_with_the_norm_of_its_name(family, depth, norm):
    model = load(family, depth, norm).model
    assert model == apply_norm(stock(family, depth).model, norm)
    assert model.backbone.depth == depth
    assert model.backbone.type == ('ResNet' if norm == 'bn' else 'NormResNet')


@pytest.mark.parametrize('family, depth, norm', GRID)
def test_norm_on_the_command_line_overrides_the_one_of_the_config(family, depth, norm):
    for other in PLACEMENTS:
        expected = apply_norm(stock(family, depth).model, other)
        assert apply_norm(load(family, depth, norm).model, other) == expected


@pytest.mark.parametrize('depth', [50, 101])
@pytest.mark.parametrize('schedule', ['3x', 'ms-2x'])
def test_the_longer_schedules_train_the_same_model(depth, schedule):
    assert load('faster-rcnn', depth, 'bnet5', schedule).model == load('faster-rcnn', depth, 'bnet5').model


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('depth, blocks, channels', [(50, 16, 15104), (101, 33, 32512)])
def test_every_residual_block_ends_in_bnet_and_costs_the_published_parameters(family, depth, blocks, channels):
    plain = count_parameters(build(load(family, depth, 'bn').model))
    for kernel_size in (3, 5, 7) if family == 'faster-rcnn' else (5,):
        model = build(load(family, depth, f'bnet{kernel_size}').model)
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BNET)]
        assert len(layers) == blocks
        assert all(re.fullmatch(r'backbone\.layer[1-4]\.\d+\.bnet3', name) for name, _ in layers)
        assert all(m.kernel_size == kernel_size for _, m in layers)
        assert count_parameters(model) - plain == channels * (kernel_size**2 - 1)


def test_the_extra_parameters_on_r50_are_the_published_numbers():
    plain = count_parameters(build(load('retinanet', 50, 'bn').model))
    extra = [count_parameters(build(load('retinanet', 50, norm).model)) - plain for norm in ('bnet3', 'bnet5', 'bnet7')]
    assert extra == [120_832, 362_496, 724_992]


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
def test_the_recipe_is_the_published_one(family):
    cfg = load(family, 50, 'bnet5')
    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert {k: v for k, v in cfg.optim_wrapper.optimizer.items() if k != '_scope_'} == dict(
        type='SGD', lr=0.01 if family == 'retinanet' else 0.02, momentum=0.9, weight_decay=0.0001
    )
    assert not cfg.optim_wrapper.get('clip_grad') and 'paramwise_cfg' not in cfg.optim_wrapper
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.by_epoch, warmup.begin, warmup.end) == ('LinearLR', False, 0, 500)
    assert warmup.start_factor == 0.001
    assert (steps.milestones, steps.gamma, cfg.train_cfg.max_epochs) == ([8, 11], 0.1, 12)

    backbone = cfg.model.backbone
    assert backbone.frozen_stages == 1 and backbone.norm_eval is True and backbone.style == 'pytorch'
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint='torchvision://resnet50')
    image = cfg.model.data_preprocessor
    assert image.mean == [123.675, 116.28, 103.53] and image.std == [58.395, 57.12, 57.375]
    assert image.bgr_to_rgb and image.pad_size_divisor == 32
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert pipeline['Resize'].scale == (1333, 800) and pipeline['RandomFlip'].prob == 0.5
    assert 'norm_cfg' not in cfg.model.neck


@pytest.mark.parametrize('family', ['faster-rcnn', 'mask-rcnn'])
def test_the_heads_are_the_published_ones(family):
    model = load(family, 50, 'bnet5').model
    head = model.roi_head.bbox_head
    assert head.type == 'Shared2FCBBoxHead' and head.loss_bbox.type == 'L1Loss' and 'norm_cfg' not in head
    assert model.roi_head.bbox_roi_extractor.roi_layer == dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    assert model.train_cfg.rcnn.assigner.match_low_quality is (family == 'mask-rcnn')


@pytest.mark.parametrize('depth', [50, 101])
def test_3x_is_1x_three_times_as_long(depth):
    cfg, short = load('faster-rcnn', depth, 'bnet5', '3x'), load('faster-rcnn', depth, 'bnet5')
    warmup, steps = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == steps.end == 36 and steps.milestones == [27, 33] and steps.gamma == 0.1
    assert warmup.end == 500 and warmup.start_factor == 0.001 and warmup.by_epoch is False
    for key in ('train_dataloader', 'test_dataloader', 'optim_wrapper'):
        assert cfg[key] == short[key]


@pytest.mark.parametrize('depth', [50, 101])
def test_ms_2x_is_the_released_multi_scale_recipe(depth):
    cfg = load('faster-rcnn', depth, 'bnet5', 'ms-2x')
    steps = cfg.param_scheduler[1]
    assert cfg.train_cfg.max_epochs == steps.end == 24 and steps.milestones == [16, 22]
    ours = cfg.train_dataloader.dataset.pipeline
    theirs = stock('faster-rcnn', depth).train_dataloader.dataset.pipeline
    assert [step.type for step in ours] == [step.type.replace('Resize', 'RandomResize') for step in theirs]
    assert [dict(step) for i, step in enumerate(ours) if i != 2] == [dict(s) for i, s in enumerate(theirs) if i != 2]
    assert ours[2] == dict(type='RandomResize', scale=[(1333, 480), (1333, 960)], keep_ratio=True)
    assert cfg.test_dataloader == stock('faster-rcnn', depth).test_dataloader


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_folders_hold_the_whole_grid_and_nothing_else():
    expected = {path(*choice) for choice in GRID}
    expected |= {path('faster-rcnn', depth, 'bnet5', s) for depth in (50, 101) for s in ('3x', 'ms-2x')}
    assert set(FILES) == expected


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_config_is_short_names_its_row_and_has_one_line_for_the_norm(file, models):
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    assert 5 <= len(lines) <= 15
    assert "custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)" in lines
    assert sum(line.startswith('model = ') for line in lines) == 1
    entry = models.get(file.stem)
    if entry is None:
        assert lines[0] == '# No published row.'
        return
    for result in entry['Results']:
        for metric, value in result['Metrics'].items():
            assert re.search(rf'\b{metric} {value}\b', lines[0])
    if 'Row' in entry['Published']:
        assert lines[0].startswith(f'# Published row {entry["Published"]["Row"]}: ')
        never = entry['Published']['Config'] == 'never released by the authors'
        assert ('never released its config' in lines[0]) == never


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('depth', [50, 101])
def test_configs_of_one_detector_differ_in_the_line_for_the_norm_only(family, depth):
    def rest(norm):
        lines = path(family, depth, norm).read_text().splitlines()
        return [line for line in lines if line.strip() and not line.startswith(('#', 'model = '))]

    assert rest('bn') == rest('bnet3') == rest('bnet5') == rest('bnet7')


def test_editing_the_line_for_the_norm_is_all_it_takes(tmp_path):
    text = path('mask-rcnn', 50, 'bnet5').read_text()
    baseline = path('mask-rcnn', 50, 'bn').read_text()
    line = re.compile(r'^model = .*$', re.MULTILINE)
    (tmp_path / 'to_bn.py').write_text(line.sub(line.search(baseline)[0], text))
    (tmp_path / 'to_bnet5.py').write_text(line.sub(line.search(text)[0], baseline))
    (tmp_path / 'to_bnet7.py').write_text(text.replace('kernel_size=5', 'kernel_size=7'))
    for norm in ('bn', 'bnet5', 'bnet7'):
        assert Config.fromfile(tmp_path / f'to_{norm}.py').model == load('mask-rcnn', 50, norm).model


# --- the published rows ----------------------------------------------------------------------------------------------


def test_the_later_2x_numbers_are_in_the_metafile(models, rows):
    for depth in (50, 101):
        published = re.search(r'prints 2x ([\d.]+)', rows[f'faster-r{depth}-bnet5-3x']['note'])[1]
        model = models[f'faster-rcnn_r{depth}_fpn_bnet5_ms-2x_coco']
        assert 'Row' not in model['Published']
        assert model['Results'][0]['Metrics'] == {'box AP': float(published)}
