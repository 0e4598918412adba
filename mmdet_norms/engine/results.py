"""The result of a run: ``results.json`` in the work dir and one table of average precisions or accuracies."""

import io
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import torch
from mmdet.evaluation import CocoMetric
from mmengine.dist import master_only
from mmengine.evaluator import DumpResults
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import BaseLoop, Runner
from rich import box
from rich.table import Table

from ..console import as_text, plain_console
from ..files import replacing, write_bytes
from .precise_bn import PreciseBNHook
from .start import StartHook

KINDS = ('bbox', 'segm')
COLUMNS = {
    'AP': 'mAP',
    'AP50': 'mAP_50',
    'AP75': 'mAP_75',
    'APs': 'mAP_s',
    'APm': 'mAP_m',
    'APl': 'mAP_l',
}
PER_CLASS_SUFFIX = '_precision'
_TOP = re.compile(r'accuracy/top(\d+)')
TOP1_OF_CLASS = 'accuracy/top1_'
ORIGIN = ('split', 'config', 'checkpoint', 'epoch', 'iter', 'partial_checkpoint', 'precise_bn')
"""In results.json beside the numbers."""

_KEPT = re.compile(r'results-(val|test).*\.json')
_OF_A_CLASS = re.compile(rf'(.*/)?({"|".join(KINDS)})_.+{PER_CLASS_SUFFIX}|{TOP1_OF_CLASS}.+')
_MOST_OF_CLASSES = 40  # rows of a validation that are no flood in a log
_TABLE_WIDTH = 100  # fixed, and ASCII lines, so that any log file reads like the terminal


@HOOKS.register_module()
class ResultsHook(Hook):
    """Write the metrics of every evaluation to ``results.json`` and log them as a table.

    The file lies in the run's work dir (not in the dated folder below it), is replaced in one step and
    always holds the latest evaluation: ``bbox_mAP``, ``bbox_mAP_50``, ..., ``segm_mAP``, ..., of a classifier
    ``accuracy/top1``, ``accuracy/top5`` in 0 to 1, other scalar metrics under their own names, and which config,
    checkpoint and epoch they belong to. Results of a test of another checkpoint that are replaced go on as
    ``results-test-CHECKPOINT.json``. What a :class:`ClassResultsHook` has kept of a validation is there as well, and in
    the table where that is no more than 40 numbers.

    Args:
        filename: the file's name within the work dir.
    """

    # after the evaluation and everything that might still add to the metrics
    priority = 'VERY_LOW'

    def __init__(self, filename: str = 'results.json') -> None:
        self.filename = filename

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write and log the results of a validation."""
        self._report(runner, metrics, 'val')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write and log the results of a test."""
        self._report(runner, metrics, 'test')

    @master_only
    def _report(self, runner: Runner, metrics: dict[str, float] | None, split: str) -> None:
        results = plain_results(metrics or {})
        path = Path(runner.work_dir) / self.filename
        if not results and _only_formats(runner, split):
            runner.logger.info(f'format_only: nothing was evaluated; {path} is left as it was')
            return
        origin = _origin(runner, split)
        kept = keep_earlier(path, origin)
        if kept is not None:
            runner.logger.info(f'The results that {path} had ({describe(read_json(kept))}) are now in {kept}')
        hook = next((hook for hook in runner.hooks if isinstance(hook, ClassResultsHook)), None)
        classes = plain_results(hook.results) if hook is not None and split == 'val' else {}
        write_json(path, {**results, **classes, **origin})
        if results:
            is_flood = len(classes) > _MOST_OF_CLASSES
            text = results_table(results if is_flood else {**results, **classes}, title=_title(runner, split))
            and_classes = ', those of the classes, too' * is_flood
            runner.logger.info(f'{text}Results written to {path}{and_classes}')
        else:  # CocoMetric's answer to a model that detects nothing; the file must not keep old values
            runner.logger.warning(f'The evaluation gave no results, {path} has none')


