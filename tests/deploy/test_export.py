"""Fused models on disk: checkpoints, ONNX, and the commands that write and read them."""

import json
import pickle
import re
import sys
import warnings
from itertools import chain

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from helpers import detectors, tiny, warm
from mmdet_norms import fuse
from mmdet_norms.cli import export, test
from mmdet_norms.deploy import export_onnx, is_fused, load_fused, save_fused
from mmdet_norms.layers._fold import Folded

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')


def small(seed=0):
    torch.manual_seed(seed)
    norms = dict(type='BN'), dict(type='BNET')
    model = nn.Sequential(*(ConvModule(i, 4, 3, norm_cfg=norm_cfg) for i, norm_cfg in zip((3, 4), norms)))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
    return model.eval()


class TestCheckpoints:
    def test_a_saved_model_loads_into_what_the_config_builds(self, tmp_path):
        model, x = small(), torch.randn(1, 3, 9, 9)
        save_fused(fuse(model), tmp_path / 'new' / 'fused.pth', meta=dict(dataset_meta=dict(classes=('a',)), epoch=3))
        for other in (small(1), fuse(small(1))):
            loaded = load_fused(other, tmp_path / 'new' / 'fused.pth')
            torch.testing.assert_close(loaded(x), model(x))
            assert loaded.dataset_meta == dict(classes=('a',)) and not loaded.training
        checkpoint = torch.load(tmp_path / 'new' / 'fused.pth', weights_only=True)
        assert is_fused(checkpoint) and checkpoint['meta']['epoch'] == 3
        by_hand = fuse(small(1))
        by_hand.load_state_dict(checkpoint['state_dict'])
        torch.testing.assert_close(by_hand(x), model(x))

    def test_other_files_and_models_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r'takes what fuse\(model\) returned'):
            save_fused(small(), tmp_path / 'x.pth')
        assert not list(tmp_path.iterdir())
        torch.save(dict(meta={}, state_dict=small().state_dict()), tmp_path / 'plain.pth')
        with pytest.raises(ValueError, match='no checkpoint of a fused model'):
            load_fused(small(), tmp_path / 'plain.pth')

    def test_a_failure_leaves_the_old_file_and_no_other(self, tmp_path):
        (tmp_path / 'fused.pth').write_text('old')
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            save_fused(fuse(small()), tmp_path / 'fused.pth', meta=dict(bad=lambda: 0))
        assert [path.name for path in tmp_path.iterdir()] == ['fused.pth']
        assert (tmp_path / 'fused.pth').read_text() == 'old'

    @pytest.mark.parametrize('content', [{}, dict(meta=None), dict(meta={}), [1], dict(state_dict={})])
    def test_nothing_else_is_taken_for_one(self, content):
        assert not is_fused(content)


# ---------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder; config and checkpoint of a Mask R-CNN with BNET; what ``tools/test.py`` finds with it."""
    folder = tmp_path_factory.mktemp('run')
    config = tiny.write_config(folder)
    model = detectors.two_stage('bnet3')
    meta = dict(dataset_meta=dict(classes=tiny.CLASSES), epoch=1)
    torch.save(dict(meta=meta, state_dict=model.state_dict(), optimizer=dict(big=1)), folder / 'epoch_1.pth')
    arguments = [str(config), str(folder / 'epoch_1.pth'), '--norm', 'bnet3']
    return folder, arguments, evaluate(folder, arguments, 'plain')


def evaluate(folder, arguments, name):
    """Results and detections of ``tools/test.py``."""
    work_dir = folder / name
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        test.main([*arguments, '--work-dir', str(work_dir), '--out', str(work_dir / 'found.pkl')])
    results = json.loads((work_dir / 'results.json').read_text())
    log = '\n'.join(path.read_text() for path in work_dir.glob('*/*.log'))
    with open(work_dir / 'found.pkl', 'rb') as file:
        return results, pickle.load(file), log


