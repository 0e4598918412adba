"""What a config got wrong is one message; an error of somebody's own code keeps its traceback."""

from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmengine.config import Config

from helpers import tiny
from helpers.commands import fails
from mmdet_norms.cli import check, test, train
from mmdet_norms.cli.common import load_config, read_config
from mmdet_norms.cli.config_checks import config_problems, norm_problems
from mmdet_norms.errors import UserError


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tmp_path)


@pytest.fixture
def own_backbone():
    @MODELS.register_module()
    class OwnResNet(ResNet):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            raise ValueError('norm_cfg of my own: a bug of mine in norm_at')

    yield
    del MODELS._module_dict['OwnResNet']


def test_an_error_of_the_users_own_code_keeps_its_traceback(config, tmp_path, own_backbone):
    arguments = [str(config), '--work-dir', str(tmp_path / 'run'), '--cfg-options', 'model.backbone.type=OwnResNet']
    with pytest.raises(ValueError, match='a bug of mine'):
        train.main(arguments)


@pytest.mark.parametrize(
    'part, norm_cfg, said',
    [
        ('backbone', dict(type='BNET', kernel_size=4), 'kernel_size=4 must be an odd'),
        ('neck', dict(type='GN', num_groups=5), 'num_groups=5 must divide'),
        ('backbone', dict(type='BNTE'), "norm_cfg.type='BNTE' is not a registered norm layer"),
        ('backbone', dict(type='CBN', burnin='soon'), "burnin='soon' must be a number"),
    ],
)
def test_a_wrong_norm_is_one_message(config, tmp_path, capsys, part, norm_cfg, said):
    config.write_text(f'{config.read_text()}\nmodel[{part!r}]["norm_cfg"] = {norm_cfg!r}\n')
    assert said in fails(capsys, train.main, config, '--work-dir', tmp_path / 'run')


def overlay(folder, base, **parts):
    path = folder / 'overlay.py'
    path.write_text(
        f'_base_ = {base!r}\ncustom_imports = dict(imports=["mmdet_norms"])\n'
        + ''.join(f'{key} = {value!r}\n' for key, value in parts.items())
    )
    return path


YOLOX = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'  # its batch norms have a momentum and an eps of their own
DEMO = str(Path(__file__).resolve().parents[2] / 'configs' / 'demo' / 'mask-rcnn_r50_fpn_bnet5_shapes.py')


@pytest.mark.parametrize(
    'base, model, said',
    [
        (
            YOLOX,
            dict(neck=dict(norm_cfg=dict(type='GN', num_groups=16))),
            "model.neck.norm_cfg of type 'GN' has an unknown key momentum=0.03",
        ),
        (
            DEMO,
            dict(backbone=dict(norm_at=dict(last=dict(type='GN', num_groups=8)))),
            "model.backbone.norm_at.last of type 'GN' has an unknown key kernel_size=5",
        ),
        (DEMO, dict(backbone=dict(norm_cfg=dict(num_groups=8))), "model.backbone.norm_cfg of type 'BN' has an unknown"),
        (DEMO, dict(neck=dict(norm_cfg=dict(type='torch.nn.GroupNorm', groups=2))), "'GN' has an unknown key groups"),
        (DEMO, dict(neck=dict(norm_cfg=dict(type='SyncBN', momentun=0.1))), "(did you mean 'momentum'?)"),
    ],
)
def test_a_key_of_another_norm_is_named_by_its_path_before_anything_is_built(base, model, said, tmp_path, capsys):
    message = fails(capsys, train.main, overlay(tmp_path, base, model=model), '--work-dir', tmp_path / 'run')
    assert said in message and '=dict(_delete_=True, type=' in message and not (tmp_path / 'run').exists()


def test_what_the_message_says_is_right(tmp_path, capsys):
    model = dict(neck=dict(norm_cfg=dict(type='GN', num_groups=16)))
    message = fails(capsys, train.main, overlay(tmp_path, YOLOX, model=model))
    advice = message.rpartition('write ')[2]
    assert advice == "norm_cfg=dict(_delete_=True, type='GN', eps=0.001, num_groups=16)"
    model['neck']['norm_cfg']['_delete_'] = True
    cfg = load_config(train.parse_args([str(overlay(tmp_path, YOLOX, model=model))]))
    assert cfg.model.neck.norm_cfg == dict(type='GN', num_groups=16)


