"""``tools/browse.py``: images of a data set as a model gets to see them, after all augmentations."""

import argparse
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import BaseDataElement, InstanceData

from mmdet_norms.commands import typed
from mmdet_norms.console import as_text
from mmdet_norms.datasets.counts import count
from mmdet_norms.datasets.sources import SPLITS
from mmdet_norms.engine.inference import displayable
from mmdet_norms.engine.picture import Colours, Instance, class_colours, draw_gallery, save_sheet
from mmdet_norms.entries import is_a, is_classifier, mappings

from .check import check_data
from .common import (
    UserError,
    add_check_argument,
    add_data_arguments,
    add_seed_argument,
    command,
    move_and_merge,
    read_config,
    require_annotations,
)
from .options import add_option_arguments
from .picture_sheet import check_sheet

Picture = tuple[str, np.ndarray, list[Instance]]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    args.out = args.out or f'work_dirs/browse-{args.split}.png'
    check_sheet(args, '--number', args.number, (args.config,))
    cfg = read_config(args.config)
    loader = f'{args.split}_dataloader'
    with TemporaryDirectory() as folder:  # for changed copies of the annotations, which building reads as a whole
        args.copies = folder
        move_and_merge(cfg, args)
        if not (cfg.get(loader) or {}).get('dataset'):
            raise UserError(f'--split {args.split}: the config has no {loader}.dataset')
        require_annotations(cfg, loader)
        check_data(cfg, (args.split,), args.allow_data_faults, folder=folder)
        init_default_scope(cfg.get('default_scope') or 'mmdet')
        dataset = DATASETS.build(cfg[loader].dataset)
    if not len(dataset):
        raise UserError(f'{loader}: there is no image in this data set')
    colours = class_colours(dataset.metainfo.get('classes') or ('object',), dataset.metainfo.get('palette'))
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if os.path.realpath(args.out) in {os.path.realpath(path) for info in infos for path in _paths(info)}:
        raise UserError(f'--out {args.out}: is an image of the data set; choose another name')
    print(count(infos, dataset.metainfo.get('classes') or ()).line(args.split))
    pictures = list(_pictures(dataset, cfg[loader].dataset, args, colours))
    title = as_text(f'{Path(args.config).stem}, {args.split}: {len(pictures)} of {len(infos)} images')
    classified = is_classifier(cfg.get('model'))
    legend, if_empty = ((), '') if classified else (colours, 'no objects')
    save_sheet(draw_gallery(pictures, title, legend, if_empty), Path(args.out))
    print(f'Picture sheet written to {args.out}')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('browse'),
        description='Draw images of a data set with boxes, masks and class names (of a classifier, with the class) as '
        'the pipeline of the config gives them, after all augmentations, and count its images and objects.',
    )
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('--split', choices=SPLITS, default='train', help='whose data (default: train)')
    parser.add_argument('--number', type=int, default=12, metavar='N', help='number of images (default: 12)')
    add_seed_argument(parser, 0, 'which images, and how they are augmented (default: 0)')
    parser.add_argument('--out', metavar='FILE.png', help='default: work_dirs/browse-SPLIT.png')
    parser.add_argument('--overwrite', action='store_true', help='replace a file --out that is no picture sheet')
    add_data_arguments(parser)
    add_option_arguments(parser)
    add_check_argument(parser)
    args = parser.parse_args(argv)
    args.reads = (args.split,)
    return args


def _pictures(dataset: object, entry: Mapping, args: argparse.Namespace, colours: Colours) -> Iterator[Picture]:
    """Some images, by chance, with what the pipeline makes of them; of several branches, each."""
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[: args.number]
    set_random_seed(args.seed)
    normalized = next(_normalizations(entry), None)
    for index in sorted(chosen.tolist()):
        try:
            item = dataset[index]
        except Exception as error:
            if str(error).startswith('Cannot find valid image'):  # of mmengine, after a thousand attempts
                raise UserError(f'--split {args.split}: the pipeline leaves out every image') from error
            raise UserError(
                f'--split {args.split}: the pipeline fails at image {index} of the data set, as it would in a run: '
                f'{type(error).__name__}: {as_text(error)}{_raised_in(error)}'
            ) from error
        for branch, inputs, sample in _branches(item, args.split):
            path = sample.metainfo.get('img_path')
            name = os.path.basename(path) if isinstance(path, str) else f'image {index}'
            named = f': {_name(int(sample.gt_label), colours)}' if 'gt_label' in sample else ''
            yield as_text(f'{name}{branch}{named}'), _image(inputs, normalized), _instances(sample, colours)


