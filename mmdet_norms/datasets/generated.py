"""Folders of generated data: written whole, verified, never mixed up with somebody's files."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from ..console import plain_column, plain_console

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

SPLITS = ('train', 'val')
_MINUTE = 60


class ShapesError(RuntimeError):
    """The target folder cannot be used as asked; the message says what to do."""


class Generated(NamedTuple):
    """A kind of data set that a program writes.

    Args:
        name: of the kind, in messages and in meta.json.
        version: changes whenever the same arguments would give other bytes.
        classes: in the order of their labels.
        write: fills an empty folder; yields after every image.
        hashes: name -> hash, of a folder that ``write`` filled.
        is_complete: whether a folder is as its meta.json (the second argument) says.
        files: every file and folder of the data set that was made with such arguments, relative to its folder.
    """

    name: str
    version: int
    classes: Sequence[str]
    write: Callable[[Path], Iterator[None]]
    hashes: Callable[[Path], dict[str, str]]
    is_complete: Callable[[Path, dict], bool]
    files: Callable[[Mapping], set[str]]

    @property
    def generator(self) -> str:
        """What meta.json names as the program."""
        return f'mmdet_norms {self.name}'


def write_generated(
    root: str | Path, kind: Generated, arguments: Mapping, images: int, overwrite: bool = False, progress: bool = False
) -> Path:
    """Write a data set and its ``meta.json``, unless ``root`` holds exactly it.

    All files are first written to a folder beside ``root`` that is renamed at the end, so ``root`` is never
    half-written. What killed processes left beside it is removed.

    Args:
        root: folder to write; created with its parents.
        kind: what to write.
        arguments: it was made with; kept in meta.json.
        images: how many, for the progress bar.
        overwrite: replace a data set of the same kind in ``root``. A folder with anything else in it is never replaced.
        progress: show a progress bar with the remaining time on stderr.

    Returns:
        ``root`` as a path.

    Raises:
        ShapesError: ``root`` holds something else; the message says what to do.
    """
    root = Path(root).expanduser()
    target = root.resolve()  # a link to a folder on another disk stays a link
    if _is_done(target, root, kind, arguments, overwrite):
        return root

    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    tag = secrets.token_hex(4)  # not the process id: in containers that is often the same
    fresh = target.with_name(f'.{target.name}.new-{tag}')
    old = target.with_name(f'.{target.name}.old-{tag}')
    fresh.mkdir()
    columns = (
        plain_column('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        plain_column('left'),
        TimeRemainingColumn(),
    )
    try:
        with (
            _locked(fresh),
            Progress(*columns, console=plain_console(stderr=True), disable=not progress) as bar,
        ):
            task = bar.add_task(kind.name, total=images)
            for _ in kind.write(fresh):
                bar.advance(task)
            meta = dict(
                generator=kind.generator,
                version=kind.version,
                arguments=arguments,
                classes=list(kind.classes),
                sha256=kind.hashes(fresh),
            )
            (fresh / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
            # Somebody else may have written the folder meanwhile.
            if not _is_done(target, root, kind, arguments, overwrite):
                if target.exists():
                    target.rename(old)
                fresh.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)  # the second rename failed
        for folder in (fresh, old):
            if folder.exists():
                shutil.rmtree(folder)
    return root


def require_counts(**given: tuple[int, int]) -> None:
    """Raise a ValueError that names the argument whose value (first) is less than its least one (second)."""
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f'{name} must be at least {least}, not {value}')


def image_name(index: int) -> str:
    """Of the file of an image."""
    return f'{index:06d}.png'


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3 uint8, BGR) as the bytes of a file."""
    ok, data = cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert ok
    return data.tobytes()


def sha256(path: Path) -> str | None:
    """Hash of a file, None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _is_done(target: Path, root: Path, kind: Generated, arguments: Mapping, overwrite: bool) -> bool:
    """Whether the data set is there already; ShapesError if it must not be written."""
    if not target.exists() or (target.is_dir() and not os.listdir(target)):
        return False
    meta = _read_meta(target, kind) if target.is_dir() else None
    if meta is None:
        raise ShapesError(
            f'{root} exists and is not a {kind.name} dataset. Choose another folder (--out), or '
            f'delete it yourself; --overwrite replaces {kind.name} datasets only.'
        )
    if (meta.get('version'), meta.get('arguments')) != (kind.version, arguments):
        problem = f'holds a {kind.name} dataset made by another version or with other arguments'
    elif not kind.is_complete(target, meta):
        problem = f'holds this {kind.name} dataset, but files are missing or were changed'
    else:
        return True
    foreign = _foreign(target, kind, meta) if overwrite else []
    if foreign:
        raise ShapesError(
            f'{root} holds files that are not part of the dataset '
            f'({", ".join(foreign[:5])}). Move them away before replacing it.'
        )
    if not overwrite:
        raise ShapesError(
            f'{root} {problem}. Use --overwrite (overwrite=True) to replace it, or choose another folder (--out).'
        )
    return False


def _read_meta(root: Path, kind: Generated) -> dict | None:
    """The folder's ``meta.json`` if a generator of this kind wrote it."""
    try:
        meta = json.loads((root / 'meta.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get('generator') == kind.generator else None


def _foreign(root: Path, kind: Generated, meta: dict) -> list[str]:
    """Files and folders below ``root``, at any depth, that are not of the data set that ``meta.json`` tells of."""
    own = kind.files(meta.get('arguments') or {}) | {'meta.json'}
    return sorted(name for path in root.rglob('*') if (name := path.relative_to(root).as_posix()) not in own)


def _remove_abandoned(target: Path) -> None:
    """Remove the unfinished folders of processes that were killed; those of living ones are locked."""
    if fcntl is None:
        return
    unfinished = re.compile(rf'\.{re.escape(target.name)}\.(new|old)-([0-9a-f]{{8}})')
    for path in sorted(target.parent.iterdir()):
        found = unfinished.fullmatch(path.name)
        fresh = path.with_name(f'.{target.name}.new-{found[2]}') if found else path
        with contextlib.suppress(OSError):
            # A folder that was made this minute may be about to be locked.
            if found and time.time() - path.stat().st_mtime > _MINUTE and not (fresh.exists() and _is_locked(fresh)):
                shutil.rmtree(path)


def _is_locked(folder: Path) -> bool:
    try:
        with _locked(folder, strictly=True):
            return False
    except OSError:  # also of disks that have no locks
        return True


@contextlib.contextmanager
def _locked(folder: Path, strictly: bool = False) -> Iterator[None]:
    """A lock that dies with its process, by which unfinished work is told from work at hand."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.nullcontext() if strictly else contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