@HOOKS.register_module()
class ClassResultsHook(Hook):
    """Keep the results of single classes in a validation for ``results.json``, and from everything else.

    Of COCO's 80 classes, with masks, they are 160 numbers, which would be in the log's line, curves of every tracker,
    and in each checkpoint. ``train --per-class`` adds the hook.
    """

    priority = 'HIGHEST'  # before whoever passes metrics on

    def __init__(self) -> None:
        self.results: dict[str, object] = {}

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Take them out."""
        metrics = {} if metrics is None else metrics
        self.results = {key: metrics.pop(key) for key in list(metrics) if _OF_A_CLASS.fullmatch(key)}


@METRICS.register_module()
class PerClassCocoMetric(CocoMetric):
    """CocoMetric whose per-class results keep the kind they belong to.

    With ``classwise=True`` the stock metric stores ``<class>_precision`` for boxes and then overwrites it
    with the one for masks; here the keys are ``bbox_<class>_precision`` and ``segm_<class>_precision``.

    Args:
        table: whether to log mmdet's table, with six columns for each class.
        kwargs: as for :class:`mmdet.evaluation.CocoMetric`, without ``classwise``.
    """

    def __init__(self, table: bool = True, **kwargs) -> None:
        super().__init__(**{**kwargs, 'classwise': True})
        self.table = table

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Evaluate one kind at a time, so that each one's per-class results can be told apart."""
        merged, kinds, logger = {}, self.metrics, MMLogger.get_current_instance()
        if results and not any(len(found['labels']) for _, found in results):
            results = self._with_nothing_found(results)
        # masks are written to a file wherever they are: once is enough
        boxes = [(truth, {key: value for key, value in found.items() if key != 'masks'}) for truth, found in results]
        if not self.table:
            logger.addFilter(_is_no_table)
        try:
            for kind in kinds:
                self.metrics = [kind]
                needed = boxes if kind != 'segm' and 'segm' in kinds else results
                for key, value in super().compute_metrics(needed).items():
                    per_class = key.endswith(PER_CLASS_SUFFIX)
                    merged[f'{kind}_{key}' if per_class else key] = value
        finally:
            self.metrics = kinds
            logger.removeFilter(_is_no_table)
        return merged

    def _with_nothing_found(self, results: list) -> list:
        """Results of a detector that finds nothing, whose AP is 0; mmdet says that they are empty and gives none.

        One empty box of the first image, which cannot be right, so that all is computed as for other detectors.
        """
        if self.format_only or self.outfile_prefix is not None:  # files for people
            return results
        (truth, found), *others = results
        nothing = dict(bboxes=np.zeros((1, 4)), scores=np.zeros(1), labels=np.zeros(1, int))
        if 'masks' in found:
            empty = np.zeros((truth['height'], truth['width']), np.uint8, order='F')
            nothing['masks'] = [mask_util.encode(empty)]
        return [(truth, {**found, **nothing}), *others]


def _is_no_table(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith('\n+-')


def plain_results(metrics: dict[str, object]) -> dict[str, float | None]:
    """The scalar metrics as plain numbers, COCO's under their bare names (``bbox_mAP``).

    An undefined value (NaN) becomes None, since JSON has no NaN. COCO's -1 (no such object) stays.
    """
    plain = {}
    for key, value in metrics.items():
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, Real):
            continue
        number = float(value)
        plain[key.removeprefix('coco/')] = None if math.isnan(number) else number
    return plain


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(content, indent=2) + '\n'  # before any file exists: this is what can fail
    with replacing(path) as part:
        part.write_text(text, encoding='utf-8')


