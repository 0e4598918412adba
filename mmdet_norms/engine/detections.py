"""Detections on disk, as ``tools/test.py --out FILE.pkl`` writes them, read without running any code."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..commands import typed
from ..compat.pickles import UnsafePickleError, load_plain
from ..errors import UserError

_PER_OBJECT = ('bboxes', 'labels', 'scores')


def read_detections(path: str | os.PathLike) -> list[dict]:
    """The detections of every image: ``img_id`` and ``pred_instances`` with ``bboxes``, ``labels``, ``scores``, ...

    A pickle can run code; here only plain data, arrays and tensors are rebuilt, so any file may be tried.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds something else. Names the file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(
            f'{path} is a folder; name the file of results that {typed("test")} CONFIG CKPT --out FILE.pkl wrote'
        )
    if not path.is_file():
        raise UserError(f'there is no results file {path}; {typed("test")} CONFIG CKPT --out {path} writes it')
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'the results file {path} cannot be read: {error.strerror or error}') from error
    write_anew = f'write it anew: {typed("test")} CONFIG CKPT --out {path}'
    if not data:
        raise UserError(f'the results file {path} is empty; {write_anew}')
    try:
        content = load_plain(data)
    except UnsafePickleError as error:
        raise UserError(
            f'{path} was not read: it is a pickle that holds more than detections ({error}), and such a file can run '
            f'any code; {write_anew}'
        ) from error
    except Exception as error:  # damaged bytes raise anything
        what = f'{type(error).__name__}: {error}'.splitlines()[0][:120]
        raise UserError(f'{path} is no file of results, or a damaged one ({what}); {write_anew}') from error
    wrong = _what_is_wrong(content)
    if wrong:
        raise UserError(f'{path} does not hold detections as {typed("test")} --out writes them: {wrong}; {write_anew}')
    return content


def _what_is_wrong(content: object) -> str:
    if not isinstance(content, list):
        return f'it is a {type(content).__name__}, not a list with an entry for every image'
    for number, entry in enumerate(content):
        if not isinstance(entry, Mapping):
            return f'entry {number} is a {type(entry).__name__}'
        absent = [key for key in ('img_id', 'pred_instances') if key not in entry]
        if absent:
            return f'entry {number} has no {" and no ".join(absent)}'
        found = entry['pred_instances']
        if not isinstance(found, Mapping):
            return f'pred_instances of entry {number} is a {type(found).__name__}'
        wrong = _what_is_wrong_with(found)
        if wrong:
            return f'of entry {number} (image {entry["img_id"]!r}), {wrong}'
    return ''


def _what_is_wrong_with(found: Mapping) -> str:
    """Of the objects in one image: as many boxes as labels, scores and masks."""
    lengths = {}
    for key in [*_PER_OBJECT, *(['masks'] if found.get('masks') is not None else [])]:
        values = found.get(key)
        if values is None or isinstance(values, (str, bytes, Mapping)) or not hasattr(values, '__len__'):
            return f'{key} is {"missing" if values is None else "a " + type(values).__name__}'
        shape = tuple(getattr(values, 'shape', ())) if not isinstance(values, Sequence) else None
        if shape == ():
            return f'{key} is a single number'
        if key == 'bboxes' and any(len(box) != 4 for box in values if hasattr(box, '__len__')):
            return 'bboxes are not four numbers each'
        lengths[key] = len(values)
    if len(set(lengths.values())) > 1:
        return 'there are ' + ', '.join(f'{number} {key}' for key, number in lengths.items())
    return ''