def same_detections(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        a, b = a['pred_instances'], b['pred_instances']
        assert len(a['scores']) > 3
        torch.testing.assert_close(a['scores'], b['scores'], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a['bboxes'], b['bboxes'], rtol=1e-3, atol=1e-2)


def metrics(results):
    return {key: value for key, value in results.items() if 'mAP' in key}


def test_the_fused_model_tests_like_the_unfused_one(run, capsys):
    folder, arguments, (plain, found, log) = run
    assert 'fused' not in log
    fused, found_fused, log = evaluate(folder, [*arguments, '--fuse'], 'fused')
    assert metrics(fused) == metrics(plain) and len(metrics(plain)) >= 12
    same_detections(found_fused, found)
    assert 'Testing the fused model: 12 of 20 norms are part of their convolutions, 8 reduced' in log
    # a checkpoint of the fused model is recognized
    config, checkpoint, *norm = arguments
    export.main([config, checkpoint, str(folder / 'fused.pth'), *norm])
    assert '12 of 20 norms' in capsys.readouterr().out
    saved = torch.load(folder / 'fused.pth', weights_only=True)
    assert saved['meta']['dataset_meta'] == dict(classes=tiny.CLASSES) and 'optimizer' not in saved
    again, found_again, log = evaluate(folder, [config, str(folder / 'fused.pth'), *norm], 'again')
    assert metrics(again) == metrics(plain)
    same_detections(found_again, found)
    assert 'do not match exactly' not in log


def test_averaged_weights_are_fused(run):
    """mmengine's EMAHook swaps the parameters of a copy into the model for a test: one by one, so both must match."""
    folder, arguments, (_, plain, _) = run
    config = folder / 'ema.py'
    config.write_text((folder / 'tiny.py').read_text() + "\ncustom_hooks = [dict(type='EMAHook')]\n")
    _, checkpoint, *norm = arguments
    _, found, _ = evaluate(folder, [str(config), checkpoint, *norm, '--fuse'], 'ema')
    same_detections(found, plain)
    save_fused(fuse(detectors.two_stage('bnet3')), folder / 'averaged.pth')
    _, found, _ = evaluate(folder, [str(config), str(folder / 'averaged.pth'), *norm], 'ema_again')
    same_detections(found, plain)


def test_training_from_a_fused_checkpoint_is_refused(run):
    from mmengine.runner import Runner

    from mmdet_norms.cli.common import read_config

    folder, arguments, _ = run
    save_fused(fuse(detectors.two_stage('bn')), folder / 'bn.pth')
    cfg = read_config(arguments[0])
    cfg.load_from, cfg.work_dir = str(folder / 'bn.pth'), str(folder / 'train')
    cfg.custom_hooks = [dict(type='FuseHook')]
    with pytest.raises(ValueError, match='checkpoint of a fused model, which has no norms to train'):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize(
    ('out', 'more', 'message'),
    [
        ('x.pt', [], r'write \*\.pth for a checkpoint or \*\.onnx for a graph'),
        ('x.pth', ['--batch', '2', '--dynamic'], '--batch and --dynamic: of no use for a checkpoint'),
        ('x.onnx', ['--size', '0', '64'], '--size 0 64: must be positive'),
        (
            'x.pth',
            ['--cfg-options', 'model.backbone.depth=34'],
            r'(?s)does not fit the model of .*\d+ weights of the model are not in .*  backbone',
        ),
        (
            'x.pth',
            ['--norm', 'bn'],
            r'(?s)does not fit the model of .* with --norm bn.*It would fit with --norm bnet3',
        ),
    ],
)
def test_a_wrong_command_says_what_to_write_and_writes_nothing(run, capsys, tmp_path, out, more, message):
    _, arguments, _ = run
    with pytest.raises(SystemExit) as stop:
        export.main([*arguments[:2], str(tmp_path / out), *(more if '--norm' in more else [*arguments[2:], *more])])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture
def onnx():
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f'{package} is not installed')
    import onnx

    return onnx


