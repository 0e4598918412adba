"""The zoo: every published detection row has one config, with its recipe, model, size, and a line in the documents."""

import copy
import importlib.util
import re
import shutil
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
from torch import nn

from helpers.meta import on_meta
from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.layers import AN, CBN, MABN, NORMS, CenConv2d

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
TRANSCRIPT = ROOT.parent / 'shared' / 'reference' / 'published-rows.yml'
FOLDERS = ('baselines', 'bnet', 'cbn', 'mabn', 'an')
CLASSIFIERS = ('imagenet', 'imagenette')  # test_classifier_zoo.py

# row: config, published box AP, mask AP
ROWS = {
    'faster-r50-bn-1x': ('baselines/faster-rcnn_r50_fpn_bn_1x', 37.5, None),
    'faster-r50-bnet3-1x': ('bnet/faster-rcnn_r50_fpn_bnet3_1x', 39.5, None),
    'faster-r50-bnet5-1x': ('bnet/faster-rcnn_r50_fpn_bnet5_1x', 40.1, None),
    'faster-r50-bnet5-3x': ('bnet/faster-rcnn_r50_fpn_bnet5_3x', 41.7, None),
    'faster-r50-bnet7-1x': ('bnet/faster-rcnn_r50_fpn_bnet7_1x', 40.7, None),
    'faster-r101-bn-1x': ('baselines/faster-rcnn_r101_fpn_bn_1x', 39.4, None),
    'faster-r101-bnet3-1x': ('bnet/faster-rcnn_r101_fpn_bnet3_1x', 40.7, None),
    'faster-r101-bnet5-1x': ('bnet/faster-rcnn_r101_fpn_bnet5_1x', 41.8, None),
    'faster-r101-bnet5-3x': ('bnet/faster-rcnn_r101_fpn_bnet5_3x', 43.1, None),
    'retina-r101-bn-1x': ('baselines/retinanet_r101_fpn_bn_1x', 38.5, None),
    'retina-r101-bnet5-1x': ('bnet/retinanet_r101_fpn_bnet5_1x', 40.7, None),
    'mask-r50-bn-1x': ('baselines/mask-rcnn_r50_fpn_bn_1x', 38.2, 34.7),
    'mask-r50-bnet3-1x': ('bnet/mask-rcnn_r50_fpn_bnet3_1x', 40.2, 36.4),
    'mask-r50-bnet5-1x': ('bnet/mask-rcnn_r50_fpn_bnet5_1x', 40.8, 36.7),
    'mask-r101-bn-1x': ('baselines/mask-rcnn_r101_fpn_bn_1x', 40.0, 36.1),
    'mask-r101-bnet3-1x': ('bnet/mask-rcnn_r101_fpn_bnet3_1x', 42.2, 37.8),
    'mask-r101-bnet5-1x': ('bnet/mask-rcnn_r101_fpn_bnet5_1x', 42.5, 37.9),
    'faster-r50-none-1x': ('cbn/faster-rcnn_r50_fpn_none_1x', 36.8, None),
    'faster-r50-syncbn-1x': ('cbn/faster-rcnn_r50_fpn_syncbn_1x', 37.5, None),
    'faster-r50-gn-1x': ('cbn/faster-rcnn_r50_fpn_gn_1x', 37.7, None),
    'faster-r50-cbn-1x': ('cbn/faster-rcnn_r50_fpn_cbn_1x', 37.6, None),
    'mask-r50-none-1x': ('cbn/mask-rcnn_r50_fpn_none_1x', 37.6, 34.0),
    'mask-r50-syncbn-1x': ('cbn/mask-rcnn_r50_fpn_syncbn_1x', 38.5, 34.3),
    'mask-r50-gn-1x': ('cbn/mask-rcnn_r50_fpn_gn_1x', 38.5, 35.0),
    'mask-r50-cbn-1x': ('cbn/mask-rcnn_r50_fpn_cbn_1x', 38.4, 34.7),
    'mask-r50-bn-2x-scratch': ('mabn/mask-rcnn_r50-scratch_fpn_bn-all_180k', 32.38, 29.07),
    'mask-r50-brn-2x-scratch': ('mabn/mask-rcnn_r50-scratch_fpn_brn_180k', 34.07, 30.98),
    'mask-r50-syncbn-2x-scratch': ('mabn/mask-rcnn_r50-scratch_fpn_syncbn-all_180k', 36.8, 33.1),
    'mask-r50-mabn-2x-scratch': ('mabn/mask-rcnn_r50-scratch_fpn_mabn_180k', 36.5, 32.69),
    'mask-r50-syncbn-2x-finetune': ('mabn/mask-rcnn_r50_fpn_syncbn-all_180k', 38.25, 34.22),
    'mask-r50-mabn-2x-finetune': ('mabn/mask-rcnn_r50_fpn_mabn_180k', 38.42, 34.12),
    'mask-r50-bn': ('an/mask-rcnn_r50_fpn_bn_2x', 39.2, 35.2),
    'mask-r50-an': ('an/mask-rcnn_r50_fpn_an_2x', 40.8, 36.4),
    'mask-r50-gn': ('an/mask-rcnn_r50_fpn_gn-all_2x', 40.3, 35.7),
    'mask-r50-sn': ('an/mask-rcnn_r50_fpn_sn_2x', 41.0, 36.5),
    'mask-r50-an-angn': ('an/mask-rcnn_r50_fpn_an-gn-head_2x', 41.6, 37.4),
    'mask-r101-bn': ('an/mask-rcnn_r101_fpn_bn_2x', 41.4, 36.8),
    'mask-r101-an': ('an/mask-rcnn_r101_fpn_an_2x', 43.1, 38.2),
    'mask-r101-gn': ('an/mask-rcnn_r101_fpn_gn-all_2x', 41.8, 36.8),
    'mask-r101-an-angn': ('an/mask-rcnn_r101_fpn_an-gn-head_2x', 43.2, 38.8),
    'mask-aognet12m-bn': ('an/mask-rcnn_aognet-12m_fpn_bn_2x', 40.7, 36.4),
    'mask-aognet12m-an': ('an/mask-rcnn_aognet-12m_fpn_an_2x', 42.0, 37.8),
    'mask-aognet12m-an-angn': ('an/mask-rcnn_aognet-12m_fpn_an-gn-head_2x', 43.0, 38.7),
    'mask-aognet40m-bn': ('an/mask-rcnn_aognet-40m_fpn_bn_2x', 43.4, 38.5),
    'mask-aognet40m-an': ('an/mask-rcnn_aognet-40m_fpn_an_2x', 44.1, 39.0),
    'mask-aognet40m-an-angn': ('an/mask-rcnn_aognet-40m_fpn_an-gn-head_2x', 44.9, 40.2),
    'cascade-mask-r101-bn': ('an/cascade-mask-rcnn_r101_fpn_bn_20e', 44.4, 38.2),
    'cascade-mask-r101-an': ('an/cascade-mask-rcnn_r101_fpn_an_20e', 45.8, 39.6),
    'cascade-mask-aognet40m-bn': ('an/cascade-mask-rcnn_aognet-40m_fpn_bn_20e', 45.6, 39.3),
    'cascade-mask-aognet40m-an': ('an/cascade-mask-rcnn_aognet-40m_fpn_an_20e', 46.5, 40.0),
}

