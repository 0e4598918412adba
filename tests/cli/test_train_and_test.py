"""The commands, on a detector that trains in seconds."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import mmdet_norms  # noqa: F401
from helpers import tiny, warm
from helpers.commands import fails, options_of
from mmdet_norms.cli import picture_sheet, test, train

ROOT = Path(__file__).resolve().parents[2]
COCO_COLUMNS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a config and a work dir of ten epochs."""
    folder = tmp_path_factory.mktemp('trained')
    config = tiny.write_config(folder)
    options = ['train_cfg.max_epochs=10', 'train_cfg.val_interval=10', 'default_hooks.checkpoint.interval=5']
    given = ['--work-dir', str(folder / 'run'), '--seed', '0', '--per-class']
    train.main([str(config), *given, '--cfg-options', *options])
    return folder


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tmp_path)


def aps(path):
    results = json.loads(Path(path).read_text())
    return {key: value for key, value in results.items() if '_mAP' in key}


def _behind(log, word):
    """What the lines of a log say that have a word in them."""
    return ''.join(line.partition(word)[2] for line in log.splitlines())


def test_training_leaves_a_log_a_checkpoint_results_and_a_runnable_config(trained):
    run = trained / 'run'
    last = (run / 'last_checkpoint').read_text()
    assert Path(last) == run / 'epoch_10.pth'
    assert set(aps(run / 'results.json')) == {f'{kind}_{c}' for kind in ('bbox', 'segm') for c in COCO_COLUMNS}
    log = next(run.glob('*/*.log')).read_text()
    assert 'eta:' in log and '| bbox |' in log
    assert 'AP per class' in log and 'mAP_75 |' not in log and 'precision' not in _behind(log, 'Epoch(val)')
    assert 'precision' not in next(run.glob('*/vis_data/scalars.json')).read_text()
    dumped = Config.fromfile(run / 'tiny.py')
    assert dumped.custom_imports.imports == ['mmdet_norms']


def test_testing_gives_the_same_aps_as_training_did(trained):
    run = trained / 'run'
    out = trained / 'out' / 'results.pkl'
    arguments = [trained / 'tiny.py', run / 'epoch_10.pth', '--eval', 'bbox', 'segm', '--per-class']
    arguments += ['--work-dir', trained / 'tested', '--out', out, '--show-dir', trained / 'shown']
    test.main([str(argument) for argument in arguments])
    expected = aps(run / 'results.json')
    assert expected['bbox_mAP'] > 0.1 and expected['segm_mAP'] > 0.1
    assert aps(trained / 'tested' / 'results.json') == expected
    per_class, validated = (json.loads((trained / d / 'results.json').read_text()) for d in ('tested', 'run'))
    keys = {f'{kind}_{name}_precision' for kind in ('bbox', 'segm') for name in tiny.CLASSES}
    assert keys <= set(per_class) and {k: per_class[k] for k in keys} == {k: validated.get(k) for k in keys}
    assert len(list((trained / 'shown').glob('*.png'))) == 4
    assert len(pickle.loads(out.read_bytes())) == 4
    sheet = ['--out', str(trained / 'sheet.png'), '--score-thr', '0.3']
    picture_sheet.main([str(trained / 'tiny.py'), str(out), *sheet])
    assert (trained / 'sheet.png').stat().st_size > 5000


def test_only_the_chosen_kind_is_evaluated(trained):
    arguments = [str(trained / 'tiny.py'), str(trained / 'run' / 'epoch_10.pth'), '--eval', 'bbox']
    detections = trained / 'boxes' / 'detections.json'
    test.main([*arguments, '--work-dir', str(trained / 'boxes'), '--out', str(detections)])
    assert {'image_id', 'category_id', 'bbox', 'score', 'segmentation'} == set(json.loads(detections.read_text())[0])
    truth = COCO(str(trained / 'data' / 'annotations.json'))
    evaluated = COCOeval(truth, truth.loadRes(str(detections)), 'bbox')
    evaluated.evaluate(), evaluated.accumulate(), evaluated.summarize()
    ap = json.loads((trained / 'boxes' / 'results.json').read_text())['bbox_mAP']
    assert evaluated.stats[0] == pytest.approx(ap, abs=1e-3)
    assert set(aps(trained / 'boxes' / 'results.json')) == {f'bbox_{column}' for column in COCO_COLUMNS}


def test_resuming_goes_on_at_the_next_epoch(trained, tmp_path):
    arguments = [str(trained / 'tiny.py'), '--work-dir', str(tmp_path), '--cfg-options', 'train_cfg.max_epochs=6']
    train.main([*arguments[:3], '--resume', str(trained / 'run' / 'epoch_5.pth'), *arguments[3:]])
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['epoch_6.pth']
    arguments[-1] = 'train_cfg.max_epochs=7'
    train.main([*arguments[:3], '--resume', *arguments[3:]])  # the latest in the work dir
    assert torch.load(tmp_path / 'epoch_7.pth')['meta']['epoch'] == 7


