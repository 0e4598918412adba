"""``tools/picture_sheet.py``: detections with masks against ground truth, in one picture."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_norms.choice import evenly
from mmdet_norms.commands import typed
from mmdet_norms.console import as_text
from mmdet_norms.engine.coco_detections import category_ids, read_coco_detections
from mmdet_norms.engine.detections import read_detections
from mmdet_norms.engine.picture import (
    FORMATS,
    Colours,
    Instance,
    Pair,
    class_colours,
    draw_sheet,
    is_sheet,
    objects_of,
    read_image,
    save_sheet,
    to_mask,
)

from .check import check_data
from .common import (
    UserError,
    add_data_arguments,
    command,
    move_and_merge,
    read_config,
    require_annotations,
    require_detector,
)
from .options import add_option_arguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    check_sheet(args, '--num', args.num, (args.config, args.results))
    cfg = read_config(args.config)
    require_detector(cfg, args.config, 'pictures')
    with TemporaryDirectory() as folder:  # for changed copies of the annotations, which building reads as a whole
        args.copies = folder
        move_and_merge(cfg, args)
        require_annotations(cfg, 'test_dataloader')
        check_data(cfg, ('test',), folder=folder)
        dataset = _build_dataset(cfg)
    truth = {info['img_id']: info for info in (dataset.get_data_info(i) for i in range(len(dataset)))}
    if os.path.realpath(args.out) in {os.path.realpath(info['img_path']) for info in truth.values()}:
        raise UserError(f'--out {args.out}: is a test image; choose another name')
    results = _read_results(args.results, dataset, list(truth))
    colours = class_colours(dataset.metainfo['classes'], dataset.metainfo.get('palette'))
    pairs = make_pairs(truth, results, colours, args.num, args.score_thr)
    title = as_text(f'{Path(args.config).stem}, {len(pairs)} of {len(results)} images')
    legend = colours if any(pair.truth or pair.detections for pair in pairs) else []
    save_sheet(draw_sheet(pairs, title, args.score_thr, legend), Path(args.out))
    print(f'Picture sheet written to {args.out}')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=typed('pictures'), description='Draw detections against ground truth.')
    parser.add_argument('config', help='the config that made the results; its test data are drawn')
    parser.add_argument('results', help=f'what {typed("test")} --out wrote, *.json or *.pkl')
    parser.add_argument('--out', metavar='FILE.png', default='work_dirs/sheet.png', help='default: %(default)s')
    parser.add_argument('--overwrite', action='store_true', help='replace a file --out that is no picture sheet')
    parser.add_argument('--num', type=int, default=12, help='number of images, spread over the data set')
    parser.add_argument('--score-thr', type=float, default=0.5, help='least score to draw (default: 0.5)')
    add_data_arguments(parser)
    add_option_arguments(parser)
    parser.set_defaults(reads=('test',))
    return parser.parse_args(argv)


def make_pairs(truth: dict, results: list[dict], colours: Colours, num: int, score_thr: float) -> list[Pair]:
    """``num`` images, evenly spread over the results, each with its ground truth (by image id) and detections."""
    unknown = [result['img_id'] for result in results if result['img_id'] not in truth]
    if unknown:
        raise UserError(f"the results are of other data: the config's test data have no image {unknown[0]}")
    pairs = []
    for result in evenly(results, num):
        info = truth[result['img_id']]
        image = read_image(info['img_path'])
        pairs.append(
            Pair(
                image,
                objects_of(info, colours, image.shape),
                _detections(result['pred_instances'], colours, image.shape, score_thr),
            )
        )
    return pairs


def _detections(predicted: dict, colours: Colours, shape: tuple, score_thr: float) -> list[Instance]:
    masks = predicted.get('masks')
    labels = [int(label) for label in predicted['labels']]
    if any(not 0 <= label < len(colours) for label in labels):
        raise UserError(
            f"the results have the label {max(labels)}, but the config's test data have {len(colours)} classes: they "
            'were made with another config'
        )
    return [
        Instance(
            box=[float(value) for value in predicted['bboxes'][i]],
            name=colours[labels[i]][0],
            colour=colours[labels[i]][1],
            mask=None if masks is None else to_mask(masks[i], *shape[:2]),
            score=float(score),
        )
        for i, score in enumerate(predicted['scores'])
        if float(score) >= score_thr
    ]


def check_sheet(args: argparse.Namespace, option: str, number: int, inputs: Sequence[str]) -> None:
    """Raise unless the sheet ``args.out`` can be written, before anything is read.

    Args:
        args: the command line.
        option: that says how many images there are to be.
        number: what it says.
        inputs: files that the command reads.
    """
    out = Path(args.out)
    if number < 1:
        raise UserError(f'{option} {number}: must be at least 1')
    if out.suffix.lower() not in FORMATS:
        raise UserError(f'--out {args.out}: name the picture *.png or *.jpg')
    if out.is_dir():
        raise UserError(f'--out {args.out}: is a folder; name a file in it')
    inputs = [name for name in inputs if os.path.exists(name)]
    if out.exists() and any(os.path.samefile(out, name) for name in inputs):
        raise UserError(f'--out {args.out}: is an input of this command; choose another name')
    if out.exists() and not args.overwrite and not is_sheet(out):
        raise UserError(f'--out {args.out}: is there and no picture sheet; choose another name, or add --overwrite')


def _read_results(path: str, dataset, images: list) -> list[dict]:
    """The detections of each image, from either format of ``tools/test.py --out``."""
    if not Path(path).is_file():
        raise UserError(f'there is no results file {path}; {typed("test")} CONFIG CKPT --out {path} writes it')
    if path.endswith('.json'):
        return read_coco_detections(path, category_ids(dataset, path), images)
    return read_detections(path)


def _build_dataset(cfg: Config):
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return DATASETS.build(cfg.test_dataloader.dataset)


if __name__ == '__main__':
    main()
