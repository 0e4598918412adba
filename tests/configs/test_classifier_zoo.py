"""configs/imagenet and configs/imagenette: models, sizes and recipes; each trains and tests. Detectors: test_zoo.py."""

import copy
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from helpers.choice import full
from helpers.meta import on_meta
from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.datasets.shapes_cls import make_shapes_cls
from mmdet_norms.layers import AN, BNET, MABN, NORMS, CenConv2d

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
FOLDERS = ('imagenet', 'imagenette')
BNET_ROWS = [
    f'resnet{depth}_{norm}_4xb64-100e_in1k' for depth in (50, 101) for norm in ('bn', 'bnet3', 'bnet5', 'bnet7')
]
MABN_ROWS = [f'resnet50_{norm}_8xb32-120e_in1k' for norm in ('bn32', 'bn2', 'brn2', 'mabn2')]
BACKBONES = ('resnet50', 'resnet101', 'aognet-12m', 'aognet-40m')
AN_ROWS = [f'{backbone}_{norm}_8xb32-120e_in1k' for backbone in BACKBONES for norm in ('bn', 'an')]
NO_ROWS = ('an-gn-head', 'frozen', 'gn-ws', 'rbn', 'bin')
IMAGENETTE = [f'resnet50_{name}_1xb32-80e_imagenette160' for name in PLACEMENTS if name not in NO_ROWS]
ROWS = [*BNET_ROWS, *MABN_ROWS, *AN_ROWS, *IMAGENETTE]
# As the authors print it, in millions, with 1000 classes.
PUBLISHED = {
    ('resnet50', 'bn'): 25.557,
    ('resnet50', 'an'): 25.755,
    ('resnet101', 'bn'): 44.549,
    ('resnet101', 'an'): 45.001,
    ('aognet-12m', 'bn'): 12.259,
    ('aognet-12m', 'an'): 12.373,
    ('aognet-40m', 'bn'): 40.153,
    ('aognet-40m', 'an'): 40.389,
}


def folder(name):
    return 'imagenette' if name.endswith('imagenette160') else 'imagenet'


@cache
def load(name):
    return Config.fromfile(CONFIGS / folder(name) / f'{name}.py')


@cache
def build(name):
    """Without memory for its weights, and without their values."""
    init_default_scope('mmdet')
    with on_meta():
        return MODELS.build(copy.deepcopy(load(name).model))


@cache
def metafile(of):
    content = yaml.safe_load((CONFIGS / of / 'metafile.yml').read_text())
    return {model['Name']: model for model in content['Models']}


def parts(name):
    return re.fullmatch(r'(.+?)_(.+)_(\d+)xb(\d+)-(\d+)e_(.+)', name).groups()


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- rows and files --------------------------------------------------------------------------------------------------


def test_every_row_has_its_config_and_its_entry():
    files = {path.stem for of in FOLDERS for path in (CONFIGS / of).glob('*.py')}
    listed = {name for of in FOLDERS for name in metafile(of)}
    assert files == listed >= set(ROWS) and len(set(ROWS)) == 31
    assert set(metafile('imagenet')) == {*BNET_ROWS, *MABN_ROWS, *AN_ROWS}
    for name in listed:
        model = metafile(folder(name))[name]
        assert model['Config'] == f'configs/{folder(name)}/{name}.py'
        length = dict(Epochs=load(name).train_cfg.get('max_epochs'), Iterations=load(name).train_cfg.get('max_iters'))
        assert model['Metadata'].items() >= {key: value for key, value in length.items() if value}.items()


def test_only_the_rows_of_mabn_have_a_published_accuracy():
    with_results = {name for of in FOLDERS for name, model in metafile(of).items() if 'Results' in model}
    assert with_results == set(MABN_ROWS)


