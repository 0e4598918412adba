"""What the figures show, against literal computations; and that the figures are there."""

import json
import re
import xml.etree.ElementTree as ET
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from helpers import tiny_cls
from helpers.commands import fails
from mmdet_norms.analysis import attention, curves, figures, kernels, stats
from mmdet_norms.analysis import runs as analysis_runs
from mmdet_norms.analysis.figures import stage
from mmdet_norms.analysis.runs import looks_of, names_of
from mmdet_norms.choice import evenly
from mmdet_norms.cli import analyze, train
from mmdet_norms.engine.norm_stats import NORM_STATS
from mmdet_norms.errors import UserError
from mmdet_norms.experiments.runs import Run
from mmdet_norms.layers import AN, BNET


def line(step, kind='BN', images=2, **own):
    values = dict(mean=[0.1 * step, -1.0], var=[1.0 + step, 2.0], g=[step**2 * 0.1, 0.0], psi=[0.5, -0.5 * step])
    return dict(type=kind, images=images, channels=[0, 5], **values, **own, all={key: 1.0 for key in values})


def looks(**own):
    return {step: {'backbone.layer1.0.bn1': line(step), 'head.bn': line(step, **own)} for step in (2, 4, 6, 8)}


def texts(path):
    return [''.join(element.itertext()) for element in ET.parse(path).iter() if element.tag.endswith('}text')]


def drawn(paths, *stems):
    assert [path.name for path in paths if path.suffix == '.svg'] == [f'{stem}.svg' for stem in stems]
    for path in paths:
        if path.suffix == '.png':
            with Image.open(path) as picture:
                assert picture.size[0] > 300
    return {path.stem: texts(path) for path in paths if path.suffix == '.svg'}


# ------------------------------------------------------------------------------------------------ statistics


def test_fluctuation_is_what_neighbours_differ_by():
    found = stats.fluctuations(looks(), 'head.bn')
    pairs = [(2, 4), (4, 6), (6, 8)]
    squares = dict(
        mean=[(0.2 / np.sqrt(1 + b)) ** 2 for _, b in pairs] + [0] * 3,
        var=[(2 / (1 + b)) ** 2 for _, b in pairs] + [0] * 3,
        g=[(2 * 0.1 * (b * b - a * a)) ** 2 for a, b in pairs] + [0] * 3,
        psi=[0] * 3 + [2.0**2] * 3,
    )
    for key, values in squares.items():
        assert found[key] == pytest.approx(np.sqrt(np.mean(values) / 2)), key


def test_looks_of_a_resumed_run(tmp_path):
    def write(folder, *lines):
        place = tmp_path / folder / 'vis_data'
        place.mkdir(parents=True)
        (place / NORM_STATS).write_text('\n'.join(lines))

    def of(step, value):
        return json.dumps(dict(step=step, layers=dict(bn=dict(mean=[value]))))

    write('1', of(2, 1), of(4, 1), of(6, 1), '{"step": 8, "lay')
    write('2', of(4, 2), '[]', of(8, 2))
    assert {step: layers['bn']['mean'][0] for step, layers in looks_of(tmp_path).items()} == {2: 1, 4: 2, 8: 2}
    assert looks_of(tmp_path / '1') == {}


def test_looks_of_a_run_that_was_overwritten_are_not_those_of_the_one_before(tmp_path):
    def write(folder, resume, **files):
        place = tmp_path / folder / 'vis_data'
        place.mkdir(parents=True)
        (place / 'config.py').write_text(f'load_from = None\nresume = {resume}\n')
        for name, content in files.items():
            (place / f'{name}.json').write_text(json.dumps(content))

    look = dict(layers=dict(bn=dict(mean=[0])))
    write('1', False, norm_stats=dict(step=2, **look), scalars=dict(loss=1, step=2))
    write('2', False, norm_stats=dict(step=4, **look), scalars=dict(loss=1, step=4))
    assert list(looks_of(tmp_path)) == [4]
    write('3', True, norm_stats=dict(step=6, **look), scalars=dict(loss=1, step=6))
    write('4', False, scalars=dict(bbox_mAP=1, step=0))  # a test
    assert list(looks_of(tmp_path)) == [4, 6]
    write('5', False, scalars=dict(loss=1, step=2))
    assert looks_of(tmp_path) == {}


