"""Files that are whole or not there: whatever the package writes, it writes beside the name and renames."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = '.part-'
"""What the names of unfinished files contain; a process that was killed leaves one behind."""


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name, in one step, if the block ends well.

    The bytes are on the disk before the name changes, so that a killed process or a power cut leaves the old file or
    the new one. Folders on the way are made. The suffix stays, as libraries choose a format by it.

    Args:
        path: the file to write or to replace. A link stays, and what it points to is replaced.

    Yields:
        The path to write to.

    Raises:
        OSError: as writing does; the old file is as it was, and nothing is left behind.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.stem}{PART}{os.getpid()}-{secrets.token_hex(3)}{path.suffix}')
    try:
        yield part
        _to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system syncs folders
        _to_disk(path.parent)


def unfinished(folder: str | os.PathLike) -> list[Path]:
    """What killed processes left of :func:`replacing` in ``folder``."""
    return sorted(Path(folder).glob(f'.*{PART}*'))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
