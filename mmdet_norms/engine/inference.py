"""A detector on images that belong to no data set: read and prepared as a test does, detections as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results, mask2bbox
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image as PillowImage
from torch import nn

from ..console import as_text
from ..entries import is_a
from ..errors import UserError
from ..files import replacing
from .picture import Colours, Instance, draw_panel

KEPT_SUFFIXES = ('.jpg', '.jpeg', '.jfif', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm')
"""Of pictures that are written in the format of their image; others become PNG."""

_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Image:
    """What the test pipeline makes of an image.

    Args:
        pixels: as it was read: BGR or grey, of whatever depth.
        prepared: what the model takes.
    """

    pixels: np.ndarray
    prepared: dict


class Inference:
    """A detector behind the test pipeline of its config.

    Args:
        model: with its weights, on the device where it is to run.
        cfg: its config; of the test data only the pipeline is read. Its default scope is the current one.

    Raises:
        UserError: the test data have no pipeline, or one that does not read images from files.
    """

    def __init__(self, model: nn.Module, cfg: Config):
        self.model = model.eval()
        try:
            steps = [dict(step) for step in get_test_pipeline_cfg(cfg)]
        except (AttributeError, KeyError, RuntimeError) as error:
            raise UserError('the config has no test_dataloader with a pipeline, which prepares images') from error
        steps = [step for step in steps if not is_a(step, 'LoadAnnotations', TRANSFORMS)]
        if not steps or not is_a(steps[0], 'LoadImageFromFile', TRANSFORMS):
            first = steps[0].get('type') if steps else 'nothing'
            raise UserError(
                f'the test pipeline of the config starts with {first}, not with LoadImageFromFile, so that it is not '
                'known how it takes a single image'
            )
        self._grey = str(steps[0].get('color_type', 'color')).startswith('grayscale')
        self._load = Compose(steps[:1])
        self._take = Compose([dict(type='LoadImageFromNDArray', to_float32=steps[0].get('to_float32', False))])
        self._prepare = Compose(steps[1:])

    def read(self, path: str) -> Image:
        """An image file, as the test pipeline reads and prepares it.

        Raises:
            UserError: the pipeline fails at it.
            Exception: it cannot be read; which one is the reader's choice.
        """
        return self._prepared(self._load(dict(img_path=path, img_id=0)))

    def take(self, frame: np.ndarray) -> Image:
        """The same for an image in memory (BGR, uint8)."""
        return self._prepared(self._take(dict(img=mmcv.bgr2gray(frame) if self._grey else frame, img_id=0)))

    def _prepared(self, loaded: dict) -> Image:
        pixels = loaded['img']
        try:
            # the pipeline changes what it is given, and the image is still to be drawn on
            return Image(pixels, self._prepare(dict(loaded)))
        except Exception as error:  # such as OpenCV's, where 3000 x 2 pixels would become less than one high
            height, width = pixels.shape[:2]
            said = ' '.join(str(error).split()) or type(error).__name__
            raise UserError(f'the test pipeline of the config fails at {width} x {height} pixels: {said}') from error

    @torch.no_grad()
    def detect(self, images: Sequence[Image]) -> list[DetDataSample]:
        """What the model finds in images that were read, as one batch.

        Raises:
            UserError: the model predicts no instances.
        """
        found = self.model.test_step(pseudo_collate([image.prepared for image in images]))
        if any('pred_instances' not in sample for sample in found):
            raise UserError('the model predicts no instances with boxes or masks, which is all that is shown here')
        return [with_boxes(sample) for sample in found]


def with_boxes(sample: DetDataSample) -> DetDataSample:
    """Of models that predict masks alone (SOLO), boxes around them."""
    instances = sample.pred_instances
    masks = instances.get('masks')
    if masks is not None and len(instances) and ('bboxes' not in instances or not instances.bboxes.any()):
        instances.bboxes = mask2bbox(torch.as_tensor(masks).cpu()).to(instances.scores)
    return sample


def records(sample: DetDataSample, classes: Sequence[str], score_thr: float) -> list[dict]:
    """The detections of an image as plain data, the surest first.

    Each has ``label``, ``class``, ``score``, ``box`` (x1, y1, x2, y2 in pixels of the image) and, where the model
    predicts it, ``mask`` (COCO's compressed run lengths). A box that is not finite is left out.
    """
    instances, kept = _kept(sample, score_thr)
    masks = instances.get('masks')
    rles = None if masks is None else encode_mask_results(np.asarray(torch.as_tensor(masks)[kept].cpu()))
    boxes, scores, labels = (instances[key].detach().cpu() for key in ('bboxes', 'scores', 'labels'))
    found = []
    for number, i in enumerate(kept.tolist()):
        entry = {'label': int(labels[i]), 'class': name_of_label(int(labels[i]), classes)}
        entry |= {'score': round(float(scores[i]), 6), 'box': [round(value, 2) for value in boxes[i].tolist()]}
        if rles is not None:
            rle = rles[number]
            entry['mask'] = {'size': [int(side) for side in rle['size']], 'counts': rle['counts'].decode()}
        found.append(entry)
    return found


def instances_to_draw(sample: DetDataSample, colours: Colours, score_thr: float) -> list[Instance]:
    """The same detections, to be drawn in the colours of their classes."""
    instances, kept = _kept(sample, score_thr)
    masks = instances.get('masks')
    drawn = []
    for i in kept.tolist():
        label = int(instances.labels[i])
        name, colour = colours[label % len(colours)]
        drawn.append(
            Instance(
                box=instances.bboxes[i].tolist(),
                name=name if label < len(colours) else as_text(name_of_label(label, ())),
                colour=colour,
                mask=None if masks is None else np.asarray(torch.as_tensor(masks[i]).cpu(), bool),
                score=float(instances.scores[i]),
            )
        )
    return drawn


def _kept(sample: DetDataSample, score_thr: float) -> tuple:
    instances = sample.pred_instances
    scores = instances.scores.detach().cpu()
    finite = torch.isfinite(instances.bboxes.detach().cpu()).all(1) & (scores >= score_thr)
    order = torch.argsort(scores, descending=True, stable=True)
    return instances, order[finite[order]]


def name_of_label(label: int, classes: Sequence[str]) -> str:
    """The class name of a label; of one that has none, its number."""
    return str(classes[label]) if label < len(classes) else f'class {label}'


def displayable(image: np.ndarray) -> np.ndarray:
    """What a pipeline has read, of whatever depth and channels (BGR), as RGB in uint8."""
    image = image if image.ndim == 3 else image[..., None]
    if image.dtype == np.uint16:
        image = image // 257
    image = np.clip(np.nan_to_num(image), 0, 255).astype(np.uint8)
    image = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, 2)
    return np.ascontiguousarray(image[..., ::-1])


def draw(image: np.ndarray, instances: Sequence[Instance]) -> np.ndarray:
    """An image (RGB) with its detections, in its own size."""
    return np.asarray(draw_panel(image, instances, '', longest=None))


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write an RGB picture in the format of the path's suffix, one of :data:`KEPT_SUFFIXES`; whole or not at all."""
    options = dict(quality=_JPEG_QUALITY) if path.suffix.lower() in ('.jpg', '.jpeg', '.jfif', '.webp') else {}
    with replacing(path) as part:
        PillowImage.fromarray(picture).save(part, **options)
