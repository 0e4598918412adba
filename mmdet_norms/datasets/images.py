"""What image files say about themselves, mostly without decoding them."""

import os
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112
_NO_BYTES = ('F', 'I')  # Pillow's names: pixels of 32 bits, which TIFF files of measurements have
_TURNED = (5, 6, 7, 8)  # a quarter turn, so that width and height change places


@dataclass(frozen=True)
class Header:
    """The size that an image file is stored in, and its EXIF orientation (1: as it is)."""

    width: int
    height: int
    orientation: int = 1

    def size(self, turned: bool) -> tuple[int, int]:
        """Width and height as read: with the orientation heeded (``turned``) or not."""
        if turned and self.orientation in _TURNED:
            return self.height, self.width
        return self.width, self.height


def read_header(path: str) -> Header | str:
    """The header of an image file, or in words what is wrong with it."""
    try:
        if os.path.getsize(path) == 0:
            return 'is an empty file'
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                # PNG keeps it in a chunk that may come last; getexif() would decode the image to get there
                known = image.format != 'PNG' or 'exif' in image.info
                orientation = image.getexif().get(_ORIENTATION, 1) if known else 1
                return Header(*image.size, orientation if orientation in range(1, 9) else 1)
    except FileNotFoundError:
        return 'is not there'
    except IsADirectoryError:
        return 'is a folder'
    except PermissionError:
        return 'may not be read'
    except Exception:  # Pillow raises many kinds for broken files
        return _decoded(path)


def decode(path: str) -> Header | str:
    """The header of an image file all of which can be decoded, or in words what is wrong with it."""
    header = read_header(path)
    if isinstance(header, str):
        return header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                image.load()  # OpenCV fills what is missing of a cut-off file with grey and says nothing
                mode = image.mode
    except (UnidentifiedImageError, Image.DecompressionBombError):  # OpenCV has decoded it
        return header
    except Exception as error:
        return f'cannot be decoded ({error})'
    if mode in _NO_BYTES and _read(path, 'IMREAD_COLOR') is None:
        return f'has pixels that OpenCV does not read as colours (mode {mode!r})'
    return header


def _decoded(path: str) -> Header | str:
    """For what only OpenCV reads."""
    image = _read(path, 'IMREAD_UNCHANGED')
    return 'is not an image that can be read' if image is None else Header(image.shape[1], image.shape[0])


def _read(path: str, flag: str) -> np.ndarray | None:
    import cv2

    try:
        return cv2.imdecode(np.fromfile(path, np.uint8), getattr(cv2, flag))
    except (OSError, ValueError, cv2.error):
        return None


def missing_files(folder: str, names: Iterable[str]) -> list[int]:
    """Which of ``names`` are no files below ``folder``, by position. Lists folders instead of asking for every file."""
    listed: dict[str, set[str] | None] = {}
    missing = []
    for i, name in enumerate(names):
        parent, file = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            listed[parent] = _files(parent)
        if listed[parent] is None or file not in listed[parent]:
            missing.append(i)
    return missing


def same_but_for_case(path: str) -> str | None:
    """A file beside ``path`` of the same name but for case, or for how its accents are written (macOS splits them)."""
    folder, name = os.path.split(path)
    wanted = _plain(name)
    return min((other for other in _files(folder) or () if _plain(other) == wanted), default=None)


def _plain(name: str) -> str:
    return unicodedata.normalize('NFKC', name).casefold()


def _files(folder: str) -> set[str] | None:
    try:
        with os.scandir(folder or '.') as entries:
            return {entry.name for entry in entries if not entry.is_dir()}
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return None
