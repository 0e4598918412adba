"""Checkpoint files of every kind of wrong: one message each, and none of their code runs."""

import gzip
import os
import pickle
import random
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdet_norms.checkpoints.read import read_checkpoint
from mmdet_norms.compat import reading
from mmdet_norms.compat.reading import CheckpointError, MissingCheckpointError, UntrustedCheckpointError, read_file
from mmdet_norms.errors import UserError


def weights():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def content():
    """As mmengine saves it."""
    history = dict(loss=HistoryBuffer([1.0, 2.0], [1, 1]), empty=HistoryBuffer())
    return dict(
        meta=dict(epoch=1, iter=4, seed=np.int64(3), dataset_meta=dict(classes=('a', 'b'))),
        state_dict=weights(),
        optimizer=dict(state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=[dict(lr=0.02)]),
        message_hub=dict(log_scalars=history, runtime_info=OrderedDict(iter=4)),
    )


@pytest.fixture(params=['this torch', 'torch < 2.6'])
def reader(request, monkeypatch):
    """Both unpicklers: torch's, and the one that stands in for it on older torch."""
    if request.param != 'this torch':
        monkeypatch.setattr(reading, '_TORCH', (2, 1))


@pytest.fixture
def saved(tmp_path):
    torch.save(content(), tmp_path / 'a.pth')
    return tmp_path / 'a.pth'


def refused(path, kind=CheckpointError):
    """The message, the same from every way in."""
    with pytest.raises(kind) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert str(path) in message and '\n' not in message and 'weights_only' not in message and len(message) < 1000
    assert isinstance(error.value, UserError)
    return message


@pytest.mark.usefixtures('reader')
@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_of_mmengine_is_read_as_it_is(tmp_path, zipped):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.save(content(), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / 'a.pth')
    assert read.meta['seed'] == 3 and read.classes() == ('a', 'b')
    assert all(torch.equal(read.state_dict[key], value) for key, value in weights().items())
    history, counts = read.content['message_hub']['log_scalars']['loss'].data
    assert history.tolist() == [1, 2] and type(history) is type(counts) is np.ndarray
    read.require_resumable()


@pytest.mark.usefixtures('reader')
def test_a_log_history_is_read_into_a_process_that_had_none(saved, monkeypatch):
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    history = read_checkpoint(saved).content['message_hub']['log_scalars']['loss']
    assert history.statistics('mean') == 1.5 and history.current() == 2


@pytest.mark.parametrize(
    'make',
    [
        lambda state: state,
        lambda state: dict(state),
        lambda state: dict(model=state, epoch=3),
        lambda state: dict(state_dict=state),
        lambda state: dict(state_dict={f'module.{key}': value for key, value in state.items()}),
        lambda state: {f'module.{key}': value for key, value in state.items()},
        lambda state: dict(state_dict={**state, 'part._extra_state': dict(a=1)}),
    ],
    ids=['bare', 'dict', 'model', 'state_dict', 'parallel', 'bare parallel', 'extra state'],
)
def test_weights_are_found_where_trainers_put_them(tmp_path, make):
    torch.save(make(weights()), tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')
    assert {key for key in found.state_dict if 'extra' not in key} == set(weights())
    with pytest.raises(CheckpointError, match=r'meta\.epoch and no meta\.iter and no optimizer.*load_from='):
        found.require_resumable()


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(message_hub={}), 'no message_hub'),
        (dict(message_hub=None), 'no message_hub'),
        (dict(meta=dict(epoch=1, iter=-3)), 'no meta.iter'),
    ],
)
def test_a_state_without_a_part_that_the_runner_reads_is_none(tmp_path, change, said):
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    state = dict(meta=dict(epoch=1, iter=2), state_dict=weights(), optimizer={}, message_hub=hub)
    torch.save(state, tmp_path / 'a.pth')
    read_checkpoint(tmp_path / 'a.pth').require_resumable()
    torch.save({**state, **change}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f'not a state of training: it has {said}'):
        read_checkpoint(tmp_path / 'a.pth').require_resumable()


BYTES = {
    'empty': (b'', 'is empty (0 bytes)'),
    'html': (b'<html>404 not found</html>\n', 'a web page'),
    'doctype': (b'\n<!DOCTYPE html><html>', 'a web page'),
    'text': (b'not a checkpoint', 'no checkpoint of torch'),
    'json': (b'{"a": 1}', 'no checkpoint of torch'),
    'zeros': (bytes(5000), 'starts with zeros'),
    'random': (random.Random(0).randbytes(999), 'no checkpoint of torch'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a', 'git lfs pull'),
    'gzip': (gzip.compress(b'abc'), 'compressed by gzip'),
    'safetensors': (b'\x10\0\0\0\0\0\0\0{"a":{"dtype":"F32"', 'safetensors'),
    'pickle': (pickle.dumps(dict(a=1)), 'no checkpoint of torch'),
    'start of a zip': (b'PK\x03\x04cut', 'cut off'),
}


@pytest.mark.parametrize('name', BYTES)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, name):
    raw, said = BYTES[name]
    (tmp_path / 'a.pth').write_bytes(raw)
    message = refused(tmp_path / 'a.pth')
    assert said in message and 'trust' not in message


