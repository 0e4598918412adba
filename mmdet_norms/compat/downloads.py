"""Files of weights from the internet, into torch.hub's cache: whole and checked, or not there."""

import hashlib
import os
import re
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from ..console import plain_column, plain_console
from ..files import explain, remove_unfinished, replacing
from .reading import ZIP_START, CheckpointError, other_kind

try:
    import fcntl
except ImportError:  # not a Unix: each process downloads, and the last one's file stays
    fcntl = None

SECONDS = 15
"""How long a server may say nothing. Torch sets no limit, and behind some firewalls nothing ever answers."""

# Their file names end in the first digits of the SHA-256 of the file; elsewhere, digits may be a date.
# Torchvision checks its own names, so that a download with another hash is none; in the others one is only spoken of.
_CHECKED = ('download.pytorch.org',)
_WITH_HASHES = (*_CHECKED, 'download.openmmlab.com', 'mmassets.onedl.ai')
_HASH = re.compile(r'-([0-9a-f]{8,64})\.[a-z]+$')
_DATE = re.compile(r'20\d{6}')


class DownloadError(CheckpointError):
    """A file could not be had. The message names it, its address, why, and where to put it by hand."""


def cached(url: str, folder: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """The file of an address, downloaded unless it is there.

    Of processes that ask for the same file at the same time, one downloads it and the others wait. A new file must
    have the length and the hash that its server and its name say; only then it takes its name. One that lies there
    already is taken as it is: whoever has no network puts files there, see :func:`note`.

    Args:
        url: ``http://`` or ``https://``; the variables ``https_proxy`` and ``no_proxy`` are heeded.
        folder: where files are kept; default ``hub/checkpoints`` below ``TORCH_HOME`` (``~/.cache/torch``).
        progress: show a bar, if somebody watches.

    Raises:
        DownloadError: it is not there and cannot be had, or not be written there.
    """
    folder = Path(folder or os.path.join(torch.hub.get_dir(), 'checkpoints')).expanduser()
    try:
        path = folder / os.path.basename(urlparse(url).path)
    except ValueError as error:
        raise DownloadError(f'{url} is no address: {error}') from error
    if path.name == folder.name:
        raise DownloadError(f'{url} is the address of a folder; name a file')
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.is_file():  # another process may have downloaded it meanwhile
                remove_unfinished(folder)
                _download(url, path, progress)
    except OSError as error:
        raise DownloadError(
            f'{path.name} ({url}) cannot be put into {folder}: {explain(error) or error}. Name another cache with '
            'TORCH_HOME=FOLDER, whose folder hub/checkpoints it will be'
        ) from error
    return path


def note(url: str, path: str | os.PathLike) -> str:
    """What is to be said of a file that is not the published one, though it has its name; else nothing."""
    expected = published_hash(url)
    if expected is None:
        return ''
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found.startswith(expected):
        return ''
    return f'it is not the published file: its SHA-256 starts with {found[: len(expected)]}, not {expected}'


def published_hash(url: str) -> str | None:
    """The first digits of the file's SHA-256, if its address says them."""
    address = urlparse(url)
    found = _HASH.search(address.path)
    if address.hostname not in _WITH_HASHES or not found or _DATE.fullmatch(found[1]):
        return None
    return found[1]


def _download(url: str, path: Path, progress: bool) -> None:
    print(f'downloading {url} to {path}')
    expected, digest, start, got = published_hash(url), hashlib.sha256(), b'', 0
    with (
        _answer(url, path) as response,
        _bar(path.name, progress, _length(response)) as advance,
        replacing(path) as part,
        open(part, 'wb') as file,
    ):
        while chunk := _read(response, url, path):
            file.write(chunk)
            digest.update(chunk)
            start, got = start or chunk[:512], got + len(chunk)
            advance(len(chunk))
        file.flush()
        kind, found = other_kind(start), digest.hexdigest()
        if _length(response) not in (None, got):
            raise _failed(url, path, f'the connection ended after {got} of {_length(response)} bytes')
        if start.startswith(ZIP_START) and not zipfile.is_zipfile(part):  # of a server that says no length
            raise _failed(url, path, f'the connection ended after {got} bytes, before the end of the file')
        if kind:
            raise _failed(url, path, f'what came is {kind}')
        if urlparse(url).hostname in _CHECKED and expected and not found.startswith(expected):
            found = found[: len(expected)]
            raise _failed(url, path, f'what came has a SHA-256 that starts with {found}, not {expected}')


def _answer(url: str, path: Path):
    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'torch.hub'})
        return urllib.request.urlopen(request, timeout=SECONDS)
    except (OSError, HTTPException, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise _failed(url, path, getattr(error, 'reason', None) or error) from error


def _read(response, url: str, path: Path) -> bytes:
    try:
        return response.read(2**18)
    except (OSError, HTTPException) as error:
        raise _failed(url, path, error) from error


def _length(response) -> int | None:
    length = response.headers.get('Content-Length') or ''
    return int(length) if length.isdecimal() else None


def _failed(url: str, path: Path, reason: object) -> DownloadError:
    with suppress(OSError, ValueError):
        scheme, host = urlparse(url).scheme, urlparse(url).hostname or ''
        if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            reason = f'{reason}; asked through the proxy of {scheme}_proxy'
    return DownloadError(
        f'{url} could not be downloaded ({reason}). Download it where that works, and put it at {path} (TORCH_HOME '
        'names another cache)'
    )


@contextmanager
def _bar(name: str, progress: bool, total: int | None) -> Iterator:
    columns = (plain_column('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = plain_console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not (progress and console.is_terminal)
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda size: bar.advance(task, size)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; where a disk has no locks, none waits."""
    lock = path.with_name(f'.{path.name}.lock')
    handle = None
    while fcntl is not None and handle is None:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'waiting for another process, which downloads {path}', file=sys.stderr)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            break
        if not lock.exists() or not os.path.samestat(os.fstat(handle), os.stat(lock)):
            os.close(handle)  # whoever had it has removed it
            handle = None
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)
