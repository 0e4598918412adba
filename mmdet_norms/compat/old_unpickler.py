"""The restricted unpickler of torch >= 2.6 for older torch, whose own cannot be taught the log history of mmengine.

``torch.load(path, pickle_module=old_unpickler, weights_only=False)`` then reads what newer torch reads. Every name in a
file is looked up in torch's own list of harmless ones and that of :mod:`.checkpoints`; the instructions that create
objects or fill them take the few kinds of which checkpoints are made.
"""

import functools
import pickle
from collections import OrderedDict

import torch
from mmengine.logging import HistoryBuffer

from .checkpoints import harmless_globals
from .pickles import PlainArray, PlainDtype, encode
from .torch_internals import harmless_in_checkpoints

UnpicklingError = pickle.UnpicklingError  # like Unpickler and load, what torch takes from the module that it is given


@functools.cache
def _known() -> dict[str, object]:
    return {**harmless_in_checkpoints(), **{name: harmless for harmless, name in harmless_globals()}}


class Unpickler(pickle._Unpickler):
    """The one written in Python, which can be told what each instruction may do."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        full = f'{module}.{name}'
        if full == '_codecs.encode':  # of the bytes of an array; not in the list of torch < 2.6
            return encode
        known = _known()
        if full not in known:
            raise UnpicklingError(f'Unsupported class {full}')
        return known[full]

    def load_newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls not in (HistoryBuffer, torch.nn.Parameter, OrderedDict):
            raise UnpicklingError(f'it creates an object of {cls!r}')
        self.append(cls.__new__(cls, *arguments))

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is OrderedDict:
            vars(built).update(state)
        elif type(built) in (HistoryBuffer, PlainDtype, PlainArray, torch.nn.Parameter):
            built.__setstate__(state)
        else:
            raise UnpicklingError(f'it fills an object of {type(built)!r}')

    def load_append(self) -> None:
        value = self.stack.pop()
        self._own_list(self.stack[-1]).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._own_list(self.stack[-1]).extend(values)

    def _own_list(self, value: object) -> list:
        if type(value) is not list:
            raise UnpicklingError(f'it appends to an object of {type(value)!r}')
        return value

    def refuse(self) -> None:
        raise UnpicklingError('it creates objects')


for _name, _method in (
    ('NEWOBJ', Unpickler.load_newobj),
    ('BUILD', Unpickler.load_build),
    ('APPEND', Unpickler.load_append),
    ('APPENDS', Unpickler.load_appends),
    *(
        (name, Unpickler.refuse)
        for name in ('INST', 'OBJ', 'NEWOBJ_EX', 'EXT1', 'EXT2', 'EXT4', 'NEXT_BUFFER', 'BYTEARRAY8')
    ),
):
    Unpickler.dispatch[getattr(pickle, _name)[0]] = _method


def load(file, **options) -> object:
    """As ``pickle.load``: of the numbers that a file of torch < 1.6 starts with."""
    return Unpickler(file, **options).load()
