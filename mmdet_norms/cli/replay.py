"""``tools/replay.py``: compute a training step again that was not finite."""

import argparse
from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample, ReIDDataSample, TrackDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement, InstanceData, LabelData, PixelData

from mmdet_norms.commands import typed
from mmdet_norms.compat.reading import read_file
from mmdet_norms.engine.nonfinite import image_files, replay

from .common import UserError, add_threads_argument, command, read_config, use_threads

_PARTS = (
    DetDataSample, ReIDDataSample, TrackDataSample, InstanceData, PixelData, LabelData, BaseDataElement,
    HorizontalBoxes, BitmapMasks, PolygonMasks, bytes,
)  # fmt: skip
"""What a batch is made of besides tensors and plain data; an empty array is pickled with the name of bytes."""


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Compute the step and say where the first bad number appears."""
    args = parse_args(argv)
    cfg = read_config(args.config)
    content = _read(args.file)
    threads = use_threads(args)
    if threads is not None:
        print(threads)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(get_device())
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for entry, finding in replay(model, content, wrapper):
        print(f'iteration {entry["iter"] + 1}, epoch {content["epoch"] + 1}')
        for image in image_files(entry['batch']):
            print(f'  image {image}')
        for name, value in finding.values.items():
            print(f'  {name}: {value.float().mean().item():.6g}')
        print(f'  {finding}')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('replay'),
        description='Compute a training step again that had NaN or inf in it, and name the first module that has.',
    )
    parser.add_argument('config', help='the config in the work dir of the run')
    parser.add_argument('file', help='WORK_DIR/nonfinite/iter_N.pth, which the run has written')
    add_threads_argument(parser)
    return parser.parse_args(argv)


def _read(path: str) -> dict:
    if not hasattr(torch.serialization, 'safe_globals'):
        raise UserError(f'{path}: reading the samples of a batch safely needs torch 2.5 or later')
    try:
        with torch.serialization.safe_globals(list(_PARTS)):
            content = read_file(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if not isinstance(content, dict) or not {'state_dict', 'batches', 'epoch'} <= content.keys():
        raise UserError(f'{path} is no file of a step to compute again; such files lie in WORK_DIR/nonfinite/')
    return content


if __name__ == '__main__':
    main()