def outputs(path, names, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return dict(zip(names, session.run(names, {'image': images.numpy()})))


def same_maps(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        margin = 1e-3 * float(value.abs().max())
        torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=1e-3, atol=margin)


def operators(onnx, path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['mabn', 'bnet3', 'an'])
def test_the_maps_of_a_single_stage_detector_are_the_same_in_onnxruntime(onnx, tmp_path, norm):
    model = detectors.single_stage('retinanet', norm)
    fused, path = fuse(model), tmp_path / 'retinanet.onnx'
    names = export_onnx(fused, path, size=(64, 96), dynamic=norm == 'an')
    assert names == [f'{kind}_{level}' for kind in ('cls_scores', 'bbox_preds') for level in range(5)]
    # batch and size other than the example's, where these are open
    images = torch.randn((3, 3, 128, 64) if norm == 'an' else (1, 3, 64, 96))
    found = outputs(path, names, images)
    with torch.no_grad():
        expected = list(chain.from_iterable(model.bbox_head(model.extract_feat(images))))
    same_maps(found, dict(zip(names, expected)))
    assert 'BatchNormalization' not in operators(onnx, path)
    assert [file.name for file in tmp_path.iterdir()] == ['retinanet.onnx']


@pytest.mark.slow
def test_a_two_stage_detector_gives_its_features_and_on_request_its_proposal_maps(onnx, run, capsys):
    folder, arguments, _ = run
    path = str(folder / 'features.onnx')
    export.main([*arguments[:2], path, *arguments[2:], '--size', '64', '64'])
    assert 'outputs: features_0, features_1, features_2, features_3, features_4' in capsys.readouterr().out
    # a stem, two convolutions in 8 blocks, a depthwise one in each, 3 shortcuts; laterals and outputs of the FPN
    assert operators(onnx, path).count('Conv') == 1 + 2 * 8 + 8 + 3 + 4 + 4
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties['mean'] == '123.675 116.28 103.53' and properties['pad_size_divisor'] == '32'
    model = detectors.two_stage('bnet3')
    names = export_onnx(fuse(model), path, size=(64, 64), part='heads')
    assert names[5:] == [f'{kind}_{level}' for kind in ('cls_scores', 'bbox_preds') for level in range(5)]
    images = detectors.image()
    found = outputs(path, names, images)
    with torch.no_grad():
        features = model.extract_feat(images)
        expected = list(chain(features, *model.rpn_head(features)))
    same_maps(found, dict(zip(names, expected)))


@pytest.mark.slow
def test_a_classifier_gives_its_scores_and_on_request_its_last_map(onnx, tmp_path):
    init_default_scope('mmdet')
    backbone = dict(type='NormResNet', depth=18, base_channels=8, norm_eval=False, norm_at=dict(last=dict(type='BNET')))
    head = dict(type='LinearClsHead', num_classes=3, in_channels=64)
    model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = dict(scores=model(images), features=model.extract_feat(images))
    for part, name in ((None, 'scores'), ('features', 'features')):
        names = export_onnx(fuse(model), tmp_path / 'x.onnx', size=(32, 32), batch=2, part=part)
        assert names == [name]
        same_maps(outputs(tmp_path / 'x.onnx', names, images), {name: expected[name]})


def test_a_part_that_is_not_there_is_refused(onnx, tmp_path):
    model = fuse(detectors.single_stage('retinanet'))
    with pytest.raises(ValueError, match="part='roi' is unknown; choose one of: features, heads"):
        export_onnx(model, tmp_path / 'x.onnx', part='roi')
    for other in (None, nn.Identity()):
        model.bbox_head = other
        with pytest.raises(ValueError, match="RetinaNet has no dense head; write part='features'"):
            export_onnx(model, tmp_path / 'x.onnx', part='heads')
    with pytest.raises(ValueError, match='export takes a detector of mmdet'):
        export_onnx(small(), tmp_path / 'x.onnx')
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    _, arguments, _ = run
    with pytest.raises(SystemExit):
        export.main([*arguments[:2], str(tmp_path / 'x.onnx'), *arguments[2:]])
    assert 'pip install onnx onnxscript onnxruntime' in capsys.readouterr().err


def test_importing_the_package_loads_no_exporter():
    code = "import sys, mmdet_norms; assert callable(mmdet_norms.fuse); sys.exit('onnx' in sys.modules)"
    assert warm.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_a_folded_norm_shows_what_it_was():
    fused = fuse(small())
    assert repr(fused[0].norm) == 'Folded(BatchNorm2d)' and isinstance(fused[0].norm, Folded)
