"""``tools/train.py``: train a detector from a config."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdet.registry import OPTIM_WRAPPERS, WEIGHT_INITIALIZERS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from mmdet_norms.compat import mmcv_ops
from mmdet_norms.deploy import is_fused
from mmdet_norms.engine import CPUAmpOptimWrapper
from mmdet_norms.entries import class_of, is_a, name_of

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
    _require_weights(cfg, args.config)
    add_hook(cfg, 'RandomStateHook')
    add_hook(cfg, 'PendingValidationHook')
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
    if not isinstance(cfg.get('optim_wrapper'), dict):
        raise UserError(
            '--amp replaces OptimWrapper, but the config has no optim_wrapper; write one, or leave --amp out'
        )
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if class_of(wrapper, OPTIM_WRAPPERS) not in (OptimWrapper, AmpOptimWrapper, CPUAmpOptimWrapper):
        raise UserError(
            f'--amp replaces OptimWrapper, but the config has optim_wrapper.type={name_of(wrapper, OPTIM_WRAPPERS)!r}; '
            "leave --amp out, or set optim_wrapper.type='OptimWrapper'"
        )
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


def _require_weights(cfg: Config, config: str) -> None:
    """Raise if a local file that the run starts from is not there, or holds a fused model."""
    option = '--resume' if cfg.get('resume') else 'load_from'
    start = cfg.get('load_from')
    last = Path(cfg.work_dir) / 'last_checkpoint'
    if start is None and cfg.get('resume') and last.is_file():
        start = last.read_text().strip()
    pretrained = [(key, path) for key, path in _pretrained(cfg.model, 'model') if '://' not in path]
    for key, path in pretrained:
        if not Path(path).expanduser().is_file():
            raise UserError(_missing_weights(key, path, config, option if start else None))
    if start is not None:
        require_checkpoint(start, option)
    for key, path in [*pretrained, (option, start)]:
        if path is not None and is_fused(Path(path).expanduser()):
            raise UserError(
                f'{key}: {path} is the checkpoint of a fused model, which has no norms to train; name the checkpoint '
                'that it was made from'
            )


def _pretrained(node: object, key: str) -> Iterator[tuple[str, str]]:
    """Key and path of every file of weights that building the model reads."""
    if isinstance(node, (list, tuple)):
        for i, entry in enumerate(node):
            yield from _pretrained(entry, f'{key}.{i}')
    elif isinstance(node, dict):
        if node.get('checkpoint') and is_a(node, 'Pretrained', WEIGHT_INITIALIZERS):
            yield f'{key}.checkpoint', node['checkpoint']
        for name, value in node.items():
            yield from _pretrained(value, f'{key}.{name}')


def _missing_weights(key: str, path: str, config: str, replaced_by: str | None) -> str:
    """What to do about a file of pretrained weights that is not there.

    Args:
        replaced_by: the option whose checkpoint replaces the weights; mmengine reads them nevertheless.
    """
    message = f'{key}: there is no file {path}'
    folder = '/'.join(Path(path).parts[:-1])
    for parent in Path(config).parents[:2]:  # configs/NAME/ and configs/NAME/published-checkpoints/
        readme = parent / 'README.md'
        if folder and readme.is_file() and f'{folder}/' in readme.read_text(encoding='utf-8'):
            message += f'; {readme} says where these weights are to be had and how to convert them'
            break
    message += f'. Name another file with --cfg-options {key}=FILE'
    if replaced_by is not None:
        init_cfg = key[: key.rindex('init_cfg') + len('init_cfg')]
        message += f'; or leave them out, since the checkpoint of {replaced_by} replaces them: {init_cfg}=None'
    return message


if __name__ == '__main__':
    main()
