"""``tools/fuse.py``: fold the norms of a trained detector into its convolutions and save it as a checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdet_norms.commands import typed

from .common import UserError, command
from .export import ONNX_ONLY, add_arguments, run


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Fuse as the command line says."""
    args = parse_args(argv)
    if Path(args.out).suffix != '.pth':
        graph = f'; {typed("export")} writes graphs' if Path(args.out).suffix == '.onnx' else ''
        raise UserError(f'OUT {args.out}: name the checkpoint *.pth{graph}')
    run(args)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('fuse'),
        description='Fold the norms of a detector into its convolutions, and save the result as a checkpoint for '
        f'{typed("test")}, {typed("infer")} and load_fused. {typed("export")} writes ONNX graphs as well.',
    )
    add_arguments(parser, '*.pth')
    parser.set_defaults(**dict.fromkeys(ONNX_ONLY))
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