CONTENTS = {
    'list': ([1, 2], 'holds a list'),
    'number': (3, 'holds a int'),
    'tensor': (torch.zeros(3), 'holds a Tensor'),
    'nothing': (None, 'holds a NoneType'),
    'empty dict': ({}, 'it is an empty dict'),
    'other dict': (dict(epoch=3, lr=0.1), 'neither state_dict nor model'),
    'optimizer only': (dict(optimizer=dict(state={})), 'neither state_dict nor model'),
    'empty state dict': (dict(state_dict={}), 'its state_dict is empty'),
    'list as state dict': (dict(state_dict=[torch.zeros(3)]), 'its state_dict is a list'),
    'numbers as state dict': (dict(state_dict=dict(a=1.0)), "'a' is a float"),
    'one that is no tensor': (dict(state_dict=dict(a=torch.zeros(2), b='x')), "'b' is a str"),
    'a number as a name': (dict(state_dict={3: torch.zeros(2)}), "'3' is a Tensor, not a tensor with a name"),
}


@pytest.mark.parametrize('name', CONTENTS)
def test_a_file_without_weights_says_what_it_holds(tmp_path, name):
    value, said = CONTENTS[name]
    torch.save(value, tmp_path / 'a.pth')
    assert said in refused(tmp_path / 'a.pth')


def test_folders_and_files_that_are_not_there(tmp_path, saved, monkeypatch):
    assert f'is a folder; name a checkpoint file, e.g. {saved}' in refused(tmp_path)
    assert '(in its folder: a.pth)' in refused(tmp_path / 'b.pth', MissingCheckpointError)
    assert 'there is no folder' in refused(tmp_path / 'none' / 'b.pth', FileNotFoundError)
    os.mkfifo(tmp_path / 'pipe.pth')
    assert 'no ordinary file' in refused(tmp_path / 'pipe.pth')
    (tmp_path / 'gone.pth').symlink_to(tmp_path / 'nowhere')
    assert 'there is no file' in refused(tmp_path / 'gone.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert read_checkpoint('~/a.pth').meta['epoch'] == 1

    def forbidden(path, *args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', forbidden)
    assert 'cannot be read: Permission denied' in refused(saved)


@pytest.mark.usefixtures('reader')
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('part', [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_called_so_and_never_answered_with_trust(tmp_path, zipped, part):
    torch.save(content(), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(whole[: int(len(whole) * part)])
    message = refused(tmp_path / 'a.pth')
    assert 'cut off' in message or 'damaged' in message
    assert 'trust' not in message


def test_archives_of_other_things_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    assert 'zip archive that holds no checkpoint' in refused(tmp_path / 'a.zip')
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'a.pt')
    assert 'TorchScript' in refused(tmp_path / 'a.pt')
    with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(2**24))
    assert 'claims to hold far more' in refused(tmp_path / 'bomb.pth')


def test_a_weight_that_changed_on_the_disk_is_noticed(saved):
    whole = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size if '/data/' in entry.filename else 0)
    start = whole.find(weights()['0.weight'].numpy().tobytes())
    whole[start + 5] ^= 4
    saved.write_bytes(whole)
    assert f'wrong checksum, e.g. {entry.filename}' in refused(saved)


@pytest.mark.skipif(not hasattr(torch.serialization, 'set_crc32_options'), reason='this torch writes them always')
def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_checkpoint(tmp_path / 'a.pth').meta['epoch'] == 1


def test_a_tensor_that_claims_more_than_there_is_is_refused_and_not_copied(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.zeros(1).expand(2**45))), tmp_path / 'a.pth')
    assert 'the tensor a claims 35184372088832 numbers' in refused(tmp_path / 'a.pth')


class Calls:
    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def _pointers():
    """numpy told to see pointers in bytes."""
    kind = Calls(np.dtype, 'f8', False, True, state=(3, '|', None, ('a',), {'a': (Calls(np.dtype, 'O'), 0)}, 8, 8, 0))
    return Calls(np.array(0).__reduce__()[0], np.ndarray, (0,), b'b', state=(1, (1,), kind, False, b'12345678'))


