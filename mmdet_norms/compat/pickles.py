"""Pickles of plain data and tensors, read without running any of their code.

A pickle is a program. This reader knows the part of the language that builds numbers, texts, lists, tuples, dicts,
numpy arrays and tensors, and no other: every name in the file is looked up in a table of harmless functions written
here.
"""

import io
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_KEYS = (str, int, float, bool, bytes, type(None))  # of dicts: a nested tuple can take for ever to hash


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for something that is neither plain data nor a tensor."""


class PlainDtype:
    """What ``numpy.dtype`` means inside a file: a kind of number. numpy's own can be told to see pointers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not (isinstance(code, str) and re.fullmatch(r'[<>=|]?[biufc?]\d{0,2}', code)):
            raise UnsafePickleError(f'numpy.dtype({code!r}) is no kind of number')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ('<', '>', '=', '|') or any(state[2:5]):
            raise UnsafePickleError(f'numpy.dtype with {state!r} is no kind of number')
        self.dtype = self.dtype.newbyteorder(order)

    def __reduce__(self) -> tuple:
        return self.dtype.__reduce__()


class PlainArray(np.ndarray):
    """What ``numpy.ndarray`` means inside a file: an array of numbers. It is saved as an ordinary one."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, kind, fortran, data = state
        if not isinstance(kind, PlainDtype):
            raise UnsafePickleError('an array that is not of numbers')
        super().__setstate__((version, shape, kind.dtype, fortran, data))

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def new_array(cls: type, shape: tuple, code: object) -> PlainArray:
    """What ``numpy``'s ``_reconstruct`` means inside a file: an empty array, to be filled by its state."""
    if cls is not PlainArray:
        raise UnsafePickleError(f'an array of the type {cls!r}')
    return np.empty(0).view(PlainArray)


def plain_scalar(kind: PlainDtype, data: object) -> np.generic:
    """What ``numpy``'s ``scalar`` means inside a file: one number."""
    if not isinstance(kind, PlainDtype):
        raise UnsafePickleError('a numpy scalar that is no number')
    data = data.encode('latin-1') if isinstance(data, str) else data  # numpy < 2 under protocol 2
    return np.frombuffer(data, kind.dtype, count=1)[0]


def from_buffer(data: bytes, kind: PlainDtype, shape: Sequence[int], order: str) -> np.ndarray:
    """What ``numpy``'s ``_frombuffer`` means inside a file: an array of numbers, of pickle protocol 5."""
    if not isinstance(kind, PlainDtype):
        raise UnsafePickleError('an array that is not of numbers')
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order).copy()


def no_bytes() -> bytes:
    """What ``bytes`` means inside a file: the data of an empty array, as old protocols write it."""
    return b''


NUMPY = {
    '__builtin__.bytes': no_bytes,
    'builtins.bytes': no_bytes,
    'numpy.dtype': PlainDtype,
    'numpy.ndarray': PlainArray,
    **{f'numpy.{module}.multiarray._reconstruct': new_array for module in ('core', '_core')},
    **{f'numpy.{module}.multiarray.scalar': plain_scalar for module in ('core', '_core')},
    **{f'numpy.{module}.numeric._frombuffer': from_buffer for module in ('core', '_core')},
}


def load_plain(data: bytes) -> object:
    """What a pickle of plain data and tensors holds.

    Raises:
        UnsafePickleError: it asks for more; nothing of it has run.
        Exception: of any kind, for damaged bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch, about the kind of storage that it writes into pickles itself
        return _Plain(io.BytesIO(data)).load()


def encode(text: str, encoding: str = 'latin1') -> bytes:
    """What ``codecs.encode`` means inside a file: bytes, as Python 3 writes them for Python 2."""
    if encoding != 'latin1':
        raise UnsafePickleError(f'bytes in the encoding {encoding!r}')
    return text.encode(encoding)


def _storage(data: bytes) -> object:
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)


def _tensor(storage: object, offset: int, size: Sequence[int], stride: Sequence[int], *rest: object) -> Tensor:
    """A copy of the part of a storage that size and stride describe, if it has such a part."""
    if not isinstance(storage, torch.TypedStorage):
        raise UnsafePickleError(f'a tensor in {type(storage).__name__}')
    if len(size) != len(stride) or min([offset, *size, *stride]) < 0:
        raise ValueError(f'no tensor has the size {tuple(size)} and the stride {tuple(stride)}')
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if math.prod(size) and (last >= storage.size() or math.prod(size) > storage.size()):
        raise ValueError(f'a tensor of size {tuple(size)} in {storage.size()} numbers')
    if not math.prod(size):
        return torch.empty(size, dtype=storage.dtype)
    return torch.tensor([], dtype=storage.dtype).set_(storage, offset, size, stride).clone()


_NAMES: dict[str, Callable] = {
    '_codecs.encode': encode,
    'collections.OrderedDict': lambda pairs=(): OrderedDict(pairs) if not pairs else dict(pairs),
    'torch.storage._load_from_bytes': _storage,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch.Size': lambda sizes: torch.Size(sizes),
    **NUMPY,
}


class _Plain(pickle._Unpickler):
    """The one written in Python: it can be told which instructions there are, and no index makes it ask for memory."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Callable:
        try:
            return _NAMES[f'{module}.{name}']
        except KeyError:
            raise UnsafePickleError(f'it asks for {module}.{name}') from None

    def _refuse(self) -> None:
        raise UnsafePickleError('it creates objects')

    def _build(self) -> None:
        if not isinstance(self.stack[-2], (PlainDtype, PlainArray)):
            self._refuse()
        pickle._Unpickler.load_build(self)

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), 'little')
        self.append(bytearray(self.read(size)))  # the original asks for the memory first

    def _dict(self) -> None:
        self._require_keys(self.stack[::2])
        pickle._Unpickler.load_dict(self)

    def _setitem(self) -> None:
        self._require_keys(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)

    def _setitems(self) -> None:
        self._require_keys(self.stack[::2])  # what lies above the mark: key, value, key, value
        pickle._Unpickler.load_setitems(self)

    def _require_keys(self, keys: Sequence) -> None:
        if not all(isinstance(key, _KEYS) for key in keys):
            raise UnsafePickleError('a dict with keys that are neither texts nor numbers')


_REFUSED = (
    'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'EXT1', 'EXT2', 'EXT4', 'PERSID', 'BINPERSID', 'EMPTY_SET', 'ADDITEMS',
    'FROZENSET', 'NEXT_BUFFER', 'READONLY_BUFFER',
)  # fmt: skip
for _instruction in _REFUSED:
    _Plain.dispatch[getattr(pickle, _instruction)[0]] = _Plain._refuse
_Plain.dispatch[pickle.BUILD[0]] = _Plain._build
_Plain.dispatch[pickle.BYTEARRAY8[0]] = _Plain._bytearray
_Plain.dispatch[pickle.DICT[0]] = _Plain._dict
_Plain.dispatch[pickle.SETITEM[0]] = _Plain._setitem
_Plain.dispatch[pickle.SETITEMS[0]] = _Plain._setitems