@pytest.mark.parametrize('name', ROWS)
def test_a_config_is_short_and_says_only_what_differs(name):
    lines = (CONFIGS / folder(name) / f'{name}.py').read_text().splitlines()
    assert 5 <= len(lines) <= 15 and all(lines) and lines[0].startswith('# ') and lines[0].endswith('.')
    said = metafile(folder(name))[name].get('Published', {})
    if 'Row' in said:
        assert lines[0].startswith(f'# Published row {said["Row"]}: top-1 error {said["Top 1 Error"]}')
    if 'Weights' in said:
        assert said['Weights'] in lines[0]
    assert load(name).custom_imports == dict(imports=['mmdet_norms'], allow_failed_imports=False)


# --- the models ------------------------------------------------------------------------------------------------------


def resnet_parameters(depth, norm, classes):
    """Counted by hand: stem, bottlenecks with expansion 4, linear layer; what a norm has instead of 2 per channel."""
    total, channels = 3 * 64 * 49 + 2 * 64, 64
    for stage, blocks in enumerate({50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]):
        width, k = 64 * 2**stage, (10, 10, 20, 20)[stage]
        for block in range(blocks):
            total += channels * width + 9 * width**2 + width * 4 * width + 2 * (width + width + 4 * width)
            if block == 0:
                total += channels * 4 * width + 2 * 4 * width
                total += 6 if norm == 'sn' else 0
            channels = 4 * width
            if norm.startswith('bnet'):
                total += channels * (int(norm[4:]) ** 2 - 1)
            elif norm == 'an':
                total += 3 * k * width + 2 * k - 2 * width
            elif norm == 'sn':
                total += 3 * 6
    return total + 6 * (norm == 'sn') + channels * classes + classes


# Counted by hand in the reference, by parts.
AOGNET = {
    ('aognet-12m', 'bn'): 7_472 + 116_656 + 561_088 + 4_066_080 + 6_682_803,
    ('aognet-12m', 'an'): 7_472 + 121_144 + 570_616 + 4_118_368 + 6_730_755,
    ('aognet-40m', 'bn'): 22_148 + 352_411 + 1_705_648 + 17_285_602 + 19_386_195,
    ('aognet-40m', 'an'): 22_148 + 360_175 + 1_722_232 + 17_415_770 + 19_467_555,
}


@pytest.mark.parametrize('name', ROWS)
def test_a_row_builds_to_its_exact_number_of_parameters(name):
    backbone, norm, *_ = parts(name)
    classes = 1000 if folder(name) == 'imagenet' else 10
    if backbone.startswith('resnet'):
        expected = resnet_parameters(int(backbone[6:]), norm, classes)
    else:
        expected = AOGNET[backbone, norm] + classes * ({'aognet-12m': 824, 'aognet-40m': 1400}[backbone] + 1)
    assert sum(value.numel() for value in build(name).parameters()) == expected
    model = metafile(folder(name))[name]
    assert model['Metadata']['Parameters'] == expected
    if name in AN_ROWS:
        assert round(expected / 1e6, 3) == PUBLISHED[backbone, norm]
        assert model['Published']['Parameters'] == f'{PUBLISHED[backbone, norm]:.3f}M'


def test_models_of_imagenette_build_to_the_parameters_of_their_entries():
    for name in set(metafile('imagenette')) - set(IMAGENETTE):
        expected = metafile('imagenette')[name]['Metadata']['Parameters']
        assert sum(value.numel() for value in build(name).parameters()) == expected, name


@pytest.mark.parametrize('name', [name for name in ROWS if name not in MABN_ROWS])
def test_a_config_is_its_baseline_with_the_norm_of_its_name(name):
    norm = parts(name)[1]
    ours, base = load(name), load(name.replace(f'_{norm}_', '_bn_'))
    assert plain(ours.model) == plain(apply_norm(base.model, norm))
    differs = {key for key in {*ours, *base} if ours.get(key) != base.get(key)}
    allowed = {'model', 'norm_cfg'} | ({'custom_hooks'} if 'resnet101_bnet' in name else set())
    assert differs <= allowed


