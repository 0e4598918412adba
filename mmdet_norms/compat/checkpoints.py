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

Any other object in a checkpoint is still refused, see :func:`explain_refusal`. Files of strangers are read by
:func:`load_stranger`, which does not depend on torch's default.
"""

import os
import pickle
import re
import zipfile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_STATISTICS = ('min', 'max', 'mean', 'current')
_LEGACY_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # pickle of the number that torch < 1.6 writes first


def allow_own_checkpoints() -> None:
    """Let ``torch.load`` read mmengine checkpoints without giving up ``weights_only``. Idempotent."""
    HistoryBuffer.__getstate__ = _state_without_functions
    if _loads_weights_only_by_default():
        torch.serialization.add_safe_globals(_harmless_globals())


class UntrustedCheckpointError(ValueError):
    """A checkpoint holds more than tensors and plain data, and was not read."""


def load_stranger(path: str | os.PathLike, trust_pickle: bool = False) -> object:
    """Read a checkpoint that somebody else wrote, to the CPU, running none of its code.

    Args:
        path: a file of ``torch.save``, of today's format or that of torch < 1.6.
        trust_pickle: read it with the full unpickler, which runs what the file says.

    Raises:
        FileNotFoundError: no such file.
        UntrustedCheckpointError: the restricted unpickler met something that is neither tensor nor plain data.
        ValueError: not a file of ``torch.save``, or a damaged one.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no file {path}')
    with open(path, 'rb') as file:
        start = file.read(len(_LEGACY_START))
    if not (zipfile.is_zipfile(path) or start == _LEGACY_START):
        raise ValueError(
            f'{path} is no checkpoint of torch, or a damaged one (it starts with {start!r}); was the download complete?'
        )
    try:
        return torch.load(path, map_location='cpu', weights_only=not trust_pickle)
    except Exception as error:  # torch's readers raise whatever damaged bytes make them
        if trust_pickle or not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f'{path} is damaged: {_reason(error)}') from error
        cut = ' A download that broke off can look the same.' if start == _LEGACY_START else ''
        raise UntrustedCheckpointError(
            f'{explain_refusal(path)} Or read it with trust_pickle=True (--trust-pickle on the command line): the file '
            f'may then do on this machine whatever you may. What stopped it: {_reason(error)}.{cut}'
        ) from error


def explain_refusal(path: str) -> str:
    """Say in one message why ``torch.load`` refused the checkpoint at ``path``."""
    found = ''
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        allowed = {name for _, name in _harmless_globals()}
        names = ', '.join(sorted(set(unsafe) - allowed))
        found = f' (it asks for: {names})' if names else ''
    except Exception:  # an older torch, or no readable zip: the message stands without the names
        pass
    return (
        f'refused to load the checkpoint {path}: it holds more than tensors and plain data{found}, '
        'and unpickling such objects can run any code. If you trust its origin, load it once '
        'yourself and save only its "state_dict" with torch.save.'
    )


def _reason(error: Exception) -> str:
    """The one sentence of torch's message that names what was refused, or where the bytes made no sense."""
    found = re.search(r'(Unsupported|Trying to|Can only)[^\n]*?(?=\.? Please|\.? was not|\.?\n|$)', str(error))
    return found[0] if found else (str(error) or type(error).__name__).splitlines()[0]


def _loads_weights_only_by_default() -> bool:
    major, minor = torch.__version__.split('.')[:2]
    return (int(major), int(minor)) >= (2, 6)


def _harmless_globals() -> list:
    """Pairs of an object and the name it goes by in a pickle: plain data, nothing that acts."""
    rebuild_array = np.empty(0).__reduce__()[0]
    rebuild_scalar = np.float64(0).__reduce__()[0]
    pairs = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_statistic_by_name, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2 and numpy 1
        pairs.append((rebuild_array, f'{module}._reconstruct'))
        pairs.append((rebuild_scalar, f'{module}.scalar'))
    # a dtype is an instance of its own class (numpy.dtypes.Float64DType); numbers only, no objects
    numeric = {type(np.dtype(code)) for code in '?' + np.typecodes['AllInteger'] + np.typecodes['Float']}
    pairs += [(cls, f'{cls.__module__}.{cls.__name__}') for cls in numeric]
    return pairs


def _statistic_by_name(owner: object, name: str) -> object:
    """What ``getattr`` means inside a checkpoint: one of HistoryBuffer's own statistics."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return vars(HistoryBuffer)[name]
    raise pickle.UnpicklingError(f'a checkpoint may not look up {name!r} on {owner!r}')


def _state_without_functions(buffer: HistoryBuffer) -> dict:
    """Replace ``HistoryBuffer.__getstate__``: the numbers alone."""
    return {key: value for key, value in vars(buffer).items() if key != 'statistics_methods'}
