"""What the checks at the start of a run cost on data of COCO's size: ``python tests/datasets/coco_size.py``.

By hand: it writes 450 MB of annotations and 123,287 names of images into a temporary folder, and removes them.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdet_norms.cli import train
from mmdet_norms.cli.check import check_data
from mmdet_norms.cli.common import load_config

CONFIG = Path(__file__).resolve().parents[2] / 'configs' / 'baselines' / 'mask-rcnn_r50_fpn_bn_1x_coco.py'
WIDTH, HEIGHT, POINTS = 640, 480, 24
SPLITS = {'train': (118_287, 860_001), 'val': (5_000, 36_781)}
LINKS = 20_000  # names of one file; file systems have a limit


def write_split(root: Path, split: str, images: int, objects: int) -> None:
    """Annotations of the size of COCO's, and a name for each image."""
    from mmdet.datasets import CocoDataset  # needs mmcv's ops, which mmdet_norms may have to supply first

    rng = np.random.default_rng(0)
    (root / f'{split}2017').mkdir()
    names = [f'{i:012d}.jpg' for i in range(images)]
    for i, name in enumerate(names):
        source = root / f'{i // LINKS}.jpg'
        if i % LINKS == 0:
            cv2.imwrite(str(source), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        os.link(source, root / f'{split}2017' / name)
    for path in root.glob('*.jpg'):
        path.unlink()
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    annotations = []
    for i in range(objects):
        half = rng.uniform(5, 60, 2)
        centre = rng.uniform(half, np.array([WIDTH, HEIGHT]) - half)
        polygon = (centre + ring * half).round(2)
        low, high = polygon.min(0), polygon.max(0)
        annotations.append(
            dict(
                segmentation=[polygon.ravel().tolist()],
                area=round(float(np.prod(half) * np.pi), 4),
                iscrowd=0,
                image_id=int(rng.integers(images)),
                bbox=[*low.tolist(), *(high - low).round(2).tolist()],
                category_id=int(rng.integers(80)) + 1,
                id=i + 1,
            )
        )
    content = dict(
        images=[dict(id=i, file_name=name, width=WIDTH, height=HEIGHT) for i, name in enumerate(names)],
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])],
    )
    (root / 'annotations').mkdir(exist_ok=True)
    (root / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))


def main() -> None:
    """Write, check, say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        for split, (images, objects) in SPLITS.items():
            write_split(Path(folder), split, images, objects)
        size = sum(path.stat().st_size for path in Path(folder, 'annotations').iterdir())
        wall, cpu = time.perf_counter(), time.process_time()
        cfg = load_config(train.parse_args([str(CONFIG), '--data-root', folder]))
        check_data(cfg, ('train', 'val'), False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f'{size / 1e6:.0f} MB of annotations: {wall:.1f} s, of which {cpu:.1f} s of CPU time')


if __name__ == '__main__':
    main()