# All parameters with 80 classes, of the rows whose table prints #Params.
PARAMETERS = {
    'mask-r50-bn': 45_707_056,
    'mask-r50-an': 45_905_444,
    'mask-r50-gn': 45_711_152,
    'mask-r50-an-angn': 45_953_632,
    'mask-r101-bn': 64_699_184,
    'mask-r101-an': 65_150_668,
    'mask-r101-gn': 64_703_280,
    'mask-r101-an-angn': 65_198_856,
    'mask-aognet12m-bn': 33_090_403,
    'mask-aognet12m-an': 33_204_659,
    'mask-aognet12m-an-angn': 33_252_847,
    'mask-aognet40m-bn': 60_727_796,
    'mask-aognet40m-an': 60_963_672,
    'mask-aognet40m-an-angn': 61_011_860,
    'cascade-mask-r101-bn': 96_316_734,
    'cascade-mask-r101-an': 96_768_218,
    'cascade-mask-aognet40m-bn': 92_345_346,
    'cascade-mask-aognet40m-an': 92_581_222,
}

# What the 81-way heads of mmdet 1 have more: four box deltas and a mask, or three masks.
EXTRA_OF_81_CLASSES = {'MaskRCNN': (1024 + 1) * 4 + (256 + 1), 'CascadeRCNN': 3 * (256 + 1)}


def config(row):
    return ROWS[row][0]


def rows_of(folder):
    return [row for row in ROWS if config(row).startswith(f'{folder}/')]


@cache
def load(name):
    """A config by its path below configs/, without `_coco.py`."""
    return Config.fromfile(CONFIGS / f'{name}_coco.py')


@cache
def build(name):
    """The detector without memory for its weights, and without their values."""
    init_default_scope('mmdet')
    with on_meta():
        return MODELS.build(copy.deepcopy(load(name).model))  # building changes it


