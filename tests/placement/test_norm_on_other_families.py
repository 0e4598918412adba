"""Norms on families beyond Faster, Mask, Cascade R-CNN and RetinaNet: all norms of a model replaced, and ``--norm``."""

import functools
import types
import warnings

import pytest
import torch
from mmdet.models.dense_heads import paa_head
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from helpers.choice import in_turn
from helpers.other_families import DOCUMENT, FAMILIES, NORMS, REFUSED, Family, render, shrink, stock_config
from mmdet_norms import apply_norm, layers, replace_norm_cfg

CENTRED = dict(type='CenConv')
# A name for each family in turn.
NAMES = ('bnet5', 'gn', 'an', 'mabn', 'frozen', 'cbn', 'bnet3', 'an-gn-head', 'bnet7', 'brn', 'bn', 'sn')
NAMED = [(family, NAMES[i % len(NAMES)]) for i, family in enumerate(FAMILIES)]


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


class _NearestOfTwo:
    """Stands in for scikit-learn's mixture of two Gaussians, with which PAA splits positives from negatives."""

    def __init__(self, n_components, means_init, **_):
        self.means = means_init.reshape(1, 2)

    def fit(self, scores):
        return self

    def predict(self, scores):
        return abs(scores - self.means).argmin(1)

    def score_samples(self, scores):
        return -abs(scores - self.means).min(1)


@pytest.fixture(autouse=True)
def scikit_learn(monkeypatch):
    if paa_head.skm is None:
        monkeypatch.setattr(paa_head, 'skm', types.SimpleNamespace(GaussianMixture=_NearestOfTwo))


def shrunk(family: Family, model=None):
    """The family's config, its model (or the given one) shrunk."""
    cfg = stock_config(family)
    if model is not None:
        cfg.model = model
    shrink(cfg.model, family)
    cfg.optim_wrapper.type = 'OptimWrapper'  # some train with AMP, on GPUs only
    cfg.optim_wrapper.pop('loss_scale', None)
    cfg.optim_wrapper.optimizer.lr *= 0.01  # as at the start of a warm-up: at the full one, a first step may diverge
    return cfg


def build(model_cfg) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmcv's, of convolutions with bias before a norm
        model = MODELS.build(model_cfg)
    # mmdet 3.3.0 reads it in predict() and never sets it
    if type(getattr(model, 'bbox_head', None)).__name__ == 'SSDHead':
        model.bbox_head.loss_cls = None
    return revert_sync_batchnorm(model)  # as mmengine's Runner does with one process


