"""``tools/test.py``: evaluate a checkpoint."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import DumpDetResults
from mmdet.registry import HOOKS, METRICS
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from mmdet_norms.commands import typed
from mmdet_norms.deploy import is_fused
from mmdet_norms.engine.coco_detections import DumpCocoDetections, category_ids, is_detections
from mmdet_norms.engine.predictions import DumpPredictions, is_predictions
from mmdet_norms.engine.shared_memory import require_shared_memory
from mmdet_norms.engine.work_dir import TESTING, claimed, require_unclaimed
from mmdet_norms.entries import class_of, is_a, is_classifier, name_of, parameter_of
from mmdet_norms.files import remove_unfinished, require_writable

from .check import check_data
from .common import (
    UserError,
    add_check_argument,
    add_common_arguments,
    build_runner,
    command,
    is_first_process,
    load_config,
    require_annotations,
    require_checkpoint,
    run_with_checkpoint,
    use_threads,
)
from .config_checks import KINDS, config_problems, predicts_masks, require_none
from .per_class import tell_classes_apart
from .precise_bn import add_precise_bn_argument, use_precise_bn
from .weights import add_partial_argument, check_test

_DETECTIONS = ('.json', '.pkl', '.pickle')


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_args(argv)
    cfg = test_config(args)
    check_test(cfg, args)
    with _claimed(cfg, args) if is_first_process(args) else nullcontext():
        runner = build_runner(cfg, use_threads(args, cfg.get('test_dataloader')))
        if args.out is not None:
            _save_detections(runner, args.out)
        run_with_checkpoint(runner.test, args)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=typed('test'), description='Evaluate a checkpoint.')
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--eval', nargs='+', choices=KINDS, help="what to evaluate; default: what the config's evaluator says"
    )
    parser.add_argument('--per-class', action='store_true', help='AP, or accuracy, of every class as well')
    parser.add_argument(
        '--out',
        metavar='FILE',
        help="save the detections: *.json in COCO's result format, *.pkl as mmdet does; of a classifier the class and "
        'score of every image',
    )
    parser.add_argument('--show-dir', metavar='DIR', help='save every test image with its detections')
    parser.add_argument(
        '--fuse', action='store_true', help='fold the norms into the convolutions first: the model as it is deployed'
    )
    add_precise_bn_argument(parser, 'the evaluation')
    add_partial_argument(parser, 'evaluate')
    add_common_arguments(parser)
    add_check_argument(parser)
    args = parser.parse_args(argv)
    args.reads = ('test',) if args.precise_bn is None else ('train', 'test')
    return args


def test_config(args: argparse.Namespace) -> Config:
    """The config that the arguments of a test lead to. Raises before anything heavy happens."""
    if args.out is not None:
        _check_out(args.out)
    cfg = load_config(args)
    if is_classifier(cfg.get('model')):
        _refuse_for_classifiers(args)
    if args.out is not None:
        _check_replaced(args.out, is_classifier(cfg.get('model')))
    ignored = [key for key in ('load_from', 'resume') if key in (args.cfg_options or {})]
    if ignored:
        raise UserError(f'--cfg-options {ignored[0]}: this key changes nothing in a test; name the checkpoint as CKPT')
    if args.out is not None and os.path.realpath(args.out) == os.path.realpath(f'{cfg.work_dir}/results.json'):
        raise UserError(f'--out {args.out}: the metrics are written there; name the detections detections.json')
    require_checkpoint(args.checkpoint, 'CKPT')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.eval is not None:
        _evaluate(cfg, args)
    require_none(config_problems(cfg, ('test',)))
    if args.per_class:
        for metric in _metrics_per_class(cfg):
            tell_classes_apart(metric, with_subclasses=True)
    if args.show_dir is not None:
        _draw_into(cfg, args.show_dir)
    _add_fuse_hook(cfg, args.fuse)
    use_precise_bn(cfg, args.precise_bn, at_test=True)
    if args.precise_bn is not None and is_fused(Path(args.checkpoint).expanduser()):
        raise UserError(
            f'--precise-bn {args.precise_bn}: {args.checkpoint} is of a fused model, which has no norms; '
            'name the checkpoint that it was made from'
        )
    loaders = tuple(f'{split}_dataloader' for split in args.reads)
    for loader in loaders:
        require_annotations(cfg, loader)
    check_data(cfg, args.reads, args.allow_data_faults)
    require_shared_memory(cfg, loaders)
    return cfg


@contextmanager
def _claimed(cfg: Config, args: argparse.Namespace) -> Iterator[None]:
    """The work dir, whose results.json a training or another test would write, too; and room for what is asked."""
    if args.out is not None:
        require_writable(args.out, '--out')
    if args.show_dir is not None:
        require_writable(Path(args.show_dir) / 'picture', '--show-dir')
    require_unclaimed(cfg.work_dir)
    with claimed(cfg.work_dir, TESTING):
        for place in {Path(path).parent for path in (f'{cfg.work_dir}/results.json', args.out) if path}:
            remove_unfinished(place)
        yield


test_config.__test__ = False  # the name is for people, not for pytest


def _add_fuse_hook(cfg: Config, fuse: bool) -> None:
    """With or without --fuse, so that checkpoints of fused models are recognized."""
    hooks = [dict(hook) for hook in cfg.get('custom_hooks') or []]
    ours = [hook for hook in hooks if is_a(hook, 'FuseHook', HOOKS)]
    if not ours:
        hooks.append(dict(type='FuseHook', fuse=fuse))
    elif fuse:
        ours[0]['fuse'] = True
    cfg.custom_hooks = hooks


def _check_out(out: str) -> None:
    """Raise unless ``out`` can be written: a name of a known kind that no other kind of file has."""
    if not out.endswith(_DETECTIONS):
        raise UserError(f'--out {out}: name the file *.json (COCO result format) or *.pkl (as mmdet does)')
    path = Path(out)
    if path.is_dir():
        raise UserError(f'--out {out}: is a folder; name a file in it')


def _check_replaced(out: str, classifier: bool) -> None:
    """Raise if a file of that name is there that holds something else."""
    path = Path(out)
    is_ours = is_predictions if classifier and path.suffix == '.json' else is_detections
    if path.is_file() and not is_ours(path):
        what = 'predictions' if classifier else 'detections'
        raise UserError(f'--out {out}: there is such a file, and it holds no {what}; choose another name')


def _refuse_for_classifiers(args: argparse.Namespace) -> None:
    """What there is of detectors only."""
    model = f'the model of {args.config} is an image classifier'
    if args.eval is not None:
        raise UserError(
            f'--eval {" ".join(args.eval)}: {model}, whose metric is accuracy (test_evaluator.topk says which); leave '
            '--eval out'
        )
    if args.show_dir is not None:
        raise UserError(
            f'--show-dir {args.show_dir}: {model}, and the option draws detections; --out FILE.json writes the '
            'predicted class of every image'
        )


def _save_detections(runner: Runner, out: str) -> None:
    """Beside the metrics, one that keeps the detections, or the predictions of a classifier."""
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    metrics = runner.test_evaluator.metrics
    if is_classifier(runner.cfg.model):
        metrics.append(DumpPredictions(out) if out.endswith('.json') else DumpResults(out_file_path=out))
        metrics[-1].dataset_meta = runner.test_evaluator.dataset_meta
    elif out.endswith('.json'):
        metrics.append(DumpCocoDetections(out, category_ids(runner.test_dataloader.dataset, out)))
    else:
        metrics.append(DumpDetResults(out_file_path=out))


def _evaluate(cfg: Config, args: argparse.Namespace) -> None:
    metrics = _coco_metrics(cfg, '--eval')
    if 'segm' in args.eval and not predicts_masks(cfg.model):
        others = [kind for kind in args.eval if kind != 'segm'] or ['bbox']
        raise UserError(
            f'--eval segm: the model of {args.config} predicts boxes only (it has no mask head); '
            f'write --eval {" ".join(others)}, or use a config with masks such as Mask R-CNN'
        )
    for metric in metrics:
        metric.metric = list(dict.fromkeys(args.eval))


def _metrics_per_class(cfg: Config) -> list[dict]:
    """The config's metrics that tell classes apart where they are asked to."""
    if is_classifier(cfg.get('model')):
        return _metrics_of(cfg, '--per-class', 'Accuracy')
    return _coco_metrics(cfg, '--per-class')