def plain(value):
    """Plain containers, without the scope that mmengine writes into configs of packages."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@cache
def models():
    """The models of all metafiles by name."""
    found = {}
    for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((ROOT / path).read_text())['Models']:
            assert model['Name'] not in found
            found[model['Name']] = model
    return found


def by_row():
    rows = [model for model in models().values() if 'Row' in model.get('Published', {})]
    found = {model['Published']['Row']: model for model in rows}
    assert len(found) == len(rows)
    return found


def detectors():
    return {name: model for name, model in models().items() if name.endswith('_coco')}


def metrics(model):
    return {key: value for result in model.get('Results', []) for key, value in result['Metrics'].items()}


@pytest.fixture(scope='module')
def transcript():
    if not TRANSCRIPT.exists():
        pytest.skip('published-rows.yml, the transcript of the published tables, is not beside this checkout')
    return yaml.safe_load(TRANSCRIPT.read_text())


# --- rows and files --------------------------------------------------------------------------------------------------


def test_the_zoo_has_fifty_rows_and_a_config_for_each():
    assert [len(rows_of(folder)) for folder in FOLDERS] == [5, 12, 8, 6, 19]
    assert len({config(row) for row in ROWS}) == 50
    for row, (name, box, mask) in ROWS.items():
        model = by_row()[row]
        assert (CONFIGS / f'{name}_coco.py').is_file()
        assert model['Config'] == f'configs/{name}_coco.py' and model['Name'] == Path(model['Config']).stem
        assert (metrics(model)['box AP'], metrics(model).get('mask AP')) == (box, mask)


def test_rows_that_a_published_table_prints_exchanged_say_so_wherever_they_are_shown():
    notes = {row: by_row()[row]['Published']['Note'] for row in ('mask-r101-bn-1x', 'mask-r101-bnet3-1x')}
    for row, other, mask in (
        ('mask-r101-bn-1x', 'mask-r101-bnet3-1x', 36.1),
        ('mask-r101-bnet3-1x', 'mask-r101-bn-1x', 37.8),
    ):
        assert metrics(by_row()[row])['mask AP'] == mask  # as mmdet's zoo has the first
        assert other in notes[row] and 'exchanged' in notes[row]
        for document in ('docs/zoo.md', 'configs/bnet/README.md'):
            assert f'* `{row}`: {notes[row]}.' in (ROOT / document).read_text()


def test_the_metafiles_say_what_the_transcript_of_the_published_tables_says(transcript):
    tables = {table: transcript[table] for table in ('bnet', 'cbn', 'mabn', 'an')}
    published = {row['id']: row for table in tables.values() for row in table}
    assert set(published) == set(ROWS)
    assert {row: value['params'] for row, value in published.items() if 'params' in value} == PARAMETERS
    for row, facts in published.items():
        model = by_row()[row]
        keys = {f'{kind}{at}': f'{kind} AP{at}' for kind in ('box', 'mask') for at in ('', '50', '75')}
        assert metrics(model) == {keys[key]: value for key, value in facts.items() if key in keys}
        assert model['Published'].get('FPS') == facts.get('fps')
        origin = {True: 'released by the authors', False: 'never released by the authors'}
        if 'quoted' in facts.get('note', ''):
            expected = 'none, the authors quote the row from another paper'
        elif facts in tables['an']:
            expected = 'released by the authors'
        else:
            expected = origin.get(facts.get('config_published'), "mmdet's model zoo")
        assert model['Published']['Config'] == expected
    for facts in transcript['mabn_imagenet']:
        row = by_row()[facts['id']]
        assert metrics(row) == {'Top 1 Accuracy': round(100 - facts['top1_error'], 2)}
        assert row['Published']['Top 1 Error'] == facts['top1_error']
    readme = (CONFIGS / 'mabn' / 'README.md').read_text()
    for speed in transcript['mabn_inference_speed'].values():
        assert f'{speed:.2f}' in readme


def test_the_metafiles_list_every_config_of_the_tables_and_no_other():
    listed = {model['Config'] for model in models().values()}
    assert all((ROOT / path).is_file() for path in listed)
    for folder in ('cbn', 'mabn', 'an'):  # configs/bnet and configs/baselines have more detectors than rows
        files = {str(file.relative_to(ROOT)) for file in (CONFIGS / folder).glob('*.py')}
        assert files == {path for path in listed if path.startswith(f'configs/{folder}/')}
    without_row = {name for name, model in detectors().items() if 'Row' not in model['Published']}
    assert without_row == {f'faster-rcnn_r{depth}_fpn_bnet5_ms-2x_coco' for depth in (50, 101)}


def test_collections_name_the_paper_and_the_readme_of_their_folder():
    for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        content = yaml.safe_load((ROOT / path).read_text())
        for collection in content['Collections']:
            assert (ROOT / collection['README']).parent == (ROOT / path).parent
            assert collection['Paper']['URL'].startswith('https://arxiv.org/abs/') and collection['Paper']['Title']
        names = {collection['Name'] for collection in content['Collections']}
        assert {model['In Collection'] for model in content['Models']} == names
        assert all((ROOT / model['Config']).parent == (ROOT / path).parent for model in content['Models'])


@pytest.mark.parametrize('row', rows_of('cbn') + rows_of('mabn') + rows_of('an'))
def test_a_config_is_short_and_its_first_line_names_the_row(row):
    lines = (CONFIGS / f'{config(row)}_coco.py').read_text().splitlines()
    assert 5 <= len(lines) <= 15 and all(lines)
    _, box, mask = ROWS[row]
    expected = f'# Published row {row}: box AP {box}' + (f', mask AP {mask}' if mask else '')
    assert re.fullmatch(rf'{re.escape(expected)}( \(.*\))?\.', lines[0])
    origin = by_row()[row]['Published']['Config']
    assert ('never released' in lines[0]) == origin.startswith('never')
    assert ('quote it from another paper' in lines[0]) == ('quote' in origin)
    assert load(config(row)).custom_imports == dict(imports=['mmdet_norms'], allow_failed_imports=False)


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(model['Config'] for model in detectors().values()))
def test_a_config_builds_to_exactly_the_parameters_of_its_metafile(name):
    name = name.removeprefix('configs/').removesuffix('_coco.py')
    model = models()[Path(f'{name}_coco').name]
    parameters = sum(parameter.numel() for parameter in build(name).parameters())
    assert parameters == model['Metadata']['Parameters']
    row = model['Published'].get('Row')
    assert parameters == PARAMETERS.get(row, parameters)
    if 'Parameters' in model['Published']:
        printed = float(model['Published']['Parameters'].removesuffix('M'))
        classes_81 = parameters + EXTRA_OF_81_CLASSES[load(name).model.type]
        # The authors print 65.15 for 65.155025.
        assert abs(classes_81 / 1e6 - printed) <= 0.00503, (row, classes_81)


PLACED = [
    *((f'cbn/{d}-rcnn_r50_fpn_{{}}_1x', 'none', norm) for d in ('faster', 'mask') for norm in ('syncbn', 'gn', 'cbn')),
    *(('mabn/mask-rcnn_r50-scratch_fpn_{}_180k', 'bn-all', norm) for norm in ('brn', 'mabn')),
    *((f'an/mask-rcnn_r{depth}_fpn_{{}}_2x', 'bn', norm) for depth in (50, 101) for norm in ('an', 'an-gn-head')),
    ('an/mask-rcnn_r50_fpn_{}_2x', 'bn', 'sn'),
    ('an/cascade-mask-rcnn_r101_fpn_{}_20e', 'bn', 'an'),
    *((f'an/mask-rcnn_aognet-{a}_fpn_{{}}_2x', 'bn', norm) for a in ('12m', '40m') for norm in ('an', 'an-gn-head')),
    ('an/cascade-mask-rcnn_aognet-40m_fpn_{}_20e', 'bn', 'an'),
]


@pytest.mark.parametrize('name, baseline, norm', PLACED)
def test_a_config_is_its_baseline_with_the_norm_of_its_name(name, baseline, norm):
    ours, base = copy.deepcopy(load(name.format(norm))), copy.deepcopy(load(name.format(baseline)))
    if 'aognet' in name:  # whose pretrained weights are those of its norm
        del ours.model.backbone.init_cfg, base.model.backbone.init_cfg
    assert plain(ours.model) == plain(apply_norm(base.model, norm)) == plain(apply_norm(ours.model, norm))
    assert plain(ours.model) != plain(base.model)
    for key in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'test_dataloader'):
        assert ours[key] == base[key]


def test_every_name_of_a_norm_in_the_zoo_is_placed_as_its_table_says_or_tested_here():
    names = {re.fullmatch(r'.*_fpn_(.+)_[^_]+', config(row))[1] for row in ROWS}
    assert names - set(PLACEMENTS) == {'none', 'bn-all', 'syncbn-all', 'gn-all'}


def norms_of(name, part=''):
    """How many norms of each type a part of the detector has; a norm inside another one is part of it."""
    found, inside = Counter(), []
    for path, module in build(name).get_submodule(part).named_modules():
        if isinstance(module, (nn.BatchNorm2d, *NORMS.values())) and not path.startswith(tuple(inside)):
            found[type(module).__name__] += 1
            inside.append(f'{path}.')
    return dict(found)


BACKBONE = {
    'r50': {'bn': {'BatchNorm2d': 53}, 'an': {'BatchNorm2d': 37, 'AN': 16}},
    'r101': {'bn': {'BatchNorm2d': 104}, 'an': {'BatchNorm2d': 71, 'AN': 33}},
}


@pytest.mark.parametrize('detector', ['faster-rcnn', 'mask-rcnn'])
@pytest.mark.parametrize('norm, kind', [('none', None), ('syncbn', 'SyncBN'), ('gn', 'GN'), ('cbn', 'CBN')])
def test_cbn_rows_have_their_norm_in_fpn_and_heads_and_batch_norm_in_the_backbone(detector, norm, kind):
    name = f'cbn/{detector}_r50_fpn_{norm}_1x'
    parts = {'backbone': {'BatchNorm2d': 53}, 'neck': {kind: 8}, 'rpn_head': {}, 'roi_head.bbox_head': {kind: 4}}
    if detector == 'mask-rcnn':
        parts['roi_head.mask_head'] = {kind: 4}
    for part, expected in parts.items():
        assert norms_of(name, part) == {key: n for key, n in expected.items() if key}, part
    for layer in build(name).modules():
        if isinstance(layer, CBN):
            assert (layer.buffer_num, layer.burnin) == (3, 8)


@pytest.mark.parametrize('row', rows_of('mabn'))
def test_mabn_rows_have_69_norms_everywhere_but_in_the_rpn_and_mabn_a_centred_convolution_before_each(row):
    norm = re.search(r'-(bn|brn|syncbn|mabn)-', row)[1]
    kind = {'bn': 'BatchNorm2d', 'syncbn': 'SyncBN'}.get(norm, norm.upper())
    parts = {'backbone': 53, 'neck': 8, 'roi_head.bbox_head': 4, 'roi_head.mask_head': 4}
    for part, count in parts.items():
        assert norms_of(config(row), part) == {kind: count}
    assert norms_of(config(row), 'rpn_head') == {}
    centred = [m for m in build(config(row)).modules() if isinstance(m, CenConv2d)]
    assert len(centred) == (69 if norm == 'mabn' else 0) and all(conv.bias is None for conv in centred)
    layers = [m for m in build(config(row)).modules() if isinstance(m, MABN)]
    assert len(layers) == len(centred) and all(m.buffer_size == 16 and m.warmup_iters == 100 for m in layers)
    assert all(parameter.requires_grad for parameter in build(config(row)).train().parameters())


@pytest.mark.parametrize('row', [row for row in rows_of('an') if 'aognet' not in row])
def test_an_rows_have_an_behind_the_second_convolution_and_in_the_box_head(row):
    name = config(row)
    if re.search('-[gs]n$', row):  # quoted rows: everywhere but in the RPN
        backbone = 104 if 'r101' in row else 53
        for part, n in {'backbone': backbone, 'neck': 8, 'roi_head.bbox_head': 4, 'roi_head.mask_head': 4}.items():
            assert norms_of(name, part) == {row[-2:].upper(): n}
        assert norms_of(name, 'rpn_head') == {}
        return
    norm = 'bn' if row.endswith('bn') else 'an'
    assert norms_of(name, 'backbone') == BACKBONE['r101' if 'r101' in row else 'r50'][norm]
    in_heads = row.endswith('angn')
    assert norms_of(name, 'neck') == ({'GN': 8} if in_heads else {})
    assert norms_of(name, 'roi_head.mask_head') == ({'GN': 4} if in_heads else {})
    assert norms_of(name, 'roi_head.bbox_head') == ({'AN': 4} if in_heads else {})
    if norm == 'an':
        layers = {path: m for path, m in build(name).backbone.named_modules() if isinstance(m, AN)}
        assert all(re.fullmatch(r'layer[1-4]\.\d+\.\w+2', path) for path in layers)
        assert {path[:6]: m.k for path, m in layers.items()} == dict(layer1=10, layer2=10, layer3=20, layer4=20)
    if in_heads:
        assert [conv.norm.k for conv in build(name).roi_head.bbox_head.shared_convs] == [10, 10, 20, 20]


@pytest.mark.parametrize('row', [row for row in rows_of('an') if 'aognet' in row])
def test_aognet_rows_have_an_in_24_or_28_nodes_and_a_neck_of_their_widths(row):
    arch = '12m' if '12m' in row else '40m'
    norm = 'BN' if row.endswith('bn') else 'AN'
    cfg = load(config(row)).model
    backbone, neck = cfg.backbone, cfg.neck
    assert (backbone.type, backbone.arch, backbone.norm) == ('AOGNet', arch, norm)
    assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'pretrained/aognet-{arch}_{norm.lower()}.pth')
    assert neck.in_channels == {'12m': [128, 256, 512, 824], '40m': [224, 448, 896, 1400]}[arch]
    layers = [m for m in build(config(row)).backbone.modules() if isinstance(m, AN)]
    assert len(layers) == (0 if norm == 'BN' else {'12m': 24, '40m': 28}[arch])
    # Everything but backbone and neck is that of the ResNet row.
    for key, value in plain(load(re.sub('aognet-12m|aognet-40m', 'r101', config(row))).model).items():
        if key not in ('backbone', 'neck'):
            assert plain(cfg[key]) == value


# --- the recipes -----------------------------------------------------------------------------------------------------

SGD = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001)
RGB = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)
SMOOTH = dict(type='SmoothL1Loss', loss_weight=1.0)


def schedule(cfg):
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.begin, warmup.end, warmup.by_epoch) == ('LinearLR', 0, 500, False)
    assert (steps.type, steps.gamma, steps.begin) == ('MultiStepLR', 0.1, 0)
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert steps.end == length and steps.by_epoch == ('max_epochs' in cfg.train_cfg)
    return length, list(steps.milestones), warmup.start_factor


def image(cfg):
    return {key: cfg.model.data_preprocessor[key] for key in RGB}


def pipeline(cfg):
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    return tuple(steps['Resize'].scale), steps['Resize'].keep_ratio, steps['RandomFlip'].prob, len(steps)


def proposals(cfg):
    train, test = cfg.model.train_cfg.rpn_proposal, cfg.model.test_cfg.rpn
    return train.nms_pre, train.max_per_img, test.nms_pre, test.max_per_img, train.nms.iou_threshold


def sampler(part):
    return part.sampler.num, part.sampler.pos_fraction


def check_heads_and_sampling(cfg):
    """What the CBN, MABN and AN rows share."""
    model, roi = cfg.model, cfg.model.roi_head
    assert plain(model.rpn_head.loss_bbox) == dict(SMOOTH, beta=1 / 9)
    anchors = model.rpn_head.anchor_generator
    assert (anchors.scales, anchors.ratios, anchors.strides) == ([8], [0.5, 1.0, 2.0], [4, 8, 16, 32, 64])
    assert sampler(model.train_cfg.rpn) == (256, 0.5) and model.train_cfg.rpn.allowed_border == 0
    heads = roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]
    for head in heads:
        assert plain(head.loss_bbox) == dict(SMOOTH, beta=1.0) and head.fc_out_channels == 1024
    stages = model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else [model.train_cfg.rcnn]
    assert all(sampler(stage) == (512, 0.25) for stage in stages)
    for key, size in (('bbox_roi_extractor', 7), ('mask_roi_extractor', 14)):
        if key in roi:
            layer = plain(roi[key].roi_layer)
            assert layer == dict(type='RoIAlign', output_size=size, sampling_ratio=2)
    if 'mask_head' in roi:
        assert all(stage.mask_size == 28 for stage in stages)
    test = model.test_cfg.rcnn
    assert (test.score_thr, test.nms.iou_threshold, test.max_per_img) == (0.05, 0.5, 100)
    assert pipeline(cfg) == ((1333, 800), True, 0.5, 5)


def check_box_head_of_four_convolutions(cfg):
    head = cfg.model.roi_head.bbox_head
    assert head.type in ('Shared4Conv1FCBBoxHead', 'NormShared4Conv1FCBBoxHead')
    assert head.conv_out_channels == 256 and head.reg_class_agnostic is False


def gpus(row):
    folder = config(row).split('/')[0]
    (collection,) = yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())['Collections']
    return [int(n) for n in re.findall(r'\d+', collection['Metadata']['Training Resources'])]


@pytest.mark.parametrize('row', ROWS)
def test_images_per_gpu_and_length_are_those_of_the_metafile(row):
    cfg, metadata = load(config(row)), by_row()[row]['Metadata']
    number, images = gpus(row)
    assert cfg.train_dataloader.batch_size == images and cfg.auto_scale_lr.base_batch_size == number * images == 16
    assert cfg.train_cfg.get('max_epochs') == metadata.get('Epochs')
    assert cfg.train_cfg.get('max_iters') == metadata.get('Iterations')
    assert cfg.val_evaluator.metric == (['bbox', 'segm'] if ROWS[row][2] else 'bbox')


@pytest.mark.parametrize('row', rows_of('cbn'))
def test_cbn_rows_have_the_published_recipe(row):
    cfg = load(config(row))
    assert gpus(row) == [4, 4]
    assert schedule(cfg) == (12, [8, 11], 1 / 3) and cfg.train_cfg.val_interval == 1
    assert plain(cfg.optim_wrapper) == dict(
        type='OptimWrapper', optimizer=SGD, clip_grad=dict(max_norm=35, norm_type=2)
    )
    assert proposals(cfg) == (2000, 2000, 2000, 2000, 0.7)
    assert cfg.model.train_cfg.rcnn.assigner.match_low_quality is True
    check_heads_and_sampling(cfg)
    check_box_head_of_four_convolutions(cfg)
    assert image(cfg) == RGB
    backbone = cfg.model.backbone
    assert (backbone.frozen_stages, backbone.norm_eval, backbone.style) == (1, True, 'pytorch')
    assert backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    assert cfg.custom_hooks == [dict(type='NormHook')]


@pytest.mark.parametrize('row', rows_of('mabn'))
def test_mabn_rows_have_the_published_recipe(row):
    cfg = load(config(row))
    assert gpus(row) == [8, 2]
    assert schedule(cfg) == (180_000, [120_000, 160_000], 1 / 3) and cfg.train_cfg.type == 'IterBasedTrainLoop'
    assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
    assert cfg.default_hooks.checkpoint.by_epoch is False and cfg.log_processor.by_epoch is False
    assert plain(cfg.optim_wrapper.optimizer) == SGD and 'clip_grad' not in cfg.optim_wrapper
    assert proposals(cfg) == (2000, 1000, 1000, 1000, 0.7)
    assert cfg.model.train_cfg.rcnn.assigner.match_low_quality is False
    check_heads_and_sampling(cfg)
    check_box_head_of_four_convolutions(cfg)
    assert image(cfg) == dict(
        mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32
    )
    backbone = cfg.model.backbone
    assert (backbone.frozen_stages, backbone.norm_eval, backbone.style) == (-1, False, 'caffe')
    start = {
        'mask-r50-mabn-2x-finetune': dict(type='Pretrained', checkpoint='pretrained/R50-wc.pth'),
        'mask-r50-syncbn-2x-finetune': dict(type='Pretrained', checkpoint='open-mmlab://detectron2/resnet50_caffe'),
    }
    assert plain(backbone.init_cfg) == start.get(row, dict(type='Caffe2Xavier', layer='Conv2d'))
    assert cfg.custom_hooks == [dict(type='NormHook')]


@pytest.mark.parametrize('row', [row for row in rows_of('mabn') if row.endswith('scratch')])
def test_biases_of_mabn_rows_learn_twice_as_fast_and_do_not_decay(row):
    model, cfg = build(config(row)), load(config(row))
    optimizer = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper)).optimizer
    group_of = {id(group['params'][0]): group for group in optimizer.param_groups}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        expected = (0.04, 0.0) if name.endswith('.bias') else (0.02, 1e-4)
        assert (group['lr'], group['weight_decay']) == expected, name


@pytest.mark.parametrize('norm', ['mabn', 'bn-all'])
def test_mabn_rows_from_scratch_start_as_in_maskrcnn_benchmark(norm):
    init_default_scope('mmdet')
    model = copy.deepcopy(load(f'mabn/mask-rcnn_r50-scratch_fpn_{norm}_180k').model)
    torch.manual_seed(0)
    parts = {key: MODELS.build(model[key]) for key in ('backbone', 'neck')}
    parts['box head'] = MODELS.build(dict(model.roi_head.bbox_head))
    parts['mask head'] = MODELS.build(dict(model.roi_head.mask_head))
    seen = Counter()
    for part, module in parts.items():
        module.init_weights()
        for path, layer in module.named_modules():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            weight = layer.weight.detach()
            fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
            if part in ('backbone', 'neck') or 'shared_fcs' in path:
                std = fan_in**-0.5
                assert weight.abs().max() <= std * 3**0.5 * 1.0001, path  # uniform
            elif part == 'mask head':
                if 'convs' not in path:
                    continue
                std = (2 / fan_out) ** 0.5
            else:
                std = 0.001 if path == 'fc_reg' else 0.01
            assert abs(weight.std() / std - 1) < 0.05, (part, path)
            seen[part] += 1
        norms = [m for m in module.modules() if isinstance(m, (MABN, nn.BatchNorm2d)) and m.weight is not None]
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    assert seen == {'backbone': 53, 'neck': 8, 'box head': 7, 'mask head': 4}


@pytest.mark.parametrize('row', [row for row in rows_of('an') if not re.search('-gn$', row)])
def test_an_rows_have_the_published_recipe(row):
    cfg, cascade = load(config(row)), row.startswith('cascade')
    assert gpus(row) == [8, 2]
    assert schedule(cfg) == ((20, [16, 19], 1 / 3) if cascade else (24, [16, 22], 1 / 3))
    assert plain(cfg.optim_wrapper) == dict(
        type='OptimWrapper', optimizer=SGD, clip_grad=dict(max_norm=35, norm_type=2)
    )
    assert proposals(cfg) == (2000, 2000, 1000, 1000, 0.7)
    check_heads_and_sampling(cfg)
    assert image(cfg) == RGB
    backbone, roi = cfg.model.backbone, cfg.model.roi_head
    frozen = (-1, False) if row.endswith('-sn') else (1, True)
    assert (backbone.frozen_stages, backbone.norm_eval) == frozen
    if 'aognet' not in row:
        depth = 101 if 'r101' in row else 50
        assert (backbone.depth, backbone.style) == (depth, 'pytorch')
        assert backbone.init_cfg.checkpoint == f'torchvision://resnet{depth}'
    if not cascade:
        check_box_head_of_four_convolutions(cfg)
        return
    assert roi.stage_loss_weights == [1, 0.5, 0.25]
    assert [head.type for head in roi.bbox_head] == ['Shared2FCBBoxHead'] * 3
    assert all(head.reg_class_agnostic for head in roi.bbox_head)
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert [head.bbox_coder.target_stds for head in roi.bbox_head] == stds
    assert [stage.assigner.pos_iou_thr for stage in cfg.model.train_cfg.rcnn] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize('depth', [50, 101])
def test_quoted_group_norm_rows_are_the_configs_that_mmdet_ships_for_them(depth):
    ours = load(f'an/mask-rcnn_r{depth}_fpn_gn-all_2x')
    theirs = Config.fromstring(f"_base_ = 'mmdet::gn/mask-rcnn_r{depth}_fpn_gn-all_2x_coco.py'", '.py')
    assert {key: value for key, value in ours.items() if key != 'custom_imports'} == dict(theirs.items())
    assert ours.train_cfg.max_epochs == 24 and ours.model.backbone.depth == depth
    assert ours.model.backbone.init_cfg.checkpoint == f'open-mmlab://detectron/resnet{depth}_gn'


# --- they train and test ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'cbn/mask-rcnn_r50_fpn_cbn_1x',
        'mabn/mask-rcnn_r50-scratch_fpn_mabn_180k',
        'an/mask-rcnn_r50_fpn_an-gn-head_2x',
        'an/mask-rcnn_aognet-12m_fpn_an-gn-head_2x',
    ],
)
def test_a_zoo_model_takes_a_training_step_and_a_test_step(name):
    from mmdet.testing import demo_mm_inputs

    init_default_scope('mmdet')
    cfg = copy.deepcopy(load(name))
    # The size of the step, not the model: few proposals and few RoIs.
    cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 20
    cfg.model.train_cfg.rcnn.sampler.num = 8
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = demo_mm_inputs(2, [(3, 96, 96)] * 2, num_items=[2, 2], num_classes=80, with_mask=True)
    before = {key: value.clone() for key, value in model.named_parameters()}
    losses, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    assert torch.isfinite(losses)
    wrapper.update_params(losses)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert all(any(key.startswith(part) for key in moved) for part in ('backbone', 'neck', 'rpn_head', 'roi_head'))
    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(data, False), mode='predict')
    assert len(results) == 2 and all(len(sample.pred_instances) <= 100 for sample in results)
    assert all('masks' in sample.pred_instances for sample in results)


# --- the documents ---------------------------------------------------------------------------------------------------


@pytest.fixture
def make_zoo():
    spec = importlib.util.spec_from_file_location('make_zoo', ROOT / 'tools' / 'make_zoo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the tables are made of and written to."""
    folders = FOLDERS + CLASSIFIERS
    of_folders = [f'configs/{folder}/{file}' for folder in folders for file in ('metafile.yml', 'README.md')]
    for path in ('model-index.yml', 'docs/zoo.md', *of_folders):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_the_documents_are_what_the_metafiles_say(make_zoo):
    assert make_zoo.main(['--check']) == 0, 'run: python tools/make_zoo.py'


