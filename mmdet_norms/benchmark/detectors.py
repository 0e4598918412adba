"""Whole detectors: a training step, inference, and inference with the norms folded away."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS, init_default_scope
from torch import nn

from ..entries import is_a, name_of
from ..layers import NORMS, CenConv2d, another_function_allowed, link_convs
from ..placement import BATCH_NORM, CENTRED, STANDARDIZED, VARIANTS
from .groups import Entry, Group, Setting
from .layers import failed_entry, settle, settling_calls
from .measure import Case, owned_tensors, peak_bytes, saved_bytes

MODES = ('train', 'inference')
CONFIG = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
NORMS_BY_DEFAULT = ('bn', 'bnet5', 'cbn', 'mabn', 'an')

_BOXES_PER_IMAGE = 8
_STOCK = {ours: stock for stock, ours in VARIANTS.items()}


class Detectors:
    """Detectors that differ in their norms, measured beside *batch norm twins*.

    The twin of a detector is the same detector with batch norm in place of every other norm. Named norms bring heads
    of their own (four convolutions in the box head), and only the twin tells what the norm costs. Detectors whose
    twins are alike share one; a candidate that is its own twin is a baseline.

    Weights are drawn, not loaded, and each candidate takes those of its twin, which makes it the same function: the
    same proposals survive, so that non-maximum suppression costs all of them the same. The learning rate is 0, which
    keeps it so, and the samplers are seeded alike before each call.

    Args:
        configs: name -> config, with the norms in place already.
        setting: device, precision, layout.
        image: height and width.
        batch: images of a training step. Inference takes one.
    """

    level = 'detector'

    def __init__(self, configs: Mapping[str, Config], setting: Setting, image: tuple[int, int], batch: int):
        self.configs, self.twins = _with_twins(configs)
        self.setting = setting
        self.image = image
        self.batch = batch
        self._models: dict[str, nn.Module] | None = None
        self._failed: dict[str, Exception] = {}

    def group(self, mode: str, fused: bool = True, tuned: bool = False) -> Group:
        """The candidates of one mode. Ask for 'inference' first: training moves running statistics.

        Args:
            mode: 'train' (preprocessing, forward, backward, optimizer) or 'inference' (preprocessing to boxes).
            fused: measure every detector with its norms folded as well, in the same interleaved run. For 'inference'.
            tuned: measure every detector in tune mode as well (:func:`mmdet_norms.engine.tune_mode`). For 'train'.
        """
        images = self.images(mode)
        group = Group(self.level, mode, self.setting, (images, 3, *self.image), images=images)
        data = self._data(images)
        for name, model in self._built().items():
            over = self.twins[name] if self.twins[name] != name else None
            if name in self._failed:
                group.entries.append(failed_entry(name, self._failed[name]))
            elif mode == 'train':
                group.entries.append(self._train_entry(name, over, model, data, self.configs[name]))
                if tuned:
                    group.entries.append(self._tuned_entry(name, model, data))
            else:
                group.entries.append(self._inference_entry(name, over, model, data))
                if fused:
                    group.entries += self._fused_entry(name, model, data)
        return group

    def images(self, mode: str) -> int:
        """Of one call."""
        return self.batch if mode == 'train' else 1

    def _data(self, images: int) -> dict:
        """What a data loader would give."""
        data = demo_mm_inputs(
            images,
            (3, *self.image),
            [_BOXES_PER_IMAGE] * images,
            with_mask=True,
            use_box_type=True,
            device=str(self.setting.device),
        )
        for sample in data['data_samples']:
            sample.gt_instances.labels.zero_()  # the one class that every detector has
        return data

    def _facts(self, name: str) -> dict:
        """More columns of the inference of a model as it is."""
        return {}

    def _built(self) -> dict[str, nn.Module]:
        if self._models is None:
            self._models = {}
            for name, cfg in self.configs.items():
                try:
                    self._models[name] = _build(cfg)
                except Exception as error:
                    self._models[name], self._failed[name] = None, error
            self._share_weights()
            for model in self._models.values():
                if model is not None:
                    model.to(self.setting.device)
                    model.to(memory_format=self.setting.memory_format)
        return self._models

    def _share_weights(self) -> None:
        for name in dict.fromkeys(self.twins.values()):
            twin = self._models[name]
            family = [self._models[other] for other, its in self.twins.items() if its == name and other != name]
            family = [model for model in family if model is not None]
            if twin is None:
                continue
            for model in family:
                _centre_as(model, twin)
            for model in family:
                with warnings.catch_warnings(), another_function_allowed():  # group norm has the convolutions at least
                    warnings.simplefilter('ignore')  # of MABN, which takes a batch norm over
                    model.load_state_dict(twin.state_dict(), strict=False)

    def _train_entry(self, name: str, over: str | None, model: nn.Module, data: dict, cfg: Config) -> Entry:
        optim_wrapper = build_optim_wrapper(model, _optim_cfg(cfg, self.setting))

        def forward() -> dict:
            with self.setting.autocast():
                return model(**model.data_preprocessor(data, True), mode='loss')

        def run() -> None:
            model.train_step(data, optim_wrapper)

        def reset() -> None:
            model.train()
            _seed()

        def facts() -> dict:
            reset()
            peak = peak_bytes(run, self.setting.device)
            optim_wrapper.zero_grad()
            return dict(
                peak_bytes=peak, saved_bytes=saved_bytes(forward, owned_tensors(model)), parameters=_count(model)
            )

        model.train()
        case = Case(name, run, reset, lambda: settle(model), settling_calls(model))
        return Entry(case, over, facts)

    def _tuned_entry(self, name: str, model: nn.Module, data: dict) -> Entry:
        label = f'{name}, tune mode'
        try:
            from ..engine import tune_mode

            model = copy.deepcopy(model)
            if not tune_mode(model).active:
                raise ValueError('no norm of it has fixed statistics in training (norm_eval, frozen_stages, FrozenBN)')
        except Exception as error:
            return failed_entry(label, error)
        return self._train_entry(label, name, model, data, self.configs[name])

    def _inference_entry(self, name: str, over: str | None, model: nn.Module, data: dict) -> Entry:
        def run() -> None:
            with torch.no_grad(), self.setting.autocast():
                model.test_step(data)

        def reset() -> None:
            model.eval()
            _seed()

        def facts() -> dict:
            reset()
            return dict(self._facts(name), peak_bytes=peak_bytes(run, self.setting.device), parameters=_count(model))

        return Entry(Case(name, run, reset), over, facts)

    def _fused_entry(self, name: str, model: nn.Module, data: dict) -> list[Entry]:
        """One row; none where all norms are as they were, as in a network of group norms."""
        label, twin = _fused(name), self.twins[name]
        over = _fused(twin) if twin != name else name
        try:
            from ..deploy import fuse

            fused = fuse(model.eval())
        except Exception as error:
            return [failed_entry(label, error)]
        if not (fused.fuse_report.folded or fused.fuse_report.reduced):
            return []
        return [self._inference_entry(label, over, fused, data)]


def batch_norm_twin(model_cfg: Mapping) -> dict:
    """The model config with batch norm in place of every other norm, at the same places. Not changed in place."""
    return _with_batch_norm(copy.deepcopy(model_cfg))


def _with_batch_norm(node):
    if isinstance(node, (list, tuple)):
        return type(node)(_with_batch_norm(child) for child in node)
    if not isinstance(node, Mapping):
        return node
    if 'norm_at' in node:
        del node['norm_at']
        node['type'] = _STOCK.get(name_of(node), node['type'])
    if name_of(node.get('conv_cfg')) in (CENTRED['type'], STANDARDIZED['type']):
        del node['conv_cfg']
    for key, value in node.items():
        if key == 'norm_cfg':
            node[key] = [_plain(cfg) for cfg in value] if isinstance(value, (list, tuple)) else _plain(value)
        else:
            node[key] = _with_batch_norm(value)
    return node


def _plain(norm_cfg: Mapping | None) -> Mapping | None:
    return ConfigDict(BATCH_NORM) if norm_cfg and name_of(norm_cfg) in (*NORMS, 'IN') else norm_cfg


def _with_twins(configs: Mapping[str, Config]) -> tuple[dict[str, Config], dict[str, str]]:
    """The configs, each new twin before the first that needs it; and name -> name of its twin."""
    everything, twins = {}, {}
    for name, cfg in configs.items():
        twin = batch_norm_twin(cfg.model)
        alike = [other for other, known in {**everything, **configs}.items() if known.model == twin]
        twins[name] = name if name in alike else alike[0] if alike else f'bn (as {name})'
        if not alike:
            everything[twins[name]] = copy.deepcopy(cfg)
            everything[twins[name]].model = twin
            twins[twins[name]] = twins[name]
        everything[name] = cfg
    return everything, twins


def _build(cfg: Config) -> nn.Module:
    """The detector with drawn weights, and every CBN past its burn-in."""
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model_cfg = copy.deepcopy(cfg.model)
    for node in _dicts(model_cfg):
        if is_a(node.get('init_cfg'), 'Pretrained', WEIGHT_INITIALIZERS):
            node['init_cfg'] = None
        if is_a(node, 'CBN'):
            node['burnin'] = 0
    torch.manual_seed(0)
    with _quiet():
        model = MODELS.build(model_cfg)
        model.init_weights()
    link_convs(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mmengine's lines about each parameter's initialization."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _dicts(node) -> Iterator[dict]:
    if isinstance(node, Mapping):
        yield node
    if isinstance(node, (Mapping, list, tuple)):
        for child in node.values() if isinstance(node, Mapping) else node:
            yield from _dicts(child)


@torch.no_grad()
def _centre_as(model: nn.Module, twin: nn.Module) -> None:
    """Centre the weights of ``twin`` where ``model`` centres its own, so that they stay one function."""
    convs = dict(twin.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, CenConv2d) and name in convs:
            weight = convs[name].weight
            weight.sub_(weight.mean((1, 2, 3), keepdim=True))


def _optim_cfg(cfg: Config, setting: Setting) -> dict:
    optim_cfg = copy.deepcopy(cfg.optim_wrapper)
    optim_cfg.optimizer.lr = 0.0  # the weights stay, the work is the same
    if setting.half is not None:
        on_cpu = setting.device.type == 'cpu'
        optim_cfg.type = 'CPUAmpOptimWrapper' if on_cpu else 'AmpOptimWrapper'
        for key in ('loss_scale', 'dtype'):
            optim_cfg.pop(key, None)
        if not on_cpu:
            optim_cfg.update(loss_scale='dynamic', dtype=str(setting.half).removeprefix('torch.'))
    return optim_cfg


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def _fused(name: str) -> str:
    return f'{name}, fused'


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
