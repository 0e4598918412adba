"""What is read of work dirs: of cells, of single runs, of resumed, killed, damaged and foreign ones."""

import json

import pytest

from helpers.work_dirs import coco, dump, top_k, write_run
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import runs

BN = coco('bbox', 0.3) | coco('segm', 0.25)


def test_a_cell_is_what_its_labels_say(tmp_path):
    labels = dict(norm='mabn', batch_size=4, seed=2, rho=0.5)
    write_run(tmp_path / 'grid' / 'cell', BN, labels, cost=dict(seconds_per_iteration=0.5))
    (run,), grids = runs.find([tmp_path])
    assert (run.labels, run.status, run.iterations, grids) == (labels, 'finished', 100, [])
    assert run.results == BN and run.of == 'val, iter 100' and run.cost == {'seconds_per_iteration': 0.5}
    assert run.curves['bbox_mAP'][0] == (25, pytest.approx(0.075)) and run.curves['bbox_mAP'][-1] == (100, 0.3)
    assert run.curves['loss'][0][0] == 10


def test_labels_of_a_run_outside_of_a_grid_are_those_of_its_config(tmp_path):
    run = write_run(tmp_path / 'one', BN, norm="dict(type='BNET', kernel_size=5)", batch_size=4, seed=7)
    (run / '20260101_000000' / 'x.log').write_text('    GPU number: 2\n')
    ((found,), _) = runs.find([run])
    assert found.labels == dict(norm='bnet5', batch_size=8, seed=7)
    assert found.cost['images_per_second'] == pytest.approx(80)


@pytest.mark.parametrize(
    ('norm_cfg', 'name'),
    [
        ([dict(type='AN', k=10), dict(type='AN', k=20)], 'an'),
        (dict(type='mmcv.SyncBN'), 'syncbn'),
        (dict(type='BN'), 'bn'),
        (dict(last=dict(type='BNET', kernel_size=7)), 'bnet7'),
        (None, ''),
    ],
)
def test_norms_of_a_model(norm_cfg, name):
    assert runs.norm_of(dict(backbone=dict(norm_cfg=norm_cfg, stem=[dict(norm_at=norm_cfg)]))) == name
    assert runs.norm_of(dict(backbone=dict(norm_cfg=dict(type='BN')), neck=dict(norm_cfg=dict(type='GN')))) == 'gn'


def test_a_resumed_run_is_one_curve_and_one_over_another_only_the_last(tmp_path):
    run = write_run(tmp_path / 'run', BN)

    def part(name, *steps):
        lines = [json.dumps(dict(loss=9.0, step=step)) for step in steps]
        path = run / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join([*lines, '{"loss": 1.0, "st']))  # as a killed process leaves it

    part('20260102_000000', 60, 70, 100)
    loss = dict(runs.read(run).curves['loss'])
    assert sorted(loss) == [10, 20, 30, 40, 50, 60, 70, 100] and loss[60] == loss[100] == 9.0 != loss[50]
    part('20260103_000000', 10, 20)
    assert runs.read(run).curves['loss'] == [(10, 9.0), (20, 9.0)]
    part('20260104_000000', 50, 100)  # which logs at other iterations, so that only its config tells
    (run / '20260104_000000' / 'vis_data' / 'config.py').write_text('resume = False\n')
    assert runs.read(run).curves['loss'] == [(50, 9.0), (100, 9.0)]


def test_epochs_become_iterations(tmp_path):
    run = tmp_path / 'run'
    lines = []
    for epoch in (1, 2, 3):
        lines += [dict(loss=1.0, step=40 * epoch - 10), dict(step=epoch, **top_k(0.2 * epoch))]
    path = run / '20260101_000000' / 'vis_data' / 'scalars.json'
    dump(path, {})
    path.write_text('\n'.join(map(json.dumps, lines)))
    dump(run / 'results.json', top_k(0.6) | dict(split='val', epoch=3, iter=120))
    assert [at for at, _ in runs.read(run).curves['accuracy/top1']] == [40, 80, 120]