HOSTILE = {
    'os.system': lambda mark: Calls(os.system, f'touch {mark}'),
    'os.mkdir': lambda mark: Calls(os.mkdir, mark),
    'eval': lambda mark: Calls(eval, f'open({mark!r}, "w")'),
    'exec': lambda mark: Calls(exec, f'open({mark!r}, "w")'),
    'getattr of a module': lambda mark: Calls(getattr, Calls(__import__, 'os'), 'mkdir'),
    'getattr of a class': lambda mark: Calls(getattr, HistoryBuffer, '__globals__'),
    'getattr of a function': lambda mark: Calls(getattr, Calls(getattr, HistoryBuffer, 'mean'), '__globals__'),
    'torch.load': lambda mark: Calls(torch.load, mark),
    'torch.hub': lambda mark: Calls(torch.hub.load, mark, 'x'),
    'partial': lambda mark: Calls(__import__('functools').partial, os.mkdir, mark),
    'pointers of numpy': lambda mark: _pointers(),
    'objects in an array': lambda mark: np.array([Calls(os.mkdir, mark)], object),
    'inside a tensor dict': lambda mark: dict(a=dict(b=[(Calls(os.mkdir, mark),)])),
    'a namespace': lambda mark: __import__('argparse').Namespace(lr=1),
}


@pytest.mark.usefixtures('reader')
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_file_is_refused_and_does_not_run(tmp_path, name, zipped):
    mark = str(tmp_path / 'ran')
    torch.save({**content(), 'extra': HOSTILE[name](mark)}, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / 'a.pth', UntrustedCheckpointError)
    assert 'more than tensors and plain data' in message and 'trust-pickle' not in message
    assert not os.path.exists(mark)


@pytest.mark.usefixtures('reader')
def test_numpys_own_kinds_of_numbers_cannot_be_changed_by_a_file(tmp_path):
    kind = Calls(np.dtype, 'f8', False, False, state=(3, '>', None, None, None, -1, -1, 0))
    torch.save(dict(extra=kind), tmp_path / 'a.pth')
    read_file(tmp_path / 'a.pth')
    assert np.dtype('f8').isnative and np.zeros(1).dtype.isnative


@pytest.mark.usefixtures('reader')
def test_arrays_and_numbers_of_numpy_are_saved_again_as_numpys(tmp_path):
    arrays = dict(a=np.arange(3.0), b=np.float32(2), c=np.zeros((0, 4), np.int8), d=np.arange(4, dtype='>i2'))
    torch.save(arrays, tmp_path / 'a.pth')
    read = read_file(tmp_path / 'a.pth')
    torch.save(read, tmp_path / 'b.pth')
    assert b'mmdet_norms' not in (tmp_path / 'b.pth').read_bytes()
    again = torch.load(tmp_path / 'b.pth', weights_only=False)
    assert all(
        np.array_equal(again[key], value) and again[key].dtype.str[1:] == value.dtype.str[1:]
        for key, value in arrays.items()
    )


# --- mmengine's loader reads by the same reader; what it downloads: test_downloads.py --------------------------------


@pytest.mark.usefixtures('reader')
def test_mmengine_reads_by_the_same_reader(tmp_path, saved):
    assert CheckpointLoader.load_checkpoint(str(saved), logger='silent')['meta']['epoch'] == 1
    (tmp_path / 'a.pth').write_text('<html>')
    with pytest.raises(CheckpointError, match='a web page'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), logger='silent')


@pytest.mark.usefixtures('reader')
def test_damage_anywhere_gives_the_weights_or_one_message(saved):
    """Random bytes: whatever is not noticed leaves the weights as they were."""
    whole, draw = saved.read_bytes(), random.Random(0)
    noticed = 0
    for number in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 30])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        saved.write_bytes(damaged[: draw.randrange(len(whole))] if number % 3 == 2 else damaged)
        try:
            read = read_checkpoint(saved)
        except CheckpointError as error:
            noticed += 1
            assert str(saved) in str(error) and '\n' not in str(error) and 'trust' not in str(error).lower()
        else:
            assert all(torch.equal(read.state_dict[key], value) for key, value in weights().items())
    assert noticed > 200


# --- a checkpoint that is looked at and then read by the run ---------------------------------------------------------


def test_what_is_kept_is_handed_out_once_and_only_while_the_file_is_the_same(saved, tmp_path):
    mine = dict(mine=1)
    reading.keep(saved, mine)
    os.symlink(saved, tmp_path / 'link.pth')
    assert read_file(tmp_path / 'link.pth') is mine
    assert read_file(saved) is not mine
    reading.keep(saved, mine)
    torch.save(dict(state_dict=weights()), saved)
    assert read_file(saved) is not mine
    reading.keep(saved, mine)
    assert read_file(saved, map_location='meta') is not mine and not reading._kept  # nor is it held any longer
    reading.keep(saved, mine)
    torch.save(weights(), tmp_path / 'b.pth')
    assert read_file(tmp_path / 'b.pth').keys() == weights().keys() and read_file(saved) is mine
    reading.keep(tmp_path / 'none.pth', mine)
    assert not reading._kept
