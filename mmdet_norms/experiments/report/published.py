"""Published rows beside ours: of the config that a run was started with, where it still is that config."""

import functools
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import load

from mmdet_norms_start import own_configs

from ...engine.results import COLUMNS
from ..runs import Run
from .metrics import KIND_NAMES

_KEYS = {f'{name} {ap}': f'{kind}_{key}' for kind, name in KIND_NAMES.items() for ap, key in COLUMNS.items()}
_KEYS |= {'Top 1 Accuracy': 'accuracy/top1', 'Top 5 Accuracy': 'accuracy/top5'}


def published(run: Run) -> dict | None:
    """What the metafile says of the run's config: name, results in the unit of results.json, data and iterations.

    None where there is no such row, or the run has another model, data set or number of epochs than its config.
    """
    entry = _rows().get(Path(run.config).stem)
    if entry is None or not run.cfg:
        return None
    model, path = entry
    theirs = _config(path)
    if any(of(theirs) != of(run.cfg) for of in (_model, _data, _epochs)):
        return None
    results, data = {}, set()
    for result in model.get('Results') or ():
        data.add(result.get('Dataset', ''))
        for name, value in (result.get('Metrics') or {}).items():
            if name in _KEYS:
                results[_KEYS[name]] = value / 100
    return dict(name=model['Name'], data=', '.join(sorted(data)), results=results) if results else None


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
    """All of it but where its weights come from: GN with and without WS, or CBN of another rho, are other models."""

    def plain(node: object) -> object:
        if isinstance(node, Mapping):
            return {key: plain(value) for key, value in node.items() if key != 'init_cfg'}
        return [plain(entry) for entry in node] if isinstance(node, (list, tuple)) else node

    return plain(cfg.get('model'))


def _epochs(cfg: Mapping) -> int | None:
    """None of a training that counts iterations, which are others with another batch size."""
    return (cfg.get('train_cfg') or {}).get('max_epochs')


def _data(cfg: Mapping) -> tuple:
    """What tells COCO from somebody's own images in its place: the classes, by the annotation file where none are."""
    dataset = (cfg.get('val_dataloader') or cfg.get('train_dataloader') or {}).get('dataset') or {}
    classes = list((dataset.get('metainfo') or {}).get('classes') or ())
    return dataset.get('type'), classes, Path(str(dataset.get('ann_file'))).name