def test_figures_of_statistics(tmp_path):
    cbn = {f'{kind}{what}_error': [0.1, 0.2] for kind in ('naive', 'compensated') for what in ('', '_var')}
    mabn = dict(second_moment=[1, 2], second_moment_used=[1, 2], psi_used=[0, 1], r=[1, 1])
    runs = {
        '$x$, <batch 2>': looks(**cbn),
        'b': looks(**mabn, energy=[[0.1, 0.1, 0], [0, 0.8, 0], [0, 0, 0]]),
        'c': looks(energy=[[None, None, None]] * 3),
    }
    for run in runs.values():
        for layers in run.values():
            own = layers['head.bn']
            own['all'].update({key: 0.1 for key in own if key.endswith('_error')}, r=1.0)
    found = drawn(stats.draw(runs, tmp_path), 'stats', 'fluctuation', 'stats-cbn', 'stats-mabn', 'stats-bnet')
    assert '$x$, <batch 2>' in found['stats'] and 'layer1.0.bn1' in found['stats']
    rows = (tmp_path / 'fluctuation.md').read_text().splitlines()
    numbers = json.loads((tmp_path / 'fluctuation.json').read_text())
    assert len(rows) == 4 and rows[3].split(' | ')[1] == f'{numbers["$x$, <batch 2>"]["head.bn"]["mean"]:.3g}'
    assert not [text for texts in found.values() for text in texts if 'mathdefault' in text]


@pytest.mark.parametrize('decades', [0.1, 0.8, 1.3, 3, 7])
def test_the_numbers_of_a_log_axis_have_room(decades):
    with figures.styled():
        for low, width in product((4e-7, 1.3e-3, 0.7), (1.75, 3.4)):
            figure, axes = figures.sheet(1, 2, width=width)
            values = [low, low * 10**decades]
            axes[0, 0].plot(values, [0, 1])
            axes[0, 1].plot([0, 1], values)
            for axis, which in zip(axes[0], 'xy'):
                figures.logarithmic(axis, which)
            figure.draw_without_rendering()
            for own in (axes[0, 0].xaxis, axes[0, 1].yaxis):
                ends = sorted(own.get_view_interval())
                shown = [t for t, at in zip(own.get_ticklabels(), own.get_ticklocs()) if ends[0] <= at <= ends[1]]
                assert len({text.get_text() for text in shown}) == len(shown) >= 2
                boxes = [text.get_window_extent() for text in shown]
                assert not [a for a, b in combinations(boxes, 2) if a.padded(1).overlaps(b)]


def test_numbers_of_a_log_axis_are_plain_text():
    said = [figures.power(value) for value in (3 * 10.0**-5, 1e-12, 0.01, 30.0, 1e4, 1.5e6)]
    assert said == [f'3{figures.TIMES}10⁻⁵', '10⁻¹²', '0.01', '30', '10⁴', f'1.5{figures.TIMES}10⁶']


def test_lines_differ_without_colours(tmp_path):
    looks_of_lines = [figures.look_of(number) for number in range(32)]
    assert len({(look['marker'], look['ls']) for look in looks_of_lines}) == 32
    steps = range(2, 202, 2)
    runs = {f'{n}': {step: {'bn': line(step)} for step in steps} for n in range(8)}
    paths = stats.draw(runs, tmp_path)
    lines = re.findall(
        r'<g id="line2d_\d+">(.*?)\n    </g>', next(p for p in paths if p.name == 'stats.svg').read_text(), re.S
    )
    marked = [re.findall(r'<use ', one) for one in lines if one.count('L ') > 50]
    assert len(marked) == 8 * 4 and all(5 <= len(one) <= 6 for one in marked)


def test_batches_that_are_accumulated_count_as_a_larger_one():
    plain = looks()
    halved = {
        step: {name: own | {key: [v / 2 for v in own[key]] for key in ('g', 'psi')} for name, own in layers.items()}
        for step, layers in plain.items()
    }
    for layers in halved.values():
        for own in layers.values():
            own['accumulated'] = 2
    assert stats.fluctuations(halved, 'head.bn') == pytest.approx(stats.fluctuations(plain, 'head.bn'))


