"""A data set of a few small images and a config that reads it, for the tests of the checks."""

import json
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

CLASSES = ('disc', 'box', 'star')
WIDTH, HEIGHT = 40, 24


def content(images=4, classes=CLASSES, prefix='', width=WIDTH, height=HEIGHT):
    """Two objects an image, each with a polygon, in COCO's format."""
    listed = [dict(id=i + 1, file_name=f'{prefix}{i:02d}.png', width=width, height=height) for i in range(images)]
    annotations = []
    for image in listed:
        for k in range(2):
            x, y, w, h = 3 + 14 * k, 4, 10, 8
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image['id'],
                    category_id=1 + (len(annotations) % len(classes)),
                    bbox=[x, y, w, h],
                    area=w * h / 2,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h]],
                )
            )
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(classes)]
    return dict(images=listed, annotations=annotations, categories=categories)


def write(root: Path, train: dict, val: dict, images: bool = True) -> Path:
    """Both splits, with the images that ``train`` and ``val`` list."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    for split, listed in (('train', train), ('val', val)):
        (root / split).mkdir(exist_ok=True)
        for image in listed['images'] if images else ():
            pixels = np.full((image['height'], image['width'], 3), 90, np.uint8)
            Image.fromarray(pixels).save(root / split / image['file_name'])
        dump(root, split, listed)
    return root


def dump(root: Path, split: str, listed) -> None:
    """The annotation file of a split."""
    (root / 'annotations' / f'{split}.json').write_text(json.dumps(listed), encoding='utf-8')


def config(root, classes=CLASSES, masks=True, **changes) -> Config:
    """Of a model whose heads count the classes, and the data of ``root``."""
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=masks)]

    def loader(split, **more):
        entry = dict(
            type='CocoDataset',
            data_root=f'{root}/',
            metainfo=dict(classes=classes),
            ann_file=f'annotations/{split}.json',
            data_prefix=dict(img=f'{split}/'),
            pipeline=pipeline,
            **more,
        )
        return dict(batch_size=2, num_workers=0, dataset=entry)

    count = len(classes) if not isinstance(classes, str) else 1
    evaluator = dict(
        type='CocoMetric', ann_file=f'{root}/annotations/val.json', metric=['bbox', 'segm'] if masks else 'bbox'
    )
    cfg = Config(
        dict(
            data_root=f'{root}/',
            model=dict(
                type='MaskRCNN',
                rpn_head=dict(type='RPNHead'),
                roi_head=dict(
                    type='StandardRoIHead',
                    bbox_head=dict(type='Shared2FCBBoxHead', num_classes=count),
                    mask_head=dict(type='FCNMaskHead', num_classes=count),
                ),
            ),
            train_dataloader=loader('train', filter_cfg=dict(filter_empty_gt=True, min_size=8)),
            val_dataloader=loader('val', test_mode=True),
            test_dataloader=loader('val', test_mode=True),
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            work_dir=f'{root}/work',
        )
    )
    cfg.merge_from_dict(changes)
    return cfg