@pytest.mark.parametrize('name', MABN_ROWS)
def test_mabn_rows_have_one_norm_everywhere_over_groups_of_the_batch(name):
    norm = parts(name)[1]
    kind = {'bn32': 'BatchNorm2d', 'bn2': 'GhostBN', 'brn2': 'BRN', 'mabn2': 'GroupedMABN'}[norm]
    found, inside = Counter(), ()
    for path, module in build(name).named_modules():
        if isinstance(module, (nn.BatchNorm2d, *NORMS.values())) and not (inside and path.startswith(inside)):
            found[type(module).__name__] += 1
            inside = (*inside, f'{path}.')
            assert norm == 'bn32' or module.norm_batch == 2
            assert norm != 'mabn2' or module.buffer_size == 16
    assert found == {kind: 53}
    centred = [module for module in build(name).modules() if isinstance(module, CenConv2d)]
    assert len(centred) == (53 if norm == 'mabn2' else 0)
    backbone = load(name).model.backbone
    assert (backbone.style, backbone.zero_init_residual, backbone.depth) == ('pytorch', False, 50)


@pytest.mark.parametrize('name', ['resnet50_bnet5_4xb64-100e_in1k', 'resnet50_mabn2_8xb32-120e_in1k'])
def test_convolutions_start_as_kaiming_normal_by_fan_out(name):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(load(name).model))
    model.init_weights()
    for path, module in model.backbone.named_modules():
        if isinstance(module, nn.Conv2d) and 'bnconv' not in path:
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            assert abs(module.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.05, path
        elif isinstance(module, MABN):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, BNET):  # as the authors intend
            assert not module.bnconv.weight.any() and not module.bnconv.bias.any()


def test_components_and_kernels_sit_where_the_papers_have_them():
    for name in ROWS:
        layers = {path: m for path, m in build(name).backbone.named_modules() if isinstance(m, (AN, BNET))}
        backbone, norm, *_ = parts(name)
        blocks = {'resnet50': 16, 'resnet101': 33, 'aognet-12m': 24, 'aognet-40m': 28}[backbone]
        assert len(layers) == (blocks if norm == 'an' or norm.startswith('bnet') else 0), name
        if norm == 'an' and backbone.startswith('resnet'):
            assert all(re.fullmatch(r'layer[1-4]\.\d+\.\w+2', path) for path in layers)
            assert {path[:6]: m.k for path, m in layers.items()} == dict(layer1=10, layer2=10, layer3=20, layer4=20)
        elif norm != 'an':
            assert all(re.fullmatch(r'layer[1-4]\.\d+\.bnet3', path) for path in layers)
            assert all(m.kernel_size == int(norm[4:]) for m in layers.values())


# --- the recipes -----------------------------------------------------------------------------------------------------

SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001)
RGB = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)


def steps(dataloader):
    return [plain(step) for step in dataloader.dataset.pipeline]


