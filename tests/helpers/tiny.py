"""A detector and a dataset small enough to train in seconds, for the tests of the commands."""

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('disc', 'box')

CONFIG = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=8, num_stages=4,
                  out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN'), norm_eval=False),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2)),
    train_cfg=dict(rpn=dict(sampler=dict(num=32)), rpn_proposal=dict(nms_pre=64, max_per_img=32),
                   rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=64, max_per_img=32), rcnn=dict(score_thr=0.0, max_per_img=20)))
data_root = '{root}/'
metainfo = dict(classes=('disc', 'box'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                            'scale_factor'))]
dataset = dict(_delete_=True, type='CocoDataset', data_root=data_root, metainfo=metainfo,
               ann_file='annotations.json', data_prefix=dict(img='images/'), pipeline=test_pipeline,
               test_mode=True)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='CocoDataset', data_root=data_root, metainfo=metainfo,
    ann_file='annotations.json', data_prefix=dict(img='images/'), pipeline=train_pipeline))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=0.002))
auto_scale_lr = dict(base_batch_size=16)
env_cfg = dict(mp_cfg=dict(mp_start_method='fork'))
"""


def write_dataset(root: Path, num_images: int = 4, size: int = 64) -> Path:
    """Write images with one disc and one box each, a crowd on the first and nothing on the last."""
    (root / 'images').mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(num_images):
        name = f'{i:03d}.png'
        image = np.full((size, size, 3), 90, np.uint8)
        images.append(dict(id=i + 1, file_name=name, width=size, height=size))
        if i < num_images - 1:
            cv2.circle(image, (18 + i, 20), 10, (40, 40, 230), -1)
            cv2.rectangle(image, (34, 30 + i), (56, 54), (230, 60, 40), -1)
            annotations += [
                _annotation(len(annotations) + 1, i + 1, 1, _circle(18 + i, 20, 10)),
                _annotation(len(annotations) + 2, i + 1, 2, [34, 30 + i, 56, 30 + i, 56, 54, 34, 54]),
            ]
        if i == 0:
            annotations.append(_crowd(len(annotations) + 1, i + 1, size))
        cv2.imwrite(str(root / 'images' / name), image)
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'annotations.json').write_text(json.dumps(content))
    return root


def write_config(folder: Path, more: str = '') -> Path:
    """Write the data and a config for it into ``folder``; return the config's path."""
    write_dataset(folder / 'data')
    path = folder / 'tiny.py'
    path.write_text(CONFIG.replace('{root}', str(folder / 'data')) + more)
    return path


def _circle(x: float, y: float, radius: float) -> list:
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
    return points.round(2).ravel().tolist()


def _annotation(number: int, image: int, category: int, polygon: list) -> dict:
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    return dict(
        id=number,
        image_id=image,
        category_id=category,
        iscrowd=0,
        bbox=[float(v) for v in box],
        area=float(area),
        segmentation=[polygon],
    )


def _crowd(number: int, image: int, size: int) -> dict:
    # a 6 x 10 corner as uncompressed run lengths, column by column
    counts = [0]
    for _ in range(10):
        counts += [6, size - 6]
    counts[-1] += size * (size - 10)
    return dict(
        id=number,
        image_id=image,
        category_id=2,
        iscrowd=1,
        bbox=[0.0, 0.0, 10.0, 6.0],
        area=60.0,
        segmentation=dict(size=[size, size], counts=counts),
    )
