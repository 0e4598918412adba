"""``tools/train.py``: train a detector from a config."""

import argparse
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.device import get_device

from mmdet_norms.compat import mmcv_ops

from .common import (
    UserError,
    add_common_arguments,
    add_hook,
    build_runner,
    command,
    load_config,
    require_annotations,
    require_checkpoint,
    run_with_checkpoint,
)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(argv)
    cfg = train_config(args)
    runner = build_runner(cfg)
    run_with_checkpoint(runner.train, cfg.get('load_from'))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='tools/train.py', description='Train a detector.')
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('--amp', action='store_true', help='mixed precision (bfloat16 on a CPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's auto_scale_lr.base_batch_size to the real one",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from CKPT or, without a value, from the latest checkpoint in the work dir',
    )
    parser.add_argument(
        '--tune-mode',
        action='store_true',
        help='compute norms with fixed statistics (norm_eval, frozen_stages, FrozenBN) as part of their convolutions',
    )
    parser.add_argument('--seed', type=int, help='seed of the run')
    parser.add_argument('--deterministic', action='store_true', help='deterministic algorithms, slower')
    add_common_arguments(parser)
    return parser.parse_args(argv)


def train_config(args: argparse.Namespace) -> Config:
    """The config that the arguments of a training run lead to."""
    cfg = load_config(args)
    for dataloader in ('train_dataloader', 'val_dataloader'):
        require_annotations(cfg, dataloader)
    if args.amp:
        _use_mixed_precision(cfg)
    if args.auto_scale_lr:
        _scale_learning_rate(cfg)
    if args.resume is not None:
        _resume(cfg, args.resume)
    if args.tune_mode:
        add_hook(cfg, 'TuneModeHook')
    if args.seed is not None or args.deterministic:
        asked = dict(seed=args.seed, deterministic=args.deterministic)
        cfg.randomness = dict(cfg.get('randomness') or {}, **asked)
    if args.launcher != 'none':
        # processes see different images, so their running statistics differ; without this the
        # validation mixes all of them while the checkpoint holds those of the first process
        add_hook(cfg, 'SyncBuffersHook')
    return cfg


def _use_mixed_precision(cfg: Config) -> None:
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp replaces OptimWrapper, but the config has optim_wrapper.type={wrapper!r}')
    if get_device() == 'cpu':
        if mmcv_ops.active() == 'compiled':
            raise UserError(
                '--amp: compiled mmcv has no bfloat16 RoIAlign on a CPU; leave --amp out, or use mmcv-lite, whose ops '
                'this package supplies'
            )
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype'):  # bfloat16 is all a CPU has, and it needs no scaling
            cfg.optim_wrapper.pop(key, None)
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _scale_learning_rate(cfg: Config) -> None:
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise UserError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size, the batch size the learning rate was '
            'chosen for; add --cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def _resume(cfg: Config, source: str) -> None:
    cfg.resume = True
    cfg.load_from = None
    if source != 'auto':
        require_checkpoint(source, '--resume')
        cfg.load_from = source


if __name__ == '__main__':
    main()