def test_a_single_look_is_a_point(tmp_path):
    one = {2: looks()[2]}
    found = stats.draw(dict(a=one), tmp_path)
    assert [path.name for path in found] == ['stats.svg', 'stats.png']
    assert 'layer1.0.bn1' in texts(found[0])
    points = re.findall(r'<use [^>]*fill: #2f86dd', found[0].read_text())  # the markers; axes have others
    assert len(points) == 8 + 1  # and that of the legend


def test_wrong_layers_and_channels(tmp_path):
    runs = dict(a=looks())
    with pytest.raises(UserError, match=r'--layers x\*: fits none of 2; there are such as .*bn'):
        stats.draw(runs, tmp_path, ['x*'])
    with pytest.raises(UserError, match='--channel 3: no run has recorded it'):
        stats.draw(runs, tmp_path, channel=3)
    drawn(stats.draw(dict(a={2: looks()[2]}), tmp_path), 'stats')  # one look does not fluctuate


def test_names_of_runs_say_what_differs():
    labels = [dict(norm='bn', batch_size=2, seed=0), dict(norm='bn', batch_size=8, seed=0)]
    runs = [Run(folder='', labels=own, status='finished') for own in labels]
    assert names_of(runs) == ['bn, batch 2', 'bn, batch 8']
    assert names_of(runs[:1]) == ['bn']
    runs[1].labels = dict(norm='gn', batch_size=2, seed=1, lr=0.1)
    assert names_of(runs) == ['bn, seed 0, lr None', 'gn, seed 1, lr 0.1']
    assert names_of(runs, without=('seed', 'lr')) == ['bn', 'gn']


def test_stages_and_even_choices():
    names = [
        'backbone.layer3.5.bnet3',
        'layer12.0.bn',
        'backbone.stages.2.0.norm',
        'roi_head.bbox_head.convs.0.bn',
        'bn1',
    ]
    assert [stage(name) for name in names] == ['layer3', 'layer12', 'stages.2', 'roi_head.bbox_head', 'bn1']
    assert evenly('abcdefg', 3) == ['a', 'd', 'g'] and evenly('ab', 3) == ['a', 'b'] and evenly('abc', 1) == ['a']


# ------------------------------------------------------------------------------------------------ kernels


def test_magnitude_and_energy_by_stage():
    torch.manual_seed(0)
    weights = {f'layer{i}.{j}.bnet3.bnconv.weight': torch.randn(3 + i, 1, 3, 3) for i in (1, 2) for j in (0, 1)}
    others = {'layer1.0.conv1.weight': torch.ones(3, 1, 3, 3), 'layer1.0.bnet3.bnconv.bias': torch.ones(3)}
    found = kernels.stages_of(kernels.kernels_of(weights | others))
    assert [(own.name, own.layers) for own in found] == [('layer1', 2), ('layer2', 2)]
    for own in found:
        rows = np.concatenate([w[:, 0].double().numpy() for name, w in weights.items() if name.startswith(own.name)])
        np.testing.assert_allclose(own.magnitude, np.abs(rows).mean(0))
        np.testing.assert_allclose(own.energy, (rows**2).sum(0) / (rows**2).sum())


def test_responses_are_of_the_channels_that_the_neighbourhood_changes_most():
    torch.manual_seed(0)
    norm, x = BNET(6).eval(), torch.randn(1, 6, 7, 8)
    norm.bn.running_mean.normal_()
    norm.bn.running_var.uniform_(0.5, 2)
    norm.bnconv.weight.data.normal_()
    norm.bnconv.weight.data[2] = 9  # the most, but of a dead channel
    x[:, 2] = 1
    y = norm(x)
    found = kernels.responses_of(norm, x, y, 'a', 2)
    before = F.batch_norm(x, norm.bn.running_mean, norm.bn.running_var, eps=norm.bn.eps)
    off = norm.bnconv.weight.detach().clone()
    off[:, :, 1, 1] = 0
    added = F.conv2d(before, off, padding=1, groups=6)[0].flatten(1).std(1, correction=0)
    added[2] = 0
    assert [own.channel for own in found] == added.argsort(descending=True)[:2].tolist()
    for own in found:
        np.testing.assert_allclose(own.before, before[0, own.channel], atol=1e-6)
        np.testing.assert_allclose(own.after, y[0, own.channel].detach(), atol=1e-6)
        np.testing.assert_array_equal(own.kernel, norm.bnconv.weight[own.channel, 0].detach())


