"""A trained detector has the same AP with every kind of ops in every memory format: RoIAlign, NMS, DCN, losses."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from helpers import tiny
from mmdet_norms import fuse
from mmdet_norms.cli import train
from mmdet_norms.compat import mmcv_ops
from mmdet_norms.compat.mmcv_ops import in_torchvision

# With deformable convolutions, from channels-last maps, as the demo trains.
MORE = """
model['backbone'].update(depth=50, dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
                         stage_with_dcn=(False, False, True, True))
model['neck']['in_channels'] = [32, 64, 128, 256]
custom_hooks = [dict(type='ChannelsLastHook')]
train_cfg = dict(max_epochs=EPOCHS, val_interval=100)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=100))
"""
KINDS = {
    'torch': '',
    'mmcv': '' if mmcv_ops.active() == 'compiled' else 'the installed mmcv has no compiled ops',
    'torchvision': in_torchvision.load(),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Config and checkpoint of a detector trained by the best ops there are, so by the compiled ones of mmcv if any."""
    folder = tmp_path_factory.mktemp('ap')
    config = tiny.write_config(folder, MORE.replace('EPOCHS', '40'))
    train.main([str(config), '--work-dir', str(folder / 'run'), '--seed', '0'])
    return config, next((folder / 'run').glob('epoch_*.pth')), {}


def ap(trained, folder, layout=torch.contiguous_format, fused=False):
    config, checkpoint, _ = trained
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(work_dir=str(folder), load_from=str(checkpoint), custom_hooks=[]))
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    if fused:
        fuse(runner.model)
    runner.model.to(memory_format=layout)
    metrics = runner.test()
    return {name: value for name, value in metrics.items() if name.endswith('_mAP')}


@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_ap_is_the_same(kind, layout, fused, trained, tmp_path, monkeypatch):
    if KINDS[kind]:
        pytest.skip(KINDS[kind])
    monkeypatch.setenv('MMDET_NORMS_OPS', 'torch')
    if not trained[2]:
        trained[2].update(ap(trained, tmp_path / 'reference'))
    expected = trained[2]
    print(expected)
    assert expected['coco/bbox_mAP'] > 0.3 and expected['coco/segm_mAP'] > 0.3  # garbage would show
    monkeypatch.setenv('MMDET_NORMS_OPS', kind)
    assert ap(trained, tmp_path, layout, fused) == pytest.approx(expected, abs=1e-3)
