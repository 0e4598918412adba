"""Write the generated data sets: of the demo's detector, or of its pretraining."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdet_norms.commands import typed
from mmdet_norms.datasets.shapes import CLASSES, ShapesConfig, ShapesError, make_shapes
from mmdet_norms.datasets.shapes_cls import NUM_TRAIN, NUM_VAL, SHAPES_CLS, SHAPES_CLS_HARD, make_shapes_cls
from mmdet_norms.files import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/make_shapes.py``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=typed('shapes'),
        description='Generate the shapes dataset (COCO format), or shapes-cls (folders of classes), from a seed.',
    )
    parser.add_argument(
        '--classification',
        action='store_true',
        help='the data to pretrain on: one shape per image, DIR/{train,val}/CLASS/*.png',
    )
    parser.add_argument(
        '--hard', action='store_true', help='of the data to pretrain on those that compare norms (docs/norm-batch.md)'
    )
    detection = ShapesConfig().size
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='folder to write (default: data/shapes; data/shapes-cls, or data/shapes-cls-hard, for classification)',
    )
    parser.add_argument('--train', type=int, metavar='N', help=f'train images (default: 1600; {NUM_TRAIN})')
    parser.add_argument('--val', type=int, metavar='N', help=f'val images (default: 200; {NUM_VAL})')
    parser.add_argument(
        '--size', type=int, metavar='PX', help=f'side of the square images (default: {detection}; {SHAPES_CLS.size})'
    )
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='random seed (default: 0)')
    parser.add_argument('--overwrite', action='store_true', help='replace another dataset of that kind in DIR')
    args = parser.parse_args(argv)
    if args.hard and not args.classification:
        parser.error('--hard is for --classification')
    make, name = (make_shapes_cls, 'shapes-cls') if args.classification else (make_shapes, 'shapes')
    kind = dict(config=SHAPES_CLS_HARD) if args.hard else {}
    folder = f'data/{name}-hard' if args.hard else f'data/{name}'
    counts = {key: value for key, value in dict(num_train=args.train, num_val=args.val).items() if value is not None}
    try:
        root = make(
            folder if args.out is None else args.out,
            size=args.size,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=True,
            **counts,
            **kind,
        )
    except (ShapesError, ValueError, OSError) as error:
        said = explain(error) if isinstance(error, OSError) else None
        print(f'error: {said or error}', file=sys.stderr)
        return 2
    print(f'{name} dataset in {root}')
    for split in ('train', 'val'):
        print(f'  {split + ":":6} {_folder(root, split) if args.classification else _annotated(root, split)}')
    print(f'  classes: {", ".join(CLASSES)}')
    return 0


def _annotated(root: Path, split: str) -> str:
    path = root / 'annotations' / f'{split}.json'
    content = json.loads(path.read_text(encoding='utf-8'))
    crowds = sum(a['iscrowd'] for a in content['annotations'])
    empty = len(content['images']) - len({a['image_id'] for a in content['annotations']})
    return (
        f'{len(content["images"])} images ({empty} without objects), {len(content["annotations"]) - crowds} objects, '
        f'{crowds} crowds; {path}'
    )


def _folder(root: Path, split: str) -> str:
    return f'{sum(1 for _ in (root / split).glob("*/*.png"))} images; {root / split}'


if __name__ == '__main__':
    sys.exit(main())
