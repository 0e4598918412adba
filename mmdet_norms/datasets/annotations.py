"""Reading annotation files in COCO format, and the one order of their classes."""

import difflib
import gc
import json
import os
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmdet_norms.errors import UserError

BOM = b'\xef\xbb\xbf'

# The last few files, since --data-root, the checks and the evaluator's checks ask for the same ones.
_kept: dict[tuple, dict] = {}


class DataError(UserError, ValueError):
    """Data that cannot be read; the message names the file and says what to do."""


def read_annotations(path: str | os.PathLike) -> dict:
    """The content of an annotation file in COCO format, as it is.

    Raises:
        DataError: the file is not there, is no JSON, or holds no dict of lists called images and categories.
    """
    path = Path(path)
    try:
        stat = path.stat()
        key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        if key not in _kept:
            _kept[key] = _parse(path)
        return _kept[key]
    except OSError as error:
        raise DataError(f'{path}: the annotation file cannot be read ({error.strerror or error})') from error


def forget() -> None:
    """Give back the memory of the files read so far."""
    with no_collection():
        _kept.clear()


@contextmanager
def no_collection() -> Iterator[None]:
    """Without looking for garbage, of which there is none: among millions of objects that doubles the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _parse(path: Path) -> dict:
    data = path.read_bytes()
    try:
        with no_collection():
            content = json.loads(data.removeprefix(BOM).decode('utf-8'))
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
        raise DataError(
            f'{path} is not valid JSON ({error}; {len(data):,} bytes): it may be cut off or of another format; '
            'write or copy it again'
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__} where COCO's format has a dict of images, annotations and "
            'categories; export the data set as COCO instances'
        )
    for name in ('images', 'categories'):
        if not isinstance(content.get(name), list):
            raise DataError(
                f"{path} has no list '{name}', which COCO's format has beside 'annotations'; "
                'export the data set as COCO instances'
            )
    if not isinstance(content.get('annotations', []), list):
        raise DataError(f"{path}: 'annotations' is a {type(content['annotations']).__name__}, not a list")
    for name in ('images', 'annotations', 'categories'):
        for i, entry in enumerate(content.get(name, ())):
            if not isinstance(entry, dict):
                raise DataError(f'{path}: entry {i} of {name} is {entry!r:.60}, not a dict')
    content['_bom'] = data.startswith(BOM)
    return content


def class_order(content: dict, classes: Sequence[str] | None = None, by_id: bool = False) -> tuple[str, ...]:
    """The names that the labels 0, 1, ... stand for: the order of the file's list of categories, not of their ids.

    mmdet's data sets and COCO metric both number the categories in this order, whatever the order in ``classes``.

    Args:
        content: of an annotation file.
        classes: leave out categories with other names.
        by_id: for data sets that sort the categories first (Objects365 v1).
    """
    categories = [category for category in content['categories'] if 'name' in category]
    if by_id:
        categories = sorted(categories, key=lambda category: category['id'])
    return tuple(category['name'] for category in categories if classes is None or category['name'] in classes)


def other_order(wanted: Sequence[str], listed: Sequence[str]) -> str | None:
    """What keeps ``listed`` from being ``wanted``, with both orders; None if they are the same."""
    if list(wanted) == list(listed):
        return None
    if len(wanted) == len(listed) and set(wanted) == set(listed):
        return f'lists the classes in another order: {_names(listed, wanted)}, not {_names(wanted, listed)}'
    missing = [name for name in wanted if name not in listed]
    added = [name for name in listed if name not in wanted]
    if {_plain(name) for name in missing} & {_plain(name) for name in added}:  # blanks, accents, 1 and '1'
        wanted, listed, missing, added = (list(map(ascii, names)) for names in (wanted, listed, missing, added))
    parts = [f'lacks {_some(missing)}{_nearest(missing, added)}'] if missing else []
    parts += [f'also has {_some(added)}'] if added else []
    return f'{" and ".join(parts) or "differs"}: {_names(listed, wanted)}, not {_names(wanted, listed)}'


def _plain(name: Hashable) -> str:
    """What one sees of a name."""
    text = ''.join(char for char in unicodedata.normalize('NFKC', str(name)) if char.isprintable())
    return ' '.join(text.split())


def _names(names: Sequence[str], other: Sequence[str]) -> str:
    """The names, or the part around the first difference where there are many."""
    if len(names) <= 12:
        return f'({", ".join(map(str, names))})'
    same = next((i for i, (a, b) in enumerate(zip(names, other)) if a != b), min(len(names), len(other)))
    start, end = max(0, same - 2), same + 6
    return (
        f'({"..., " if start else ""}{", ".join(map(str, names[start:end]))}'
        f'{", ..." if end < len(names) else ""}; {len(names)} names, the first difference at {same})'
    )


def _nearest(missing: Iterable[str], names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    for name in missing:
        near = difflib.get_close_matches(str(name), names, 1) or [n for n in names if n.lower() == str(name).lower()]
        if near:
            return f' ({_quoted(name)} may be its {_quoted(near[0])})'
    return ''


def _quoted(name: str) -> str:
    return name if name[:1] in ('"', "'") else f"'{name}'"


def _some(names: Sequence[Hashable], limit: int = 6) -> str:
    names = list(names)
    return ', '.join(map(str, names[:limit])) + (f', ... ({len(names)} in all)' if len(names) > limit else '')
