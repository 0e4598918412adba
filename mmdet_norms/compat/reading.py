"""The one reader of checkpoint files: restricted, and able to say in one sentence what is wrong with a file.

Every tool reads through :func:`read_file`, and so does mmengine (``zoo.py``), whoever started it.
"""

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from . import old_unpickler
from .checkpoints import explain_refusal

_LEGACY_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # pickle of the number that torch < 1.6 writes first
ZIP_START = b'PK\x03\x04'
_OTHER_FILES = {  # how they start, and what to do
    b'version https://git-lfs': 'a pointer of Git LFS, not the file itself; fetch it with: git lfs pull',
    b'\x1f\x8b': 'compressed by gzip; unpack it first',
    b'BZh': 'compressed by bzip2; unpack it first',
    b'\xfd7zXZ': 'compressed by xz; unpack it first',
    b'\x93NUMPY': 'an array of numpy, no checkpoint of torch',
    b'\x89HDF': 'a file of HDF5, no checkpoint of torch',
}
_AGAIN = 'copy or download it again'


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used as it is; the message names the file, what is wrong and what to do."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no such file."""


class UntrustedCheckpointError(CheckpointError):
    """A checkpoint holds more than tensors and plain data, and was not read."""


def read_file(path: str | os.PathLike, map_location: object = 'cpu', trust_pickle: bool = False) -> object:
    """What a file of ``torch.save`` holds, read without running any code that is in it.

    Args:
        path: a local file, of today's format or that of torch < 1.6. ``~`` is the home folder.
        map_location: as of ``torch.load``.
        trust_pickle: read it with the full unpickler, which runs what the file says.

    Raises:
        MissingCheckpointError: no such file.
        UntrustedCheckpointError: an undamaged file asks for something that is neither tensor nor plain data.
        CheckpointError: a folder, no permission, not a file of ``torch.save``, or a damaged one.
    """
    path = os.path.expanduser(os.fspath(path))
    content = _take(path)
    if content is not None and str(map_location) == 'cpu':
        return content
    start = _first_bytes(path)
    what = other_kind(start)
    if what:
        raise CheckpointError(f'{path} is {what}')
    is_zip = start.startswith(ZIP_START)
    if is_zip:
        _check_archive(path)
    how = dict(weights_only=not trust_pickle)
    if not trust_pickle and _TORCH < (2, 6):
        how = dict(weights_only=False, pickle_module=old_unpickler)
    try:
        content = torch.load(path, map_location=map_location, **how)
    except Exception as error:  # torch's readers raise whatever damaged bytes make them
        if trust_pickle or not isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(f'{path} is damaged ({_reason(error)}); {_AGAIN}') from error
        if not is_zip and not _names_are_whole(path):
            raise CheckpointError(f'{path} is cut off or damaged ({_reason(error)}); {_AGAIN}') from error
        raise UntrustedCheckpointError(f'{explain_refusal(path)} What stopped it: {_reason(error)}.') from error
    if trust_pickle:
        return content
    _require_whole_tensors(content, path)
    return content


_kept: dict[tuple, object] = {}  # at most one


def keep(path: str | os.PathLike, content: object) -> None:
    """Have the next :func:`read_file` of this file return ``content``, if the file is the same and stays on the CPU.

    For who looks at a checkpoint and hands it on to a run, which reads it again: some seconds for some hundred MB. Only
    the last one is kept, until it is read for whatever device.
    """
    _kept.clear()
    identity = _identity(os.path.expanduser(os.fspath(path)))
    if identity is not None:
        _kept[identity] = content


def _take(path: str) -> object:
    return _kept.pop(_identity(path), None) if _kept else None


