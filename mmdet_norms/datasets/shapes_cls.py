"""The ``shapes-cls`` dataset: one shape per image, in folders of classes, generated from a seed.

Drawn as the :mod:`shapes <mmdet_norms.datasets.shapes>` of the demo's detector are, with the same outlines, colours,
textures, clutter, light, blur and noise, so that a backbone that was pretrained on it has seen what the detector will
see. The class is decided by the outline alone.

    >>> from mmdet_norms.datasets.shapes_cls import make_shapes_cls
    >>> make_shapes_cls('data/shapes-cls', num_train=6000, num_val=1200)

The folder has the layout of ImageNet, ``{train,val}/CLASS/*.png``, and is read by ``ImageFolder``. Image ``i`` of a
split is of class ``i % 6`` and drawn from a random generator seeded with ``[seed, split, i]``, so it does not depend on
how many images are made, and every class has as many as any other.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .generated import SPLITS, Generated, image_name, png, require_counts, write_generated
from .shapes import CLASSES, Scene, ShapesConfig, render_single

__all__ = ['NUM_TRAIN', 'NUM_VAL', 'SHAPES_CLS', 'SHAPES_CLS_HARD', 'VERSION', 'make_shapes_cls', 'render_image']

#: Changes whenever the same arguments would give other pixels.
VERSION = 1

#: So that two minutes on two CPU cores are enough: larger in the image, with more contrast and less around them than in
#: the demo's detection data. In pixels, objects are as large as there.
SHAPES_CLS = ShapesConfig(
    size=48, min_object=0.75, max_object=0.9, clutter=0.5, min_contrast=0.6, texture=0.04, noise=0.015, blur=0.5
)
#: To compare norms: so hard that what they do to a training is to be seen in what it reaches.
SHAPES_CLS_HARD = ShapesConfig(size=48, min_object=0.6, max_object=0.9, clutter=1.5, min_contrast=0.45, texture=0.06)

NUM_TRAIN, NUM_VAL = 6000, 1200
_STREAMS = {'train': 2, 'val': 3}  # 0 and 1 are those of the detection data


def render_image(cfg: ShapesConfig, seed: int, split: str, index: int) -> Scene:
    """Draw image ``index`` of a split; its one object has the label ``index % 6``, a place in ``CLASSES``.

    Args:
        cfg: how images look; what it says of several objects, crowds and empty images is not used.
        seed: of the data set, 0 or more.
        split: ``'train'`` or ``'val'``.
        index: number of the image in the split, from 0.
    """
    return render_single(cfg, np.random.default_rng([seed, _STREAMS[split], index]), index % len(CLASSES))


def make_shapes_cls(
    root: str | Path,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: int | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    config: ShapesConfig | None = None,
    progress: bool = False,
) -> Path:
    """Write the data set: ``{train,val}/CLASS/*.png`` and meta.json with a hash of each split.

    If ``root`` already holds exactly this data set, nothing is done; ``root`` is never half-written. The same arguments
    give the same bytes (with the same OpenCV and numpy).

    Args:
        root: folder to write; created with its parents.
        num_train: images in ``train``, at least 6: one of each class.
        num_val: images in ``val``, at least 6.
        size: side of the images, px, 32 or more; short for ``config`` with another ``size``. Default 48.
        seed: 0 or more.
        overwrite: replace another ``shapes-cls`` data set in ``root``. A folder with anything else in it is never
            replaced.
        config: how images look; default :data:`SHAPES_CLS`.
        progress: show a progress bar with the remaining time on stderr.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: an argument is out of range.
        ShapesError: ``root`` holds something else; the message says what to do.
    """
    config = config or SHAPES_CLS
    if size is not None:
        config = dataclasses.replace(config, size=size)
    require_counts(num_train=(num_train, len(CLASSES)), num_val=(num_val, len(CLASSES)), seed=(seed, 0))
    counts = dict(train=num_train, val=num_val)

    def write(fresh: Path) -> Iterator[None]:
        for split, count in counts.items():
            for name in CLASSES:
                (fresh / split / name).mkdir(parents=True)
            for index in range(count):
                (fresh / _place_of(split, index)).write_bytes(png(render_image(config, seed, split, index).image))
                yield

    return write_generated(
        root,
        Generated('shapes-cls', VERSION, sorted(CLASSES), write, _hashes, _is_complete, _files),
        dict(num_train=int(num_train), num_val=int(num_val), seed=int(seed), **dataclasses.asdict(config)),
        images=num_train + num_val,
        overwrite=overwrite,
        progress=progress,
    )


def _place_of(split: str, index: int) -> str:
    return f'{split}/{CLASSES[index % len(CLASSES)]}/{image_name(index)}'


def _hashes(root: Path) -> dict[str, str]:
    """Of the names and bytes of all files of a split: the class of an image is where it lies."""
    found = {}
    for split in SPLITS:
        total = hashlib.sha256()
        for path in sorted(path for path in (root / split).rglob('*') if path.is_file()):
            total.update(path.relative_to(root).as_posix().encode() + b'\0' + path.read_bytes())
        found[split] = total.hexdigest()
    return found


def _is_complete(root: Path, meta: dict) -> bool:
    try:
        return _hashes(root) == meta.get('sha256')
    except OSError:
        return False


def _files(arguments: Mapping) -> set[str]:
    own = {*SPLITS, *(f'{split}/{name}' for split in SPLITS for name in CLASSES)}
    return own | {_place_of(split, i) for split in SPLITS for i in range(arguments.get(f'num_{split}', 0))}