@pytest.mark.parametrize('name', [*BNET_ROWS, *MABN_ROWS, *AN_ROWS])
def test_imagenet_rows_have_their_recipe(name):
    cfg = load(name)
    _, _, gpus, images, _, _ = parts(name)
    assert plain(cfg.optim_wrapper) == dict(type='OptimWrapper', optimizer=SGD)
    assert cfg.train_dataloader.batch_size == int(images) and cfg.auto_scale_lr.base_batch_size == 256
    assert int(gpus) * int(images) == 256
    backend = {} if name in MABN_ROWS else dict(backend='pillow')
    assert steps(cfg.val_dataloader) == [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=[10**6, 256], keep_ratio=True, **backend),
        dict(type='CenterCrop', crop_size=224),
        dict(type='PackClsInputs'),
    ]
    crop = dict(type='RandomResizedCrop', scale=224, **backend)
    flip, pack = dict(type='RandomFlip', prob=0.5), dict(type='PackClsInputs')
    preprocessor = {key: value for key, value in cfg.model.data_preprocessor.items() if key != 'type'}
    smoothing = cfg.model.head.get('label_smoothing', 0.0)
    if name in MABN_ROWS:
        lighting = dict(type='Lighting', alphastd=0.1)
        crop['aspect_ratio_range'] = [1, 1]
        assert steps(cfg.train_dataloader) == [dict(type='LoadImageFromFile'), crop, lighting, flip, pack]
        assert preprocessor == {} and smoothing == 0.1  # BGR, 0 to 255
        assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
        assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 120 * 5000)
        (scheduler,) = cfg.param_scheduler
        assert scheduler.milestones == [5000 * epoch for epoch in (30, 60, 90)] and scheduler.by_epoch is False
        assert (scheduler.begin, scheduler.end, scheduler.gamma) == (0, 600_000, 0.1)
        assert cfg.default_hooks.checkpoint.by_epoch is False and cfg.log_processor.by_epoch is False
        return
    assert steps(cfg.train_dataloader) == [dict(type='LoadImageFromFile'), crop, flip, pack]
    assert preprocessor == RGB and smoothing == 0
    if name in BNET_ROWS:
        (scheduler,) = cfg.param_scheduler
        assert (scheduler.type, scheduler.milestones, scheduler.gamma) == ('MultiStepLR', [30, 60, 90], 0.1)
        assert (scheduler.begin, scheduler.end, scheduler.by_epoch) == (0, 100, True)
        assert cfg.train_cfg.max_epochs == 100
    else:
        warmup, cosine = cfg.param_scheduler
        assert (warmup.type, warmup.begin, warmup.end, warmup.by_epoch) == ('LinearLR', 0, 5, True)
        assert (cosine.type, cosine.begin, cosine.end, cosine.T_max) == ('CosineAnnealingLR', 5, 120, 115)
        assert cfg.train_cfg.max_epochs == 120
    backbone = cfg.model.backbone
    assert backbone.type == 'AOGNet' or (backbone.style, backbone.zero_init_residual) == ('pytorch', True)


@pytest.mark.parametrize('name', BNET_ROWS)
def test_kernels_stop_training_at_epoch_61_in_resnet_101_only(name):
    hooks = [plain(hook) for hook in load(name).get('custom_hooks', [])]
    expected = [dict(type='FreezeBNETHook', epoch=61)]
    assert hooks == (expected if name.startswith('resnet101_bnet') else [])


@pytest.mark.parametrize('name', ['resnet50_bnet5_4xb64-100e_in1k', 'resnet50_an_8xb32-120e_in1k', MABN_ROWS[-1]])
def test_weight_decay_acts_on_all_parameters(name):
    model = build(name)
    (group,) = build_optim_wrapper(model, copy.deepcopy(load(name).optim_wrapper)).optimizer.param_groups
    assert {id(value) for value in group['params']} == {id(value) for value in model.parameters()}


# --- into detectors --------------------------------------------------------------------------------------------------

FEEDS = {
    'resnet50_bnet5_4xb64-100e_in1k': ('bnet/faster-rcnn_r50_fpn_bnet5_1x', {}),
    'resnet50_an_8xb32-120e_in1k': ('an/mask-rcnn_r50_fpn_an_2x', {}),
    'aognet-12m_bn_8xb32-120e_in1k': ('an/mask-rcnn_aognet-12m_fpn_bn_2x', {}),
    'resnet50_mabn2_8xb32-120e_in1k': ('mabn/mask-rcnn_r50_fpn_mabn_180k', {'model.backbone.style': 'pytorch'}),
}


