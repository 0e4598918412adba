"""tools/browse.py: what a pipeline gives, whatever wraps the data set; the counts; what is refused."""

import json
import re

import cv2
import numpy as np
import pytest

from helpers import tiny, tiny_cls
from mmdet_norms.cli import browse
from mmdet_norms.engine import picture
from mmdet_norms.engine.picture import is_sheet

PLAIN = "train_dataloader['dataset']"
INNER = "inner = {key: value for key, value in train_dataloader['dataset'].items() if key != '_delete_'}\n"
PACK = "dict(type='PackDetInputs')"
LOAD = "dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)"


@pytest.fixture
def drawn(monkeypatch):
    """What a sheet is drawn of, by caption."""
    seen = []
    real = browse.draw_gallery
    monkeypatch.setattr(browse, 'draw_gallery', lambda pictures, *more: seen.extend(pictures) or real(pictures, *more))
    return seen


def look(folder, *arguments, more=''):
    config = tiny.write_config(folder, more)
    browse.main([str(config), '--out', str(folder / 'sheet.png'), *map(str, arguments)])
    assert is_sheet(folder / 'sheet.png')


def fails(capsys, folder, *arguments, more=''):
    config = tiny.write_config(folder, more)
    with pytest.raises(SystemExit) as stopped:
        browse.main([str(config), *map(str, arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count('error: ') == 1
    return said


def test_every_form_of_masks_crowds_and_empty_images(tmp_path, drawn, capsys):
    look(tmp_path, more=f"{PLAIN}['pipeline'][1]['poly2mask'] = False\n")
    assert re.search(
        r'^train: 4 images, 1 without objects; 6 objects: disc 3, box 3; 1 ignored \(crowds\)$',
        capsys.readouterr().out,
        re.M,
    )
    by_name = {caption: (image, instances) for caption, image, instances in drawn}
    assert sorted(by_name) == ['000.png', '001.png', '002.png', '003.png'] and not by_name['003.png'][1]
    image, instances = by_name['001.png']
    assert np.array_equal(image, cv2.imread(str(tmp_path / 'data/images/001.png'))[..., ::-1])
    disc, box = instances
    assert (disc.name, box.name) == ('disc', 'box') and box.box == [34, 31, 56, 54]
    assert disc.mask.shape == (64, 64) and 250 < disc.mask.sum() < 350
    assert not disc.mask[:, 40:].any() and box.mask[32:53, 36:54].all()
    crowd = next(one for one in by_name['000.png'][1] if one.ignored)
    assert crowd.box == [0, 0, 10, 6]


def test_what_the_pipeline_did_is_seen_and_normalization_turned_back(tmp_path, drawn):
    steps = "dict(type='RandomFlip', prob=1.0), dict(type='Normalize', mean=[10, 20, 30], std=[2, 3, 4], to_rgb=True)"
    look(tmp_path, '--seed', 3, '--number', 2, more=f"{PLAIN}['pipeline'] = [{LOAD}, {steps}, {PACK}]\n")
    assert len(drawn) == 2
    for caption, image, instances in drawn:
        expected = cv2.imread(str(tmp_path / 'data/images' / caption))[:, ::-1, ::-1]
        assert np.abs(image.astype(int) - expected).max() <= 1
        assert all(one.box[0] < 30 for one in instances if one.name == 'box')


def test_a_seed_decides_images_and_augmentations(tmp_path, drawn):
    more = f"{PLAIN}['pipeline'] = [{LOAD}, dict(type='PhotoMetricDistortion'), {PACK}]\n"
    for seed in (1, 1, 2):
        look(tmp_path, '--seed', seed, '--number', 2, more=more)
    first, again, other = drawn[:2], drawn[2:4], drawn[4:]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(first, other))


@pytest.mark.parametrize(
    'wrapper, images',
    [
        ("dict(type='RepeatDataset', times=2, dataset=inner)", '8 images (4 different ones), 2 without'),
        (
            "dict(type='ConcatDataset', datasets=[inner, inner])",
            '8 images (4 different ones), 2 without',
        ),
        ("dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=inner)", '4 images, 1 without'),
    ],
)
def test_wrapped_data_sets(tmp_path, drawn, capsys, wrapper, images):
    look(tmp_path, '--number', 100, more=f"{INNER}train_dataloader['dataset'] = dict({wrapper}, _delete_=True)\n")
    assert images in capsys.readouterr().out and len(drawn) == int(images.split()[0])


def mixed(load):
    return (
        f"{PLAIN}['pipeline'] = [{load}]\n"
        f"{INNER}train_dataloader['dataset'] = dict(_delete_=True, type='MultiImageMixDataset', dataset=inner,\n"
        f"    pipeline=[dict(type='Mosaic', img_scale=(64, 64), pad_val=0.0), {PACK}])\n"
    )


def test_mixed_images(tmp_path, drawn):
    look(tmp_path, more=mixed(LOAD.replace('with_mask=True', 'with_mask=False')))
    assert len(drawn) == 4 and all(image.shape == (128, 128, 3) for _, image, _ in drawn)
    assert max(len(instances) for *_, instances in drawn) > 3


def test_a_pipeline_that_fails_is_one_message(tmp_path, capsys):
    """mmdet's Mosaic mixes no masks; a training would end in a traceback."""
    said = fails(capsys, tmp_path, '--out', tmp_path / 'a.png', more=mixed(LOAD))
    assert 'the pipeline fails at image 0' in said and 'IndexError' in said and '(in PackDetInputs)' in said


def test_branches_of_semi_supervised_pipelines(tmp_path, drawn):
    fields = "branch_field=['sup', 'unsup']"
    more = f"{PLAIN}['pipeline'] = [{LOAD}, dict(type='MultiBranch', {fields}, sup=[{PACK}])]\n"
    look(tmp_path, more=more)
    assert sorted(caption for caption, *_ in drawn)[0] == '000.png (sup)' and len(drawn) == 4


@pytest.mark.parametrize('split', ['val', 'test'])
def test_other_splits(tmp_path, drawn, capsys, split):
    look(tmp_path, '--split', split)
    assert f'{split}: 4 images' in capsys.readouterr().out and sum(len(instances) for *_, instances in drawn) == 7


def test_another_folder_of_data(tmp_path, drawn, capsys):
    tiny.write_dataset(tmp_path / 'own' / 'train')
    content = json.loads((tmp_path / 'own/train/annotations.json').read_text())
    content['categories'] = [dict(id=1, name='[/b]'), dict(id=2, name='two\nlines')]
    (tmp_path / 'own/train.json').write_text(json.dumps(content))
    (tmp_path / 'own/images').symlink_to(tmp_path / 'own/train/images')
    look(tmp_path, '--data-root', tmp_path / 'own')
    assert r'[/b] 3, two\nlines 3' in capsys.readouterr().out and drawn[0][2][0].name == '[/b]'


@pytest.mark.parametrize(
    'arguments, more, said',
    [
        (['--number', 0], '', '--number 0: must be at least 1'),
        (['--seed', -1], '', '--seed: -1 must be at least 0'),
        (['--seed', 2**32], '', 'less than 2**32'),
        (['--out', 'x.svg'], '', 'name the picture *.png or *.jpg'),
        (['--out', 'data/images/003.png', '--overwrite'], '', 'is an image of the data set'),
        ([], f"{PLAIN}['pipeline'] = [{LOAD}]\n", 'does not end in PackDetInputs'),
        ([], f"{PLAIN}['ann_file'] = 'none.json'\n", 'there is no annotation file'),
        (['--split', 'val'], 'val_dataloader = None\n', 'the config has no val_dataloader.dataset'),
        (['--cfg-options', 'train_dataloader.dataset.pipline=[]'], '', 'train_dataloader.dataset.pipeline'),
    ],
)
def test_a_mistake_is_one_message(tmp_path, capsys, monkeypatch, arguments, more, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, tmp_path, *arguments, more=more)


def test_the_images_of_a_classifier_are_named_by_their_class(tmp_path, drawn, capsys):
    more = "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='PackClsInputs')]\n"
    config = tiny_cls.write_config(tmp_path, more)
    (tmp_path / 'data/train/box/3.png').unlink()
    browse.main([str(config), '--out', str(tmp_path / 'sheet.png'), '--number', '20'])
    assert '\ntrain: 11 images: disc 4, ring 4, box 3\n' in '\n' + capsys.readouterr().out
    assert is_sheet(tmp_path / 'sheet.png') and len(drawn) == 11
    assert {caption.split(': ')[1] for caption, *_ in drawn} == {'disc', 'ring', 'box'}
    for caption, image, instances in drawn:
        name, cls = caption.split(': ')
        stored = [cv2.imread(str(path)) for path in (tmp_path / f'data/train/{cls}').glob(name)]
        assert not instances and np.array_equal(image, stored[0][..., ::-1])


def test_captions_keep_their_end(tmp_path):
    assert picture._shortened('a' * 100 + '.png', 13, 100).startswith('…') and picture._shortened('a', 13, 100) == 'a'
    sheet = picture.draw_gallery([('b' * 100, np.zeros((9, 3, 3), np.uint8), [])], 't' * 300, [('x', (1, 2, 3))])
    assert 288 < sheet.width < 800
    title = np.asarray(picture.draw_sheet([picture.Pair(np.zeros((9, 3, 3), np.uint8))], 't' * 300, 0.5, []))[:24]
    assert title[:, 16:-16].min() < 100 and title[:, -16:].min() == 255
