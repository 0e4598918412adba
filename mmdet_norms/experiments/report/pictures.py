"""The same images as each norm sees them."""

from typing import NamedTuple

from PIL import Image

from ..runs import Run
from .content import Content, Method, Setting
from .page import jpeg

_WIDEST, _QUALITY = 2400, 82
_MOST_COLUMNS = 8


class Pictures(NamedTuple):
    """An image for the page, and what it shows."""

    source: str
    caption: str


def pictures(content: Content, images: int) -> Pictures | None:
    """Of each norm the first seed, at its smallest batch size, where they differ most; None of classifiers.

    Raises:
        UserError: a run has no checkpoint any more, or its data is gone.
    """
    if not content.metric.key.startswith(('bbox_', 'segm_')):
        return None
    from ..detections import side_by_side  # loads what runs a model

    chosen = [found for method in content.ordered if (found := _smallest(content, method))][:_MOST_COLUMNS]
    labels = [setting.method.name for setting, _ in chosen]
    array = side_by_side([run.folder for _, run in chosen], labels=labels, number=images)
    where = [_where(setting, run) for setting, run in chosen]
    most = max(where, key=where.count)
    others = [f'{name}{place}' for name, place in zip(labels, where) if place != most]
    but = f' ({", ".join(others)})' if others else ''
    return Pictures(_data(array), f'What the norms find{most}{but}, beside the ground truth.')


def _smallest(content: Content, method: Method) -> tuple[Setting, Run] | None:
    """The smallest batch size at which a run of a method came to its end, and that of the first seed there."""
    for size in content.batch_sizes:
        setting = content.at(method, size)
        run = next((run for run in setting.runs if run.is_finished), None) if setting else None
        if run is not None:
            return setting, run
    return None


def _where(setting: Setting, run: Run) -> str:
    size = f' at batch size {setting.batch_size},' if setting.batch_size is not None else ','
    return f'{size} seed {run.labels["seed"]}'


def _data(array) -> str:
    image = Image.fromarray(array)
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, round(image.height * _WIDEST / image.width)))
    return jpeg(image, _QUALITY)