def _identity(path: str) -> tuple | None:
    """Another one if the file was replaced or written to."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns


def _first_bytes(path: str) -> bytes:
    if os.path.isdir(path):
        inside = sorted(Path(path).glob('*.pth'), key=lambda file: file.stat().st_mtime)
        hint = f', e.g. {inside[-1]}' if inside else ''
        raise CheckpointError(f'{path} is a folder; name a checkpoint file{hint}')
    if not os.path.exists(path):
        raise MissingCheckpointError(f'there is no file {path}{_near(path)}')
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise CheckpointError(f'{path} is no ordinary file; name a checkpoint file')
    try:
        with open(path, 'rb') as file:
            return file.read(512)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error


def _near(path: str) -> str:
    """What else is there, for a name that is not."""
    for parent in Path(path).absolute().parents:
        if parent.is_dir():
            if parent != Path(path).absolute().parent:
                return f' (there is no folder {Path(path).parent} either)'
            found = sorted(file.name for file in parent.glob('*.pth'))
            return f' (in its folder: {", ".join(found[:5])}{", ..." if found[5:] else ""})' if found else ''
    return ''


def other_kind(start: bytes) -> str:
    """What a file that starts so is instead of a checkpoint, and what to do; nothing if it may be one."""
    if not start:
        return f'empty (0 bytes); {_AGAIN}'
    for other, what in _OTHER_FILES.items():
        if start.startswith(other):
            return what
    if start.startswith((ZIP_START, _LEGACY_START)):
        return ''
    if not start.strip(b'\0'):
        return f'damaged: it starts with zeros, as after a crash while it was written; {_AGAIN}'
    text = start.lstrip().lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        return f'a web page (it starts with {start[:40]!r}), an error or a login page in place of the file; {_AGAIN}'
    if start[8:10] == b'{"':
        return 'a safetensors file; load it with safetensors and save its dict of tensors with torch.save'
    return f'no checkpoint of torch, or a damaged one (it starts with {start[:16]!r}); was the download complete?'


def _check_archive(path: str) -> None:
    """Raise unless a zip is whole: its end is there, and its contents have the checksums that it says."""
    size = os.path.getsize(path)
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f'{path} is cut off: it has {size} bytes, and its end is missing; {_AGAIN}')
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename.partition('/')[2] for entry in entries]
            if 'data.pkl' not in names:
                raise CheckpointError(
                    f'{path} is a zip archive that holds no checkpoint of torch (no data.pkl); unpack it first'
                )
            if 'constants.pkl' in names:
                raise CheckpointError(
                    f'{path} is a program of TorchScript (torch.jit.save), no checkpoint; save its state_dict() with '
                    'torch.save'
                )
            if sum(entry.file_size for entry in entries) > 16 * size + 2**20:
                raise CheckpointError(f'{path} is damaged: it claims to hold far more than its {size} bytes; {_AGAIN}')
            wrong = [entry.filename for entry in entries if not _has_its_checksum(archive, entry)]
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f'{path} is damaged ({_reason(error)}); {_AGAIN}') from error
    if wrong and len(wrong) < len(entries) - 1:  # torch can be told to write none
        raise CheckpointError(
            f'{path} is damaged: {len(wrong)} of its {len(entries)} parts have a wrong checksum, e.g. {wrong[0]}; '
            f'{_AGAIN}'
        )


def _has_its_checksum(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as file:
            while file.read(2**22):
                pass
    except zipfile.BadZipFile as error:
        if 'CRC' not in str(error):
            raise
        return False
    return True


def _require_whole_tensors(content: object, path: str) -> None:
    """Raise if a tensor claims more numbers than there are: to copy it would take all memory."""
    for name, tensor in _tensors(content):
        numbers = tensor.numel()
        if (
            tensor.layout == torch.strided
            and numbers * tensor.element_size() > tensor.untyped_storage().nbytes() + 2**20
        ):
            raise CheckpointError(f'{path} is damaged: the tensor {name} claims {numbers} numbers; {_AGAIN}')


def _tensors(content: object, depth: int = 3):
    if isinstance(content, Mapping) and depth:
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield key, value
            else:
                yield from _tensors(value, depth - 1)


def _names_are_whole(path: str) -> bool:
    """Whether the pickles at the start of a file of torch < 1.6 can be parsed: the fourth is the content."""
    try:
        with open(path, 'rb') as file:
            for _ in range(4):
                for _ in pickletools.genops(file):
                    pass
    except Exception:
        return False
    return True


def _reason(error: Exception) -> str:
    """The one sentence of torch's message that names what was refused, or where the bytes made no sense."""
    error = error.__context__ or error  # what torch's unpickler said, before torch added what to do with unsafe files
    text = re.split(r'\.? Please|,? was not an allowed|\n', str(error).strip())[0].rstrip('.') or type(error).__name__
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text[:200])


_TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])


def load_from_local(filename: str, map_location: object) -> object:
    """In place of mmengine's, which names neither the file nor what is wrong."""
    return with_state_dict(read_file(filename, map_location))


def with_state_dict(content: object) -> object:
    """Where the weights are under ``model``, as several trainers save them, let them be found under ``state_dict``."""
    if isinstance(content, dict) and 'state_dict' not in content and is_state_dict(content.get('model')):
        content['state_dict'] = content['model']
    return content


def is_state_dict(content: object) -> bool:
    """Whether it is a dict of tensors (or of the states that modules keep beside them) by name, and not empty."""
    return (
        isinstance(content, Mapping)
        and any(isinstance(value, Tensor) for value in content.values())
        and all(
            isinstance(key, str) and (isinstance(value, Tensor) or key.endswith('_extra_state'))
            for key, value in content.items()
        )
    )