def read_json(path: Path) -> dict:
    """What :func:`write_json` wrote; nothing if it cannot be read or is something else."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> Iterator[dict]:
    """What each line says that is a whole object, of which a killed process leaves half; nothing without the file."""
    try:
        text = path.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


def describe(result: dict) -> str:
    """Of what the numbers are: ``'val, epoch 3'``, ``'test, epoch_3.pth'``; empty if the file does not say it."""
    split, checkpoint = result.get('split'), result.get('checkpoint')
    if split == 'test':
        return f'test, {os.path.basename(str(checkpoint))}' if checkpoint else 'test'
    when = next((f'{key} {result[key]}' for key in ('epoch', 'iter') if result.get(key) is not None), None)
    return ', '.join(str(part) for part in (split, when) if part)


def keep_earlier(path: Path, origin: dict) -> Path | None:
    """Copy the results at ``path`` to a name of their own if those of ``origin`` are of something else.

    A validation that is replaced by the next one, or by a test of the checkpoint that it judged, is not kept, nor is a
    test that is run again.

    Returns:
        The copy's path, if one was made.
    """
    old = read_json(path)
    if old.get('split') not in ('val', 'test') or _says_the_same(old, origin):
        return None
    what = describe(old).replace(', ', '-').replace(' ', '_').removesuffix('.pth')
    name = re.sub(r'[^\w.-]', '_', what)[:100]
    names = (f'results-{name}{more}.json' for more in ('', *(f'-{number}' for number in range(2, 1000))))
    places = (path.with_name(name) for name in names)
    kept = next(place for place in places if not place.exists() or _identity(read_json(place)) == _identity(old))
    write_bytes(kept, path.read_bytes())
    return kept


def kept_results(work_dir: Path) -> list[Path]:
    """What :func:`keep_earlier` made in a work dir."""
    return sorted(path for path in work_dir.glob('results-*.json') if _KEPT.fullmatch(path.name) and _is_ours(path))


def _is_ours(path: Path) -> bool:
    return path.name.startswith(f'results-{read_json(path).get("split")}')


def _says_the_same(old: dict, new: dict) -> bool:
    if old['split'] == 'test':
        return _identity(old) == _identity(new)
    judged = [f'{key}_{old.get(key)}' for key in ('epoch', 'iter')]
    return new['split'] == 'val' or Path(str(new.get('checkpoint'))).stem in judged


def _identity(result: dict) -> tuple:
    """Two tests with the same one are the same test; two validations, of the same point of a run."""
    checkpoint = result.get('checkpoint')
    checkpoint = checkpoint if checkpoint is None or '://' in str(checkpoint) else os.path.realpath(str(checkpoint))
    keys = ('split', 'config', 'epoch', 'iter', 'partial_checkpoint', 'precise_bn')
    return checkpoint, *(result.get(key) for key in keys)


def results_table(results: dict[str, float | None], title: str = '') -> str:
    """A text table of the COCO results (:func:`coco_kinds`) or accuracies, and a second one per class if there are any.

    Empty if ``results`` has neither.
    """
    kinds, tops = coco_kinds(results), accuracies(results)
    tables = []
    if kinds:
        rows = {kind: [results.get(f'{kind}_{key}') for key in COLUMNS.values()] for kind in kinds}
        tables += [_table(COLUMNS, rows, title), *_per_class_tables(results, kinds)]
    if tops:
        accuracy = {'accuracy': [results[key] for key in tops.values()]}
        tables += ['' if kinds else as_text(title), _table(tops, accuracy)]  # narrower than a title, which would break
        names = {key.removeprefix(TOP1_OF_CLASS): [results[key]] for key in results if key.startswith(TOP1_OF_CLASS)}
        tables += ['accuracy per class', _table(['top-1'], names, first='class')] if names else []
    return _as_text(*tables) if tables else ''


def _table(columns: Iterable[str], rows: dict[str, list[float | None]], title: str = '', first: str = '') -> Table:
    table = Table(title=as_text(title) or None, title_justify='left', box=box.ASCII2)
    table.add_column(first)
    for column in columns:
        table.add_column(as_text(column), justify='right')
    for name, values in rows.items():
        table.add_row(as_text(name), *map(format_ap, values))
    return table


def accuracies(results: Mapping[str, object]) -> dict[str, str]:
    """Of a classifier's results, what columns call them: ``{'top-1': 'accuracy/top1', ...}``, the smallest k first."""
    found = {int(match[1]): key for key in results if (match := _TOP.fullmatch(key))}
    return {f'top-{k}': found[k] for k in sorted(found)}


