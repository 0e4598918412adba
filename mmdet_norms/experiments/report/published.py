"""Published rows beside ours: of whichever config of this package a run has the model, the data and the length of."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import load

from mmdet_norms_start import own_configs

from ...engine.results import COLUMNS
from ..runs import Run
from .metrics import KIND_NAMES

_KEYS = {f'{name} {ap}': f'{kind}_{key}' for kind, name in KIND_NAMES.items() for ap, key in COLUMNS.items()}
_FILES = ('checkpoint', 'backend_args')
_KEYS |= {'Top 1 Accuracy': 'accuracy/top1', 'Top 5 Accuracy': 'accuracy/top5'}


def published(run: Run) -> dict | None:
    """What a metafile says of the run's model: name, results in the unit of results.json, and data.

    The row need not be that of the config that the run was started with: with ``--norm`` it is that of another one.
    None where no row has its model, data set, augmentation and number of epochs or, where iterations count, of images.
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
    return all(of(theirs) == of(run.cfg) for of in (_model, _data, _epochs)) and _has_images_of(theirs, run)


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


def _model(cfg: Mapping) -> object:
    """All of it but the file of its weights: GN with and without WS, or CBN of another rho, are other models.

    So is one that starts from no weights.
    """
    return _plain(cfg.get('model')), bool(cfg.get('load_from'))


def _plain(node: object) -> object:
    """Without files of weights, and with lists for tuples, as a config that was written down has them."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items() if key not in _FILES}
    return [_plain(entry) for entry in node] if isinstance(node, (list, tuple)) else node


def _epochs(cfg: Mapping) -> int | None:
    """None of a training that counts iterations."""
    return (cfg.get('train_cfg') or {}).get('max_epochs')


def _has_images_of(theirs: Mapping, run: Run) -> bool:
    """Whether a training that counts iterations sees as many images: with another batch size they are others."""
    ours, published = ((cfg.get('train_cfg') or {}).get('max_iters') for cfg in (run.cfg, theirs))
    if ours is None or published is None:
        return ours == published
    their_size = (theirs.get('auto_scale_lr') or {}).get('base_batch_size') or theirs['train_dataloader']['batch_size']
    size = run.labels.get('batch_size') or their_size
    return abs(ours * size - published * their_size) <= size  # iterations are rounded


def _data(cfg: Mapping) -> tuple:
    """What tells COCO from somebody's own images in its place, and a training on several sizes from one on one.

    That is the classes, by the annotation file where none are, and the transforms.
    """
    dataset = (cfg.get('val_dataloader') or cfg.get('train_dataloader') or {}).get('dataset') or {}
    trained = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in trained and isinstance(trained.get('dataset'), Mapping):  # such as RepeatDataset
        trained = trained['dataset']
    classes = list((dataset.get('metainfo') or {}).get('classes') or ())
    return dataset.get('type'), classes, Path(str(dataset.get('ann_file'))).name, _plain(trained.get('pipeline'))