def norms_of(model: nn.Module, *kinds: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


@functools.cache
def stock_norms(family: Family) -> int:
    """How many norms of feature maps the stock model has."""
    return len(norms_of(build(shrunk(family).model), _BatchNorm, nn.GroupNorm))


def train_and_test(cfg, family: Family, model: nn.Module, placed: list[nn.Module], unused: int = 0) -> None:
    """One step of each; every placed norm that can be trained, but for the unused ones, gets a gradient."""
    from mmdet.testing import demo_mm_inputs  # imports mmcv's ops, which mmdet_norms may have to supply first

    reached = set()
    for norm in placed:
        for parameter in norm.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, norm=norm: reached.add(norm))
    shape = [3, family.size, family.size]
    data = demo_mm_inputs(2, [shape, shape], num_items=[2, 1], num_classes=2, with_mask=family.masks)
    model.train()
    MessageHub.get_current_instance().update_info('epoch', 0)  # as the runner does; TOOD reads it
    losses = model.train_step(data, build_optim_wrapper(model, cfg.optim_wrapper))
    assert all(value.isfinite().all() for value in losses.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    trained = {norm for norm in placed if any(p.requires_grad for p in norm.parameters())}
    assert reached <= trained and len(trained) - len(reached) == unused
    model.eval()
    with torch.no_grad():
        results = model.test_step(data)
    assert len(results) == 2
    assert all(result.pred_instances.scores.isfinite().all() for result in results)
    assert all(result.pred_instances.bboxes.isfinite().all() for result in results)


CASES = [
    pytest.param(*case.values, id=case.id) if case.values in REFUSED else case
    for case in in_turn(FAMILIES, NORMS, each=2)
]


@pytest.mark.parametrize('name, norm', CASES)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_family_trains_and_is_tested_with_one_norm_in_place_of_all(name, norm):
    family = FAMILIES[name]
    cfg = shrunk(family)
    cfg.model = replace_norm_cfg(cfg.model, NORMS[norm], conv_cfg=CENTRED if norm == 'MABN' else None)
    model = build(cfg.model)
    model.init_weights()
    placed = norms_of(model, layers.NORMS[norm])
    assert len(placed) == stock_norms(family) - family.keeps > 0
    if norm == 'BNET':
        assert all(starts_as_batch_norm(layer) for layer in placed)

    if (name, norm) in REFUSED:
        with pytest.raises(RuntimeError, match='must follow a convolution directly, but autograd says'):
            train_and_test(cfg, family, model, placed)
    else:
        train_and_test(cfg, family, model, placed, family.unused)


def starts_as_batch_norm(layer: layers.BNET) -> bool:
    """Or as zero, where the last norm of a residual block does."""
    around = layer.bnconv.weight.detach().clone()
    centre = around[..., layer.kernel_size // 2, layer.kernel_size // 2]
    same = bool((centre == 1).all() or (centre == 0).all())
    centre.zero_()
    return same and not around.any()


def count(model: nn.Module, kind: type) -> tuple[int, int, int]:
    """Norms of a kind in the backbone (with the one inside a recursive pyramid), the neck, and anywhere else."""
    inner = getattr(getattr(model, 'neck', None), 'rfp_modules', nn.Module())
    backbone = len(norms_of(model.backbone, kind)) + len(norms_of(inner, kind))
    neck = len(norms_of(getattr(model, 'neck', nn.Module()), kind)) - len(norms_of(inner, kind))
    return backbone, neck, len(norms_of(model, kind)) - backbone - neck


def named(name: str, family: Family):
    """The shrunk config with the norms of a name, and the warning about parts that stay without."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = apply_norm(stock_config(family).model, name)
    stays = [str(w.message) for w in caught if 'stays without it' in str(w.message)]
    return shrunk(family, model), stays


@pytest.mark.parametrize('name', FAMILIES)
def test_the_names_put_their_norms_into_backbone_neck_and_heads_of_a_family(name):
    family = FAMILIES[name]
    for norm, kind, expected in (
        ('bnet5', layers.BNET, (family.blocks, 0, 0)),
        ('an', layers.AN, (family.blocks, 0, 0)),
        ('brn', layers.BRN, (family.norms, family.neck, family.heads)),
        ('gn', layers.GN, (0, family.neck, family.heads)),
    ):
        if norm == 'gn' and not family.neck + family.heads:
            with pytest.raises(ValueError, match='sits in FPN, box and mask head, but the model has none') as error:
                named(norm, family)
            assert family.stays in str(error.value)
            continue
        cfg, stays = named(norm, family)
        if norm in ('brn', 'gn'):
            assert stays == ([f'norm {norm!r}: stays without it: {family.stays}'] if family.stays else [])
        stock = count(build(shrunk(family).model), layers.GN) if norm == 'gn' else (0, 0, 0)
        found = count(build(cfg.model), kind)
        # group norm that stays where it was, in the backbone
        assert (found[0] - stock[0], *found[1:]) == expected, norm


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name, norm', NAMED)
def test_a_family_trains_and_is_tested_with_the_norms_of_a_name(name, norm):
    family = FAMILIES[name]
    try:
        cfg, _ = named(norm, family)
    except ValueError as error:
        assert not family.neck + family.heads and 'has none that takes it' in str(error)
        return
    model = build(cfg.model)
    model.init_weights()
    kinds = {'bn': _BatchNorm, 'an-gn-head': layers.AN, 'frozen': layers.FrozenBN}
    kind = kinds.get(norm) or layers.NORMS[norm.upper().rstrip('357')]
    unused = family.unused if norm in ('bn', 'mabn', 'brn', 'sn', 'rbn', 'bin') else 0
    train_and_test(cfg, family, model, norms_of(model, kind), unused)


@pytest.mark.parametrize('norm', NORMS)
def test_a_detector_without_norms_has_nothing_to_replace(norm):
    model = stock_config(Family('ssd/ssd300_coco.py')).model
    with pytest.raises(ValueError) as error:
        replace_norm_cfg(model, NORMS[norm])
    assert f'norm_cfg.type={norm!r} has nothing to replace' in str(error.value)
    assert "model.type='SingleStageDetector' has no norms" in str(error.value)


def test_a_name_on_a_backbone_without_norms_is_refused_or_leaves_the_backbone_alone():
    model = stock_config(Family('ssd/ssd300_coco.py')).model
    for name in ('bn', 'bnet5', 'an', 'mabn', 'frozen'):
        with pytest.raises(ValueError, match=r"model\.backbone\.type='SSDVGG' has no norms; use one of: ResNet,"):
            apply_norm(model, name)
    with pytest.warns(UserWarning, match=r'model\.bbox_head \(SSDHead has no norm to replace\)'):
        placed = apply_norm(model, 'gn')
    assert placed.backbone == model.backbone and placed.neck.norm_cfg.type == 'GN'


def test_group_norm_that_does_not_fit_a_narrow_model_says_what_does():
    model = apply_norm(stock_config(Family('yolox/yolox_tiny_8xb8-300e_coco.py')).model, 'gn')
    with pytest.raises(ValueError, match='num_groups=32 must divide the 48 channels of the layer; write one of: 1, 2'):
        build(model)


def test_the_document_shows_these_families():
    assert DOCUMENT.read_text(encoding='utf-8') == render(), 'run: python tests/helpers/other_families.py'
