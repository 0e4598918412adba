"""Random bytes in every other file that a tool reads: an answer or one message, never a traceback. Seeded."""

import json
import random

import pytest
import torch

from helpers import tiny
from mmdet_norms.cli import compare, picture_sheet
from mmdet_norms.datasets.annotations import read_annotations
from mmdet_norms.engine.safe_checkpoints import CheckpointFolder
from mmdet_norms.errors import UserError


def damaged(whole, number, seed=0):
    """Versions of some bytes: changed, cut, doubled, replaced by others, and what editors do to texts."""
    draw = random.Random(seed)
    for i in range(number):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 9, 40])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        kind = i % 5
        if kind == 1:
            content = content[: draw.randrange(len(content))]
        elif kind == 2:
            content = content + whole
        elif kind == 3:
            content = bytearray(draw.randbytes(draw.randrange(300)))
        yield bytes(content)
    yield from (
        b'',
        b'\0' * 300,
        b'\xff\xfe' + whole[:40],
        b'[' * 100_000,
        b'{"a":' * 50_000,
        b'1e999',
        b'NaN',
        b'null',
        b'""',
    )
    yield from (b'[]', b'{}', b'[null]', b'{"images": 3}', b'9' * 5000, b'"' + b'x' * 5000 + b'"')


def test_a_last_checkpoint_of_random_bytes(tmp_path):
    torch.save(dict(meta=dict(epoch=1, iter=2), state_dict={}, message_hub={}), tmp_path / 'epoch_1.pth')
    last = tmp_path / 'last_checkpoint'
    names = [
        b'../../etc/passwd',
        b'/',
        b'.',
        b'..',
        b'~',
        b'a' * 5000,
        b'/' * 3000,
        b'x\0y',
        b'epoch_1.pth\nepoch_2.pth',
        b'/dev/zero',
    ]
    for content in [*names, *damaged(str(tmp_path / 'epoch_1.pth').encode(), 60)]:
        last.write_bytes(content)
        folder = CheckpointFolder(tmp_path, tmp_path)
        try:
            found = folder.newest()
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:
            assert found.path is None or found.path.name == 'epoch_1.pth' or '://' in str(found.path)


def test_results_of_random_bytes_in_a_comparison(tmp_path, capsys):
    results = dict(bbox_mAP=0.1, segm_mAP=0.2, split='val', config='a.py', epoch=3)
    whole = json.dumps(results).encode()
    path = tmp_path / 'run' / 'results.json'
    path.parent.mkdir()
    for content in damaged(whole, 60):
        path.write_bytes(content)
        try:
            compare.main([str(path.parent)])
        except SystemExit as stopped:
            assert stopped.code == 2
            said = capsys.readouterr().err
            assert said.startswith('error: ') and 'results.json' in said
        capsys.readouterr()


def test_detections_of_random_bytes_in_a_picture_sheet(tmp_path, capsys):
    config = tiny.write_config(tmp_path)
    found = [dict(image_id=1, category_id=1, bbox=[1.0, 2.0, 3.0, 4.0], score=0.5)]
    for suffix in ('json', 'pkl'):
        path = tmp_path / f'found.{suffix}'
        for content in list(damaged(json.dumps(found).encode(), 10))[: 16 if suffix == 'json' else 5]:
            path.write_bytes(content)
            try:
                picture_sheet.main([str(config), str(path), '--out', str(tmp_path / 'sheet.png')])
            except SystemExit as stopped:
                assert stopped.code == 2
                assert capsys.readouterr().err.startswith('error: ')


@pytest.mark.parametrize('seed', range(3))
def test_annotations_of_random_bytes(tmp_path, seed):
    tiny.write_dataset(tmp_path)
    path = tmp_path / 'annotations.json'
    for content in damaged(path.read_bytes(), 80, seed):
        path.write_bytes(content)
        try:
            read_annotations(str(path))
        except UserError as error:
            assert str(path) in str(error)