def test_mixed_precision_trains_on_a_cpu(config, tmp_path):
    if torch.cuda.is_available():
        pytest.skip('on a GPU --amp is mmengine as it is')
    train.main([str(config), '--amp', '--work-dir', str(tmp_path / 'run')])
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert 'CPUAmpOptimWrapper' in log
    weights = torch.load(tmp_path / 'run' / 'epoch_1.pth')['state_dict'].values()
    weights = [value for value in weights if value.is_floating_point()]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights)


def test_a_norm_by_name_is_in_the_config_and_options_refine_it(config):
    cfg = options_of(train, config, '--norm', 'bnet5', '--cfg-options', 'model.backbone.norm_at.last.kernel_size=7')
    assert cfg.model.backbone.norm_at.last == dict(type='BNET', kernel_size=7)
    assert cfg.work_dir.endswith('tiny_bnet5')


def test_a_packaged_config_can_be_named_directly(tmp_path):
    name = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    tiny.write_dataset(tmp_path)
    options = ['train_dataloader.dataset.data_root=' + f'{tmp_path}/']
    options += ['train_dataloader.dataset.ann_file=annotations.json', 'val_dataloader=None']
    options += ['train_dataloader.dataset.data_prefix.img=images/']
    options += ['train_dataloader.dataset.filter_cfg.filter_empty_gt=False']  # no image has a class of COCO
    cfg = options_of(train, name, '--norm', 'bnet3', '--allow-data-faults', '--cfg-options', *options)
    assert cfg.model.backbone.norm_at.last.kernel_size == 3
    assert cfg.work_dir == './work_dirs/retinanet_r50_fpn_1x_coco_bnet3'


def test_the_learning_rate_is_scaled_only_from_a_known_batch_size(config, capsys):
    assert options_of(train, config, '--auto-scale-lr').auto_scale_lr.enable
    text = config.read_text().replace('dict(base_batch_size=16)', 'dict(_delete_=True)')
    config.write_text(text)
    assert 'base_batch_size' in fails(capsys, train.main, config, '--auto-scale-lr')


def test_existing_imports_and_hooks_are_kept(config):
    config.write_text(
        config.read_text().replace("imports=['mmdet_norms']", "imports=['json', 'mmdet_norms']")
        + "custom_hooks = [dict(type='ResultsHook', filename='mine.json'), dict(type='NumClassCheckHook')]\n"
    )
    cfg = options_of(train, config)
    assert cfg.custom_imports.imports == ['json', 'mmdet_norms']
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == [
        'ResultsHook',
        'NumClassCheckHook',
        'NormHook',
        'ScheduleHook',
        'NonFiniteHook',
        'RandomStateHook',
        'PendingValidationHook',
        'CostHook',
    ]


def test_processes_share_their_running_statistics_before_they_are_judged(config):
    hooks = options_of(train, config, '--launcher', 'pytorch').custom_hooks
    assert [hook.type for hook in hooks] == [
        'NormHook',
        'ResultsHook',
        'ScheduleHook',
        'NonFiniteHook',
        'RandomStateHook',
        'PendingValidationHook',
        'CostHook',
        'SyncBuffersHook',
    ]
    hooks = options_of(train, config).custom_hooks
    assert [hook.type for hook in hooks] == [
        'NormHook',
        'ResultsHook',
        'ScheduleHook',
        'NonFiniteHook',
        'RandomStateHook',
        'PendingValidationHook',
        'CostHook',
    ]