def test_a_norm_with_arguments_of_its_own_takes_them(tmp_path):
    class Own(torch.nn.BatchNorm2d):
        def __init__(self, num_features, mine=1, **kwargs):
            super().__init__(num_features, **kwargs)

    class Anything(torch.nn.Module):
        def __init__(self, num_features, **kwargs):
            super().__init__()

    parts = [dict(norm_cfg=dict(type=Own, mine=2, momentum=0.1)), dict(norm_cfg=dict(type=Anything, whatever=3))]
    assert not list(norm_problems(parts, 'model'))
    assert len(list(norm_problems([dict(norm_cfg=[None, dict(type=Own, yours=2)])], 'model'))) == 1


RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'


@pytest.mark.parametrize(
    'metric, said',
    [
        (
            'segm',
            "val_evaluator.metric='segm': the model predicts boxes only, it has no mask head; write ",
        ),
        (['bbox', 'segm'], 'write val_evaluator.metric=bbox'),
        ('bboxes', "'bboxes' is no metric, choose from bbox, segm, proposal, proposal_fast"),
    ],
)
def test_a_metric_that_the_model_cannot_have_is_found_before_training(metric, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, 'require_annotations', lambda *_: None)
    config = overlay(tmp_path, RETINANET, val_evaluator=dict(metric=metric), test_evaluator=dict(metric=metric))
    assert said in fails(capsys, train.main, config, '--work-dir', tmp_path / 'run')
    message = fails(capsys, test.main, config, __file__, '--work-dir', tmp_path / 'run')
    assert said.replace('val_', 'test_') in message and not (tmp_path / 'run').exists()


def test_the_checking_tool_lists_them_all(config, capsys):
    config.write_text(
        f'{config.read_text()}\nmodel["neck"]["norm_cfg"] = dict(type="GN", momentum=0.1)\n'
        'model["roi_head"]["mask_head"] = None\nmodel["backbone"]["norm_cfg"] = dict(type="BN", num_groups=2)\n'
    )
    with pytest.raises(SystemExit):
        check.main([str(config)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('error ')]
    for said in (
        'backbone.norm_cfg',
        'neck.norm_cfg',
        "val_evaluator.metric=['bbox', 'segm']",
        'test_evaluator.metric',
    ):
        assert any(said in line for line in lines), said


def test_what_models_of_others_predict_is_left_to_them():
    @MODELS.register_module()
    class OwnDetector(torch.nn.Module):
        pass

    try:
        cfg = Config(dict(model=dict(type='OwnDetector'), val_evaluator=dict(type='CocoMetric', metric='segm')))
        assert not config_problems(cfg)
    finally:
        del MODELS._module_dict['OwnDetector']


@pytest.mark.parametrize('name', ['mmdet_norms::', 'mmdet_norms::../../x.py', 'mmdet::nothing/like/it'])
def test_a_packaged_config_that_is_far_from_all_is_told_where_they_are(name):
    with pytest.raises(UserError, match=r'has no such config; those that it has are in \S+configs$'):
        read_config(name)


@pytest.fixture
def naming_a_module(config):
    def write(name):
        text = config.read_text().replace("imports=['mmdet_norms']", f"imports=['mmdet_norms', {name!r}]")
        config.write_text(text)
        return config

    return write


@pytest.mark.parametrize('name', ['norm_of_mine_a', 'package_of_mine.norm_of_mine'])
def test_a_module_that_python_does_not_find_is_one_message(naming_a_module, name):
    config = naming_a_module(name)
    said = rf'custom_imports: there is no module {name.split(".")[0]}; .*PYTHONPATH=FOLDER in front'
    with pytest.raises(UserError, match=said):
        read_config(str(config))


def test_a_package_without_that_module_is_one_message(naming_a_module):
    with pytest.raises(UserError, match=r'custom_imports: mmdet_norms is there, but has no module mmdet_norms.bnt$'):
        read_config(str(naming_a_module('mmdet_norms.bnt')))


def test_a_module_beside_the_config_names_its_folder(naming_a_module, tmp_path):
    config = naming_a_module('norm_of_mine_b')
    config.with_name('norm_of_mine_b.py').touch()
    with pytest.raises(UserError, match=f'PYTHONPATH={config.parent.resolve()} in front of the command$'):
        read_config(str(config))


def test_a_module_that_lacks_another_one_keeps_its_traceback(naming_a_module, monkeypatch):
    config = naming_a_module('norm_of_mine_c')
    config.with_name('norm_of_mine_c.py').write_text('import no_such_module_at_all\n')
    monkeypatch.syspath_prepend(str(config.parent))
    with pytest.raises(ImportError, match='Failed to import custom modules'):
        read_config(str(config))
