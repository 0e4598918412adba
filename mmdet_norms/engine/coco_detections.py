"""``--out FILE.json``: the detections as COCO's result format has them, for any tool that reads it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmdet.structures.mask import encode_mask_results
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS

from ..commands import typed
from ..errors import UserError
from ..files import replacing


@METRICS.register_module()
class DumpCocoDetections(BaseMetric):
    """Write a list of ``{image_id, category_id, bbox, score[, segmentation]}``, one entry per detection.

    ``bbox`` is x, y, width, height in pixels of the image; ``segmentation`` is a compressed RLE. That is what
    ``pycocotools.coco.COCO.loadRes`` reads. Nothing is computed, so no metric is added.

    Args:
        out: the file.
        category_ids: the annotation file's id of each label.
        collect_device: as for :class:`mmengine.evaluator.BaseMetric`.
    """

    default_prefix = 'detections'  # of nothing; without one mmengine warns

    def __init__(self, out: str | Path, category_ids: Sequence[int], collect_device: str = 'cpu'):
        super().__init__(collect_device=collect_device)
        self.out = Path(out)
        self.category_ids = list(category_ids)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the detections of a batch, masks as run lengths."""
        for sample in data_samples:
            if 'pred_instances' not in sample:
                raise UserError(f'--out {self.out}: the model predicts no instances; write --out FILE.pkl')
            found = sample['pred_instances']
            boxes = np.asarray(found['bboxes'].detach().cpu(), np.float64).reshape(-1, 4)
            masks = found.get('masks')
            if isinstance(masks, torch.Tensor):
                masks = encode_mask_results(masks.detach().cpu().numpy())
            self.results.append(
                dict(
                    img_id=sample['img_id'],
                    boxes=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist(),
                    scores=found['scores'].detach().cpu().tolist(),
                    labels=found['labels'].detach().cpu().tolist(),
                    masks=masks,
                )
            )

    def compute_metrics(self, results: list[dict]) -> dict:
        """Write the file in one step."""
        entries, not_finite = coco_entries(results, self.category_ids, digits=(2, 6))
        with replacing(self.out) as part:
            part.write_text(json.dumps(entries), encoding='utf-8')
        logger = MMLogger.get_current_instance()
        logger.info(f'{len(entries)} detections in COCO format written to {self.out}')
        if not_finite:
            logger.warning(f'{not_finite} detections have NaN or infinite boxes or scores and are not in {self.out}')
        return {}


def coco_entries(
    results: Sequence[dict], category_ids: Sequence[int], digits: tuple[int, int] | None = None
) -> tuple[list[dict], int]:
    """What :meth:`DumpCocoDetections.process` has kept, as COCO's format has it; and how many are not finite.

    Args:
        results: an entry per image.
        category_ids: the annotation file's id of each label.
        digits: of boxes and of scores after the point; all of them by default.
    """
    entries, not_finite = [], 0
    for image in results:
        for i, box in enumerate(image['boxes']):
            score = image['scores'][i]
            if not all(map(math.isfinite, [*box, score])):
                not_finite += 1
                continue
            entry = dict(
                image_id=image['img_id'],
                category_id=category_ids[image['labels'][i]],
                bbox=[round(value, digits[0]) for value in box] if digits else list(box),
                score=round(score, digits[1]) if digits else score,
            )
            if image['masks'] is not None:
                entry['segmentation'] = _plain(image['masks'][i])
            entries.append(entry)
    return entries, not_finite


def category_ids(dataset: object, out: str | Path) -> list[int]:
    """The annotation file's id of each label of a COCO data set, or of the wrapped ones if they agree.

    Raises:
        UserError: a data set without such ids, or several with other ones.
    """
    inner = [dataset]
    while not all(hasattr(part, 'cat_ids') for part in inner):
        wrapped = [getattr(part, 'datasets', None) or [getattr(part, 'dataset', None)] for part in inner]
        inner = [part for parts in wrapped for part in parts]
        if not inner or any(part is None for part in inner):
            kind = type(dataset).__name__
            raise UserError(f'--out {out}: {kind} has no ids of categories as COCO data do; write --out FILE.pkl')
    ids = [list(part.cat_ids) for part in inner]
    if any(other != ids[0] for other in ids):
        raise UserError(f'--out {out}: the test data sets number their classes differently; write --out FILE.pkl')
    return ids[0]


def read_coco_detections(path: str | Path, ids: Sequence[int], images: Sequence[object]) -> list[dict]:
    """What :class:`DumpCocoDetections` wrote (or another program, in the format), as mmdet has it: an entry per image.

    Args:
        path: the file.
        ids: the category id of each label.
        images: the ids of all images, those without detections included.

    Raises:
        UserError: no such list, an entry without one of its fields, or of data that are not these.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path} does not hold detections in COCO format ({error})') from error
    if not isinstance(entries, list):
        raise UserError(
            f'{path} does not hold detections in COCO format, which are a list; {typed("test")} CONFIG CKPT --out '
            'detections.json writes them (results.json of a work dir has the metrics)'
        )
    labels = {category: label for label, category in enumerate(ids)}
    found = {image: dict(bboxes=[], scores=[], labels=[], masks=[]) for image in images}
    for i, entry in enumerate(entries):
        try:
            x, y, width, height = (float(value) for value in entry['bbox'])
            score, image, category = float(entry['score']), entry['image_id'], entry['category_id']
            mask, known = entry.get('segmentation'), image in found and category in labels
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f'{path} does not hold detections in COCO format (entry {i}: {error!r})') from error
        if not known:
            raise UserError(f'{path}: entry {i} is of image {image!r} and category {category!r}, not of the test data')
        of_image = found[image]
        of_image['bboxes'].append([x, y, x + width, y + height])
        of_image['scores'].append(score)
        of_image['labels'].append(labels[category])
        of_image['masks'].append(mask)
    for of_image in found.values():
        if not any(of_image['masks']):
            of_image['masks'] = None
    return [dict(img_id=image, pred_instances=of_image) for image, of_image in found.items()]


def is_detections(path: Path) -> bool:
    """Does the file begin as one that ``--out`` writes (a pickle, a list in JSON)? It is not read further."""
    with path.open('rb') as file:
        start = file.read(4096)
    if path.suffix == '.json':
        text = b''.join(start.split())
        return text in (b'', b'[]') or (text.startswith(b'[{') and b'"image_id"' in text)
    known = (b'img_id', b'img_path', b'ori_shape', b'pred_instances')
    no_detections = len(start) < 16 and b']' in start
    return not start or (start[:1] == b'\x80' and (no_detections or any(word in start for word in known)))


def _plain(rle: dict) -> dict:
    counts = rle['counts']
    return dict(size=list(rle['size']), counts=counts.decode() if isinstance(counts, bytes) else counts)