def _raised_in(error: BaseException) -> str:
    """The step of the pipeline that raised it, as far as the traceback shows."""
    steps = [
        type(frame.f_locals['self']).__name__
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == 'transform' and 'self' in frame.f_locals
    ]
    return f' (in {steps[0]})' if steps else ''


def _branches(item: object, split: str) -> Iterator[tuple[str, torch.Tensor, BaseDataElement]]:
    """The images in what a data set gives: one, or one for each branch of a semi-supervised pipeline."""
    inputs, sample = (item.get('inputs'), item.get('data_samples')) if isinstance(item, Mapping) else (None, None)
    several = inputs if isinstance(inputs, Mapping) else {None: inputs}
    samples = sample if isinstance(inputs, Mapping) and isinstance(sample, Mapping) else {None: sample}
    there = [(name, value, samples.get(name)) for name, value in several.items() if value is not None]
    for name, value, of_it in there:
        known = isinstance(of_it, DetDataSample) or (isinstance(of_it, BaseDataElement) and 'gt_label' in of_it)
        if not isinstance(value, torch.Tensor) or value.dim() != 3 or not known:
            there = []
            break
        yield (f' ({name})' if name else ''), value, of_it
    if not there:
        raise UserError(
            f'--split {split}: the pipeline does not end in PackDetInputs (PackClsInputs for a classifier), so that it '
            'is not known where image, boxes and masks are in what it gives'
        )


def _image(inputs: torch.Tensor, normalized: Mapping | None) -> np.ndarray:
    """RGB, uint8; where the pipeline itself normalizes (the model does it otherwise), turned back."""
    image = inputs.permute(1, 2, 0).numpy()
    if normalized is not None:
        image = image * np.asarray(normalized['std'], np.float32) + np.asarray(normalized['mean'], np.float32)
        image = image[..., ::-1] if normalized.get('to_rgb', True) else image
        image = np.round(image)
    return displayable(image)


def _normalizations(node: object) -> Iterator[Mapping]:
    """Every step of a pipeline in a config that normalizes."""
    return (entry for _, entry in mappings(node) if is_a(entry, 'Normalize', TRANSFORMS) and 'mean' in entry)


def _instances(sample: BaseDataElement, colours: Colours) -> list[Instance]:
    groups = [(sample.get('gt_instances'), False), (sample.get('ignored_instances'), True)]
    return [one for group, ignored in groups if group is not None for one in _of_group(group, ignored, colours)]


def _of_group(group: InstanceData, ignored: bool, colours: Colours) -> Iterator[Instance]:
    labels, boxes, masks = group.get('labels'), group.get('bboxes'), group.get('masks')
    masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks
    if isinstance(boxes, BaseBoxes):
        boxes = boxes.convert_to('hbox').tensor if boxes.box_dim != 4 else boxes.tensor
    for i in range(len(group) if labels is not None else 0):
        mask = None if masks is None else np.asarray(masks[i], bool)
        box = boxes[i].tolist() if boxes is not None else _around(mask)
        label = int(labels[i])
        yield Instance(box, _name(label, colours), colours[label % len(colours)][1], mask, ignored=ignored)


def _around(mask: np.ndarray | None) -> list[float]:
    rows, columns = np.nonzero(mask) if mask is not None else ((), ())
    if not len(rows):
        return [0, 0, 0, 0]
    return [float(columns.min()), float(rows.min()), float(columns.max()), float(rows.max())]


def _name(label: int, colours: Colours) -> str:
    return colours[label][0] if label < len(colours) else f'class {label}'


def _paths(info: Mapping) -> list[str]:
    return [info['img_path']] if isinstance(info.get('img_path'), str) else []


if __name__ == '__main__':
    main()