@pytest.mark.parametrize('name', FEEDS)
def test_a_detector_starts_from_the_weights_of_a_classifier_as_the_same_function(name, tmp_path):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    classifier = MODELS.build(copy.deepcopy(load(name).model)).eval()
    with torch.no_grad():
        for key, value in classifier.state_dict().items():  # nothing at its start
            if key.endswith(('running_mean', 'running_var', 'weight', 'bias')):
                value.uniform_(0.5, 1.5) if key.endswith('var') else value.uniform_(-0.05, 0.05)
    file = tmp_path / 'epoch_100.pth'
    torch.save(dict(meta={}, state_dict=classifier.state_dict()), file)

    detector, options = FEEDS[name]
    cfg = Config.fromfile(CONFIGS / f'{detector}_coco.py')
    place = 'model.backbone.init_cfg'
    cfg.merge_from_dict({f'{place}.checkpoint': str(file), f'{place}.prefix': 'backbone.', **options})
    backbone = MODELS.build(cfg.model.backbone)  # whose eval() returns nothing
    backbone.init_weights()
    backbone.eval()
    windows = ('iters', 'pre_x2', 'pre_gz', 'buffer_x2', 'buffer_gz')
    wanted, found = (
        {key: value.flatten() for key, value in module.state_dict().items() if not key.endswith(windows)}
        for module in (classifier.backbone, backbone)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(x)[-1], classifier.backbone(x)[-1])


def test_the_readme_says_what_else_the_detector_needs():
    text = (CONFIGS / 'imagenet' / 'README.md').read_text()
    for name, (detector, options) in FEEDS.items():
        for key, value in options.items():
            (line,) = [line for line in text.splitlines() if line.startswith(f'| `{name}` | `configs/{detector}')]
            assert f'{key}={value}' in line


def test_weights_are_called_as_in_mmpretrain():
    backbone = {f'backbone.{key}' for key in build('resnet50_bn_4xb64-100e_in1k').backbone.state_dict()}
    names = set(build('resnet50_bn_4xb64-100e_in1k').state_dict())
    assert names == backbone | {'head.fc.weight', 'head.fc.bias'}
    assert 'backbone.layer4.2.bn3.running_var' in names


# --- they train and test ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_shapes_cls(tmp_path_factory.mktemp('data') / 'shapes-cls', num_train=6, num_val=6)


def small(name, images, folder):
    """The row with one iteration of six images, one of each class, and one validation."""
    cfg = copy.deepcopy(load(name))
    cfg.work_dir, cfg.launcher = str(folder), 'none'
    cfg.model.head.num_classes = 6
    by_iter = cfg.train_cfg.type == 'IterBasedTrainLoop'
    cfg.train_cfg.update(dict(max_iters=1) if by_iter else dict(max_epochs=1), val_interval=1)
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)  # up to 360 MB
    for key in ('train_dataloader', 'val_dataloader'):
        cfg[key].update(batch_size=6, num_workers=0, persistent_workers=False)
        cfg[key].dataset.data_root = str(images)
        for step in cfg[key].dataset.pipeline:
            for size in ('scale', 'crop_size'):
                if step.get(size) in (224, 160):
                    step[size] = 64
    cfg.test_dataloader = cfg.val_dataloader
    cfg.randomness = dict(seed=0)
    return cfg


LARGER = ('resnet101', 'aognet-40m')  # of networks whose smaller sibling has the same rows


@pytest.mark.slow
@pytest.mark.parametrize('name', [full(name) if name.startswith(LARGER) else name for name in ROWS])
def test_a_row_takes_a_training_step_and_a_test(name, images, tmp_path):
    runner = Runner.from_cfg(small(name, images, tmp_path))
    before = {key: value.detach().clone() for key, value in runner.model.named_parameters()}
    runner.train()
    assert runner.iter == 1
    still = {key for key, value in runner.model.named_parameters() if torch.equal(value, before[key])}
    # Behind a last norm that starts at 0 nothing of the branch moves in the first step, but that norm.
    assert not any(key.startswith(('head.fc', 'backbone.conv1', 'backbone.stem')) for key in still), still
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())
    right = [6 * runner.message_hub.get_scalar(f'val/accuracy/top{k}').current() for k in (1, 5)]
    assert 0 <= right[0] <= right[1] <= 6 and right == pytest.approx([round(n) for n in right])
