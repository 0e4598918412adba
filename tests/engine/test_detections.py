"""Results files are read without running their code, whatever is in them."""

import os
import pickle
import pickletools
import random
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mmdet_norms.compat import pickles
from mmdet_norms.engine.coco_detections import is_detections
from mmdet_norms.engine.detections import read_detections
from mmdet_norms.errors import UserError


def detections(number=3, masks=True):
    """As mmdet's DumpDetResults collects them."""
    images = []
    for i in range(number):
        found = dict(bboxes=torch.rand(i, 4), labels=torch.arange(i), scores=torch.rand(i))
        if masks:
            found['masks'] = [dict(size=[8, 8], counts=b'0100f1\x7f\x93') for _ in range(i)]
        images.append(dict(img_id=i, img_path=f'{i}.png', ori_shape=(8, 8), pred_instances=found))
    return images


def write(path, content, protocol=2):
    with open(path, 'wb') as file:
        pickle.dump(content, file, protocol)
    return path


def refused(path, content=None):
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(UserError) as error:
        read_detections(path)
    message = str(error.value)
    assert str(path) in message and '\n' not in message
    return message


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('kind', ['tensors', 'arrays', 'numbers'])
def test_what_the_test_tool_writes_is_read_as_it_is(tmp_path, kind, protocol):
    written = detections()
    change = dict(tensors=lambda x: x, arrays=lambda x: x.numpy(), numbers=lambda x: [np.float32(v) for v in x.ravel()])
    for image in written:
        image['pred_instances']['scores'] = change[kind](image['pred_instances']['scores'])
    path = write(tmp_path / 'results.pkl', written, protocol)
    read = read_detections(path)
    for have, want in zip(read, written, strict=True):
        assert {**have, 'pred_instances': 0} == {**want, 'pred_instances': 0}
        have, want = have['pred_instances'], want['pred_instances']
        assert have['masks'] == want['masks']
        for key in ('bboxes', 'labels', 'scores'):
            assert np.array_equal(np.asarray(have[key]), np.asarray(want[key]))
            assert np.asarray(have[key]).dtype == np.asarray(want[key]).dtype


def test_views_slices_and_empty_tensors_are_read_as_they_are(tmp_path):
    boxes = torch.rand(10, 8)[2:6, ::2].t().contiguous().t()
    results = [dict(img_id=1, pred_instances=dict(bboxes=boxes, labels=torch.arange(9)[5:], scores=torch.rand(4)))]
    found = read_detections(write(tmp_path / 'a.pkl', results))[0]['pred_instances']
    assert torch.equal(found['bboxes'], boxes) and torch.equal(found['labels'], torch.arange(5, 9))


class Calls:
    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


HOSTILE = {
    'os.system': lambda mark: Calls(os.system, f'touch {mark}'),
    'eval': lambda mark: Calls(eval, f'open({str(mark)!r}, "w")'),
    'os.mkdir': lambda mark: Calls(os.mkdir, str(mark)),
    'getattr': lambda mark: Calls(getattr, Calls(__import__, 'os'), 'mkdir'),
    'codecs': lambda mark: Calls(__import__('codecs').encode, str(mark), 'rot13'),
    'torch.load': lambda mark: Calls(torch.load, str(mark)),
    'partial': lambda mark: Calls(__import__('functools').partial, os.mkdir, str(mark)),
    'object array': lambda mark: np.array([Calls(os.mkdir, str(mark))], object),
    'object dtype': lambda mark: np.dtype('O'),
    'pointers': lambda mark: Calls(np.dtype, 'f8', False, True, state=(3, '|', None, ('a',), {'a': ('O', 0)}, 8, 8, 0)),
    'class': lambda mark: Calls,
    'set': lambda mark: {1, 2},
    'inner': lambda mark: Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.mkdir, str(mark)), 2)),
    'state of a function': lambda mark: Calls(OrderedDict, state={'x': 1}),
}


def _nested(depth):
    nested = ()
    for _ in range(depth):
        nested = (nested, nested)
    return nested


@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('where', ['alone', 'inside'])
def test_code_in_a_results_file_does_not_run(tmp_path, name, where):
    mark = tmp_path / 'ran'
    content = [HOSTILE[name](mark)]
    if where == 'inside':
        content = [*detections(), dict(img_id=9, pred_instances=dict(bboxes=content[0]))]
    refused(tmp_path / 'evil.pkl', content)
    assert not mark.exists()


@pytest.mark.parametrize('code', ['O', 'O8', '|O', 'V8', 'S3', 'U2', 'M8[s]', 'f8,f8', '(2,)f8', 8, None, object])
def test_only_kinds_of_numbers_are_dtypes(code):
    with pytest.raises(pickles.UnsafePickleError, match='is no kind of number'):
        pickles.PlainDtype(code)


