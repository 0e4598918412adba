"""``tools/export.py``: fold the norms of a trained detector into its convolutions and save what results."""

import argparse
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from torch import nn

from mmdet_norms.checkpoints.read import read_checkpoint
from mmdet_norms.commands import typed
from mmdet_norms.deploy import PARTS, export_onnx, is_fused, require_onnx, save_fused
from mmdet_norms.files import refuse_overwriting, remove_unfinished, require_writable

from .common import UserError, command, run_with_checkpoint, use_threads
from .detector import add_detector_arguments, detector_config, load_detector
from .weights import pretrained_weights

ONNX_ONLY = ('size', 'batch', 'dynamic', 'part')


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    run(parse_args(argv))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('export'),
        description='Fold the norms of a detector into its convolutions, and save the model: as a checkpoint for '
        f'{typed("test")}, {typed("infer")} and load_fused (OUT.pth; {typed("fuse")} does the same), or its '
        'convolutional part as a graph (OUT.onnx).',
    )
    add_arguments(parser, '*.pth or *.onnx')
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
        'single-stage detector (and the scores of a classifier), features for others',
    )
    return parser.parse_args(argv)


def add_arguments(parser: argparse.ArgumentParser, kinds: str) -> None:
    """What every command takes that folds a checkpoint into a file of one of ``kinds``."""
    add_detector_arguments(parser, ('train',), 'the data that the model was trained on, where that was given')
    parser.add_argument('out', metavar='OUT', help=f'file to write: {kinds}')
    parser.add_argument('--force', action='store_true', help='replace OUT even if it is not what this tool wrote')


def run(args: argparse.Namespace) -> None:
    """Build, load, fuse, save."""
    _check_out(args)
    refuse_overwriting(args.out, 'OUT', {'CKPT': args.checkpoint, 'the config': args.config})
    if not args.force and not _is_ours(Path(args.out)):
        raise UserError(f'OUT {args.out} is there already and not of this tool; choose another name, or add --force')
    require_writable(args.out, 'OUT')
    remove_unfinished(Path(args.out).parent)
    cfg = detector_config(args)
    refuse_overwriting(args.out, 'OUT', dict(pretrained_weights(cfg.model)))
    print(use_threads(args, device='cpu'))
    run_with_checkpoint(functools.partial(_export, cfg, args), args)


def _export(cfg: Config, args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.checkpoint)
    model = load_detector(cfg, args, checkpoint, fused=True)
    print(model.fuse_report)
    if Path(args.out).suffix == '.pth':
        save_fused(model, args.out, dict(checkpoint.meta))
        print(f'Checkpoint of the fused model written to {args.out}')
    else:
        names = _export_onnx(model, args)
        print(f'ONNX graph written to {args.out}; input: image; outputs: {", ".join(names)}')


def _check_out(args: argparse.Namespace) -> None:
    suffix = Path(args.out).suffix
    if suffix not in ('.pth', '.onnx'):
        raise UserError(f'OUT {args.out}: write *.pth for a checkpoint or *.onnx for a graph')
    given = [f'--{key}' for key in ONNX_ONLY if getattr(args, key) is not None]
    if suffix == '.pth' and given:
        raise UserError(f'{" and ".join(given)}: of no use for a checkpoint; write OUT as *.onnx, or leave it out')
    for key in ('size', 'batch'):
        value = getattr(args, key)
        numbers = [value] if isinstance(value, int) else value or []
        if any(number < 1 for number in numbers):
            raise UserError(f'--{key} {" ".join(map(str, numbers))}: must be positive')
    if suffix == '.onnx':  # asked for before the work that would be lost
        try:
            require_onnx()
        except ImportError as error:
            raise UserError(
                f'OUT {args.out}: {error}; a graph needs: pip install onnx onnxscript onnxruntime'
            ) from error


def _is_ours(out: Path) -> bool:
    """Whether ``out`` is free, or an earlier result: a fused checkpoint or a graph with our mark."""
    if not out.is_file():
        return True
    return is_fused(out) if out.suffix == '.pth' else b'mmdet_norms' in out.read_bytes()


def _export_onnx(model: nn.Module, args: argparse.Namespace) -> list[str]:
    # of the exporter: that torchvision, whose operators do not occur here, is not installed
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    given = {key: getattr(args, key) for key in ONNX_ONLY if getattr(args, key) is not None}
    try:
        return export_onnx(model, args.out, **given)
    except ValueError as error:
        raise UserError(f'--part {args.part}: {error}' if args.part else str(error)) from error


if __name__ == '__main__':
    main()
