"""A config that is switched over to a convention: option ``--geometry`` of the commands."""

from collections.abc import Iterator, Mapping

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ...entries import mappings, name_of
from ...layers._args import ConfigError
from .conventions import CONVENTIONS

_PARTS = {
    'rpn_head.anchor_generator': dict(AnchorGenerator='PlusOneAnchorGenerator'),
    'rpn_head.bbox_coder': dict(DeltaXYWHBBoxCoder='PlusOneDeltaXYWHBBoxCoder'),
    'roi_head.bbox_roi_extractor': dict(SingleRoIExtractor='PlusOneRoIExtractor'),
    'roi_head.bbox_head': dict(
        Shared2FCBBoxHead='PlusOneShared2FCBBoxHead',
        Shared4Conv1FCBBoxHead='PlusOneShared4Conv1FCBBoxHead',
        NormShared4Conv1FCBBoxHead='PlusOneShared4Conv1FCBBoxHead',
    ),
    'roi_head.bbox_head.bbox_coder': dict(DeltaXYWHBBoxCoder='PlusOneDeltaXYWHBBoxCoder'),
    'roi_head.mask_roi_extractor': dict(SingleRoIExtractor='PlusOneRoIExtractor'),
    'roi_head.mask_head': dict(FCNMaskHead='PlusOneFCNMaskHead', NormFCNMaskHead='PlusOneFCNMaskHead'),
}
"""Place in the model -> stock type -> the type that takes a ``convention``."""


def use_geometry(cfg: Config, convention: str) -> None:
    """Let a Faster, Mask or Cascade R-CNN and its validation and test images follow a convention. In place.

    Weights stay as they are: names and shapes do not depend on it.

    Args:
        cfg: with ``model``, ``val_dataloader`` and ``test_dataloader``, where it has them. One that follows a
            convention already takes this one.
        convention: 'mmdet-v1' or 'maskrcnn-benchmark'.

    Raises:
        ConfigError: unknown convention; a part of the model, or the way its images are resized, has no legacy form.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f'geometry {convention!r} is unknown; write one of: {", ".join(CONVENTIONS)}')
    for place, types in _PARTS.items():
        parts = list(_at(cfg.get('model'), place.split('.')))
        if not parts and 'mask' not in place:
            raise ConfigError(f'the model has no {place}; Faster, Mask and Cascade R-CNN have a legacy geometry')
        for part in parts:
            name = name_of(part)
            if name not in types and name not in types.values():
                raise ConfigError(f'model.{place}.type={name!r} has no legacy form; {" and ".join(types)} have one')
            part.update(type=types.get(name, name), convention=convention)
            if place.endswith('roi_extractor'):
                part['roi_layer'].pop('aligned', None)
                part['roi_layer']['sampling_ratio'] = 2
    for loader in ('val_dataloader', 'test_dataloader'):
        if cfg.get(loader):
            _resize_as(cfg[loader], f'{loader}.dataset.pipeline', convention)


def _at(node, keys: list[str]) -> Iterator[Mapping]:
    """The dicts at a place of the model; of a list, in each of its entries."""
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from _at(entry, keys)
    elif isinstance(node, Mapping):
        if keys:
            yield from _at(node.get(keys[0]), keys[1:])
        else:
            yield node


def _resize_as(dataloader: Mapping, place: str, convention: str) -> None:
    steps = [step for _, step in mappings(dataloader) if name_of(step, TRANSFORMS) in ('Resize', 'LegacyResize')]
    if not steps:
        raise ConfigError(f'{place} has no step Resize, which is the one with a legacy form')
    for step in steps:
        if name_of(step, TRANSFORMS) == 'Resize' and not step.get('keep_ratio'):
            raise ConfigError(f'{place}: Resize has a legacy form only with keep_ratio=True')
        scale = step['scale']
        step.clear()
        step.update(type='LegacyResize', scale=scale, convention=convention)