def test_another_data_root_reaches_datasets_and_evaluators(config, tmp_path, capsys):
    old = Path(Config.fromfile(config).data_root)
    new = shutil.copytree(old, tmp_path / 'elsewhere')
    cfg = options_of(train, config, '--data-root', str(new))
    assert cfg.train_dataloader.dataset.data_root.rstrip('/') == str(new)
    assert cfg.test_evaluator.ann_file == str(new / 'annotations.json')
    assert f'{old}/' not in json.dumps([cfg.val_dataloader, cfg.val_evaluator, cfg.test_dataloader])


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['missing.py'], 'missing.py'),
        (['mmdet::nowhere/missing.py'], 'mmdet::nowhere/missing.py'),
        (['CONFIG', '--norm', 'bnet55'], 'bnet5'),
        (['CONFIG', '--work-dir', 'WORK', '--cfg-options', 'model.neck.norm_cfg.type=BNTE'], "did you mean 'BNET'"),
        (
            [
                'CONFIG',
                '--norm',
                'bnet5',
                '--work-dir',
                'WORK',
                '--cfg-options',
                'model.backbone.norm_at.last.kernel_size=4',
            ],
            'kernel_size=4 must be an odd positive integer',
        ),
        (['CONFIG', '--resume', 'missing.pth'], 'missing.pth'),
        (['CONFIG', '--data-root', '/missing'], 'the folder /missing does not exist'),
        (['CONFIG', '--launcher', 'pytorch', '--work-dir', 'WORK'], 'tools/dist_train.sh'),
    ],
)
def test_a_mistake_in_training_is_one_message(config, tmp_path, capsys, monkeypatch, arguments, said):
    for name in ('RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    names = dict(CONFIG=config, WORK=tmp_path / 'run')
    message = fails(capsys, train.main, *(names.get(a, a) for a in arguments))
    assert said in message


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['CONFIG', 'missing.pth'], 'missing.pth'),
        (['CONFIG', 'EMPTY', '--out', 'results.txt'], '.pkl'),
        (['CONFIG', 'EMPTY', '--out', 'w/results.json', '--work-dir', 'w'], 'the metrics are written there'),
        (['CONFIG', 'EMPTY', '--out', 'w/results.json', '--work-dir', './v/../w'], 'the metrics are written there'),
        (['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'EMPTY', '--eval', 'bbox', 'segm'], '--eval bbox;'),
        (['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'EMPTY', '--eval', 'segm'], '--eval bbox,'),
        (['mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py', 'EMPTY', '--eval', 'bbox'], 'VOCMetric'),
    ],
)
def test_a_mistake_in_testing_is_one_message(config, tmp_path, capsys, arguments, said):
    (tmp_path / 'empty.pth').touch()
    names = dict(CONFIG=config, EMPTY=tmp_path / 'empty.pth')
    assert said.rstrip(';,') in fails(capsys, test.main, *(names.get(a, a) for a in arguments))


def test_masks_on_a_box_detector_say_what_to_write_instead(tmp_path, capsys):
    (tmp_path / 'empty.pth').touch()
    name = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    message = fails(capsys, test.main, name, tmp_path / 'empty.pth', '--eval', 'bbox', 'segm')
    assert '--eval segm' in message and name in message and 'write --eval bbox' in message


@pytest.mark.parametrize(
    'name, masks',
    [
        ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True),
        ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', True),
        ('solo/solo_r50_fpn_1x_coco.py', True),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', True),
        ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', False),
        ('faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', False),
        ('retinanet/retinanet_r50_fpn_1x_coco.py', False),
    ],
)
def test_models_that_predict_masks_are_told_from_those_that_do_not(name, masks):
    from mmengine.hub import get_config

    assert test.predicts_masks(get_config(f'mmdet::{name}').model) is masks


@pytest.mark.skipif(not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'), reason='old torch')
def test_a_hostile_checkpoint_is_refused_in_one_message(config, tmp_path, capsys):
    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save(dict(state_dict={}, extra=RunsCode()), tmp_path / 'evil.pth')
    message = fails(capsys, test.main, config, tmp_path / 'evil.pth', '--work-dir', tmp_path / 'run')
    assert 'refused' in message and 'evil.pth' in message and 'mkdir' in message
    assert not (tmp_path / 'ran').exists()


@pytest.mark.slow
def test_the_stock_tools_resume_and_test_a_run_of_ours(trained, tmp_path):
    import mmdet

    from mmdet_norms.compat.mmcv_ops import active

    tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    dumped, checkpoint = trained / 'run' / 'tiny.py', trained / 'run' / 'epoch_5.pth'
    arguments = ['--work-dir', tmp_path, '--resume', checkpoint, '--cfg-options', 'train_cfg.max_epochs=6']
    run_script(tools / 'train.py', dumped, *arguments)
    assert 'bbox_mAP' in (tmp_path / 'results.json').read_text()
    tool, arguments = tools / 'test.py', [dumped, tmp_path / 'epoch_6.pth', '--work-dir', tmp_path]
    if active() == 'compiled':
        run_script(tool, *arguments)
    else:  # this tool imports mmcv.ops before it reads a config
        run_script('-m', 'mmdet_norms', tool, *arguments)


def test_the_tools_of_a_clone_start_from_anywhere(tmp_path):
    names = ('train', 'test', 'picture_sheet')
    started = [
        warm.Popen(
            [sys.executable, str(ROOT / 'tools' / f'{name}.py'), '--help'],
            cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    for name, process in zip(names, started):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert f'usage: tools/{name}.py' in said


def run_script(*command, cwd=None):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
