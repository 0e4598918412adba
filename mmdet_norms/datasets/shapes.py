"""The ``shapes`` dataset: small COCO-format instance segmentation, generated from a seed.

Every image shows a few geometric shapes on a textured, cluttered background.  The class of
an object is decided by its outline alone: colour, shading, size, aspect ratio, rotation and
position come from one distribution that all classes share.  Objects occlude each other, are
cut by the image border, and are seen under varying light, blur and noise.  A few images hold
a crowd (one ``iscrowd=1`` region), a few hold nothing.

    >>> from mmdet_norms.datasets.shapes import METAINFO, make_shapes
    >>> make_shapes('data/shapes', num_train=1600, num_val=200)

The folder is read by mmdet's ordinary ``CocoDataset``::

    dataset = dict(
        type='CocoDataset', data_root='data/shapes', metainfo=METAINFO,
        ann_file='annotations/train.json', data_prefix=dict(img='train/'))

Image ``i`` of a split is drawn from a random generator seeded with ``[seed, split, i]``, so
it does not depend on how many images are made, nor on the order in which they are made.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from .generated import SPLITS, Generated, ShapesError, image_name, png, require_counts, sha256, write_generated

__all__ = [
    'CLASSES',
    'METAINFO',
    'VERSION',
    'Scene',
    'ShapesConfig',
    'ShapesError',
    'annotate',
    'make_shapes',
    'render_scene',
    'render_single',
]

#: Changes whenever the same arguments would give other pixels or annotations.
VERSION = 1

CLASSES = ('ellipse', 'rectangle', 'triangle', 'star', 'cross', 'ring')

#: ``metainfo`` for mmdet's ``CocoDataset``; the palette is for visualisers only.
METAINFO = dict(
    classes=CLASSES,
    palette=[(220, 20, 60), (0, 130, 200), (60, 180, 75), (255, 200, 25), (145, 30, 180), (70, 220, 220)],
)

_SUPERSAMPLE = 4  # outlines are drawn this many times finer, then averaged down
_CROWD = 128  # ids from here up in a scene's id map belong to the crowd
_TRIES = 12  # placements tried before an object is given up


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """How the images look, that is how hard the dataset is.

    The defaults are meant for a detector trained from scratch for a few hundred iterations
    on a CPU: objects are large for the image and stand out from the background, while about
    a quarter of the later ones hide part of an earlier one.

    Args:
        size: Side of the square images, px, 32 to 1024.
        min_object: Smallest object diameter as a fraction of ``size``.  At the default size
            it is 23 px, below COCO's "small" limit of 32^2 px area.
        max_object: Largest object diameter as a fraction of ``size``.  Diameters are
            log-uniform between the two, and are those of the circle an outline fits in, so
            that size says nothing about the class.
        max_objects: Objects per image are uniform in 1 to this number (1 to 100).
        occlusion: Probability that an object is placed over an earlier one on purpose; all
            others keep clear of each other.
        min_visible: An object that would show less than this fraction of its full area
            (hidden by others, or outside of the image) is placed elsewhere, or given up.
        clutter: Mean number of thin lines, arcs and dots behind the objects.
        min_contrast: Least distance of an object's colour from the mean background, and 0.6
            of it from the other objects, in RGB with channels in 0 to 1.  Up to 0.8.
        texture: Amplitude of background texture, and half of it on objects (0 to 1 scale).
        lighting: Largest relative change of brightness, by a gain for the whole image and
            by a linear gradient across it.
        noise: Largest standard deviation of the pixel noise (0 to 1 scale).
        blur: Largest standard deviation of the Gaussian blur, px.
        crowd_fraction: Fraction of the images with a crowd region.
        empty_fraction: Fraction of the images without any object.

    Raises:
        ValueError: A value is out of range.
    """

    size: int = 128
    min_object: float = 0.18
    max_object: float = 0.6
    max_objects: int = 4
    occlusion: float = 0.25
    min_visible: float = 0.5
    clutter: float = 6.0
    min_contrast: float = 0.35
    texture: float = 0.12
    lighting: float = 0.25
    noise: float = 0.03
    blur: float = 0.8
    crowd_fraction: float = 0.025
    empty_fraction: float = 0.025

    def __post_init__(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f'ShapesConfig: {message}')

        check(32 <= self.size <= 1024, f'size must be 32 to 1024 px, not {self.size}')
        check(
            0 < self.min_object <= self.max_object <= 0.9,
            'need 0 < min_object <= max_object <= 0.9 (fractions of the image side), got '
            f'{self.min_object} and {self.max_object}',
        )
        check(
            self.min_object * self.size >= 10,
            f'min_object * size is {self.min_object * self.size:.1f} px; classes cannot be told apart below 10 px',
        )
        check(1 <= self.max_objects <= 100, f'max_objects must be 1 to 100, not {self.max_objects}')
        check(0.1 <= self.min_visible <= 1, f'min_visible must be 0.1 to 1, not {self.min_visible}')
        check(0 <= self.min_contrast <= 0.8, f'min_contrast must be 0 to 0.8, not {self.min_contrast}')
        for name in ('occlusion', 'texture', 'lighting', 'noise', 'crowd_fraction', 'empty_fraction'):
            check(0 <= getattr(self, name) <= 1, f'{name} must be 0 to 1, not {getattr(self, name)}')
        check(self.crowd_fraction + self.empty_fraction <= 1, 'crowd_fraction + empty_fraction must not exceed 1')
        check(0 <= self.clutter <= 200, f'clutter must be 0 to 200, not {self.clutter}')
        check(0 <= self.blur <= 5, f'blur must be 0 to 5 px, not {self.blur}')


class SceneObject(NamedTuple):
    """One annotated thing: an object, or a crowd region."""

    label: int  # index into CLASSES
    fine: np.ndarray  # visible mask at 4x the image's resolution, bool
    mask: np.ndarray  # visible mask at image resolution (more than half covered), bool
    is_crowd: bool
    visible: float  # visible fraction of the full outline's area; 1.0 for crowds


class Scene(NamedTuple):
    """An image (H, W, 3 uint8, BGR as OpenCV has it) and what is in it."""

    image: np.ndarray
    objects: list[SceneObject]


class _Placed(NamedTuple):
    label: int
    centre: tuple[float, float]
    radius: float
    area: float  # of the full outline, in fine pixels
    colour: np.ndarray


# --------------------------------------------------------------------------------------
# Outlines
# --------------------------------------------------------------------------------------
def _regular(n: int, radius: float | np.ndarray = 1.0) -> np.ndarray:
    angle = np.arange(n) * (2 * math.pi / n)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1))


def _unit_outline(label: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Contours within the unit circle; a second contour is a hole."""
    name = CLASSES[label]
    t = rng.random()
    if name == 'ellipse':
        return [_regular(40)]
    if name == 'rectangle':
        return [_regular(4) @ (np.array([[1, 1], [-1, 1]]) * math.sqrt(0.5))]
    if name == 'triangle':
        return [_regular(3)]
    if name == 'star':
        return [_regular(10, np.tile([1.0, 0.36 + 0.1 * t], 5))]
    if name == 'ring':
        return [_regular(40), _regular(40, 0.45 + 0.15 * t)]
    a = 0.26 + 0.08 * t  # half width of the cross' arms
    b = math.sqrt(1 - a * a)
    quarter = np.array([[b, -a], [b, a], [a, a]])
    turn = np.array([[0, 1], [-1, 0]])
    parts = [quarter]
    for _ in range(3):
        parts.append(parts[-1] @ turn)
    return [np.concatenate(parts)]


