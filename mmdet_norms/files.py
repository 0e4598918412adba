"""Files that are whole or not there: whatever the package writes, it writes beside the name and renames."""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # not a Unix: unfinished files cannot tell whether somebody still writes them
    fcntl = None

PART = '.part-'
"""What the names of unfinished files contain; a process that was killed leaves one behind."""

_PART = re.compile(rf'\..*{re.escape(PART)}[0-9]+-[0-9a-f]{{6}}(\.[^.]*)?')
_KEPT_OF_NAME = 50  # characters; a name may have 255 bytes
_HOUR = 3600

# what only the machine's owner can put right, as opposed to a bug
_MACHINE = {
    errno.ENOSPC: 'make room on that disk, or name another place',
    errno.EDQUOT: 'the quota is used up: make room, or name another place',
    errno.EFBIG: 'the limit of file sizes (ulimit -f) is too small for it',
    errno.EROFS: 'name a place that can be written to',
    errno.EACCES: 'change its permissions, or name another place',
    errno.EPERM: 'change its permissions, or name another place',
    errno.EIO: 'the disk, or the connection to it, is broken',
    errno.ENOTDIR: 'a part of this path is a file where a folder should be',
    errno.EEXIST: 'there is a file where a folder should be',
    errno.EISDIR: 'there is a folder where a file should be',
    errno.ENAMETOOLONG: 'name a shorter path',
    errno.ESTALE: 'the network disk has lost it: is the folder still there?',
}


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name, in one step, if the block ends well.

    The bytes are on the disk before the name changes, so that a killed process or a power cut leaves the old file or
    the new one. Folders on the way are made. The suffix stays, as libraries choose a format by it.

    Args:
        path: the file to write or to replace. A link stays, and what it points to is replaced; so do the permissions.

    Yields:
        The path to write to.

    Raises:
        OSError: as writing does, with the name of ``path``; the old file is as it was, and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    part = _part_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _mark_as_in_use(handle)
            yield part
            if target.is_file():
                shutil.copymode(target, part)
            _to_disk(part)
            os.replace(part, target)
        finally:
            os.close(handle)
            part.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    with suppress(OSError):  # not every file system syncs folders
        _to_disk(target.parent)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: str | os.PathLike, content: str, encoding: str = 'utf-8') -> None:
    """Write ``content`` to ``path`` in one step."""
    write_bytes(path, content.encode(encoding))


def unfinished(folder: str | os.PathLike) -> list[Path]:
    """What killed processes left of :func:`replacing` in ``folder``; what is being written now is not among it."""
    try:
        names = sorted(name for name in os.listdir(folder) if _PART.fullmatch(name))
    except OSError:
        return []
    paths = [Path(folder) / name for name in names]
    return [path for path in paths if path.is_file() and not path.is_symlink() and not _in_use(path)]


def remove_unfinished(folder: str | os.PathLike) -> list[Path]:
    """Remove the :func:`unfinished` files of ``folder``; returns them."""
    paths = unfinished(folder)
    for path in paths:
        with suppress(OSError):
            path.unlink()
    return paths


def require_writable(path: str | os.PathLike, option: str) -> None:
    """Create the folder of ``path`` and see that a file can be written there, before any work is done for it.

    Raises:
        UserError: it cannot; the message names ``option``, the path and the reason.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        folder = Path(os.path.realpath(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        probe = _part_of(folder / 'probe')
        try:
            probe.write_bytes(bytes(4096))  # the smallest thing that takes room
            _to_disk(probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f'{option}: {explain(error) or error}') from error


def refuse_overwriting(out: str | os.PathLike, option: str, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Raise a :class:`UserError` if ``out`` is one of the files that the command reads, under whatever name.

    Args:
        inputs: what each file is called in the message -> its path; None and addresses are passed over.
    """
    out = Path(out).expanduser()
    for name, path in inputs.items():
        if path is None or '://' in str(path):
            continue
        path = Path(path).expanduser()
        same = out.exists() and path.exists() and os.path.samefile(out, path)
        if same or os.path.realpath(out) == os.path.realpath(path):
            raise UserError(f'{option} {out} is {name} itself, which stays as it is; choose another name')


def require_room(path: str | os.PathLike, size: int, option: str) -> None:
    """Raise a :class:`UserError` if the disk of ``path`` has less than ``size`` bytes left."""
    folder = Path(os.path.realpath(path)).parent
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError:
        return
    if total and free < size:
        raise UserError(
            f'{option}: the disk of {folder} has {free / 1e6:.1f} MB left and {Path(path).name} takes at least '
            f'{size / 1e6:.1f}; make room, or name another place'
        )


def explain(error: OSError) -> str | None:
    """One sentence about a disk that is full, read-only or forbidden; None if ``error`` is something else."""
    if error.errno not in _MACHINE:
        return None
    where = f'{error.filename}: ' if error.filename else ''
    return f'{where}{error.strerror}; {_MACHINE[error.errno]}'


def _part_of(target: Path) -> Path:
    name = f'.{target.stem[:_KEPT_OF_NAME]}{PART}{os.getpid()}-{secrets.token_hex(3)}{target.suffix}'
    return target.with_name(name)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mark_as_in_use(handle: int) -> None:
    """A lock that dies with its process, by which unfinished work is told from work at hand."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_use(part: Path) -> bool:
    try:
        if fcntl is None:
            return _is_young(part)
        handle = os.open(part, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        locked = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        return locked or _is_young(part)  # some network disks have no locks
    finally:
        os.close(handle)


def _is_young(part: Path) -> bool:
    return time.time() - part.stat().st_mtime < _HOUR
