"""What a run's model finds on its validation set: computed once, of the run's own data."""

import json

import pytest

from helpers import tiny, tiny_cls
from helpers.untrained import write_run
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import detections as module
from mmdet_norms.experiments.detections import config_file, detections, open_run, predictions, side_by_side


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two detectors and a classifier, each with its data."""
    folder = tmp_path_factory.mktemp('runs')
    config = tiny.write_config(folder)
    write_run(folder / 'a', config)
    write_run(folder / 'b', config, seed=1, model__backbone__norm_cfg=dict(type='GN', num_groups=4))
    (folder / 'cls').mkdir()
    write_run(folder / 'c', tiny_cls.write_config(folder / 'cls'))
    return folder


@pytest.fixture
def computed(monkeypatch):
    """Of which images something is computed, call by call."""
    calls, answers = [], module.answers
    monkeypatch.setattr(module, 'answers', lambda run, images: calls.append(images) or answers(run, images))
    return calls


def test_detections_are_computed_once_until_the_checkpoint_is_another(folder, computed, tmp_path):
    run = write_run(tmp_path / 'run', folder / 'tiny.py')
    some = detections(run, [2, 3])
    found = detections(run)
    assert {entry['image_id'] for entry in some} == {2, 3} and {entry['image_id'] for entry in found} == {1, 2, 3, 4}
    assert {'image_id', 'category_id', 'bbox', 'score', 'segmentation'} == set(found[0])
    assert detections(run) == found and detections(run, [1]) and computed == [[2, 3], None]
    assert len(list((run / 'detections').iterdir())) == 1  # the whole has the part
    write_run(run, folder / 'tiny.py', seed=3)
    assert detections(run) != found and computed == [[2, 3], None, None]
    assert len(list((run / 'detections').iterdir())) == 1  # what is outdated is gone


def test_a_run_whose_own_module_is_not_found_is_one_message(folder, tmp_path):
    run = write_run(tmp_path / 'run', folder / 'tiny.py')
    with open(config_file(run), 'a') as config:
        config.write("\ncustom_imports = dict(imports=['mmdet_norms', 'norm_of_mine_c'])\n")
    with pytest.raises(UserError, match=r'custom_imports: there is no module norm_of_mine_c; .*PYTHONPATH'):
        open_run(run)


def test_predictions_of_a_classifier(folder, computed):
    found = predictions(folder / 'c')
    assert predictions(folder / 'c') == found and computed == [None] and len(found) == 12
    assert {entry['gt_label'] for entry in found} == {0, 1, 2} and all(0 < entry['pred_score'] <= 1 for entry in found)
    with pytest.raises(UserError, match='is an image classifier'):
        detections(folder / 'c')
    with pytest.raises(UserError, match='is no image classifier'):
        predictions(folder / 'a')


def test_runs_stand_side_by_side(folder):
    picture = side_by_side([folder / 'a', folder / 'b'], number=2, score_thr=0.0)
    assert picture.shape[2] == 3 and picture.shape[1] > 3 * 288 and picture.shape[0] > 2 * 288
    # three panels in a row, and none is like another
    left, middle, right = (picture[60:300, 20 + 296 * k : 290 + 296 * k] for k in range(3))
    assert (left != middle).any() and (middle != right).any()
    with pytest.raises(UserError, match='has no image 77; it has 1, 2, 3, 4'):
        side_by_side([folder / 'a'], [77])


def test_other_data_are_no_pair(folder, tmp_path):
    tiny.write_config(tmp_path)
    annotations = tmp_path / 'data' / 'annotations.json'
    content = json.loads(annotations.read_text())
    content['images'][1]['file_name'] = 'other.png'
    annotations.write_text(json.dumps(content))
    other = write_run(tmp_path / 'other', tmp_path / 'tiny.py')
    with pytest.raises(UserError, match=r'different data: 1 of 3 images of the one .* such as 001.png'):
        side_by_side([folder / 'a', other])


def test_the_config_is_that_of_the_training_not_of_a_later_test(folder, tmp_path):
    run = write_run(tmp_path / 'run', folder / 'tiny.py')
    later = run / '20260202_000000' / 'vis_data'
    later.mkdir(parents=True)
    (later / 'config.py').write_text('')
    (later / 'scalars.json').write_text('{"coco/bbox_mAP": 0.1, "step": 0}\n')
    assert config_file(run) == run / '20260101_000000' / 'vis_data' / 'config.py'


@pytest.mark.parametrize('fault', ['no folder', 'no run', 'no checkpoint', 'no data', 'no validation', 'no fit'])
def test_what_cannot_be_evaluated_is_one_message(folder, tmp_path, fault):
    run = tmp_path / 'run'
    if fault == 'no run':
        run.mkdir()
    elif fault != 'no folder':
        write_run(run, folder / 'tiny.py', **{'no validation': dict(val_dataloader=None)}.get(fault, {}))
    if fault == 'no checkpoint':
        (run / 'epoch_1.pth').unlink()
        (run / 'last_checkpoint').unlink()
    elif fault == 'no data':
        config = run / '20260101_000000' / 'vis_data' / 'config.py'
        config.write_text(config.read_text().replace('annotations.json', 'gone.json'))
    elif fault == 'no fit':
        (run / 'epoch_1.pth').write_bytes((folder / 'b' / 'epoch_1.pth').read_bytes())
    said = {
        'no folder': 'there is no run',
        'no run': 'is no work dir of',
        'no checkpoint': 'has no checkpoint',
        'no data': r'there is no annotation file .*gone\.json',
        'no validation': 'without validation',
        'no fit': 'does not fit the model of',
    }
    with pytest.raises(UserError, match=said[fault]):
        detections(run)
    assert not (run / 'detections').exists()


def test_a_checkpoint_names_its_run(folder):
    run = open_run(folder / 'a' / 'epoch_1.pth')
    assert (run.name, run.path, run.digest) == ('a/epoch_1.pth', folder / 'a', open_run(folder / 'a').digest)
