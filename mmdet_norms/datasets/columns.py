"""Columns of an annotation file as arrays, whatever its values are; 860,000 rows take a second."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def numbers(values: Sequence) -> np.ndarray:
    """As float64; NaN for what is no finite number (text and booleans are none)."""
    plain = _plain(values)
    if plain is None or plain.ndim != 1:
        plain = np.array([_number(value) for value in values], np.float64)
    return np.where(np.isfinite(plain), plain, np.nan).astype(np.float64)


def boxes(values: Sequence) -> np.ndarray:
    """As (N, 4) float64; NaN for the whole row of what is not four finite numbers."""
    plain = _plain(values)
    if plain is None or plain.ndim != 2 or plain.shape[1] != 4:
        plain = np.array([_box(value) for value in values], np.float64).reshape(-1, 4)
    plain = plain.astype(np.float64)
    plain[~np.isfinite(plain).all(1)] = np.nan
    return plain


def positions(values: Sequence, table: Mapping) -> np.ndarray:
    """Where ``table`` has each value: what it maps to, or -1."""
    try:
        return np.array([table.get(value, -1) for value in values], np.int64)
    except TypeError:  # a list or dict, which is no id
        return np.array([table.get(value, -1) if is_id(value) else -1 for value in values], np.int64)


def is_id(value: Any) -> bool:
    """Whether a value can be an id at all: a number or a text."""
    return isinstance(value, (int, float, str)) and not isinstance(value, bool) and value == value


def is_mask(segmentation: Any) -> bool:
    """Whether there is a mask to draw: run lengths, or a polygon of three points or more."""
    if isinstance(segmentation, Mapping):
        return isinstance(segmentation.get('counts'), (list, str)) and size_of(segmentation) is not None
    return isinstance(segmentation, list) and any(is_polygon(polygon) for polygon in segmentation)


def is_polygon(polygon: Any) -> bool:
    """Whether mmdet draws it: an even number of at least six finite coordinates."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    try:
        return math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return False


def size_of(run_lengths: Mapping) -> tuple[int, int] | None:
    """Height and width of a mask in run lengths, if it says them in the right way."""
    size = run_lengths.get('size')
    if isinstance(size, list) and len(size) == 2 and all(type(value) in (int, float) for value in size):
        return size[0], size[1]
    return None


def _plain(values: Sequence) -> np.ndarray | None:
    try:
        array = np.array(values)
    except (ValueError, OverflowError):  # rows of different lengths
        return None
    return array if array.dtype.kind in 'iuf' else None


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _box(value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return [math.nan] * 4
    return [_number(number) for number in value]


def decompressed(counts: str) -> list[int] | None:
    """The run lengths in COCO's compressed text: five bits a letter, differences from the third on; or None."""
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else None
