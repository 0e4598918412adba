"""Published rows beside ours: of whichever config of this package a run has all of that decides the result."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import load

from mmdet_norms_start import own_configs

from ...engine.results import COLUMNS
from ..runs import Run
from .metrics import KIND_NAMES

_KEYS = {f'{name} {ap}': f'{kind}_{key}' for kind, name in KIND_NAMES.items() for ap, key in COLUMNS.items()}
_KEYS |= {'Top 1 Accuracy': 'accuracy/top1', 'Top 5 Accuracy': 'accuracy/top5'}

# What changes no result: which file of weights, of one network, is read, and the scope that mmengine adds to a base.
_NOWHERE = ('checkpoint', 'backend_args', '_scope_')
_OF_DATASETS = ('data_root', 'lazy_init', 'serialize_data')
_OF_LOADERS = ('batch_size', 'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'timeout')
_OF_METRICS = ('classwise', 'per_class', 'table', 'outfile_prefix', 'collect_device')
_OF_LOOPS = ('max_iters', 'val_interval', 'val_begin', 'dynamic_intervals')
# Of the rest a row needs the same: one that this package's train adds, or that logs, changes no result.
_NO_RESULT = (
    *('NormHook', 'ResultsHook', 'ClassResultsHook', 'ScheduleHook', 'RandomStateHook', 'PendingValidationHook'),
    *('CostHook', 'NonFiniteHook', 'NormStatsHook', 'SyncBuffersHook', 'TrackersHook', 'PicturesHook', 'TuneModeHook'),
    *('ChannelsLastHook', 'IterTimerHook', 'LoggerHook', 'TimedLoggerHook', 'CheckpointHook', 'RuntimeInfoHook'),
    *('DetVisualizationHook', 'VisualizationHook', 'MemoryProfilerHook', 'EmptyCacheHook'),
)
_OWN_HOOKS = dict(  # of mmengine, where a config names none in their place
    param_scheduler=dict(type='ParamSchedulerHook'), sampler_seed=dict(type='DistSamplerSeedHook')
)
_TIMES, _LISTS = ('begin', 'end', 'T_max', 'step_size', 'total_steps'), ('milestones', 'periods')
_RATES = ('eta_min', 'eta_max', 'min_value')
_ROUNDED = 0.01  # of a learning rate for another batch, as people write it


def published(run: Run) -> dict | None:
    """What a metafile says of the run's model: name, results in the unit of results.json, and data.

    The row need not be that of the config that the run was started with: with ``--norm`` it is that of another one.
    None where no row has its model, data, evaluation, optimizer, schedule and hooks. With another batch size, the
    learning rate must be that of the linear rule, and what counts iterations that of as many images.
    """
    model = next((model for model, path in _candidates(run) if _is_of(_config(path), run)), None)
    return model and dict(name=model['Name'], data=', '.join(sorted(_data_sets(model))), results=_results(model))


def _candidates(run: Run) -> Iterator[tuple[dict, Path]]:
    """The row of its own config, and those that count as many parameters: few, as reading a config takes a while."""
    loop, parameters = run.cfg.get('train_cfg') or {}, run.cost.get('parameters')
    own = _rows().get(Path(run.config).stem)
    same = (row for row in _rows().values() if parameters and row[0]['Metadata'].get('Parameters') == parameters)
    for model, path in [*([own] if own else []), *(row for row in same if row is not own)]:
        counts_epochs = 'max_epochs' in loop and model['Metadata'].get('Epochs') == loop['max_epochs']
        counts_iterations = 'max_iters' in loop and 'Iterations' in model['Metadata']
        if _results(model) and (counts_epochs or counts_iterations):
            yield model, path


def _is_of(theirs: Mapping, run: Run) -> bool:
    if _recipe(theirs) != _recipe(run.cfg):
        return False
    base = (theirs.get('auto_scale_lr') or {}).get('base_batch_size') or theirs['train_dataloader']['batch_size']
    size = run.labels.get('batch_size') or base
    ours, published = _rates(run.cfg, size), _rates(theirs, base)
    if len(ours) != len(published) or not all(map(functools.partial(math.isclose, rel_tol=_ROUNDED), ours, published)):
        return False
    ours, published = _images(run.cfg, size), _images(theirs, base)
    far = [abs(one - other) > size + 0.001 * other for one, other in zip(ours, published)]  # iterations are rounded
    return len(ours) == len(published) and not any(far)


def _results(model: Mapping) -> dict[str, float]:
    values = (
        (_KEYS.get(k), v) for result in model.get('Results') or () for k, v in (result.get('Metrics') or {}).items()
    )
    return {key: value / 100 for key, value in values if key}


def _data_sets(model: Mapping) -> set[str]:
    return {result.get('Dataset', '') for result in model.get('Results') or ()}


@functools.cache
def _rows() -> dict[str, tuple[dict, Path]]:
    """Name of a config -> its entry in a metafile of this package, and its file."""
    folder = own_configs.folder()
    index = load(str(folder / 'model-index.yml'))
    models = (model for path in index['Import'] for model in load(str(folder / path))['Models'])
    return {Path(model['Config']).stem: (model, folder / model['Config']) for model in models}


@functools.cache
def _config(path: Path) -> dict:
    return Config.fromfile(path, import_custom_modules=False).to_dict()


def _recipe(cfg: Mapping) -> list:
    """What has to be the same, whatever the batch size.

    Of the model all but the file of its weights: GN with and without WS, or CBN of another rho, are other models, and
    so is one that starts from no weights. Of annotations the name of the file: the folder is everybody's own.
    """
    loop = cfg.get('train_cfg') or {}
    wrapper = _without(cfg.get('optim_wrapper'), ())
    wrapper['optimizer'] = _without(wrapper.get('optimizer'), ('lr',))
    return [
        *(_plain(cfg.get('model')), bool(cfg.get('load_from')), cfg.get('sync_bn')),
        *(_plain(_without(_data(cfg.get(f'{split}_dataloader')), _OF_LOADERS)) for split in ('train', 'val')),
        [_plain(_named(_without(metric, _OF_METRICS))) for metric in _listed(cfg.get('val_evaluator'))],
        *(_plain(wrapper), _plain(_without(loop, _OF_LOOPS)), _hooks(cfg)),
        [
            _plain(_without(entry, (*_LISTS, *_RATES, *_TIMES) if _counts_iterations(entry) else _RATES))
            for entry in _listed(cfg.get('param_scheduler'))
        ],
    ]


def _rates(cfg: Mapping, size: int) -> list[float]:
    """Learning rates for one image."""
    rates = [((cfg.get('optim_wrapper') or {}).get('optimizer') or {}).get('lr')]
    scale = cfg.get('auto_scale_lr') or {}
    if scale.get('enable') and scale.get('base_batch_size'):
        rates = [rate and rate * size / scale['base_batch_size'] for rate in rates]
    rates += [entry[key] for entry in _listed(cfg.get('param_scheduler')) for key in _RATES if key in entry]
    return [rate / size for rate in rates if isinstance(rate, (int, float))]


def _images(cfg: Mapping, size: int) -> list[float]:
    """Until the end, and until each point of a schedule that counts iterations."""
    iterations = [(cfg.get('train_cfg') or {}).get('max_iters')]
    for entry in _listed(cfg.get('param_scheduler')):
        if _counts_iterations(entry):
            iterations += [entry.get(key) for key in _TIMES]
            iterations += [step for key in _LISTS for step in entry.get(key) or ()]
    return [count * size for count in iterations if isinstance(count, (int, float))]


def _counts_iterations(entry: Mapping) -> bool:
    return entry.get('by_epoch') is False


def _hooks(cfg: Mapping) -> list:
    found = [*{**_OWN_HOOKS, **(cfg.get('default_hooks') or {})}.values(), *_listed(cfg.get('custom_hooks'))]
    found = [_plain(hook) for hook in found if hook]
    names = [str(hook.get('type') if isinstance(hook, dict) else hook).rpartition('.')[2] for hook in found]
    starts_whole = dict(type='StartHook')  # without what --allow-partial left out
    return [hook for hook, name in zip(found, names) if name not in _NO_RESULT and hook != starts_whole]


def _data(node: object) -> object:
    """A loader or a data set, down to the one that reads: wrappers, filters and pipelines decide what a model sees."""
    if isinstance(node, (list, tuple)):
        return [_data(entry) for entry in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: _data(value) if key in ('dataset', 'datasets') else value for key, value in node.items()}
    return _named(_without(found, _OF_DATASETS))


def _named(entry: Mapping) -> dict:
    """With the names of files and folders, wherever they are; a metric for each class is the same metric."""
    found = dict(entry)
    if isinstance(found.get('ann_file'), str):
        found['ann_file'] = Path(found['ann_file']).name
    if isinstance(found.get('data_prefix'), Mapping):
        found['data_prefix'] = {key: Path(str(value)).name for key, value in found['data_prefix'].items()}
    if found.get('type') == 'PerClassCocoMetric':
        found['type'] = 'CocoMetric'
    return found


def _without(entry: object, keys: Sequence[str]) -> dict:
    return {key: value for key, value in entry.items() if key not in keys} if isinstance(entry, Mapping) else {}


def _listed(node: object) -> Sequence:
    return node if isinstance(node, (list, tuple)) else [node] if node else []


def _plain(node: object) -> object:
    """With lists for tuples, as a config that was written down has them."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items() if key not in _NOWHERE}
    return [_plain(entry) for entry in node] if isinstance(node, (list, tuple)) else node