def test_a_file_leaves_no_mark_on_the_functions_that_read_it(tmp_path):
    assert 'it creates objects' in refused(tmp_path / 'evil.pkl', b"c_codecs\nencode\n}S'mark'\nK\x01sb.")
    assert not any(hasattr(function, 'mark') for function in pickles._NAMES.values())


def test_a_key_that_takes_for_ever_to_hash_is_not_hashed(tmp_path):
    nested = pickle.dumps(_nested(64), 2)[2:-1]
    assert 'neither texts nor numbers' in refused(tmp_path / 'evil.pkl', b'\x80\x02}' + nested + b'K\x01s.')
    assert 'neither texts nor numbers' in refused(tmp_path / 'evil.pkl', b'\x80\x02}(' + nested + b'K\x01u.')
    assert 'neither texts nor numbers' in refused(tmp_path / 'evil.pkl', b'(' + nested + b'I1\nd.')


def test_a_tensor_cannot_look_beyond_its_numbers(tmp_path):
    storage = torch.zeros(4).storage()
    rebuild = torch._utils._rebuild_tensor_v2
    for offset, size, stride in (
        (0, (9,), (1,)),
        (3, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (1 << 40,), (0,)),
        (0, (2,), ()),
    ):
        tensor = Calls(rebuild, storage, offset, size, stride, False, OrderedDict())
        refused(tmp_path / 'a.pkl', [dict(img_id=1, pred_instances=dict(bboxes=tensor))])


@pytest.mark.parametrize(
    'content, said',
    [
        (b'', 'is empty'),
        (b'<html>404</html>', 'no file of results, or a damaged one (KeyError: 60)'),
        (b'[{"image_id": 1}]', 'no file of results, or a damaged one'),
        (dict(a=1), 'it is a dict, not a list'),
        ([3], 'entry 0 is a int'),
        ([dict(img_id=1)], 'entry 0 has no pred_instances'),
        ([dict(img_id=1, pred_instances=[])], 'pred_instances of entry 0 is a list'),
        ([dict(img_id=7, pred_instances={})], 'of entry 0 (image 7), bboxes is missing'),
        ([dict(img_id=7, pred_instances=dict(bboxes=[], labels='', scores=[]))], 'labels is a str'),
        (
            [dict(img_id=7, pred_instances=dict(bboxes=[], labels=[], scores=np.array(1.0)))],
            'scores is a single number',
        ),
        ([dict(img_id=7, pred_instances=dict(bboxes=[[1, 2]], labels=[1], scores=[1]))], 'not four numbers'),
        ([dict(img_id=7, pred_instances=dict(bboxes=[], labels=[1], scores=[]))], '0 bboxes, 1 labels, 0 scores'),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, content, said):
    assert said in refused(tmp_path / 'a.pkl', content)


def test_a_folder_a_missing_file_and_one_that_may_not_be_read(tmp_path, monkeypatch):
    assert 'is a folder' in refused(tmp_path)
    assert 'there is no results file' in refused(tmp_path / 'none.pkl')
    path = write(tmp_path / 'a.pkl', detections())

    def forbidden(self):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('pathlib.Path.read_bytes', forbidden)
    assert 'cannot be read: Permission denied' in refused(path)


@pytest.mark.parametrize('protocol', [2, 4])
def test_damaged_files_give_detections_or_one_message(tmp_path, protocol):
    whole = pickle.dumps(detections(), protocol)
    draw = random.Random(protocol)
    path = tmp_path / 'damaged.pkl'
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.choice([len(whole), draw.randrange(len(whole))])])
        try:
            read_detections(path)
        except UserError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
    for _ in range(50):
        path.write_bytes(draw.randbytes(draw.randrange(200)))
        refused(path)


def test_every_instruction_of_pickle_is_known_or_refused():
    """A canary: a new Python may bring instructions that nobody has thought about."""
    assert sys.version_info < (3, 15), 'look at the instructions of this Python first'
    assert {opcode.code for opcode in pickletools.opcodes} >= {chr(code) for code in pickles._Plain.dispatch}


def test_what_out_may_replace_are_detections_only(tmp_path):
    ours = {
        'a.pkl': pickle.dumps([dict(img_id=1, ori_shape=(4, 4), pred_instances={})]),
        'b.pkl': pickle.dumps([]),
        'c.json': b'[{"image_id": 1, "bbox": [0, 0, 1, 1]}]',
        'd.json': b'[ ]\n',
        'e.json': b'',
    }
    others = {
        'f.pkl': pickle.dumps([dict(mine=1)]),
        'g.pkl': pickle.dumps(dict(weights=[1.0] * 9)),
        'h.json': b'[1, 2, 3]',
        'i.json': b'[{"name": "mine"}]',
        'j.json': b'{"images": [], "image_id": 1}',
    }
    for name, content in {**ours, **others}.items():
        (tmp_path / name).write_bytes(content)
        assert is_detections(tmp_path / name) == (name in ours), name
