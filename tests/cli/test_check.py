"""Data are checked before a run, which reads completed copies of files with gaps; the tool lists what it finds."""

import json
from pathlib import Path

import pytest

from helpers import small
from mmdet_norms.cli import check, test, train
from mmdet_norms.datasets import annotations
from mmdet_norms.errors import UserError


@pytest.fixture(autouse=True)
def nothing_kept():
    annotations.forget()


@pytest.fixture
def folder(tmp_path):
    return small.write(tmp_path / 'data', small.content(prefix='train'), small.content(prefix='val'))


@pytest.fixture
def config(folder, tmp_path):
    path = tmp_path / 'small.py'
    small.config(folder).dump(path)
    return path


def edit(folder, split, change):
    path = folder / f'annotations/{split}.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop_areas(content):
    for annotation in content['annotations']:
        del annotation['area']


def train_config(*arguments):
    return train.train_config(train.parse_args([str(argument) for argument in arguments]))


def test_config(*arguments):
    return test.test_config(test.parse_args([str(argument) for argument in arguments]))


test_config.__test__ = False


def test_good_data_make_no_noise(config, capsys):
    train_config(config)
    assert capsys.readouterr() == ('', '')


def test_all_faults_of_all_splits_are_one_message(config, folder):
    edit(folder, 'train', lambda c: c['annotations'][0].update(bbox=[1, 2]))
    edit(folder, 'val', lambda c: c['categories'].reverse())
    with pytest.raises(
        UserError, match=r'(?s)train\.json.*bbox like \[1, 2\].*val\.json: lists the classes in another'
    ):
        train_config(config)


def test_faults_may_be_allowed_and_are_warnings_then(config, folder, capsys):
    edit(folder, 'val', lambda c: c['categories'].reverse())
    train_config(config, '--allow-data-faults')
    assert 'warning: ' in (said := capsys.readouterr().err) and 'another order' in said


def lose_an_image(content):
    content['images'][0]['file_name'] = 'nosuch.png'


FATAL = {
    'box': ('train', lambda c: c['annotations'][0].update(bbox=[1, 2])),
    'image of train': ('train', lose_an_image),
    'image of val': ('val', lose_an_image),
    'no objects': ('train', lambda c: c.update(annotations=[])),
    'none of the classes': ('train', lambda c: [x.update(name=x['name'].title()) for x in c['categories']]),
    'a mask that is evaluated': ('val', lambda c: c['annotations'][0].update(segmentation=[[1, 2, 3, 4]])),
    'no mask that is evaluated': ('val', lambda c: [a.pop('segmentation') for a in c['annotations']]),
    'no mask that is trained on': ('train', lambda c: [a.pop('segmentation') for a in c['annotations']]),
    'short run lengths': (
        'train',
        lambda c: c['annotations'][0].update(segmentation=dict(size=[small.HEIGHT, small.WIDTH], counts=[5, 6])),
    ),
    'image ids of two kinds': ('val', lambda c: c['images'].append(dict(c['images'][0], id='a'))),
    'odd crowd': ('val', lambda c: c['annotations'][0].update(iscrowd='maybe')),
    'no category': ('train', lambda c: c['annotations'][0].pop('category_id') and None),
}


@pytest.mark.parametrize('name', FATAL)
def test_faults_that_would_end_the_run_are_not_offered_and_not_allowed(config, folder, name):
    edit(folder, *FATAL[name])
    with pytest.raises(UserError) as found:
        train_config(config)
    assert 'allow-data-faults' not in str(found.value)
    annotations.forget()
    with pytest.raises(UserError, match='--allow-data-faults cannot help, the run would end in an error'):
        train_config(config, '--allow-data-faults')


def test_too_few_classes_end_a_training_and_too_many_do_not(config, folder):
    few, many = (['--cfg-options', f'model.roi_head.bbox_head.num_classes={n}'] for n in (1, 9))
    with pytest.raises(UserError, match='cannot help'):
        train_config(config, '--allow-data-faults', *few)
    train_config(config, '--allow-data-faults', *many)
    with pytest.raises(UserError, match='goes on nevertheless'):
        train_config(config, *many)


@pytest.mark.parametrize('split, found', [('train', False), ('val', True)])
def test_a_test_checks_the_data_that_it_reads(config, folder, tmp_path, split, found):
    edit(folder, split, lambda c: c['annotations'][0].update(bbox=[1, 2]))
    (tmp_path / 'a.pth').touch()
    if found:
        with pytest.raises(UserError, match='bbox like'):
            test_config(config, tmp_path / 'a.pth')
    else:
        test_config(config, tmp_path / 'a.pth')


def test_what_is_evaluated_decides_what_is_needed(config, folder, tmp_path):
    edit(folder, 'val', lambda c: [a.pop('segmentation') for a in c['annotations'][:3]])
    (tmp_path / 'a.pth').touch()
    with pytest.raises(UserError, match='3 of 8 annotations have no segmentation'):
        test_config(config, tmp_path / 'a.pth')
    test_config(config, tmp_path / 'a.pth', '--eval', 'bbox')


