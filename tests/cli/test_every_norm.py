"""Every named choice trains, resumes and is tested through the commands."""

import json

import pytest

from helpers import tiny
from mmdet_norms.cli import test, train
from mmdet_norms.placement import PLACEMENTS


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', PLACEMENTS)
def test_a_named_norm_trains_resumes_and_is_tested(name, tmp_path):
    config, run = str(tiny.write_config(tmp_path)), tmp_path / 'run'
    # Group norm's 32 groups, and a box head with four convolutions, at the tiny model's 16 channels.
    options = ['--cfg-options']
    if name in ('gn', 'gn-ws', 'an-gn-head'):
        options += ['model.neck.norm_cfg.num_groups=4', 'model.roi_head.mask_head.norm_cfg.num_groups=4']
    if name in ('gn', 'gn-ws'):
        options += ['model.roi_head.bbox_head.norm_cfg.num_groups=4']
    if name == 'an-gn-head':
        options += [f'model.roi_head.bbox_head.norm_cfg.{i}.num_groups=4' for i in range(4)]
    common = [config, '--norm', name, '--work-dir', str(run)]
    train.main([*common, '--seed', '0', *options, 'train_cfg.max_epochs=1'])
    train.main([*common, '--resume', *options, 'train_cfg.max_epochs=2'])
    assert (run / 'epoch_2.pth').is_file()
    trained = json.loads((run / 'results.json').read_text())
    arguments = [config, str(run / 'epoch_2.pth'), '--norm', name, '--work-dir', str(run)]
    test.main(arguments + (options if len(options) > 1 else []))
    tested = json.loads((run / 'results.json').read_text())
    assert tested['bbox_mAP'] == trained['bbox_mAP'] and tested['segm_mAP'] == trained['segm_mAP']
