"""The commands, on an image classifier that trains in a second: right, or one clear error."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import mmdet
import pytest
import torch

import mmdet_norms  # noqa: F401
from helpers import tiny, tiny_cls, warm
from helpers.commands import run_tool_in_two
from mmdet_norms.classification.image_folder import images_of_entry
from mmdet_norms.cli import check, compare, convert_checkpoint, fuse, infer, picture_sheet, replay, test, train

SORTED = sorted(tiny_cls.CLASSES)  # labels


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a config and a work dir of two epochs."""
    folder = tmp_path_factory.mktemp('classifier')
    config = tiny_cls.write_config(folder)
    train.main([str(config), '--work-dir', str(folder / 'run'), '--seed', '0', '--threads', '1'])
    return folder


@pytest.fixture
def config(tmp_path):
    return tiny_cls.write_config(tmp_path)


@pytest.fixture
def fails(capsys):
    def run(main, *arguments):
        """Run a command that must end with status 2 and one message; return it."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.count('error: ') == 1
        return said[said.index('error: ') :]

    return run


def run(main, *arguments):
    main([str(argument) for argument in arguments])


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def accuracy(folder):
    return {key: value for key, value in results(folder).items() if key.startswith('accuracy')}


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save(path, state, **meta):
    torch.save(dict(state_dict=state, meta=meta), path)
    return path


# --------------------------------------------------------------------------------------------------- train, test, table


def test_training_leaves_accuracies_in_the_log_and_in_results_json(trained):
    found = results(trained / 'run')
    assert found['split'] == 'val' and found['epoch'] == 2
    assert set(accuracy(trained / 'run')) == {'accuracy/top1'} and 0 <= found['accuracy/top1'] <= 1  # of three classes
    log = next((trained / 'run').glob('*/*.log')).read_text()
    assert '| accuracy |' in log and 'top-1' in log and 'AP50' not in log
    meta = torch.load(trained / 'run' / 'epoch_2.pth', weights_only=False)['meta']
    assert list(meta['dataset_meta']['classes']) == SORTED


def test_testing_gives_the_same_and_writes_what_is_asked_for(trained):
    arguments = [trained / 'tiny_cls.py', trained / 'run' / 'epoch_2.pth', '--per-class']
    run(test.main, *arguments, '--work-dir', trained / 'tested', '--out', trained / 'out' / 'found.json')
    found = accuracy(trained / 'tested')
    assert found.pop('accuracy/top1') == accuracy(trained / 'run')['accuracy/top1']
    assert sorted(found) == sorted(f'accuracy/top1_{name}' for name in SORTED)
    assert 'accuracy per class\n' in next((trained / 'tested').glob('*/*.log')).read_text()
    entries = json.loads((trained / 'out' / 'found.json').read_text())
    assert len(entries) == 12 and {entry['gt_label'] for entry in entries} == {0, 1, 2}
    for entry in entries:
        assert entry['pred_class'] == SORTED[entry['pred_label']] and 1 / 3 <= entry['pred_score'] <= 1
        assert Path(entry['img_path']).parent.name == SORTED[entry['gt_label']]
    right = sum(entry['pred_label'] == entry['gt_label'] for entry in entries) / 12
    assert right == pytest.approx(results(trained / 'tested')['accuracy/top1'])
    run(test.main, *arguments, '--fuse', '--work-dir', trained / 'fused', '--out', trained / 'out' / 'found.pkl')
    assert accuracy(trained / 'fused') == accuracy(trained / 'tested')
    samples = pickle.loads((trained / 'out' / 'found.pkl').read_bytes())
    assert len(samples) == 12 and len(samples[0]['pred_score']) == 3
    run(fuse.main, *arguments[:2], trained / 'out' / 'fused.pth')
    run(test.main, trained / 'tiny_cls.py', trained / 'out' / 'fused.pth', '--work-dir', trained / 'as_saved')
    assert results(trained / 'as_saved')['accuracy/top1'] == results(trained / 'run')['accuracy/top1']


def test_another_file_is_not_replaced_by_predictions(trained, fails, tmp_path):
    (tmp_path / 'mine.json').write_text('[{"image_id": 1}]')
    arguments = [trained / 'tiny_cls.py', trained / 'run' / 'epoch_2.pth', '--work-dir', tmp_path / 'w']
    assert 'holds no predictions' in fails(test.main, *arguments, '--out', tmp_path / 'mine.json')


def test_comparing_puts_classifiers_into_a_table_of_their_own(trained, tmp_path, capsys):
    for name, content in {
        'detector': {'bbox_mAP': 0.5, 'split': 'val', 'epoch': 3},
        'other': {'accuracy/top1': 0.25, 'accuracy/top5': None, 'accuracy/top1_a,b': 0.5, 'split': 'val', 'epoch': 3},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(json.dumps(content))
    run(compare.main, tmp_path / 'detector', tmp_path / 'other', trained / 'run')
    boxes, classes = capsys.readouterr().out.split('accuracy of classifiers')
    assert 'detector' in boxes and 'other' not in boxes and 'bbox average precision' in boxes
    assert 'detector' not in classes and '0.250' in classes and 'top-5' in classes and 'other results' not in classes
    assert str(trained / 'run') in classes


def test_what_only_detectors_have_is_one_error(trained, fails, tmp_path):
    config, checkpoint = trained / 'tiny_cls.py', trained / 'run' / 'epoch_2.pth'
    with_checkpoint = [config, checkpoint, '--work-dir', tmp_path / 'w']
    assert 'whose metric is accuracy' in fails(test.main, *with_checkpoint, '--eval', 'bbox')
    assert '--out FILE.json' in fails(test.main, *with_checkpoint, '--show-dir', tmp_path / 'shown')
    is_for = 'is for detectors, and the model of .* is an image classifier'
    images = trained / 'data' / 'val'
    for said in (
        fails(infer.main, config, checkpoint, images, '--out', tmp_path / 'found'),
        fails(picture_sheet.main, config, tmp_path / 'found.json', '--out', tmp_path / 'sheet.png'),
    ):
        assert re.search(is_for, said)
    coco = tiny_cls.write_config(tmp_path, "val_evaluator = dict(_delete_=True, type='CocoMetric', metric='bbox')\n")
    assert "val_evaluator=dict(type='Accuracy')" in fails(train.main, coco, '--work-dir', tmp_path / 'w')
    detector = tiny.write_config(tmp_path / 'd', "val_evaluator = dict(_delete_=True, type='Accuracy')\n")
    assert 'is for image classifiers' in fails(train.main, detector, '--work-dir', tmp_path / 'w')
    assert "write 'an'" in fails(train.main, config, '--norm', 'an-gn-head', '--work-dir', tmp_path / 'w')


# ------------------------------------------------------------------------------------------------------------- options


def test_a_resumed_run_is_the_uninterrupted_one(trained, config, tmp_path):
    arguments = [config, '--work-dir', tmp_path / 'run', '--seed', '0', '--threads', '1']
    hooks = 'default_hooks.checkpoint.interval=1'
    run(train.main, *arguments, '--cfg-options', hooks)
    for path in (tmp_path / 'run').glob('*2.pth'):
        path.unlink()
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(tmp_path / 'run' / 'epoch_1.pth'))
    run(train.main, *arguments, '--resume', '--cfg-options', hooks)
    assert same(weights(tmp_path / 'run' / 'epoch_2.pth'), weights(trained / 'run' / 'epoch_2.pth'))


@pytest.mark.parametrize(
    'options',
    [
        ['--amp', '--lr', '0.001', '--seed', '3', '--deterministic'],
        ['--norm', 'mabn', '--on-nonfinite', 'skip', '--epochs', '1'],
        ['--norm', 'cbn', '--auto-scale-lr'],
        ['--norm', 'frozen', '--tune-mode'],
        ['--cfg-options', "custom_hooks=[dict(type='EMAHook')]", 'model.data_preprocessor.mixup=0.2'],
    ],
    ids=lambda options: options[1] if options[0] == '--norm' else options[0],
)
def test_the_options_of_training_work(config, tmp_path, options):
    if 'model.data_preprocessor.mixup=0.2' in options:
        options = [*options, 'model.data_preprocessor.num_classes=3']
    run(train.main, config, '--work-dir', tmp_path / 'run', '--threads', '1', *options)
    found = accuracy(tmp_path / 'run')['accuracy/top1']
    checkpoint = max((tmp_path / 'run').glob('epoch_*.pth'))
    norm = options[:2] if options[0] == '--norm' else []
    run(test.main, config, checkpoint, *norm, '--work-dir', tmp_path / 'tested', '--threads', '1')
    if '--amp' not in options:  # evaluates in the precision of training
        assert accuracy(tmp_path / 'tested')['accuracy/top1'] == found


def test_a_step_that_is_not_finite_is_computed_again(config, tmp_path, fails, capsys):
    options = ['--cfg-options', 'optim_wrapper.optimizer.lr=1e30', 'optim_wrapper.clip_grad=None']
    said = fails(train.main, config, '--work-dir', tmp_path / 'run', '--threads', '1', *options)
    (file,) = (tmp_path / 'run' / 'nonfinite').glob('*.pth')
    assert str(file) in said
    run(replay.main, tmp_path / 'run' / 'tiny_cls.py', file, '--threads', '1')
    assert f'image {tmp_path}/data/train/' in capsys.readouterr().out


@pytest.mark.slow
def test_every_image_counts_once_with_two_processes(tmp_path):
    config = tiny_cls.write_config(tmp_path)
    (tmp_path / 'data' / 'val' / 'box' / '0.png').unlink()  # 11 images: one is shown twice
    arguments = ['--epochs', '1', '--norm', 'syncbn']
    run_tool_in_two('train', config, '--work-dir', tmp_path / 'run', *arguments)
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    out = tmp_path / 'found.json'
    run_tool_in_two('test', config, checkpoint, '--norm', 'syncbn', '--work-dir', tmp_path / 'two', '--out', out)
    run(test.main, config, checkpoint, '--norm', 'syncbn', '--work-dir', tmp_path / 'one', '--threads', '1')
    assert len(json.loads(out.read_text())) == 11
    assert accuracy(tmp_path / 'run') == accuracy(tmp_path / 'two') == accuracy(tmp_path / 'one')


@pytest.mark.slow
def test_mmdets_own_tools_run_the_dumped_config(trained, tmp_path):
    tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    command = [sys.executable, '-m', 'mmdet_norms', tools / 'test.py', trained / 'run' / 'tiny_cls.py']
    command += [trained / 'run' / 'epoch_2.pth', '--work-dir', tmp_path / 'w']
    done = warm.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert accuracy(tmp_path / 'w') == accuracy(trained / 'run')


# ---------------------------------------------------------------------------------------------------------------- data


def trained_on(config, folder, *options):
    """The config as training would read it."""
    return train.train_config(train.parse_args([str(config), '--work-dir', str(folder / 'w'), *map(str, options)]))


def test_another_folder_brings_its_classes(config, tmp_path, capsys):
    root = tiny_cls.write_folders(tmp_path / 'mine', ('training', 'valid'), ('a', 'b', 'c', 'd'))
    tiny_cls.write_folders(root, ('test',), ('a', 'b', 'c', 'd'), per_class=1)
    cfg = trained_on(config, tmp_path, '--data-root', root)
    assert cfg.model.head.num_classes == 4
    split = {name: cfg[f'{name}_dataloader'].dataset.split for name in ('train', 'val', 'test')}
    assert split == dict(train='training', val='valid', test='test')
    said = capsys.readouterr().out
    assert 'classes: 4 (a, b, c, d)' in said and 'the folder training/ (the config says train/)' in said
    run(train.main, config, '--data-root', root, '--work-dir', tmp_path / 'run', '--epochs', '1')
    assert 'accuracy/top1' in results(tmp_path / 'run')


def test_val_fraction_holds_back_a_part_of_every_class(config, tmp_path):
    names = ('10 cats', 'dog')
    root = tiny_cls.write_folders(tmp_path / 'mine', ('train',), names)
    flat = shutil.copytree(root / 'train', tmp_path / 'flat')
    for folder in (root, flat):
        work_dir = tmp_path / f'run-{folder.name}'
        options = ['--data-root', folder, '--val-fraction', '0.25', '--epochs', '1']
        run(train.main, config, '--work-dir', work_dir, *options)
        lists = {path.name.split('-')[1]: path for path in work_dir.rglob('images-*.txt')}
        lines = {part: path.read_text().splitlines() for part, path in lists.items()}
        assert len(lines['train']) == 6 and len(lines['val']) == 2
        assert not set(lines['train']) & set(lines['val'])
        assert sorted(line.rsplit(' ', 1)[1] for line in lines['val']) == ['0', '1']
    again = trained_on(config, tmp_path, '--data-root', root, '--val-fraction', '0.25')
    assert Path(again.val_dataloader.dataset.ann_file).name == lists['val'].name
    assert again.model.head.num_classes == 2


def test_names_that_are_no_utf_8_are_held_back_as_they_are(config, tmp_path):
    root = tiny_cls.write_folders(tmp_path / 'mine', ('train',), ('a', 'b'))
    os.rename(root / 'train' / 'a', os.fsencode(root / 'train') + b'/\xe9t\xe9')
    os.rename(root / 'train' / 'b' / '0.png', os.fsencode(root / 'train' / 'b') + b'/\xff.png')
    cfg = trained_on(config, tmp_path, '--data-root', root, '--val-fraction', '0.5')
    read = [images_of_entry(cfg[f'{split}_dataloader'].dataset) for split in ('train', 'val')]
    assert sorted([*read[0], *read[1]]) == sorted(map(str, root.rglob('*.png')))


def test_one_class_is_none(config, tmp_path, fails):
    root = tiny_cls.write_folders(tmp_path / 'mine', classes=('cat',))
    said = fails(train.main, config, '--work-dir', tmp_path / 'w', '--data-root', root)
    assert "the data have one class, 'cat'" in said and 'at least two classes' in said


@pytest.mark.parametrize(
    'splits, options, said',
    [
        (('train', 'val'), ['--val-fraction', '0.2'], 'there is a split to validate with'),
        (('train',), [], 'val: none of val/, valid/, validation/, test/ in .* holds folders of classes'),
        (('train',), ['--val-fraction', '2'], 'must be between 0 and 1'),
        (('.',), [], 'holds folders of classes .*--val-fraction 0.2'),
    ],
)
def test_a_folder_without_a_split_is_one_error(config, tmp_path, fails, splits, options, said):
    root = tiny_cls.write_folders(tmp_path / 'mine', splits)
    found = fails(train.main, config, '--work-dir', tmp_path / 'w', '--data-root', root, *options)
    assert re.search(said, found)


def test_of_a_flat_folder_the_list_of_labels_is_asked_for(config, tmp_path, fails):
    root = tiny_cls.write_folders(tmp_path / 'mine')
    shutil.move(root / 'val' / 'disc', tmp_path / 'flat')
    shutil.rmtree(root / 'val')
    shutil.move(tmp_path / 'flat', root / 'val')
    found = fails(train.main, config, '--work-dir', tmp_path / 'w', '--data-root', root)
    assert 'for a flat val/ give its list of lines NAME LABEL: --cfg-options val_dataloader.dataset.ann_file=' in found


def test_faults_of_the_data_are_said_before_a_run(config, tmp_path, fails, capsys, monkeypatch):
    data, work_dir = tmp_path / 'data', ['--work-dir', tmp_path / 'w']
    (data / 'train' / 'empty').mkdir()
    assert "in 'empty' of" in fails(train.main, config, *work_dir)
    (data / 'train' / 'empty').rmdir()
    (data / 'val' / 'disc').rename(data / 'val' / 'plate')
    said = fails(train.main, config, *work_dir)
    assert "'plate'" in said and 'is no class of train/' in said
    (data / 'val' / 'plate').rename(data / 'val' / 'disc')
    said = fails(train.main, config, *work_dir, '--cfg-options', 'model.head.num_classes=2')
    assert 'model.head.num_classes: is 2, but the data have 3 classes. Set it to 3' in said
    options = ['model.data_preprocessor.mixup=0.2', 'model.data_preprocessor.num_classes=4']
    assert 'model.data_preprocessor.num_classes: is 4' in fails(
        train.main, config, *work_dir, '--cfg-options', *options
    )
    capsys.readouterr()
    run(check.main, config)
    assert '0 errors, 0 warnings in ' in capsys.readouterr().out
    (data / 'val' / 'disc' / '1.png').write_bytes(b'no image')
    with pytest.raises(SystemExit):
        run(check.main, config, '--full')
    assert f'{data}/val/disc/1.png: ' in capsys.readouterr().out
    shutil.rmtree(data)
    assert 'there is no such folder' in fails(train.main, config, *work_dir)
    demo = tiny_cls.CONFIGS / 'demo' / 'resnet50_bnet5_shapes-cls.py'
    monkeypatch.chdir(tmp_path)
    said = fails(train.main, demo, *work_dir)
    assert '--classification generates it' in said and 'Or give another folder with --data-root DIR' in said


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_that_do_not_fit_are_one_error_with_advice(trained, fails, tmp_path):
    config, state = trained / 'tiny_cls.py', weights(trained / 'run' / 'epoch_2.pth')
    work_dir = ['--work-dir', tmp_path / 'w']
    twice = {key: torch.cat([value, value]) for key, value in state.items() if key.startswith('head.')}
    more = save(tmp_path / 'more.pth', {**state, **twice}, dataset_meta=dict(classes=tuple('abcdef')))
    said = fails(test.main, config, more, *work_dir)
    assert 'head.fc.weight: (6, 64) in the checkpoint, (3, 64) in the model' in said
    assert 'trained for 6 classes (a, b, c, d, ...), the config is for 3 (box, disc, ring)' in said

    other = save(tmp_path / 'order.pth', state, dataset_meta=dict(classes=('ring', 'box', 'disc')))
    assert 'so that ring would get another name' in fails(test.main, config, other, *work_dir)

    said = fails(test.main, config, trained / 'run' / 'epoch_2.pth', *work_dir, '--norm', 'bn')
    assert 'It would fit without --norm bn or with --norm bnet5' in said

    backbone = {key: value for key, value in state.items() if key.startswith('backbone.')}
    detector = save(tmp_path / 'detector.pth', {**backbone, 'neck.a.weight': torch.zeros(1)})
    said = fails(test.main, config, detector, *work_dir)
    assert 'It is the checkpoint of a detector' in said and "prefix='backbone.')" in said


def test_a_classifiers_checkpoint_given_to_a_detector_is_one_error_with_advice(trained, fails, tmp_path):
    config = tiny.write_config(tmp_path)
    said = fails(test.main, config, trained / 'run' / 'epoch_2.pth', '--work-dir', tmp_path / 'w')
    assert 'It is the checkpoint of an image classifier' in said and "prefix='backbone.')" in said


def test_a_published_file_is_converted_for_a_classifier(trained, fails, tmp_path, capsys):
    config, wide = trained / 'tiny_cls.py', ['--cfg-options', 'model.backbone.depth=50', 'model.head.in_channels=256']
    run(train.main, config, '--work-dir', tmp_path / 'run', '--epochs', '1', *wide)
    made = tmp_path / 'run' / 'epoch_1.pth'
    state = weights(made)
    published = {key.removeprefix('backbone.').removeprefix('head.'): value for key, value in state.items()}
    path = tmp_path / 'R50_BNET-5.pth'
    torch.save(dict(state_dict={f'module.{key}': value for key, value in published.items()}), path)
    said = fails(test.main, config, path, '--work-dir', tmp_path / 'w', *wide)
    assert f'{path} NEW.pth --from bnet --config CONFIG makes it a checkpoint of the classifier' in said
    target = tiny_cls.write_config(tmp_path)
    text = target.read_text().replace('depth=18', 'depth=50').replace('in_channels=64', 'in_channels=256')
    target.write_text(text)
    new = tmp_path / 'new.pth'
    run(convert_checkpoint.main, path, new, '--from', 'bnet', '--config', target)
    assert "classifier, layout 'bnet'" in capsys.readouterr().out
    assert same(weights(new), state)
    del published['fc.bias']
    torch.save(dict(state_dict=published), path)
    said = fails(convert_checkpoint.main, path, tmp_path / 'less.pth', '--from', 'bnet', '--config', target)
    assert 'does not fit model of the config' in said and 'head.fc.bias' in said
