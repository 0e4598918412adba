"""A checkpoint by its file, address or name in a model zoo: its weights and what it says about itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.runner import CheckpointLoader
from torch import Tensor

from ..compat.reading import CheckpointError, is_state_dict


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Args:
        name: as the user wrote it.
        state_dict: the weights, without the prefix ``module.`` that data-parallel training leaves.
        meta: its entry ``meta``, or nothing.
        content: all of it.
    """

    name: str
    state_dict: Mapping[str, Tensor]
    meta: Mapping
    content: Mapping

    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of their labels, if the file says them."""
        dataset = self.meta.get('dataset_meta')
        found = self.meta.get('CLASSES')
        if isinstance(dataset, Mapping):  # the first ones of mmdet 3 wrote it in capitals
            found = dataset.get('classes', dataset.get('CLASSES'))
        return tuple(map(str, found)) if isinstance(found, (list, tuple)) else None

    def require_resumable(self) -> None:
        """Raise unless training can go on from it: weights alone are a start, not a state.

        Raises:
            CheckpointError: it has no epoch, iteration, optimizer or log.
        """
        counts = {key: self.meta.get(key) for key in ('epoch', 'iter')}
        absent = [f'meta.{key}' for key, count in counts.items() if type(count) is not int or count < 0]
        absent += [] if isinstance(self.content.get('optimizer'), Mapping) else ['optimizer']
        hub = self.content.get('message_hub')
        absent += [] if isinstance(hub, Mapping) and {'log_scalars', 'runtime_info'} <= hub.keys() else ['message_hub']
        if absent:
            raise CheckpointError(
                f'{self.name} is not a state of training: it has no {" and no ".join(absent)}. To start from its '
                f'weights, leave --resume out and write --cfg-options load_from={self.name}'
            )


def read_checkpoint(name: str | os.PathLike, map_location: object = 'cpu') -> Checkpoint:
    """Read a checkpoint as mmengine finds it: a file, ``https://``, ``torchvision://``, ``open-mmlab://``, ...

    None of its code runs. The weights may be under ``state_dict`` or ``model``, or be all that the file holds.

    Raises:
        CheckpointError: there is none, it cannot be had or read, or it holds no weights. The message names it.
    """
    name = os.fspath(name)
    try:
        content = CheckpointLoader.load_checkpoint(name, map_location, logger='silent')
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f'{name} cannot be read: {error}') from error
    except ImportError as error:  # of s3://, petrel:// and pavi://, whose clients are packages of their own
        raise CheckpointError(f'{name} cannot be read: {error} Or fetch the file, and name it') from error
    return _checkpoint(name, content)


def _checkpoint(name: str, content: object) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{name} holds a {type(content).__name__}, not the weights of a model')
    state = content.get('state_dict', content)
    if not is_state_dict(state):
        raise CheckpointError(f'{name} holds no weights of a model: {_outline(content, state)}')
    meta = content.get('meta')
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    return Checkpoint(name, state, meta if isinstance(meta, Mapping) else {}, content)


def _outline(content: Mapping, state: object) -> str:
    """What is there in place of a dict of tensors."""
    if not content:
        return 'it is an empty dict'
    if 'state_dict' not in content:
        entries = ', '.join(f'{str(key)[:40]} ({type(value).__name__})' for key, value in list(content.items())[:6])
        return f'it has neither state_dict nor model, and is no dict of tensors itself: {entries}'
    if not isinstance(state, Mapping):
        return f'its state_dict is a {type(state).__name__}'
    if not state:
        return 'its state_dict is empty'
    key, value = next(
        (key, value) for key, value in state.items() if not isinstance(value, Tensor) or not isinstance(key, str)
    )
    return f'in its state_dict, {str(key)[:80]!r} is a {type(value).__name__}, not a tensor with a name'
