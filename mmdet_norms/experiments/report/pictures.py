"""The same images as each norm sees them."""

from typing import NamedTuple

from PIL import Image

from .content import Content
from .page import jpeg

_WIDEST, _QUALITY = 2400, 82
_MOST_COLUMNS = 8


class Pictures(NamedTuple):
    """An image for the page, and what it shows."""

    source: str
    caption: str


def pictures(content: Content, images: int) -> Pictures | None:
    """Of each norm the first seed, at the smallest batch size, where they differ most; None of classifiers.

    Raises:
        UserError: a run has no checkpoint any more, or its data is gone.
    """
    if not content.metric.key.startswith(('bbox_', 'segm_')):
        return None
    from ..detections import side_by_side  # loads what runs a model

    size = content.batch_sizes[0]
    chosen = [setting for method in content.ordered if (setting := content.at(method, size))]
    chosen = [(s, next((run for run in s.runs if run.is_finished), None)) for s in chosen]
    chosen = [(setting, run) for setting, run in chosen if run is not None][:_MOST_COLUMNS]
    array = side_by_side(
        [run.folder for _, run in chosen], labels=[setting.method.name for setting, _ in chosen], number=images
    )
    where = f' at batch size {size}' if size is not None else ''
    seed = chosen[0][1].labels['seed']
    return Pictures(_data(array), f'What the norms find{where}, seed {seed}, beside the ground truth.')


def _data(array) -> str:
    image = Image.fromarray(array)
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, round(image.height * _WIDEST / image.width)))
    return jpeg(image, _QUALITY)
