"""tools/benchmark.py from its command line to its files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.tiny import CONFIG
from mmdet_norms.benchmark import report
from mmdet_norms.cli import benchmark

ROOT = Path(__file__).resolve().parents[2]
MAP = ['2', '32', '6', '5']
SMALL = ['--size', *MAP, '--conv-size', *MAP, '--repeats', '2', '--warmup', '0', '--device', 'cpu']


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / 'tiny.py'
    path.write_text(CONFIG.replace('{root}', str(tmp_path)))
    return str(path)


def run(out, *arguments):
    benchmark.main([*SMALL, '--out', str(out), *arguments])
    return json.loads((out / 'benchmark.json').read_text())


def test_layers_and_convolutions_are_measured_shown_and_written(tmp_path, capsys):
    result = run(
        tmp_path / 'out',
        '--level',
        'layer',
        'conv',
        '--layers',
        'bnet3',
        '--no-reference',
        '--layout',
        'channels_last',
        '--mode',
        'forward+backward',
    )
    assert [(group['level'], group['mode'], group['layout']) for group in result['groups']] == [
        ('layer', 'forward+backward', 'channels_last'),
        ('conv', 'forward+backward', 'channels_last'),
    ]
    assert [row['name'] for row in result['groups'][0]['rows']] == ['bn', 'bnet3']
    assert all(len(row['times_ms']) == 2 for group in result['groups'] for row in group['rows'])
    assert result['command'].startswith('python tools/benchmark.py --size 2 32 6 5') and result['machine']['torch']
    shown = capsys.readouterr()
    assert 'bnet3' in shown.out and str(tmp_path / 'out' / 'benchmark.md') in shown.out.replace('\n', '')
    assert 'layer, forward+backward' in shown.err  # the progress bar


def test_every_level_mode_precision_and_layout_is_planned_with_inference_before_training(tiny):
    args = benchmark.parse_args(
        [
            *SMALL,
            '--config',
            tiny,
            '--no-reference',
            '--layers',
            'bn',
            '--precision',
            'fp32',
            'bf16',
            '--layout',
            'nchw',
            'channels_last',
            '--image',
            '64',
            '96',
            '--no-fuse',
        ]
    )
    groups = [make() for make in benchmark.make_plan(args)]
    expected = [('layer', mode) for mode in ('forward', 'forward+backward', 'eval')]
    expected += [('conv', mode) for _, mode in expected] + [('detector', 'inference'), ('detector', 'train')]
    settings = [(precision, layout) for precision in ('fp32', 'bf16') for layout in ('nchw', 'channels_last')]
    assert [((g.setting.precision, g.setting.layout), (g.level, g.mode)) for g in groups] == [
        (setting, case) for setting in settings for case in expected
    ]


def test_a_config_with_named_norms(tmp_path, tiny):
    result = run(
        tmp_path / 'out',
        '--level',
        'detector',
        '--config',
        tiny,
        '--norm',
        'bn',
        'bnet3',
        '--image',
        '64',
        '96',
        '--mode',
        'inference',
        '--no-fuse',
        '--cfg-options',
        'model.test_cfg.rcnn.max_per_img=5',
    )
    (group,) = result['groups']
    assert group['size'] == [1, 3, 64, 96] and group['mode'] == 'inference'
    rows = group['rows']
    assert [(row['name'], row['over']) for row in rows] == [('bn', None), ('bnet3', 'bn')]
    assert all(row['images_per_s'] > 0 and row['parameters'] > 0 for row in rows)


def classifiers(*arguments):
    args = benchmark.parse_args([*SMALL, '--level', 'classifier', *arguments])
    return benchmark._configs(args, 'classifier')


def test_classifiers_are_a_resnet50_with_one_norm_everywhere_or_what_config_and_norm_say():
    config = str(ROOT / 'configs' / 'demo' / 'resnet50_bnet5_shapes-cls.py')
    assert list(classifiers()) == ['bn', 'mabn', 'in', 'gn', 'ln']
    assert list(classifiers('--layers', 'sn', 'GN(num_groups=16)')) == ['bn', 'sn', 'GN(num_groups=16)']
    placed = classifiers('--norm', 'bn', 'bnet5')
    assert placed['bnet5'].model.backbone.norm_at.last.kernel_size == 5 and placed['bnet5'].model.backbone.depth == 50
    assert list(classifiers('--config', config, '--norm', 'bn', 'mabn')) == ['bn', 'mabn']
    assert list(classifiers('--config', config)) == ['resnet50_bnet5_shapes-cls']


def test_a_classifier_is_measured_from_the_command_line(tmp_path):
    config = str(ROOT / 'configs' / 'demo' / 'resnet50_bnet5_shapes-cls.py')
    arguments = ['--level', 'classifier', '--config', config, '--norm', 'bn', 'gn', '--mode', 'inference']
    arguments += ['--image', '32', '32', '--batch', '2']
    (group,) = run(tmp_path / 'out', *arguments)['groups']
    assert (group['level'], group['size']) == ('classifier', [2, 3, 32, 32])
    assert [row['name'] for row in group['rows']] == ['bn', 'bn, fused', 'gn']  # group norm cannot be folded
    text = (tmp_path / 'out' / 'benchmark.md').read_text()
    assert '| it/s |' in text and '| published it/s |' not in text


def test_a_config_as_it_is_has_its_twin_beside_it(tmp_path, tiny):
    args = benchmark.parse_args(
        [*SMALL, '--config', tiny, '--level', 'detector', '--cfg-options', "model.backbone.norm_cfg.type='BRN'"]
    )
    assert list(benchmark._configs(args, 'detector')) == ['tiny']
    from mmdet_norms.benchmark.detectors import _with_twins

    assert _with_twins(benchmark._configs(args, 'detector'))[1] == {
        'tiny': 'bn (as tiny)',
        'bn (as tiny)': 'bn (as tiny)',
    }


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    written, write = [], report.write

    def interrupted(result, folder):
        written.append(len(result['groups']))
        write(result, folder)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(report, 'write', interrupted)
    with pytest.raises(SystemExit, match='130'):
        run(tmp_path, '--level', 'layer', '--layers', 'bn')
    assert written == [1, 2]
    assert len(json.loads((tmp_path / 'benchmark.json').read_text())['groups']) == 2


def test_quick_is_small_and_the_defaults_are_those_of_the_documentation():
    args = benchmark.parse_args(['--device', 'cpu'])
    assert (args.size, args.conv_size) == ([2, 256, 100, 160], [2, 256, 50, 80])
    assert args.images == dict(detector=[512, 800], classifier=[224, 224])
    assert args.batches == dict(detector=2, classifier=8)
    assert (args.repeats, args.detector_repeats, args.warmup, args.level) == (20, 5, 3, ['layer', 'conv', 'detector'])
    assert args.detector_norms[0] == 'bn' and args.config is None
    quick = benchmark.parse_args(['--device', 'cpu', '--quick', '--repeats', '7'])
    assert quick.size[1] < 256 and (quick.repeats, quick.detector_repeats, quick.warmup) == (7, 7, 1)
    assert benchmark.parse_args(['--config', 'x.py']).detector_norms is None


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--layers', 'bn', 'bnett5'], "layer 'bnett5' is unknown (did you mean 'bnet5'?)"),
        (['--norm', 'bn', 'cbm'], "--norm cbm: norm 'cbm' is unknown"),
        (['--config', 'nowhere.py'], 'there is no config file nowhere.py'),
        (['--precision', 'fp16'], 'write --precision bf16'),
        (['--device', 'cuda:99'], 'CUDA devices here'),
        (['--device', 'gpu'], '--device gpu'),
        (['--device', 'mps'], 'measures on cpu and cuda only'),
        (['--size', '2', '0', '4', '4'], '--size 2 0 4 4: sizes are at least 1'),
        (['--repeats', '0'], '--repeats 0: must be at least 1'),
        (['--device', 'cpu', '--triton'], '--triton: the Triton kernels need a GPU'),
        (['--warmup', '-1'], '--warmup -1: must be at least 0'),
        (['--level', 'classifier', '--norm', 'an-gn-head'], '--norm an-gn-head: '),
        (
            ['--level', 'classifier', '--config', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'],
            'write --level detector',
        ),
        (['--config', f'{ROOT}/configs/demo/resnet50_bnet5_shapes-cls.py'], 'write --level classifier'),
        (['--level', 'layer', '--mode', 'train'], '--mode train: level layer has none of them; it has forward'),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(benchmark, '_measure', lambda *_: pytest.fail('measured'))
    with pytest.raises(SystemExit) as end:
        run(tmp_path / 'out', *arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_script_runs_from_a_checkout(tmp_path, monkeypatch):
    """In a process that has not loaded torch before, which reads how long its threads spin."""
    monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)
    command = [
        sys.executable,
        str(ROOT / 'tools' / 'benchmark.py'),
        *SMALL,
        '--level',
        'layer',
        '--layers',
        'bn',
        '--mode',
        'eval',
        '--out',
        'here',
        '--threads',
        '2',
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'here' / 'benchmark.png').stat().st_size > 0
    assert 'profiler' not in done.stderr.lower()
    assert 'CPU threads: 2 (--threads)' in done.stdout and 'GOMP_SPINCOUNT' not in done.stdout
    result = json.loads((tmp_path / 'here' / 'benchmark.json').read_text())
    assert result['machine']['spincount'] == '10000' and result['groups'][0]['load']['threads'] == 2
    assert isinstance(result['machine']['compiled'], bool) and result['groups'][0]['load']['cores'] > 0
