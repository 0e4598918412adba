"""``tools/export.py``: fold the norms of a trained detector into its convolutions and save what results."""

import argparse
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdet_norms.deploy import PARTS, export_onnx, fuse, is_fused, save_fused
from mmdet_norms.files import remove_unfinished, require_writable
from mmdet_norms.placement import PLACEMENTS

from .common import UserError, command, load_config, require_checkpoint, run_with_checkpoint
from .config_checks import config_problems, require_none
from .options import add_option_arguments

_ONNX_ONLY = ('size', 'batch', 'dynamic', 'part')


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    run(parse_args(argv))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog='tools/export.py',
        description='Fold the norms of a detector into its convolutions, and save the model: as a checkpoint for '
        'tools/test.py and load_fused (OUT.pth), or its convolutional part as a graph (OUT.onnx).',
    )
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('checkpoint', help='checkpoint file or URL, of the trained or of the fused model')
    parser.add_argument('out', metavar='OUT', help='file to write: *.pth or *.onnx')
    parser.add_argument(
        '--norm', metavar='NAME', help=f'the norms that the model was trained with: {", ".join(PLACEMENTS)}'
    )
    add_option_arguments(parser)
    onnx = parser.add_argument_group('for OUT.onnx')
    onnx.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='height and width of the images; default: 800 1344'
    )
    onnx.add_argument('--batch', type=int, metavar='N', help='images per call; default: 1')
    onnx.add_argument('--dynamic', action='store_const', const=True, help='leave batch, height and width open')
    onnx.add_argument(
        '--part',
        choices=PARTS,
        help='features: backbone and neck; heads: the raw maps of the dense head too. Default: heads for a '
        'single-stage detector, features for others',
    )
    # what load_config reads besides
    parser.set_defaults(data_root=None, work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Build, load, fuse, save."""
    _check_out(args)
    require_writable(args.out, 'OUT')
    remove_unfinished(Path(args.out).parent)
    cfg = load_config(args)
    require_none(config_problems(cfg, ()))
    require_checkpoint(args.checkpoint, 'CKPT')
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    run_with_checkpoint(functools.partial(_export, cfg, args), args.checkpoint)


def _export(cfg: Config, args: argparse.Namespace) -> None:
    model, meta = _fused_model(cfg, args)
    print(model.fuse_report)
    if Path(args.out).suffix == '.pth':
        save_fused(model, args.out, meta)
        print(f'Checkpoint of the fused model written to {args.out}')
    else:
        names = _export_onnx(model, args)
        print(f'ONNX graph written to {args.out}; input: image; outputs: {", ".join(names)}')


def _check_out(args: argparse.Namespace) -> None:
    suffix = Path(args.out).suffix
    if suffix not in ('.pth', '.onnx'):
        raise UserError(f'OUT {args.out}: write *.pth for a checkpoint or *.onnx for a graph')
    given = [f'--{key}' for key in _ONNX_ONLY if getattr(args, key) is not None]
    if suffix == '.pth' and given:
        raise UserError(f'{" and ".join(given)}: of no use for a checkpoint; write OUT as *.onnx, or leave it out')
    for key in ('size', 'batch'):
        value = getattr(args, key)
        numbers = [value] if isinstance(value, int) else value or []
        if any(number < 1 for number in numbers):
            raise UserError(f'--{key} {" ".join(map(str, numbers))}: must be positive')


def _fused_model(cfg: Config, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    checkpoint = CheckpointLoader.load_checkpoint(args.checkpoint, map_location='cpu')
    model = MODELS.build(cfg.model)
    already = is_fused(checkpoint)
    if already:
        model = fuse(model, inplace=True)
    _load(model, checkpoint.get('state_dict', checkpoint), args)
    return (model if already else fuse(model, inplace=True)), checkpoint.get('meta') or {}


def _load(model: nn.Module, state: dict, args: argparse.Namespace) -> None:
    """Load strictly where it counts: a detector with weights that nobody trained is not worth exporting."""
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    trained = {name for name, _ in model.named_parameters()}
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f'{args.checkpoint} does not fit the model of {args.config}: {error}') from error
    missing = [
        key for key in result.missing_keys if key in trained or key.endswith(('running_mean', 'running_var', 'weight'))
    ]
    if missing:
        raise UserError(
            f'{args.checkpoint} lacks {len(missing)} weights of the model of {args.config}, e.g. {missing[0]}; give '
            'the config that it was trained with, and --norm if that was used'
        )
    if result.unexpected_keys:
        print(f'not used: {len(result.unexpected_keys)} entries of the checkpoint, e.g. {result.unexpected_keys[0]}')


def _export_onnx(model: nn.Module, args: argparse.Namespace) -> list[str]:
    # of the exporter: that torchvision, whose operators do not occur here, is not installed
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    given = {key: getattr(args, key) for key in _ONNX_ONLY if getattr(args, key) is not None}
    try:
        return export_onnx(model, args.out, **given)
    except ImportError as error:
        raise UserError(f'{error}; OUT.onnx needs: pip install onnx onnxscript onnxruntime') from error
    except ValueError as error:
        raise UserError(f'--part {args.part}: {error}' if args.part else str(error)) from error


if __name__ == '__main__':
    main()