def is_accuracy(key: str) -> bool:
    """Whether a key is one that :func:`results_table` shows of a classifier, of its classes included."""
    return bool(_TOP.fullmatch(key)) or key.startswith(TOP1_OF_CLASS)


def coco_kinds(results: dict[str, object]) -> list[str]:
    """What COCO precisions ``results`` has: ``bbox``, ``segm``, and with a prefix what semi-supervised runs evaluate.

    Their teacher's ``teacher/coco/bbox_mAP`` is the kind ``teacher/coco/bbox``.
    """
    found = [key.removesuffix('_mAP') for key in results if key.endswith('_mAP')]
    found = [kind for kind in found if kind.rpartition('/')[2] in KINDS]
    return sorted(found, key=lambda kind: KINDS.index(kind.rpartition('/')[2]))


def other_keys(results: Mapping[str, object]) -> list[str]:
    """Keys of results that no :func:`results_table` shows: VOC's mAP, recalls of proposals."""
    kinds = coco_kinds(results)
    shown = {f'{kind}_{key}' for kind in kinds for key in COLUMNS.values()} | set(ORIGIN)
    of_coco = tuple(f'{kind}_' for kind in kinds)
    return [
        key
        for key in results
        if key not in shown
        and not is_accuracy(key)
        and not (key.startswith(of_coco) and key.endswith((PER_CLASS_SUFFIX, '_copypaste')))
    ]


def _only_formats(runner: Runner, split: str) -> bool:
    """Whether no metric of the evaluation was to compute anything (CocoMetric's ``format_only``)."""
    loop = getattr(runner, f'_{split}_loop', None)
    metrics = getattr(getattr(loop, 'evaluator', None), 'metrics', [])
    metrics = [metric for metric in metrics if not isinstance(metric, DumpResults)]
    return bool(metrics) and all(getattr(metric, 'format_only', False) for metric in metrics)


def _per_class_tables(results: dict[str, float | None], kinds: list) -> list:
    classes: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        for kind in kinds:
            if key.startswith(f'{kind}_') and key.endswith(PER_CLASS_SUFFIX):
                name = key[len(kind) + 1 : -len(PER_CLASS_SUFFIX)]
                classes.setdefault(name, {})[kind] = value
    rows = {name: [values.get(kind) for kind in kinds] for name, values in classes.items()}
    return [_table([f'{kind} AP' for kind in kinds], rows, 'AP per class', 'class')] if rows else []


def format_ap(value: float | None) -> str:
    """An AP or accuracy as results.json has it; COCO marks "no such objects" with -1, per class with NaN."""
    return '-' if value is None or value < 0 else f'{value:.3f}'


def _as_text(*tables: Table | str) -> str:
    console = plain_console(file=io.StringIO(), width=_TABLE_WIDTH)
    console.print()
    for table in tables:
        console.print(table)
    return '\n'.join(line.rstrip() for line in console.file.getvalue().split('\n'))


def _origin(runner: Runner, split: str) -> dict:
    """Which config, weights and point in training a result belongs to."""
    origin = {'split': split, 'config': runner.cfg.filename}
    if split == 'test':
        origin['checkpoint'] = None if runner._load_from is None else str(runner._load_from)
    elif isinstance(runner._train_loop, BaseLoop):  # asking for runner.epoch would build the loop
        origin.update(epoch=runner.epoch, iter=runner.iter)
    partial = next((hook.partial for hook in runner.hooks if isinstance(hook, StartHook)), None)
    if partial:
        origin['partial_checkpoint'] = dict(partial)
    hooks = [hook for hook in runner.hooks if isinstance(hook, PreciseBNHook)]
    hooks += [hook for hook in runner.hooks if isinstance(hook, StartHook) and split == 'test']
    precise = next((hook.precise for hook in hooks if hook.precise), None)
    if precise:
        origin['precise_bn'] = dict(precise)
    return origin


def _title(runner: Runner, split: str) -> str:
    name = Path(runner.cfg.filename or 'results').stem
    origin = _origin(runner, split)
    when = f', epoch {origin["epoch"]}' if 'epoch' in origin else ''
    return f'{name} ({split}{when})'
