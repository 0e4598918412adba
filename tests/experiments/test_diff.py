"""``compare diff``: what two models have found on one validation set, counted, said and drawn."""

import json
import re

import pytest

from helpers import tiny, tiny_cls
from helpers.commands import fails
from helpers.untrained import write_run
from mmdet_norms.cli import compare as command
from mmdet_norms.experiments import diff, diff_page
from mmdet_norms.experiments.bootstrap import Outcome
from mmdet_norms.experiments.detections import open_run


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Detectors of two norms, and classifiers of two seeds."""
    folder = tmp_path_factory.mktemp('runs')
    config = tiny.write_config(folder)
    write_run(folder / 'bn', config)
    write_run(folder / 'gn', config, seed=1, model__backbone__norm_cfg=dict(type='GN', num_groups=4))
    (folder / 'cls').mkdir()
    for seed in (0, 1):
        write_run(folder / f'cls{seed}', tiny_cls.write_config(folder / 'cls'), seed)
    return folder


@pytest.fixture
def runs(folder):
    return [open_run(folder / name) for name in ('bn', 'gn')]


def truth(folder, *, leave_out=(), score=0.9):
    """The annotations as detections, but those of some (image, category)."""
    content = json.loads((folder / 'data' / 'annotations.json').read_text())
    return [
        dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=score)
        for a in content['annotations']
        if not a['iscrowd'] and (a['image_id'], a['category_id']) not in leave_out
    ]


@pytest.fixture
def compared(folder, runs, monkeypatch):
    """A finds no box in images 1 and 2 and has a false disc in 4; B finds no disc in image 3."""

    monkeypatch.setattr('mmdet_norms.experiments.bootstrap.FEW_IMAGES', 1)

    def of(samples=200, **options):
        false = dict(image_id=4, category_id=1, bbox=[0, 0, 9, 9], score=0.95)
        found = {
            runs[0].path: [*truth(folder, leave_out={(1, 2), (2, 2)}), false],
            runs[1].path: truth(folder, leave_out={(3, 1)}, score=0.4),
        }
        for run in runs:
            run.cfg.val_evaluator.metric = 'bbox'
        for module in (diff, diff_page):
            monkeypatch.setattr(module, 'detections', lambda run, images=None: found[run.path])
        return diff.compare(*runs, samples, **options)

    return of


def test_objects_and_images_are_counted(compared):
    content = compared()
    json.dumps(content)
    assert content['images'] == 4 and (content['a']['score_thr'], content['b']['score_thr']) == (0.9, 0.4)
    disc, box = content['classes']
    common = dict(objects=3, found_a=3, found_b=2, only_a=1, only_b=0)
    assert disc == dict(name='disc', **common, false_a=1, false_b=0)
    assert box == dict(name='box', objects=3, found_a=1, found_b=3, only_a=0, only_b=2, false_a=0, false_b=0)
    changes = [(c['image'], c['gain'], c['gained'], c['lost']) for c in content['changes']]
    assert changes == [(1, 1, ['box'], []), (2, 1, ['box'], []), (4, 1, [], []), (3, -1, [], ['disc'])]
    assert content['counts'] == dict(better=3, worse=1, same=0)
    overall = content['kinds']['bbox']['overall']
    # recall of the discs in B is two thirds, of the boxes in A one third; the false disc is the surest
    assert overall['AP']['b'] == pytest.approx((67 / 101 + 1) / 2)
    assert overall['AP']['a'] == pytest.approx((3 / 4 + 34 / 101) / 2)
    assert overall['APl'] == dict.fromkeys(('a', 'b', 'difference', 'low', 'high', 'p'))


def test_a_score_may_be_asked_for(compared):
    content = compared(score_thr=0.92)
    assert [entry['found_a'] + entry['found_b'] for entry in content['classes']] == [0, 0]
    assert content['classes'][0]['false_a'] == 1 and len(content['changes']) == 1


def test_the_same_seed_gives_the_same_page(compared, runs, tmp_path):
    for name in ('one', 'two'):
        diff_page.write(compared(), runs, tmp_path / name, 4)
    for file in ('diff.html', 'diff.md', 'diff.json'):
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()
    other = compared(seed=1)['kinds']['bbox']['overall']['AP']
    assert other['low'] != compared()['kinds']['bbox']['overall']['AP']['low']


def test_the_best_score_is_that_of_the_best_f1():
    def outcome(found, false):
        return Outcome(1, 1, (1, 2, 3), dict(enumerate(found)), tuple(false))

    assert diff.best_threshold([outcome([0.9, 0.5, 0.2], [0.6, 0.3, 0.25, 0.22])]) == 0.5
    assert diff.best_threshold([outcome([0.9, 0.5], [0.5, 0.5, 0.5, 0.5])]) == 0.9  # equal ones count together
    assert diff.best_threshold([outcome([], [0.9])]) == diff.best_threshold([]) == 0.5


@pytest.mark.parametrize(
    'low, high, said',
    [
        (-0.009, 0.017, 'no difference seen: +0.4, 95 % interval -0.9 to 1.7, 200 images (50.0 and 50.4)'),
        (0.001, 0.017, 'B[/b] is better than A: +0.4'),
        (-0.017, -0.001, 'B[/b] is worse than A: +0.4'),
        (None, None, '+0.4 (50.0 and 50.4), no interval'),
    ],
)
def test_what_is_within_noise_is_said_so(low, high, said):
    found = dict(a=0.5, b=0.504, difference=0.004, low=low, high=high, p=0.5)
    content = dict(a=dict(name='A'), b=dict(name='B[/b]'), images=200, kinds=dict(bbox=dict(overall=dict(AP=found))))
    assert diff_page.sentences(content)[0].startswith(f'AP of boxes: {said}')


@pytest.mark.parametrize('pair', [('bn', 'gn'), ('cls0', 'cls1')])
def test_the_command_writes_a_page_that_needs_nothing_else(folder, tmp_path, pair, capsys):
    out = tmp_path / 'out'
    for _ in range(2):  # what it wrote it may write again
        command.main(['diff', *(str(folder / name) for name in pair), '--out', str(out), '--threads', '1'])
    printed = capsys.readouterr().out
    assert ('top-1: ' if pair[0] == 'cls0' else 'AP of masks: ') in printed and 'diff.html' in printed
    page, text = (out / 'diff.html').read_text(), (out / 'diff.md').read_text()
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) <= {'data:'} and 'http://' not in page
    assert "default-src 'none'" in page and page.count('<img') == page.count('src="data:image/jpeg;base64,')
    content = json.loads((out / 'diff.json').read_text())
    shown = [change for change in content['changes'] if change['gain']]
    assert page.count('<figure>') == len(shown) and sum(content['counts'].values()) == content['images']
    assert all(name in page and name in text for name in pair)
    assert 'no interval: too few images' in printed and ' to ' not in re.search(r'\| (AP|top-1) \|.*', text)[0]


def changed(folder, tmp_path, change):
    """A run whose annotation file is another one."""
    tiny.write_config(tmp_path)
    path = tmp_path / 'data' / 'annotations.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return write_run(tmp_path / 'other', tmp_path / 'tiny.py', seed=2)


def rename(content):
    content['images'][0]['file_name'] = '003.png'


def move(content):
    content['annotations'][0]['bbox'][0] += 4


@pytest.mark.parametrize('change, said', [(rename, 'different data'), (move, 'different annotations: 2 objects')])
def test_other_data_are_refused(folder, tmp_path, capsys, change, said):
    other = changed(folder, tmp_path, change)
    assert said in fails(capsys, command.main, 'diff', folder / 'bn', other, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out' / 'diff.json').exists()


@pytest.mark.parametrize(
    'options, said',
    [
        (['bn', 'bn/epoch_1.pth'], 'both runs are'),
        (['bn', 'cls0'], 'is the run of an image classifier'),
        (['bn', 'gone'], 'there is no run'),
        (['bn', 'gn', '--samples', '9'], '--samples 9'),
        (['bn', 'gn', '--num', '-1'], '--num -1'),
        (['bn', 'gn', '--score-thr', '2'], '--score-thr 2'),
        (['cls0', 'cls1', '--score-thr', '0.5'], '--score-thr 0.5: these are image classifiers'),
    ],
)
def test_what_cannot_be_compared_is_one_message(folder, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(folder)
    assert said in fails(capsys, command.main, 'diff', *options, '--out', tmp_path / 'out')


def test_by_another_metric_nothing_is_compared(runs):
    runs[1].cfg.val_evaluator = dict(type='VOCMetric')
    with pytest.raises(diff.UserError, match=r'val_evaluator of .* is VOCMetric'):
        diff.compare(*runs, 100)


def test_files_of_others_stay(folder, tmp_path, capsys):
    (tmp_path / 'diff.md').write_text('mine')
    said = fails(capsys, command.main, 'diff', folder / 'bn', folder / 'gn', '--out', tmp_path)
    assert 'holds a diff.md that this command did not write' in said and (tmp_path / 'diff.md').read_text() == 'mine'
