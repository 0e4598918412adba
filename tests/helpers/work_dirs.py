"""Work dirs as ``train`` leaves them, written without a training, for the tests of what reads them."""

import json
from pathlib import Path

AP = ('', '_50', '_75', '_s', '_m', '_l')
CONFIG = """
model = dict(type='MaskRCNN', backbone=dict(type='ResNet', norm_cfg=dict(type='BN', requires_grad=True)),
             neck=dict(type='FPN', norm_cfg={norm}))
train_cfg = dict(type='IterBasedTrainLoop', max_iters={iterations}, val_interval={every})
train_dataloader = dict(batch_size={batch_size}, dataset=dict(type='CocoDataset', data_root='data/shapes/'))
val_evaluator = dict(type='CocoMetric', ann_file='data/shapes/annotations/val.json')
randomness = dict(seed={seed})
"""


def coco(kind, ap, classes=()):
    """What an evaluation says: the areas and thresholds around ``ap`` as they tend to lie, and each class."""
    shifts = (0, 0.2, 0.02, -0.1, 0.05, None)
    found = {f'{kind}_mAP{key}': -1.0 if s is None else round(ap + s, 3) for key, s in zip(AP, shifts)}
    return found | {f'{kind}_{name}_precision': round(ap + 0.02 * i - 0.03, 3) for i, name in enumerate(classes)}


def top_k(top1, classes=()):
    """The same of a classifier."""
    found = {'accuracy/top1': top1, 'accuracy/top5': (1 + top1) / 2}
    return found | {f'accuracy/top1_{name}': round(top1 - 0.01 * i, 4) for i, name in enumerate(classes)}


def write_run(
    folder: Path,
    results: dict,
    labels: dict | None = None,
    iterations: int = 100,
    every: int = 25,
    cost: dict | None = None,
    finished: bool = True,
    config: str = 'mask-rcnn_r50_fpn_bnet5_shapes.py',
    norm: str = "dict(type='BN')",
    batch_size: int = 2,
    seed: int = 0,
) -> Path:
    """A run whose curve comes to ``results``; with ``labels`` a cell of a grid."""
    data = folder / '20260101_000000' / 'vis_data'
    data.mkdir(parents=True)
    (data / 'config.py').write_text(
        CONFIG.format(norm=norm, iterations=iterations, every=every, batch_size=batch_size, seed=seed)
    )
    lines, headline = [], next(iter(results))
    for step in range(10, iterations + 1, 10):
        line = dict(lr=0.01, loss=3 / (1 + step / 40) + 0.02 * seed, time=0.1, iter=step, step=step)
        checked = step // every * every  # lies before this line, or is its iteration
        result = {f'coco/{headline}': round(results[headline] * checked / iterations, 3), 'time': 0.1, 'step': 0}
        lines += [line] if checked <= step - 10 else [result, line] if checked < step else [line, result]
    (data / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if finished:
        origin = dict(split='val', config=config, epoch=0, iter=iterations)
        dump(folder / 'results.json', results | origin)
        dump(folder / 'finished.json', dict(epoch=0, iter=iterations, max_iters=iterations))
    if labels is not None:
        dump(folder / 'cell.json', dict(config=config, content='0', options=[], labels=labels))
    if cost is not None:
        dump(folder / 'cost.json', cost)
    return folder


def dump(path: Path, content: dict) -> None:
    """As JSON; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