def _shape(label: int, radius: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Contours around the origin, px: a stretched and rotated unit outline."""
    stretch = np.array([1.0, rng.uniform(0.7, 1.0)])
    angle = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, s], [-s, c]]) * radius
    return [(contour * stretch) @ turn for contour in _unit_outline(label, rng)]


def _area(contours: Sequence[np.ndarray]) -> float:
    def shoelace(p: np.ndarray) -> float:
        q = np.roll(p, -1, 0)
        return 0.5 * abs(float((p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum()))

    return shoelace(contours[0]) - sum(shoelace(p) for p in contours[1:])


def _fine_points(contours: Sequence[np.ndarray], centre: tuple[float, float]) -> list[np.ndarray]:
    # Continuous image coordinates to indices of fine pixel centres.
    return [np.rint((p + centre) * _SUPERSAMPLE - 0.5).astype(np.int32) for p in contours]


def _patch(points: Sequence[np.ndarray], side: int) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """The fine mask of an outline, cut to its bounding box within the image."""
    x0, y0 = np.maximum(points[0].min(0), 0)
    x1, y1 = np.minimum(points[0].max(0) + 1, side)
    if x1 <= x0 or y1 <= y0:
        return None
    mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillPoly(mask, points, 1, offset=(-int(x0), -int(y0)))  # even-odd: holes stay open
    return (slice(y0, y1), slice(x0, x1)), mask.astype(bool)


# --------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------
def _colour(rng: np.random.Generator, others: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """A random colour at the given distances from others, or the best of 30 tries."""
    candidates = rng.uniform(0.05, 0.95, (30, 3))
    slack = np.full(30, np.inf)
    for other, distance in others:
        slack = np.minimum(slack, np.linalg.norm(candidates - other, axis=1) - distance)
    good = slack >= 0
    return candidates[int(good.argmax()) if good.any() else int(slack.argmax())]


def _texture(size: int, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """A (size, size) field of about the given amplitude: blotches or stripes or both."""
    field = np.zeros((size, size), np.float32)
    kind = rng.integers(3)
    if kind != 1:
        cells = int(rng.integers(3, 16))
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        field += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    if kind != 0:
        period = size * rng.uniform(0.05, 0.3)
        angle, phase = rng.uniform(0, 2 * math.pi, 2)
        ramp = np.arange(size, dtype=np.float32) * np.float32(2 * math.pi / period)
        field += np.sin(
            ramp[None] * np.float32(math.cos(angle)) + ramp[:, None] * np.float32(math.sin(angle)) + np.float32(phase)
        )
    return field * np.float32(amplitude)


def _background(cfg: ShapesConfig, base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Textured and cluttered background, (H, W, 3) float32 in about 0 to 1."""
    size = cfg.size
    tint = rng.uniform(0.4, 1.0, 3).astype(np.float32)
    field = _texture(size, cfg.texture * rng.uniform(0.2, 1.0), rng)
    image = base.astype(np.float32) + field[..., None] * tint
    image8 = np.clip(image * 255, 0, 255).astype(np.uint8)  # anti-aliased lines need uint8
    unit = size / 128
    for _ in range(int(rng.poisson(cfg.clutter))):
        colour = tuple(int(c) for c in rng.integers(10, 246, 3))
        x, y = (int(v) for v in rng.integers(0, size * 16, 2))  # 1/16 px
        kind = rng.integers(3)
        if kind == 0:  # thin line
            length, angle = rng.uniform(0.1, 0.6) * size * 16, rng.uniform(0, 2 * math.pi)
            end = (int(x + length * math.cos(angle)), int(y + length * math.sin(angle)))
            cv2.line(image8, (x, y), end, colour, 1, cv2.LINE_AA, 4)
        elif kind == 1:  # thin arc, never closed: a closed one would be a ring's edge
            axes = tuple(int(v * size * 16) for v in rng.uniform(0.05, 0.3, 2))
            turn, start, sweep = rng.uniform((0, 0, 50), (360, 360, 180))
            cv2.ellipse(image8, (x, y), axes, turn, start, start + sweep, colour, 1, cv2.LINE_AA, 4)
        else:  # dot
            radius = int(rng.uniform(0.8, 2.2) * unit * 16)
            cv2.circle(image8, (x, y), radius, colour, -1, cv2.LINE_AA, 4)
    return image8.astype(np.float32) / np.float32(255)


def _place(
    cfg: ShapesConfig,
    rng: np.random.Generator,
    ids: np.ndarray,
    placed: list[_Placed],
    blocked: list[tuple[float, float, float]],
    base: np.ndarray,
    label: int | None = None,
) -> bool:
    """Draw one more object, of a random class by default, into ``ids``; False if no place was found for it."""
    if label is None:
        label = int(rng.integers(len(CLASSES)))
    over = bool(placed) and rng.random() < cfg.occlusion
    target = placed[int(rng.integers(len(placed)))] if over else None
    visible = np.bincount(ids.ravel(), minlength=256) if over else None
    low, high = math.log(cfg.min_object), math.log(cfg.max_object)
    for attempt in range(_TRIES):
        radius = 0.5 * cfg.size * math.exp(rng.uniform(low, high))
        over = over and attempt < _TRIES // 2
        if over:
            angle = rng.uniform(0, 2 * math.pi)
            reach = (radius + target.radius) * rng.uniform(0.45, 0.9)
            centre = (target.centre[0] + reach * math.cos(angle), target.centre[1] + reach * math.sin(angle))
            if not all(0.75 * radius <= c <= cfg.size - 0.75 * radius for c in centre):
                continue
            keep_clear = blocked
        else:
            centre = tuple(rng.uniform(0.75 * radius, cfg.size - 0.75 * radius, 2))
            # Circles rather than outlines, so that a slim class does not fit in more often.
            keep_clear = blocked + [(*p.centre, p.radius) for p in placed]
        if any(math.hypot(centre[0] - x, centre[1] - y) < radius + r for x, y, r in keep_clear):
            continue
        contours = _shape(label, radius, rng)
        area = _area(contours) * _SUPERSAMPLE**2
        patch = _patch(_fine_points(contours, centre), ids.shape[0])
        if patch is None:
            continue
        where, mask = patch
        if mask.sum() < cfg.min_visible * area:
            continue
        if over:
            hidden = np.bincount(ids[where][mask], minlength=256)
            if not hidden[1:].any() or any(
                visible[i] - hidden[i] < cfg.min_visible * p.area for i, p in enumerate(placed, 1)
            ):
                continue
        placed.append(
            _Placed(
                label,
                centre,
                radius,
                area,
                _colour(rng, [(base, cfg.min_contrast)] + [(p.colour, 0.6 * cfg.min_contrast) for p in placed]),
            )
        )
        ids[where][mask] = len(placed)
        return True
    return False


def _crowd(cfg: ShapesConfig, rng: np.random.Generator, ids: np.ndarray) -> tuple[int, int, tuple[float, float, float]]:
    """Draw a cluster of tiny shapes of one class; its label, count and bounding circle."""
    label = int(rng.integers(len(CLASSES)))
    spread = cfg.size * rng.uniform(0.16, 0.24)
    centre = rng.uniform(spread, cfg.size - spread, 2)
    members: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(24, 48))):
        radius = cfg.size * rng.uniform(0.025, 0.04)
        angle, reach = rng.uniform(0, 2 * math.pi), spread * math.sqrt(rng.random())
        at = (centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle))
        # Touching is what crowds do, but one lump would no longer look like shapes.
        if any(math.hypot(at[0] - x, at[1] - y) < 0.8 * (radius + r) for x, y, r in members):
            continue
        patch = _patch(_fine_points(_shape(label, radius, rng), at), ids.shape[0])
        if patch is not None:
            ids[patch[0]][patch[1]] = _CROWD + len(members)
            members.append((*at, radius))
    circle = (centre[0], centre[1], spread + 0.04 * cfg.size)
    return label, len(members), circle


