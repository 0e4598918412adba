"""Classifier level: one network with several norms, what is timed, and what is published beside it."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdet_norms.benchmark.classifiers import PUBLISHED, Classifiers, resnet50
from mmdet_norms.benchmark.groups import Setting
from mmdet_norms.layers import MABN, CenConv2d, LN2d

CPU = Setting(torch.device('cpu'))


def small(*names):
    """ResNet-18 of an eighth of the width, and ten classes."""
    configs = resnet50(names)
    for cfg in configs.values():
        cfg.model.backbone.update(depth=18, base_channels=8)
        cfg.model.head.update(in_channels=64, num_classes=10)
        if cfg.model.backbone.norm_cfg.type == 'GN':
            cfg.model.backbone.norm_cfg.num_groups = 4
    return configs


@pytest.mark.parametrize(
    'name, kind',
    [('bn', nn.BatchNorm2d), ('mabn', MABN), ('in', nn.InstanceNorm2d), ('gn', nn.GroupNorm), ('ln', LN2d)],
)
def test_a_norm_is_at_all_53_places_of_the_resnet50(name, kind):
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(resnet50([name])[name].model)
    norms = [module for module in model.modules() if isinstance(module, kind)]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(norms) == len(convs) == 53
    assert all(norm.weight.requires_grad for norm in norms)
    assert all(isinstance(conv, CenConv2d) == (name == 'mabn') for conv in convs)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032  # torchvision's ResNet-50


def test_inference_is_timed_beside_batch_norm_and_folded_where_something_folds():
    classifiers = Classifiers(small('mabn', 'in', 'gn', 'ln'), CPU, (64, 64), 2, published=True)
    group = classifiers.group('inference')
    assert [(entry.case.name, entry.over) for entry in group.entries] == [
        ('bn', None),
        ('bn, fused', 'bn'),
        ('mabn', 'bn'),
        ('mabn, fused', 'bn, fused'),
        ('in', 'bn'),
        ('gn', 'bn'),
        ('ln', 'bn'),
    ]
    measured = group.measure(repeats=1, warmup=0)
    rows = {row['name']: row for row in measured['rows']}
    assert measured['size'] == [2, 3, 64, 64] and not any('note' in row for row in rows.values())
    assert all(row['calls_per_s'] == pytest.approx(row['images_per_s'] / 2) for row in rows.values())
    assert {name: row.get('published_per_s') for name, row in rows.items()} == dict(
        {'bn, fused': None, 'mabn, fused': None}, bn=237.88, mabn=237.88, gn=99.37, ln=125.44, **{'in': 105.60}
    )
    assert rows['gn']['published_ratio'] == pytest.approx(2.394, abs=1e-3)
    assert PUBLISHED['BN'] == PUBLISHED['MABN']


def test_folded_networks_compute_what_they_did_and_are_in_eval_mode():
    classifiers = Classifiers(small('mabn'), CPU, (32, 32), 3)
    data, seen = classifiers._data(3), {}
    group = classifiers.group('inference')
    for name, model in classifiers._built().items():
        model.register_forward_hook(
            lambda module, _, samples, name=name: seen.update({name: (samples, module.training)})
        )
    for entry in group.entries:
        entry.case.reset()
        entry.case.run()
    assert set(seen) == {'bn', 'mabn'} and not any(training for _, training in seen.values())
    from mmdet_norms import fuse

    for model in classifiers._built().values():
        scores = [torch.stack([s.pred_score for s in m.test_step(data)]) for m in (model, fuse(model))]
        torch.testing.assert_close(*scores)


def test_a_training_step_moves_no_weight_and_takes_the_batch():
    classifiers = Classifiers(small('mabn'), CPU, (32, 32), 2)
    group = classifiers.group('train')
    weights = {name: [p.clone() for p in model.parameters()] for name, model in classifiers._built().items()}
    rows = {row['name']: row for row in group.measure(repeats=1, warmup=0)['rows']}
    assert group.images == 2 and set(rows) == {'bn', 'mabn'} and rows['mabn']['over'] == 'bn'
    assert all(row['saved_bytes'] > 0 and 'published_per_s' not in row for row in rows.values())
    for name, model in classifiers._built().items():
        assert all(torch.equal(*pair) for pair in zip(weights[name], model.parameters()))
    assert int(next(m for m in classifiers._built()['mabn'].modules() if isinstance(m, MABN)).iters) > 1000
