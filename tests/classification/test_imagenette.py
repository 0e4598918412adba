"""The example of BNET's Imagenette implementation: its configs, and that it learns scikit-learn's digits."""

import math
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from helpers.digits import write_digits
from mmdet_norms import classification

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'imagenette'
FUNCTIONS = {
    'xmininet': classification.xmininet,
    'xsemininet': classification.xsemininet,
    'mininet': classification.mininet,
    'mininest-ba': classification.mininest_ba,
    'mininest-bn': classification.mininest_bn,
    'resnest50': classification.resnest50,
}


class Losses(Hook):
    """Keeps the loss of each step."""

    def __init__(self, seen):
        self.seen = seen

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(outputs['loss'].item())


def example(name='xsemininet'):
    return Config.fromfile(CONFIGS / f'{name}_bnet_rangerlars_10e_imagenette160.py')


@pytest.mark.parametrize('name', FUNCTIONS)
def test_the_config_and_the_function_make_the_same_model(name):
    cfg = example(name)
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    function = FUNCTIONS[name](c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish')
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in function.state_dict().items()}
    assert repr(model.backbone) == repr(function.backbone)
    assert model.head.dropout.p == function.head.dropout.p == 0.2


def test_the_recipe_is_that_of_the_example():
    cfg = example()
    assert cfg.optim_wrapper.optimizer == dict(
        type='RangerLars', lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-3
    )
    assert cfg.train_cfg.max_epochs == 10 and cfg.train_dataloader.batch_size == 32 and not cfg.param_scheduler


@pytest.mark.parametrize('norm', ['bnet', 'bn'])
def test_the_example_lowers_the_loss_on_digits(tmp_path, norm):
    pytest.importorskip('pytorch_optimizer')
    data = write_digits(tmp_path / 'digits', train=512, val=64, side=16)
    cfg = example()
    cfg.work_dir = str(tmp_path / 'run')
    cfg.model.backbone.update(norm=norm, base_channels=16)
    cfg.model.head.in_channels = 128
    cfg.train_cfg.update(max_epochs=2, val_interval=2)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
        loader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackClsInputs')]
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.randomness = dict(seed=0)
    cfg.log_level = 'WARNING'
    runner, losses = Runner.from_cfg(cfg), []
    runner.register_hook(Losses(losses))
    runner.train()
    assert len(losses) == 32 and all(map(math.isfinite, losses))
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() > 0.3