def _kind(cfg: ShapesConfig, index: int) -> str:
    # A low-discrepancy sequence instead of chance: a small split gets its share as well.
    u = (index + 0.5) * 0.6180339887498949 % 1.0
    if u < cfg.empty_fraction:
        return 'empty'
    return 'crowd' if u < cfg.empty_fraction + cfg.crowd_fraction else 'plain'


def _cover(fine: np.ndarray, size: int) -> np.ndarray:
    """Fraction of every image pixel that a fine mask covers, float32."""
    return cv2.resize(fine.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)


def render_scene(cfg: ShapesConfig, seed: int, split: str, index: int) -> Scene:
    """Draw image ``index`` of a split, together with its exact visible masks.

    Args:
        cfg: How images look.
        seed: The dataset's seed, 0 or more.
        split: ``'train'`` or ``'val'``.
        index: Number of the image in the split, from 0.

    Returns:
        The image and its objects, in drawing order (later ones hide earlier ones).
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    size, fine_size = cfg.size, cfg.size * _SUPERSAMPLE
    base = rng.uniform(0.1, 0.9, 3)
    image = _background(cfg, base, rng)
    # Which thing is on top at every fine pixel: 0 background, 1.. objects, _CROWD.. crowd.
    ids = np.zeros((fine_size, fine_size), np.uint8)
    kind = _kind(cfg, index)
    placed: list[_Placed] = []
    blocked: list[tuple[float, float, float]] = []
    crowd_label, crowd_count = 0, 0
    if kind == 'crowd':
        crowd_label, crowd_count, circle = _crowd(cfg, rng, ids)
        blocked.append(circle)
    if kind != 'empty':
        for _ in range(int(rng.integers(1, cfg.max_objects + 1))):
            _place(cfg, rng, ids, placed, blocked, base)

    objects = []
    if crowd_count:
        fine = ids >= _CROWD
        objects.append(SceneObject(crowd_label, fine, _cover(fine, size) > 0.5, True, 1.0))
        for i in range(crowd_count):
            colour = _colour(rng, [(base, cfg.min_contrast)]).astype(np.float32)
            image += _cover(ids == _CROWD + i, size)[..., None] * (colour - image)
    paint, drawn = _draw(cfg, image, ids, placed, rng)
    return Scene(_expose(cfg, paint, rng), objects + drawn)


def _draw(
    cfg: ShapesConfig, image: np.ndarray, ids: np.ndarray, placed: Sequence[_Placed], rng: np.random.Generator
) -> tuple[np.ndarray, list[SceneObject]]:
    """The background with the placed objects on it, and what is to be seen of each."""
    paint, objects = image.copy(), []  # weights of all layers add up to one at every pixel
    for i, p in enumerate(placed, 1):
        fine = ids == i
        cover = _cover(fine, cfg.size)
        shade = _texture(cfg.size, 0.5 * cfg.texture * rng.uniform(0.0, 1.0), rng)
        colour = p.colour.astype(np.float32) + shade[..., None]
        paint += cover[..., None] * (colour - image)
        objects.append(SceneObject(p.label, fine, cover > 0.5, False, min(1.0, float(fine.sum()) / p.area)))
    return paint, objects


def render_single(cfg: ShapesConfig, rng: np.random.Generator, label: int) -> Scene:
    """Draw one object of a class, as :func:`render_scene` draws it."""
    base = rng.uniform(0.1, 0.9, 3)
    image = _background(cfg, base, rng)
    ids = np.zeros((cfg.size * _SUPERSAMPLE, cfg.size * _SUPERSAMPLE), np.uint8)
    placed: list[_Placed] = []
    while not placed:  # an unlucky try is given up
        _place(cfg, rng, ids, placed, [], base, label)
    paint, objects = _draw(cfg, image, ids, placed, rng)
    return Scene(_expose(cfg, paint, rng), objects)


def _expose(cfg: ShapesConfig, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lighting, blur and noise; returns uint8."""
    size = cfg.size
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.7, 0.7, size, dtype=np.float32)
    slope = np.float32(cfg.lighting * rng.random())
    light = (
        ramp[None] * (slope * np.float32(math.cos(angle)))
        + ramp[:, None] * (slope * np.float32(math.sin(angle)))
        + np.float32(1 + cfg.lighting * rng.uniform(-1, 1))
    )
    image = image * light[..., None]
    sigma = cfg.blur * rng.random()
    if sigma > 0.2:  # less cannot be seen
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    noise = rng.standard_normal(image.shape, np.float32)
    image = image + noise * np.float32(cfg.noise * rng.random())
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------
# Annotations
# --------------------------------------------------------------------------------------
def _rle(mask: np.ndarray) -> dict[str, list]:
    """COCO's uncompressed run lengths: column by column, starting with a run of zeros."""
    flat = np.concatenate([[False], mask.ravel(order='F'), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    edges = edges[edges < mask.size]
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return dict(size=list(mask.shape), counts=counts.tolist())


def _polygons(fine: np.ndarray) -> list[list[float]] | None:
    """Outlines of a fine mask in image px, or None if it has holes."""
    contours, hierarchy = cv2.findContours(fine.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0] if contours else ()):
        big = cv2.contourArea(contour) >= _SUPERSAMPLE**2  # 1 px: less is a rounding artefact
        if parent >= 0:
            if big:
                return None
            continue
        contour = cv2.approxPolyDP(contour, 0.2 * _SUPERSAMPLE, True)
        if big and len(contour) >= 3:
            points = (contour.reshape(-1, 2) + 0.5) / _SUPERSAMPLE
            polygons.append([round(float(v), 2) for v in points.ravel()])
    return polygons or None


def annotate(obj: SceneObject) -> dict:
    """COCO's ``segmentation``, ``area``, ``bbox``, ``iscrowd``, ``category_id`` of an object.

    Polygons where they say what the mask says (regions without holes), run lengths where
    they do not; ``area`` and ``bbox`` are those of the segmentation as pycocotools decodes
    it, so the fields of an annotation agree exactly.
    """
    height, width = obj.mask.shape
    polygons = None if obj.is_crowd else _polygons(obj.fine)
    segmentation: list | dict = _rle(obj.mask)
    rle = coco_mask.frPyObjects(segmentation, height, width)
    if polygons is not None:
        drawn = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if coco_mask.iou([drawn], [rle], [0])[0, 0] > 0.92:
            segmentation, rle = polygons, drawn
    return dict(
        segmentation=segmentation,
        area=int(coco_mask.area(rle)),
        bbox=[int(v) for v in coco_mask.toBbox(rle)],
        iscrowd=int(obj.is_crowd),
        category_id=obj.label + 1,
    )


# --------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------
def _write_split(folder: Path, cfg: ShapesConfig, seed: int, split: str, count: int) -> Iterator[None]:
    """Write one split; yields after every image."""
    (folder / split).mkdir()
    images, annotations = [], []
    for index in range(count):
        scene = render_scene(cfg, seed, split, index)
        name = image_name(index)
        (folder / split / name).write_bytes(png(scene.image))  # raises on a full disk
        images.append(dict(id=index + 1, file_name=name, width=cfg.size, height=cfg.size))
        for obj in scene.objects:
            annotations.append(dict(id=len(annotations) + 1, image_id=index + 1, **annotate(obj)))
        yield
    # No date: the same seed has to give the same bytes.
    content = dict(
        info=dict(
            description=f'mmdet_norms shapes, {split} split',
            version=str(VERSION),
            year=2024,
            contributor='',
            url='',
            date_created='',
        ),
        licenses=[],
        images=images,
        annotations=annotations,
        categories=[dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, 1)],
    )
    text = json.dumps(content, separators=(',', ':'))
    (folder / 'annotations' / f'{split}.json').write_text(text, encoding='utf-8')


