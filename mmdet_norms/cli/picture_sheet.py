"""``tools/picture_sheet.py``: detections with masks against ground truth, in one picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import mmengine
import numpy as np
from mmdet.registry import DATASETS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from mmdet_norms.engine.picture import (
    Colour,
    Instance,
    Pair,
    class_colours,
    draw_sheet,
    read_image,
    save_sheet,
    to_mask,
)

from .common import UserError, command, move_data_root, read_config, require_annotations


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    cfg = read_config(args.config)
    if args.data_root is not None:
        move_data_root(cfg, args.data_root)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    require_annotations(cfg, 'test_dataloader')
    results = _read_results(args.results)
    dataset = _build_dataset(cfg)
    classes = dataset.metainfo['classes']
    palette = dataset.metainfo.get('palette') or ()
    colours = class_colours(classes, palette if len(palette) == len(classes) else None)
    pairs = make_pairs(dataset, results, colours, args.num, args.score_thr)
    title = f'{Path(args.config).stem}, {len(pairs)} of {len(results)} images'
    legend = colours if any(pair.truth or pair.detections for pair in pairs) else {}
    save_sheet(draw_sheet(pairs, title, args.score_thr, legend), Path(args.out))
    print(f'Picture sheet written to {args.out}')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='tools/picture_sheet.py', description='Draw detections against ground truth.')
    parser.add_argument('config', help='the config that made the results; its test data are drawn')
    parser.add_argument('results', help='what tools/test.py --out wrote (a pickle: only open one that you trust)')
    parser.add_argument('--out', metavar='FILE.png', default='sheet.png', help='default: sheet.png')
    parser.add_argument('--num', type=int, default=12, help='number of images, spread over the data set')
    parser.add_argument('--score-thr', type=float, default=0.5, help='least score to draw (default: 0.5)')
    parser.add_argument('--data-root', metavar='DIR', help="replaces the config's data_root")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    return parser.parse_args(argv)


def make_pairs(dataset, results: list[dict], colours: dict[str, Colour], num: int, score_thr: float) -> list[Pair]:
    """``num`` images, evenly spread over the results, each with its ground truth and detections."""
    truth = {info['img_id']: info for info in (dataset.get_data_info(i) for i in range(len(dataset)))}
    unknown = [result['img_id'] for result in results if result['img_id'] not in truth]
    if unknown:
        raise UserError(f"the results are of other data: the config's test data have no image {unknown[0]}")
    names = list(colours)
    chosen = np.unique(np.linspace(0, len(results) - 1, min(num, len(results))).round().astype(int))
    pairs = []
    for result in (results[i] for i in chosen):
        info = truth[result['img_id']]
        image = read_image(info['img_path'])
        pairs.append(
            Pair(
                image,
                _truth(info, names, colours, image.shape),
                _detections(result['pred_instances'], names, colours, image.shape, score_thr),
            )
        )
    return pairs


def _truth(info: dict, names: list[str], colours: dict[str, Colour], shape: tuple) -> list[Instance]:
    return [
        Instance(
            box=item['bbox'],
            name=names[item['bbox_label']],
            colour=colours[names[item['bbox_label']]],
            mask=to_mask(item.get('mask'), *shape[:2]),
            ignored=bool(item.get('ignore_flag', 0)),
        )
        for item in info.get('instances', [])
    ]


def _detections(
    predicted: dict, names: list[str], colours: dict[str, Colour], shape: tuple, score_thr: float
) -> list[Instance]:
    masks = predicted.get('masks')
    return [
        Instance(
            box=[float(value) for value in predicted['bboxes'][i]],
            name=names[int(predicted['labels'][i])],
            colour=colours[names[int(predicted['labels'][i])]],
            mask=None if masks is None else to_mask(masks[i], *shape[:2]),
            score=float(score),
        )
        for i, score in enumerate(predicted['scores'])
        if float(score) >= score_thr
    ]


def _read_results(path: str) -> list[dict]:
    if not Path(path).is_file():
        raise UserError(f'there is no results file {path}; tools/test.py CONFIG CKPT --out {path} writes it')
    results = mmengine.load(path)
    if not isinstance(results, list) or not all('pred_instances' in result for result in results):
        raise UserError(f'{path} does not hold detections as tools/test.py --out writes them')
    return results


def _build_dataset(cfg: Config):
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return DATASETS.build(cfg.test_dataloader.dataset)


if __name__ == '__main__':
    main()
