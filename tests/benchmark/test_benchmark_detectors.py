"""Detector level: twins with batch norm, shared weights, and what is timed."""

import copy
import functools

import pytest
import torch
from mmengine.config import Config

from helpers.tiny import CONFIG
from mmdet_norms.benchmark.detectors import Detectors, batch_norm_twin
from mmdet_norms.benchmark.groups import Setting
from mmdet_norms.cli.common import read_config
from mmdet_norms.layers import MABN, NORMS
from mmdet_norms.placement import PLACEMENTS, apply_norm

CPU = Setting(torch.device('cpu'))
MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp('tiny') / 'tiny.py'
    path.write_text(CONFIG.replace('{root}', str(path.parent)))
    return str(path)


read = functools.lru_cache(read_config)


def with_norm(path, name):
    cfg = copy.deepcopy(read(path))
    cfg.model = apply_norm(cfg.model, name)
    return cfg


def types_of(node, key='norm_cfg'):
    """The types of all norm_cfgs (or conv_cfgs) in a config."""
    if isinstance(node, (list, tuple)):
        return {kind for child in node for kind in types_of(child, key)}
    if not isinstance(node, dict):
        return set()
    found = set()
    for name, value in node.items():
        if name in (key, 'norm_at') and value:
            values = value.values() if name == 'norm_at' else value if isinstance(value, list) else [value]
            found |= {cfg['type'] for entry in values for cfg in (entry if isinstance(entry, list) else [entry])}
        else:
            found |= types_of(value, key)
    return found


class TestTwins:
    @pytest.mark.parametrize('name', sorted(PLACEMENTS))
    def test_a_twin_has_batch_norm_wherever_there_was_another_norm(self, name):
        cfg = with_norm(MASK_RCNN, name)
        before = Config(dict(model=cfg.model)).pretty_text
        twin = batch_norm_twin(cfg.model)
        assert Config(dict(model=cfg.model)).pretty_text == before
        assert types_of(twin) == {'BN'} and types_of(twin, 'conv_cfg') <= {'BN', 'None'}
        for part in ('neck', 'roi_head'):
            assert bool(types_of(twin[part])) == bool(types_of(cfg.model[part]) & set(NORMS)), part
        assert twin['backbone']['type'] == 'ResNet'

    @pytest.mark.parametrize('name', ['bnet5', 'an', 'frozen'])
    def test_norms_that_sit_in_the_backbone_only_share_the_stock_detector(self, name):
        assert batch_norm_twin(with_norm(MASK_RCNN, name).model) == with_norm(MASK_RCNN, 'bn').model

    def test_twins_stand_before_their_detectors_and_are_shared(self):
        names = ['bnet3', 'cbn', 'syncbn', 'bn', 'mabn']
        detectors = Detectors({name: with_norm(MASK_RCNN, name) for name in names}, CPU, (64, 96), 1)
        assert list(detectors.configs) == ['bnet3', 'bn (as cbn)', 'cbn', 'syncbn', 'bn', 'bn (as mabn)', 'mabn']
        assert detectors.twins == {
            'bnet3': 'bn',
            'bn': 'bn',
            'cbn': 'bn (as cbn)',
            'syncbn': 'bn (as cbn)',
            'bn (as cbn)': 'bn (as cbn)',
            'mabn': 'bn (as mabn)',
            'bn (as mabn)': 'bn (as mabn)',
        }


class TestMeasuring:
    def test_every_candidate_computes_what_its_twin_computes(self, tiny):
        names = ['bn', 'bnet5', 'cbn', 'mabn', 'an']
        detectors = Detectors({name: with_norm(tiny, name) for name in names}, CPU, (64, 96), 2)
        models = detectors._built()
        assert not detectors._failed and len(models) == 7
        x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = {name: model.eval().extract_feat(x) for name, model in models.items()}
        for name, twin in detectors.twins.items():
            for ours, theirs in zip(features[name], features[twin]):
                assert theirs.std() > 0
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f'{name}: {m}')

    def test_a_training_step_is_timed_in_the_steady_state_and_moves_no_weight(self, tiny):
        detectors = Detectors({name: with_norm(tiny, name) for name in ('bn', 'mabn')}, CPU, (64, 96), 2)
        group = detectors.group('train')
        weights = {name: [p.clone() for p in model.parameters()] for name, model in detectors._built().items()}
        rows = {row['name']: row for row in group.measure(1, 0)['rows']}
        assert list(rows) == ['bn', 'bn (as mabn)', 'mabn'] and rows['mabn']['over'] == 'bn (as mabn)'
        for name, row in rows.items():
            assert 'note' not in row and row['saved_bytes'] > 0 and row['peak_bytes'] > 0, row
            assert row['images_per_s'] == pytest.approx(2 / row['ms'] * 1e3)
            model = detectors._built()[name]
            assert all(torch.equal(a, b) for a, b in zip(weights[name], model.parameters()))
            assert row['parameters'] == sum(p.numel() for p in model.parameters())
        mabn = [m for m in detectors._built()['mabn'].modules() if isinstance(m, MABN) and m.iters > 0]
        assert mabn and all(m.iters > m.RENORM_DELAY for m in mabn)

    def test_inference_is_timed_as_it_is_and_folded_in_one_run(self, tiny):
        pytest.importorskip('mmdet_norms.deploy')
        detectors = Detectors({name: with_norm(tiny, name) for name in ('bn', 'bnet3')}, CPU, (64, 96), 1)
        group = detectors.group('inference')
        result = group.measure(1, 0)
        over = {row['name']: row['over'] for row in result['rows']}
        assert over == {'bn': None, 'bn, fused': 'bn', 'bnet3': 'bn', 'bnet3, fused': 'bn, fused'}
        assert not any('note' in row for row in result['rows']), result
        assert [entry.case.name for entry in detectors.group('inference', fused=False).entries] == ['bn', 'bnet3']

    def test_a_detector_that_cannot_be_built_is_a_note_beside_the_others(self, tiny):
        configs = {'bn': with_norm(tiny, 'bn'), 'gn': with_norm(tiny, 'gn')}  # 32 groups, 16 channels
        group = Detectors(configs, CPU, (64, 96), 1).group('inference', fused=False)
        rows = {row['name']: row for row in group.measure(1, 0)['rows']}
        assert 'num_groups=32 must divide' in rows['gn']['note'] and rows['bn']['ms'] > 0

    def test_mixed_precision_trains_in_bfloat16(self, tiny):
        setting = Setting(CPU.device, 'bf16', 'channels_last')
        detectors = Detectors({'bn': with_norm(tiny, 'bn')}, setting, (64, 96), 1)
        group = detectors.group('train')
        model, seen = detectors._built()['bn'], []
        model.backbone.layer1[0].bn1.register_forward_hook(lambda _, args, y: seen.append(args[0]))
        group.entries[0].case.run()
        assert seen[0].dtype == torch.bfloat16 and seen[0].is_contiguous(memory_format=torch.channels_last)
