"""``tools/reproduce.sh``: every command that it gives, up to the trainings themselves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_norms.cli import compare_run, shapes

ROOT = Path(__file__).resolve().parents[2]
RECORD = """#!{python}
import json, os, sys
with open({calls!r}, 'a') as file:
    print(json.dumps(sys.argv[1:]), file=file)
sys.exit('compare.py' in sys.argv[1] and os.environ.get('FAILS', '-') in sys.argv)
"""


def commands(folder, *arguments, **env):
    """The exit status, and what python was started with, for each time: script, arguments."""
    calls = folder / 'calls'
    recorder = folder / 'python'
    recorder.write_text(RECORD.format(python=sys.executable, calls=str(calls)))
    recorder.chmod(0o755)
    status = subprocess.run(
        ['bash', ROOT / 'tools' / 'reproduce.sh', *arguments],
        cwd=folder,
        env={**os.environ, 'PYTHON': str(recorder), **env},
        capture_output=True,
        text=True,
    ).returncode
    lines = calls.read_text().splitlines() if calls.exists() else []
    return status, [(Path(script).name, given) for script, *given in map(json.loads, lines)]


@pytest.fixture(scope='module', params=['cpu', 'gpu'])
def preset(request, tmp_path_factory):
    """A folder with a few images of the preset's kind, and the commands."""
    folder = tmp_path_factory.mktemp(request.param)
    status, found = commands(folder, request.param)
    assert status == 0
    for script, given in found:
        if script == 'make_shapes.py':
            shapes.main([*given, '--train', '6', '--val', '6', '--out', str(folder / given[given.index('--out') + 1])])
    return folder, found


def grids(found):
    """The arguments of each `compare run`, with the config where it is."""
    given = [given[1:] for script, given in found if script == 'compare.py' and given[0] == 'run']
    return [[str(ROOT / config), *rest] for config, *rest in given]


def test_the_trainings_are_those_that_the_page_tells(preset, monkeypatch):
    folder, found = preset
    monkeypatch.chdir(folder)
    finished, sizes = set(), []
    for given in grids(found):
        args = compare_run.parse_args(given)
        cells = list(compare_run._comparison(args).cells())
        sizes.append(len(cells))
        plain = Config.fromfile(args.config).model.backbone.get('init_cfg', {}).get('checkpoint')
        for cell in cells:
            named = [option.partition('=')[2] for option in cell.options if 'init_cfg.checkpoint=' in option]
            assert args.out.endswith('pretrain') or (named or [plain])[0] in finished
            finished.add(f'{args.out}/{cell.name}/epoch_7.pth')
        for file in map(Path, finished):  # as if it had been trained, for the next grid
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    batches = 2 if folder.name.startswith('cpu') else 5
    assert sizes == [15, 9 * batches, 15, 6 * batches, 6, 9]
    reported = [given for script, given in found if script == 'compare.py' and given[0] == 'report']
    assert {given[1] for given in reported} == {compare_run.parse_args(given).out for given in grids(found)}


def test_the_norms_are_where_the_page_says(preset):
    _, found = preset
    heads, everywhere = (Config.fromfile(grids(found)[number][0]) for number in (1, 3))
    for cfg in (heads, everywhere):
        assert cfg.model.neck.norm_cfg.type == cfg.model.roi_head.bbox_head.norm_cfg.type == 'BN'
        assert cfg.model.roi_head.bbox_head.num_classes == len(cfg.metainfo['classes'])
    assert heads.model.backbone.norm_eval and heads.model.backbone.frozen_stages == 1
    assert not everywhere.model.backbone.norm_eval and everywhere.model.backbone.frozen_stages == -1
    said = ' '.join(grids(found)[2])
    for name, options in {'naive': ['rho=0'], 'naive-window15': ['buffer_num=15', 'rho=0']}.items():
        keys = [f'model.{part}.norm_cfg.{key}' for key in options for part in ('neck', 'roi_head.bbox_head')]
        assert f'--variant {name}=cbn {" ".join(keys)}' in said


def test_a_grid_that_failed_does_not_stop_the_others(tmp_path):
    status, found = commands(tmp_path, FAILS='work_dirs/reproduce/pretrain', SEEDS='4 5')
    assert status == 1 and len(grids(found)) == 6
    assert all(' '.join(given).endswith('--seeds 4 5 --jobs 2 --threads 1') for given in grids(found))


def test_a_report_that_failed_does_not_stop_the_others(tmp_path):
    status, found = commands(tmp_path, FAILS='report')
    assert status == 1 and sum(given[0] == 'report' for script, given in found if script == 'compare.py') == 4


def test_all_detectors_start_from_backbones_of_the_first_seed(tmp_path):
    _, found = commands(tmp_path, SEEDS='4 5')
    for given in grids(found)[1:]:
        started = [option for option in given if 'init_cfg.checkpoint=' in option]
        assert started[0].endswith('/bn-b32-s4/epoch_7.pth') and all('-b32-s4/' in option for option in started)


def test_options_of_the_caller_and_the_backbone_of_the_seed_go_together(tmp_path):
    """Of two --cfg-options the last counts, and batch norm alone would start from the backbone of seed 0."""
    _, found = commands(tmp_path, 'cpu', '--cfg-options', 'default_hooks.logger.interval=7', SEEDS='4\n5')
    for given in grids(found)[1:]:
        (place,) = (i for i, word in enumerate(given) if word == '--cfg-options')
        options = [option.partition('=')[0] for option in given[place + 1 : place + 3]]
        assert options == ['model.backbone.init_cfg.checkpoint', 'default_hooks.logger.interval']
        assert given[given.index('--seeds') + 1 :][:2] == ['4', '5']


@pytest.mark.parametrize('arguments, seeds', [(['--seeds', '7'], '0'), (['--out=foo'], '0'), ([], ' ')])
def test_what_it_decides_itself_is_refused_before_anything_is_made(tmp_path, arguments, seeds):
    assert commands(tmp_path, 'cpu', *arguments, SEEDS=seeds) == (2, [])


def test_arguments_go_to_every_grid(tmp_path):
    status, found = commands(tmp_path, 'gpu', '--gpus', '1', '--', '--amp')
    assert status == 0 and all(given[-4:] == ['--gpus', '1', '--', '--amp'] for given in grids(found))


def test_another_preset_is_refused(tmp_path):
    assert commands(tmp_path, 'tpu') == (2, [])


@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
def test_make_reproduce_starts_it():
    said = subprocess.run(
        ['make', '-n', 'reproduce', 'PRESET=gpu', 'REPRODUCE=--gpus 1'], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert 'tools/reproduce.sh gpu --gpus 1' in said