def test_a_test_afterwards_does_not_replace_the_validation(tmp_path):
    run = write_run(tmp_path / 'run', BN)
    (run / 'results.json').rename(run / 'results-val-iter_100.json')
    dump(run / 'results.json', coco('bbox', 0.9) | dict(split='test', checkpoint='other.pth'))
    found = runs.read(run)
    assert found.results['bbox_mAP'] == 0.3 and found.of == 'val, iter 100'
    (run / 'results-val-iter_100.json').unlink()
    assert runs.read(run).of == 'test, other.pth'


def test_status_of_cells(tmp_path):
    write_run(tmp_path / 'done', BN, dict(norm='bn', batch_size=2, seed=0))
    write_run(tmp_path / 'killed', BN, dict(norm='bn', batch_size=2, seed=1), finished=False)
    write_run(tmp_path / 'broken', BN, dict(norm='bn', batch_size=2, seed=2))
    (tmp_path / 'broken' / 'results.json').write_text('{"bbox')
    cells = [
        dict(name='done', status='running'),  # the grid was killed before it noted the end
        dict(name='planted', labels=dict(norm='gn', batch_size=2, seed=0), status='failed', error='no', log='o.txt'),
        dict(name='later', labels=dict(norm='gn', batch_size=2, seed=1), status='waiting'),
    ]
    dump(tmp_path / 'grid.json', dict(command='compare run', cells=cells))
    found, (grid,) = runs.find([tmp_path, tmp_path / 'done'])
    by_name = {run.folder.rpartition('/')[2]: run for run in found}
    assert {name: run.status for name, run in by_name.items()} == dict(
        done='finished', planted='failed', later='waiting', broken='failed', killed='unfinished'
    )
    assert by_name['planted'].error == 'no' and by_name['planted'].labels['norm'] == 'gn'
    assert by_name['planted'].log == str(tmp_path / 'o.txt')
    assert 'cannot be read' in by_name['broken'].error and grid['command'] == 'compare run'
    assert by_name['killed'].results['bbox_mAP'] == 0.3  # of the log; it is not counted as finished


def test_a_run_of_mmdets_own_tool(tmp_path):
    run = write_run(tmp_path / 'run', BN, finished=False)
    assert runs.read(run).status == 'finished'
    (run / '20260101_000000' / 'vis_data' / 'config.py').unlink()
    assert runs.read(run).status == 'unfinished'


def test_what_is_alike_is_told_apart(tmp_path):
    for name, config in (('a', 'one.py'), ('b', 'two.py')):
        write_run(tmp_path / name, BN, config=config)
    assert [run.labels['config'] for run in runs.find([tmp_path])[0]] == ['one', 'two']
    write_run(tmp_path / 'c', BN, config='one.py')
    assert [run.labels.get('run') for run in runs.find([tmp_path])[0]] == ['a', None, 'c']


def test_a_config_is_read_and_not_run(tmp_path):
    run = write_run(tmp_path / 'run', BN)
    config = run / '20260101_000000' / 'vis_data' / 'config.py'
    config.write_text("model = dict(a=[dict(type='GN', c={'x.y': (1, -2.5)})], b=None)\n")
    assert runs.read(run).cfg == dict(model=dict(a=[dict(type='GN', c={'x.y': [1, -2.5]})], b=None))
    config.write_text(f'import pathlib\nx = pathlib.Path({str(tmp_path / "made")!r}).mkdir()\n')
    assert runs.read(run).labels['norm'] == 'unknown' and not (tmp_path / 'made').exists()


def test_the_config_is_that_of_the_training_not_of_a_later_test(tmp_path):
    run = write_run(tmp_path / 'run', BN)
    later = run / '20260202_000000' / 'vis_data'
    dump(later / 'scalars.json', {'coco/bbox_mAP': 0.1, 'step': 0})
    (later / 'config.py').write_text("model = dict(norm_cfg=dict(type='GN'))\n")
    assert runs.read(run).labels['norm'] == 'bn'


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        runs.find([tmp_path])
    with pytest.raises(UserError, match='does not exist'):
        runs.find([tmp_path / 'nowhere'])