# ------------------------------------------------------------------------------------------------ mixture weights


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = AN(4, k=3), AN(4, norm='GN', k=2, num_groups=2)

    def test_step(self, batch):
        x = self.body(batch)
        self.head(x.repeat_interleave(3, 0))  # three regions an image
        return [SimpleNamespace(img_id=number) for number in batch.numbers]


class Batch(torch.Tensor):
    pass


def test_weights_by_the_classes_in_an_image(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = Detector().eval()
    labels = {0: [0], 1: [0, 1], 2: [], 3: [1, 1]}
    infos = {n: dict(instances=[dict(bbox_label=label) for label in own]) for n, own in labels.items()}
    infos[2]['instances'] = [dict(bbox_label=0, ignore_flag=1)]
    run = SimpleNamespace(infos=infos, classes=('cat', 'dog', 'fox'), is_classifier=False, checkpoint='x')
    images = torch.randn(4, 4, 5, 5) * 3

    def answers(run, ids, model):
        for part in (ids[:2], ids[2:]):
            batch = images[part].as_subclass(Batch)
            batch.numbers = part
            yield model.test_step(batch)

    monkeypatch.setattr(analysis_runs, 'load_model', lambda run: model)
    monkeypatch.setattr(attention, 'answers', answers)
    found = attention.collect(run, 200, ['*'])
    m, v = images.mean((2, 3)), images.var((2, 3))
    attend = model.body.attention_weights.attention
    expected = F.relu6(attend[1](attend[0]((m / (v + 0.001).sqrt())[..., None, None])) + 3)[..., 0, 0] / 6
    np.testing.assert_allclose(found['body'].rows, expected.detach(), rtol=1e-4)
    assert {name: which.tolist() for name, which in found['body'].classes.items()} == {'cat': [0, 1], 'dog': [1, 3]}
    assert found['head'].rows.shape == (12, 2) and list(found['head'].classes) == [attention.ALL]
    assert not model.body._forward_pre_hooks
    by_hand = np.histogram(expected.detach()[[1, 3]], np.linspace(0, 1, 21))[0] / 6
    np.testing.assert_allclose(found['body'].histograms()['dog'], by_hand)
    np.testing.assert_allclose(found['body'].means()['cat'], expected.detach()[:2].mean(0), rtol=1e-4)
    assert 'dog' in drawn(attention.draw(found, tmp_path), 'attention')['attention']
    with pytest.raises(UserError, match='has no AN, whose mixture weights'):
        monkeypatch.setattr(analysis_runs, 'load_model', lambda run: nn.Conv2d(1, 1, 1))
        attention.collect(run, 200)


# ------------------------------------------------------------------------------------------------ curves


def test_curves_of_several_seeds_have_one_look(tmp_path):
    runs = [
        Run(
            '',
            dict(norm=norm, batch_size=2, seed=seed),
            'finished',
            curves={'loss': [(5, 2.0), (9, 1.0)], key: [(9, 0.3)]},
        )
        for norm, seed, key in (('bn', 0, 'bbox_mAP'), ('bn', 1, 'bbox_mAP'), ('gn', 0, 'bbox_mAP_50'))
    ]
    found = drawn(curves.draw(runs, tmp_path), 'curves')['curves']
    assert {'bn', 'gn', 'loss', 'bbox_mAP'} <= set(found) and found.count('bn') == 1 and 'bbox_mAP_50' not in found
    with pytest.raises(UserError, match='--keys acc: the runs have no such quantity; there are loss, bbox_mAP'):
        curves.draw(runs, tmp_path, ['acc'])


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.slow
def test_the_command_on_a_classifier_with_bnet_and_an(tmp_path, capsys):
    config, work_dir, out = tiny_cls.write_config(tmp_path), tmp_path / 'run', tmp_path / 'out'
    options = ['--cfg-options', 'model.backbone.norm_at.norm1.type=AN', 'model.backbone.norm_at.norm1.k=3']
    train.main(
        [str(config), '--work-dir', str(work_dir), '--norm-stats', '1', '--norm-stats-layers', '*.layer?.0.*', *options]
    )

    def run(*arguments):
        capsys.readouterr()
        analyze.main([*map(str, arguments), '--out', str(out)])
        names = capsys.readouterr().out.split()
        return [name.rpartition('/')[2] for name in names if name.endswith(('.svg', '.json'))]

    bnet = ('--layers', '*.layer2.0.bnet*')
    assert run('stats', work_dir, *bnet) == ['stats.svg', 'fluctuation.svg', 'fluctuation.json', 'stats-bnet.svg']
    image = next((tmp_path / 'data' / 'val').rglob('*.png'))
    assert run('kernels', work_dir, '--image', image, *bnet) == ['kernels.svg', 'kernels.json', 'responses.svg']
    asked = ('--images', 9, '--layers', '*.layer4.*')
    assert run('attention', work_dir, *asked) == ['attention.svg', 'attention.json']
    found = json.loads((out / 'attention.json').read_text())
    assert {name: own['instances'] for name, own in found.items()}.popitem()[1] == dict(box=3, disc=3, ring=3)
    assert run('curves', work_dir) == ['curves.svg']
    assert re.search('accuracy/top1', (out / 'curves.svg').read_text())
    # what is wrong is said
    said = fails(capsys, analyze.main, 'kernels', work_dir, '--layers', 'x', '--image', image, '--out', out)
    assert '--layers x: fits none of' in said
    assert 'give that, too' in fails(capsys, analyze.main, 'kernels', work_dir, '--layers', 'x', '--out', out)
    assert 'there is no such file' in fails(
        capsys, analyze.main, 'kernels', work_dir, '--image', out / 'no', '--out', out
    )
    (tmp_path / 'no.png').write_text('no picture')
    assert 'cannot be read' in fails(
        capsys, analyze.main, 'kernels', work_dir, '--image', tmp_path / 'no.png', '--out', tmp_path / 'none'
    )
    assert not list((tmp_path / 'none').glob('*'))
    assert 'must be at least 1' in fails(capsys, analyze.main, 'attention', work_dir, '--images', 0, '--out', out)
    for word in ('stats', 'kernels', 'attention', 'curves'):
        assert 'nowhere' in fails(capsys, analyze.main, word, tmp_path / 'nowhere', '--out', out)


def test_runs_of_which_nothing_was_recorded_are_left_out_and_named(tmp_path, capsys):
    for name, steps in (('a', (2, 4)), ('bare', ()), ('c', (2,)), ('torn', ())):
        place = tmp_path / name / '1' / 'vis_data'
        place.mkdir(parents=True)
        (place / 'scalars.json').write_text('{"loss": 1, "step": 2}')
        own = [json.dumps(dict(step=step, layers={'head.bn': line(step)})) for step in steps]
        (place / NORM_STATS).write_text('\n'.join([*own, '{"step": 9, "lay']))
    analyze.main(['stats', str(tmp_path), '--out', str(tmp_path / 'out')])
    said = capsys.readouterr()
    assert {'stats.svg', 'fluctuation.svg'} <= {name.rpartition('/')[2] for name in said.out.split()}
    for name in ('bare', 'torn'):
        assert f'warning: {tmp_path / name} is left out: nothing of its norms was recorded' in said.err
    assert said.err.count('warning') == 2
    said = fails(capsys, analyze.main, 'stats', tmp_path / 'bare', tmp_path / 'torn', '--out', tmp_path / 'out')
    assert f'nothing was recorded of the norms of {tmp_path}/bare, {tmp_path}/torn' in said and 'train with' in said


def test_options_of_train_that_need_each_other(capsys):
    assert 'how often' in fails(
        capsys, train.main, tiny_cls.CONFIGS / 'demo/resnet50_bnet5_shapes-cls.py', '--norm-stats-layers', 'x'
    )
