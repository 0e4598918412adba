"""Whether a state dict is that of a model: same keys, shapes and kinds, without memory for the model."""

import copy
import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..layers import warn_if_uncentred
from .layouts import DEFAULTS, STARTS, Layout


class Differences(NamedTuple):
    """Between a state dict and a model; false if there are none.

    Args:
        left_over: keys that the model lacks.
        missing: keys that the state dict lacks.
        mismatched: key -> (shape, or kind of number where the shape is right) of the state dict, of the model.
    """

    left_over: list[str]
    missing: list[str]
    mismatched: dict[str, tuple[str, str]]

    def __bool__(self) -> bool:
        return any(self)


def find_differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Differences:
    """Compare a state dict with the one of a model (on whatever device)."""
    mismatched = {}
    for key in [key for key in expected if key in state]:
        have, want = state[key], expected[key]
        if have.shape != want.shape:
            mismatched[key] = (str(tuple(have.shape)), str(tuple(want.shape)))
        elif have.is_floating_point() != want.is_floating_point():
            mismatched[key] = (str(have.dtype), str(want.dtype))
    return Differences(
        [key for key in state if key not in expected], [key for key in expected if key not in state], mismatched
    )


def model_cfg_of(config) -> Mapping:
    """``model`` of a config, of its file, or of its name (``mmdet::...``); a model dict is returned as it is."""
    if isinstance(config, (str, os.PathLike)):
        name = os.fspath(config)
        # By `_base_`, because Config.fromfile reads files only.
        config = Config.fromstring(f'_base_ = {name!r}', '.py') if '::' in name else Config.fromfile(name)
    if not isinstance(config, (Mapping, Config)):
        raise ValueError(f'config={config!r} must be a config, its file or name, or a model dict')
    return config.get('model', config)


def build(model_cfg: Mapping, kind: str) -> nn.Module:
    """The model (``kind='detector'``) or its backbone on the meta device: without memory for its weights.

    Raises:
        ValueError: the model cannot be built.
    """
    if kind == 'backbone' and 'backbone' in model_cfg:
        model_cfg = model_cfg['backbone']
    try:
        with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
            return MODELS.build(copy.deepcopy(model_cfg))  # building changes it
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'the model of the config cannot be built: {error}') from error


def start_absent(state: dict[str, Tensor], expected: Mapping[str, Tensor], kind: str) -> dict[str, str]:
    """Add the buffers that published files may lack, with their layer's initial values; says which, and with what."""
    absent = {key for key in expected if key not in state}
    present = {key.rpartition('.')[2] for key in state}
    started = {}
    for key in [key for key in expected if key in absent]:
        owner, _, name = key.rpartition('.')
        start = STARTS.get(name)
        if (
            start is not None
            and name not in present
            and f'{owner}.{start.beside}' in state
            and all(f'{owner}.{other}' in absent for other in start.group)
            and not (start.backbone_only and kind == 'detector')
        ):
            like = expected[key]
            state[key] = torch.full(like.shape, start.value, dtype=like.dtype)
            started[key] = f'{start.value}, as a new layer has'
    return started


def unlike_training(model: nn.Module, model_cfg: Mapping, layout: Layout) -> list[str]:
    """What no state dict shows: one message each where the detector would compute something else with the weights."""
    messages = []
    for path, trained in layout.expects.items():
        part, key = path.split('.')
        if part in model_cfg:
            value = model_cfg[part].get(key, DEFAULTS.get(path))
            value = list(value) if isinstance(value, tuple) else value
            if value != trained:
                messages.append(f'model.{path} is {value!r}, but these weights were trained with {trained!r}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        warn_if_uncentred(model)
    return messages + [str(warning.message) for warning in caught]