def test_data_set_and_evaluator_read_the_completed_copy_and_the_file_stays(config, folder, tmp_path, capsys):
    edit(folder, 'val', drop_areas)
    before = (folder / 'annotations/val.json').read_bytes()
    cfg = train_config(config, '--work-dir', tmp_path / 'run')
    copy = cfg.val_dataloader.dataset.ann_file
    assert copy == cfg.val_evaluator.ann_file == cfg.test_dataloader.dataset.ann_file == cfg.test_evaluator.ann_file
    assert Path(copy).parent == tmp_path / 'run' / 'annotations'
    assert all(annotation['area'] > 0 for annotation in json.loads(Path(copy).read_text())['annotations'])
    assert (folder / 'annotations/val.json').read_bytes() == before
    assert 'filled in area of 8 annotations' in capsys.readouterr().out
    assert cfg.train_dataloader.dataset.ann_file == 'annotations/train.json'
    annotations.forget()
    assert train_config(config, '--work-dir', tmp_path / 'run').val_evaluator.ann_file == copy
    assert len(list(Path(copy).parent.iterdir())) == 1


def test_only_the_first_process_speaks(config, folder, tmp_path, capsys, monkeypatch):
    edit(folder, 'val', drop_areas)
    monkeypatch.setenv('RANK', '1')
    train_config(config, '--work-dir', tmp_path / 'run')
    assert capsys.readouterr() == ('', '')


def test_a_work_dir_that_cannot_be_written_is_one_message(config, folder, tmp_path):
    edit(folder, 'val', drop_areas)
    (tmp_path / 'run').write_text('a file')
    with pytest.raises(UserError, match=r'a changed copy of \S+ is needed, but \S+ cannot be written'):
        train_config(config, '--work-dir', tmp_path / 'run')


def test_options_say_which_files_data_root_reads(config, folder, tmp_path):
    for name, new in (('train', 'many'), ('val', 'few')):
        (folder / f'annotations/{name}.json').rename(folder / f'{new}.json')
    files = [f'{split}_dataloader.dataset.ann_file={"many" if split == "train" else "few"}.json'
             for split in ('train', 'val', 'test')]  # fmt: skip
    with pytest.raises(UserError, match=r'has no annotations for train.*--cfg-options train_dataloader\.dataset\.ann'):
        train_config(config, '--data-root', folder)
    cfg = train_config(config, '--data-root', folder, '--cfg-options', *files)
    assert cfg.val_evaluator.ann_file == f'{folder}/few.json'


def run(capsys, *arguments):
    status = 0
    try:
        check.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def test_the_tool_lists_everything_and_its_status_says_if_there_are_errors(config, folder, capsys):
    status, said = run(capsys, config)
    assert status == 0 and said.startswith(f'{config}: 0 errors, 0 warnings in {folder}/annotations/train.json')
    edit(folder, 'train', drop_areas)
    edit(folder, 'val', lambda c: c['annotations'][0].update(bbox=[1, 2]))
    status, said = run(capsys, config)
    assert status == 2 and 'error    ' in said and 'filled   ' in said and '1 errors, 0 warnings' in said
    assert not (folder / 'work').exists()


def test_the_tool_decodes_images_if_asked(config, folder, capsys):
    path = folder / 'val/val03.png'
    path.write_bytes(path.read_bytes()[:60])
    assert run(capsys, config)[0] == 0
    status, said = run(capsys, config, '--full')
    assert status == 2 and 'val03.png cannot be decoded' in said


def test_the_tool_lists_weights_that_cannot_be_used_beside_the_rest(config, folder, tmp_path, capsys):
    edit(folder, 'val', lambda c: c['annotations'][0].update(bbox=[1, 2]))
    (tmp_path / 'a.pth').write_text('<html>')
    for arguments in ([tmp_path / 'a.pth'], ['--cfg-options', f'load_from={tmp_path / "a.pth"}']):
        status, said = run(capsys, config, *arguments)
        assert status == 2 and str(tmp_path / 'a.pth') in said and 'bbox like' in said and '2 errors' in said


def test_copies_of_a_check_are_called_by_their_names(tmp_path, capsys):
    content = small.content(prefix='train')
    folder = small.write(tmp_path / 'all', content, content)
    (folder / 'annotations/val.json').unlink()
    (folder / 'annotations/train.json').rename(folder / 'annotations.json')
    path = tmp_path / 'small.py'
    small.config(folder).dump(path)
    check.main([str(path), '--data-root', str(folder), '--val-fraction', '0.5'])
    said = capsys.readouterr().out
    assert 'the run reads annotations-train-' in said and ' warnings in annotations-train-' in said