def test_a_number_that_changes_in_a_metafile_or_in_a_table_is_noticed_and_mended(make_zoo, checkout, capsys):
    root = ['--root', str(checkout)]
    assert make_zoo.main([*root, '--check']) == 0
    metafile = checkout / 'configs' / 'an' / 'metafile.yml'
    metafile.write_text(metafile.read_text().replace('box AP: 41.6', 'box AP: 41.7'))
    assert make_zoo.main([*root, '--check']) == 1
    out, err = capsys.readouterr()
    assert 'docs/zoo.md is not' in out and 'configs/an/README.md is not' in out and 'make_zoo.py' in err
    assert make_zoo.main(root) == 0 and make_zoo.main([*root, '--check']) == 0
    assert '| 41.7 | 37.4 |' in (checkout / 'docs' / 'zoo.md').read_text()
    readme = checkout / 'configs' / 'cbn' / 'README.md'
    text = readme.read_text()
    readme.write_text(text.replace('| 38.4 (', '| 39.4 ('))
    assert make_zoo.main([*root, '--check']) == 1
    make_zoo.main(root)
    assert readme.read_text() == text


@pytest.mark.parametrize('row', ROWS)
def test_the_documents_have_one_line_for_the_row_with_its_numbers_config_and_commands(row):
    name, box, mask = ROWS[row]
    folder, file = name.split('/')
    model = by_row()[row]
    digits = 2 if folder == 'mabn' else 1
    values = [f'{value:.{digits}f}' if value else '-' for value in (box, mask)]
    parameters = f'{model["Metadata"]["Parameters"]:,}'

    def line(text, title):
        (found,) = [line for line in text.splitlines() if line.startswith(f'| {row} |')]
        cells = [cell.strip() for cell in found.strip('|').split('|')]
        header = next(line for line in text.splitlines() if line.startswith('| row |') and 'box AP' in line)
        named = dict(zip([cell.strip() for cell in header.strip('|').split('|')], cells))
        assert named['box AP'].split(' ')[0] == values[0]
        assert named.get('mask AP', '-').split(' ')[0] == values[1]
        assert named['parameters'] == parameters
        return named[title]

    commands = line((ROOT / 'docs' / 'zoo.md').read_text(), 'train and test')
    kinds = 'bbox segm' if mask else 'bbox'
    assert commands == (
        f'`tools/dist_train.sh configs/{name}_coco.py {gpus(row)[0]}`<br>'
        f'`python tools/test.py configs/{name}_coco.py CHECKPOINT --eval {kinds}`'
    )
    assert line((CONFIGS / folder / 'README.md').read_text(), 'config here') == f'[{file}_coco.py]({file}_coco.py)'
    if folder == 'baselines':
        link = f'[{file}_coco.py](../baselines/{file}_coco.py)'
        assert line((CONFIGS / 'bnet' / 'README.md').read_text(), 'config here') == link


@pytest.mark.parametrize('folder', FOLDERS + CLASSIFIERS)
def test_links_of_a_readme_lead_somewhere(folder):
    readme = CONFIGS / folder / 'README.md'
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', readme.read_text()):
        assert target.startswith('https://') or (readme.parent / target).exists(), target


COMPARED = [path for path in CONFIGS.glob('*/*.py') if path.parent.name in ('demo', 'reproduce')]


@pytest.mark.parametrize(
    'path', [path for path in COMPARED if 'norm-batch' not in path.stem], ids=lambda path: path.stem
)
def test_what_is_compared_is_validated_on_the_way(path):
    """Of one validation there is no curve. Each checkpoint has one, as before."""
    cfg = Config.fromfile(path)
    every, end = cfg.train_cfg.val_interval, cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert end >= 3 * every and end % every == 0 and cfg.default_hooks.checkpoint.interval % every == 0
