"""A classifier and folders of images small enough to train in a second, for the tests of the commands."""

from pathlib import Path

import cv2
import numpy as np

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
CLASSES = ('disc', 'ring', 'box')

CONFIG = """
_base_ = '{configs}/demo/resnet50_bnet5_shapes-cls.py'
model = dict(backbone=dict(depth=18, base_channels=8), head=dict(num_classes=3, in_channels=64))
data_root = '{root}/'
train_dataloader = dict(batch_size=6, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(batch_size=6, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2, val_interval=1)
param_scheduler = []
"""


def write_folders(root: Path, splits=('train', 'val'), classes=CLASSES, per_class: int = 4, size: int = 32) -> Path:
    """Write ``root/SPLIT/CLASS/*.png``: one shape each, larger from image to image, in the colour of its class."""
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                image = np.full((size, size, 3), 90 + 5 * i, np.uint8)
                colour = [60, 60, 60]
                colour[label % 3] = 230
                middle, radius = (size // 2, size // 2 + i), 6 + i
                if name == 'box':
                    cv2.rectangle(image, (8, 8), (16 + i, 20), colour, -1)
                else:
                    cv2.circle(image, middle, radius, colour, 2 if name == 'ring' else -1)
                cv2.imwrite(str(folder / f'{i}.png'), image)
    return root


def write_config(folder: Path, more: str = '') -> Path:
    """Write the data and a config for it into ``folder``; return the config's path."""
    write_folders(folder / 'data')
    path = folder / 'tiny_cls.py'
    path.write_text(CONFIG.replace('{root}', str(folder / 'data')).replace('{configs}', str(CONFIGS)) + more)
    return path
