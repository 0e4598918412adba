"""What one config has otherwise than another."""

from mmengine.config import Config

from mmdet_norms.cli.differences import base_of, differences


def lines(before, now, width=100):
    return [one.line(width) for one in differences(before, now)]


def test_changed_new_and_gone_keys():
    before = dict(model=dict(type='A', depth=50, norm=dict(type='BN')), hooks=[dict(type='H', n=1)], lr=0.1, gone={})
    now = dict(model=dict(type='A', depth=18, norm=dict(type='BN', eps=1e-3)), hooks=[dict(type='H', n=2)], lr=0.1)
    assert lines(before, now) == [
        'model.depth: 50 -> 18',
        'model.norm.eps = 0.001',
        'hooks.0.n: 1 -> 2',
        'gone is left out',
    ]
    assert lines(before, before) == [] and lines(dict(a=dict(_scope_='mmdet')), dict(a={})) == []


def test_values_are_written_as_in_a_config():
    now = dict(a=dict(type='BNET', k=[1, (2,)]), b={'x.y': None}, c=[dict(n=1), dict(n=2)])
    assert lines(dict(c=[dict(n=1)]), now) == [
        "a = dict(type='BNET', k=[1, (2,)])",
        "b = {'x.y': None}",
        'c: [dict(n=1)] -> [dict(n=1), dict(n=2)]',
    ]
    assert lines({}, dict(a='x' * 50), width=20) == [f"a = '{'x' * 15} ..."]


def test_the_base_of_a_file_with_several_of_them(tmp_path):
    (tmp_path / 'a.py').write_text('x = dict(a=1, b=2)\n')
    (tmp_path / 'b.py').write_text('y = 1\n')
    (tmp_path / 'own.py').write_text("_base_ = ['a.py', './b.py']\nx = dict(b=3)\n")
    names, base = base_of(Config.fromfile(tmp_path / 'own.py'))
    assert names == ['a.py', './b.py'] and base.to_dict() == dict(x=dict(a=1, b=2), y=1)
    assert base_of(Config.fromfile(tmp_path / 'a.py')) == ([], None) and base_of(Config(dict(a=1))) == ([], None)
