"""Checkpoints written by mmengine load and resume under torch >= 2.6, safely.

Since 2.6 ``torch.load`` reads with ``weights_only=True``: a restricted unpickler that only rebuilds
tensors, plain containers and whatever was declared harmless. mmengine 0.10 keeps its log history in
the checkpoint as :class:`HistoryBuffer` objects over numpy arrays, so its own checkpoints are refused.

The answer is not to switch the protection off. Two things suffice:

* the few plain-data classes such a checkpoint holds are declared safe;
* log histories are saved without the table of their statistics functions. Stock mmengine pickles that
  table as ``getattr(HistoryBuffer, 'mean')``, and ``getattr`` is a key to everything. The table is
  rebuilt by the class on loading, so nothing is lost, and files saved here load anywhere. For files
  that a stock run saved earlier the name ``getattr`` resolves to :func:`_statistic_by_name`, which
  can hand out those four functions and nothing else.

Any other object in a checkpoint is still refused, see :func:`explain_refusal`. Files are read by ``reading.py``.
"""

import pickle

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from .pickles import NUMPY

_STATISTICS = ('min', 'max', 'mean', 'current')
_stock_fill = HistoryBuffer.__setstate__


def allow_own_checkpoints() -> None:
    """Let ``torch.load`` read mmengine checkpoints without giving up ``weights_only``. Idempotent."""
    if _loads_weights_only_by_default():
        torch.serialization.add_safe_globals(harmless_globals())


def explain_refusal(path: str) -> str:
    """Say in one message why ``torch.load`` refused the checkpoint at ``path``."""
    found = ''
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        allowed = {name for _, name in harmless_globals()}
        names = ', '.join(sorted(set(unsafe) - allowed))
        found = f' (it asks for: {names})' if names else ''
    except Exception:  # an older torch, or no readable zip: the message stands without the names
        pass
    return (
        f'refused to load the checkpoint {path}: it holds more than tensors and plain data{found}, '
        'and unpickling such objects can run any code. If you trust its origin, load it once '
        'yourself and save only its "state_dict" with torch.save.'
    )


def _loads_weights_only_by_default() -> bool:
    major, minor = torch.__version__.split('.')[:2]
    return (int(major), int(minor)) >= (2, 6)


def harmless_globals() -> list:
    """Pairs of an object and the name it goes by in a pickle: plain data, nothing that acts."""
    return [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_statistic_by_name, 'builtins.getattr'),
        *((harmless, name) for name, harmless in NUMPY.items()),
    ]


def _statistic_by_name(owner: object, name: str) -> object:
    """What ``getattr`` means inside a checkpoint: one of HistoryBuffer's own statistics."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return vars(HistoryBuffer)[name]
    raise pickle.UnpicklingError(f'a checkpoint may not look up {name!r} on {owner!r}')


def state_without_functions(buffer: HistoryBuffer) -> dict:
    """Replace ``HistoryBuffer.__getstate__``: the numbers alone."""
    return {key: value for key, value in vars(buffer).items() if key != 'statistics_methods'}


def fill(buffer: HistoryBuffer, state: dict) -> None:
    """``HistoryBuffer.__setstate__``: plain arrays, and the class's own functions, whatever the file says of them."""
    arrays = {key: value.view(np.ndarray) if isinstance(value, np.ndarray) else value for key, value in state.items()}
    arrays.pop('statistics_methods', None)
    _stock_fill(buffer, arrays)