def _coco_metrics(cfg: Config, option: str) -> list[dict]:
    """The config's COCO metrics, which are the ones that the options act on."""
    return _metrics_of(cfg, option, 'CocoMetric')


def _metrics_of(cfg: Config, option: str, kind: str) -> list[dict]:
    evaluator = cfg.get('test_evaluator') or []
    entries = list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]
    found = [entry for entry in entries if is_a(entry, kind, METRICS)]
    if not found:
        types = ', '.join(name_of(entry, METRICS) for entry in entries) or 'none'
        raise UserError(
            f"{option} is for {'COCO metrics' if kind == 'CocoMetric' else kind}, but the config's test_evaluator is "
            f"{types}; leave {option} out to use it as it is, or set test_evaluator.type='{kind}'"
        )
    return found


def _draw_into(cfg: Config, directory: str) -> None:
    hooks = cfg.get('default_hooks') or {}
    if parameter_of(hooks.get('visualization'), 'test_out_dir', HOOKS) is None:
        raise UserError(
            "--show-dir needs a visualization hook; set default_hooks.visualization=dict(type='DetVisualizationHook')"
        )
    # an absolute path is taken as it is, a relative one would land in the dated folder of the run
    hooks.visualization.update(draw=True, test_out_dir=os.path.abspath(directory))
    if class_of(hooks.visualization, HOOKS) is DetVisualizationHook:  # a user's own subclass draws its own way
        hooks.visualization.type = 'PicturesHook'


if __name__ == '__main__':
    main()
