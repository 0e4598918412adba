"""``--precise-bn N`` of training and testing: running statistics computed anew over N training images."""

import argparse

from mmengine.config import Config

from mmdet_norms.errors import UserError

from .common import set_on_hook


def add_precise_bn_argument(parser: argparse.ArgumentParser, when: str) -> None:
    """``--precise-bn N``.

    Args:
        when: before what the statistics are computed.
    """
    parser.add_argument(
        '--precise-bn',
        type=int,
        metavar='N',
        help=f'compute running statistics anew over N training images before {when} (docs/train.md)',
    )


def use_precise_bn(cfg: Config, images: int | None, at_test: bool = False) -> None:
    """Add the hook, or change the number of the config's own."""
    if images is None:
        return
    if images < 1:
        raise UserError(f'--precise-bn {images}: must be a number of training images, 1 or more, such as 1000')
    if not isinstance(cfg.get('train_dataloader'), dict):
        raise UserError(
            f'--precise-bn {images}: the config has no train_dataloader, whose images the statistics would be of'
        )
    set_on_hook(cfg, 'PreciseBNHook', num_images=images, at_test=at_test)