def _is_complete(root: Path, meta: dict) -> bool:
    """Whether all files that ``meta.json`` speaks of are there."""
    for split in SPLITS:
        expected = meta['arguments'][f'num_{split}']
        folder = root / split
        if not folder.is_dir() or sum(name.endswith('.png') for name in os.listdir(folder)) != expected:
            return False
        path = root / 'annotations' / f'{split}.json'
        if sha256(path) != meta.get('sha256', {}).get(path.name):
            return False
    return True


def _files(arguments: Mapping) -> set[str]:
    """Every file and folder that belongs to the data set of such arguments."""
    own = {'annotations', *SPLITS}
    for split in SPLITS:
        own.add(f'annotations/{split}.json')
        own.update(f'{split}/{image_name(i)}' for i in range(arguments.get(f'num_{split}', 0)))
    return own


def make_shapes(
    root: str | Path,
    num_train: int = 1600,
    num_val: int = 200,
    size: int | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    config: ShapesConfig | None = None,
    progress: bool = False,
) -> Path:
    """Write the dataset: ``{train,val}/*.png``, ``annotations/{train,val}.json``, meta.json.

    If ``root`` already holds exactly this dataset, nothing is done.  All files are first
    written to a folder beside ``root`` that is renamed at the end, so ``root`` is never
    half-written.  The same arguments give the same bytes (with the same OpenCV and numpy).

    Args:
        root: Folder to write; created with its parents.
        num_train: Images in ``train``, at least 1.  1600 take about eight seconds and are more
            than a short training run sees twice.
        num_val: Images in ``val``, at least 1.
        size: Side of the images, px; short for ``config`` with another ``size``.
        seed: Seed, 0 or more.
        overwrite: Replace another ``shapes`` dataset in ``root``.  A folder with anything
            else in it is never replaced.
        config: How images look; None for the defaults.
        progress: Show a progress bar with the remaining time on stderr.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: An argument is out of range.
        ShapesError: ``root`` holds something else; the message says what to do.
    """
    config = config or ShapesConfig()
    if size is not None:
        config = dataclasses.replace(config, size=size)
    require_counts(num_train=(num_train, 1), num_val=(num_val, 1), seed=(seed, 0))
    counts = dict(train=num_train, val=num_val)

    def write(fresh: Path) -> Iterator[None]:
        (fresh / 'annotations').mkdir()
        for split, count in counts.items():
            yield from _write_split(fresh, config, seed, split, count)

    def hashes(fresh: Path) -> dict[str, str]:
        return {f'{split}.json': sha256(fresh / 'annotations' / f'{split}.json') for split in SPLITS}

    return write_generated(
        root,
        Generated('shapes', VERSION, CLASSES, write, hashes, _is_complete, _files),
        dict(num_train=int(num_train), num_val=int(num_val), seed=int(seed), **dataclasses.asdict(config)),
        images=num_train + num_val,
        overwrite=overwrite,
        progress=progress,
    )
