"""What the model of a run finds on its validation set: computed once, kept in the run's folder, drawn side by side."""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import nn
from torch.utils.data import Dataset, Subset

from ..checkpoints.fit import fit
from ..checkpoints.read import read_checkpoint
from ..choice import evenly
from ..classification.image_folder import image_folders, problems_of
from ..commands import typed
from ..config_files import read_config_file
from ..console import as_text, plain_column, plain_console
from ..datasets.generated import sha256
from ..datasets.sources import sources
from ..deploy import fuse, is_fused
from ..engine.coco_detections import DumpCocoDetections, category_ids, coco_entries
from ..engine.inference import with_boxes
from ..engine.picture import Colours, Instance, class_colours, draw_columns, objects_of, read_image, to_mask
from ..engine.safe_checkpoints import CheckpointFolder
from ..entries import is_a, is_classifier
from ..errors import UserError, some
from ..files import write_text
from ..version import __version__
from .runs import configs_of

FOLDER = 'detections'
"""In the folder of a run: ``val-CHECKPOINT-DIGEST.json``, of some images only ``val-CHECKPOINT-DIGEST-IMAGES.json``."""

_FEW = 64  # images that are not worth the workers of a data loader
_ALONE = dict(num_workers=0, persistent_workers=False)


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """A work dir of ``train`` with one of its checkpoints.

    Args:
        name: the work dir's, and that of a checkpoint where one was named.
        path: the work dir.
        checkpoint: the file.
        cfg: that the run was trained with.
    """

    name: str
    path: Path
    checkpoint: Path
    cfg: Config

    @property
    def is_classifier(self) -> bool:
        return is_classifier(self.cfg.get('model'))

    @cached_property
    def dataset(self) -> Dataset:
        """The validation set.

        Raises:
            UserError: there is none, or it is not there any more.
        """
        _require_data(self)
        init_default_scope(self.cfg.get('default_scope') or 'mmdet')
        with redirect_stdout(io.StringIO()):  # of pycocotools
            return Runner.build_dataloader(dict(self.cfg.val_dataloader, **_ALONE)).dataset

    @cached_property
    def infos(self) -> dict[object, dict]:
        """What the validation set says of each image, by its id: of a detector's the annotation file's, else a path."""
        infos = map(self.dataset.get_data_info, range(len(self.dataset)))
        return {info['img_path' if self.is_classifier else 'img_id']: info for info in infos}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, self.dataset.metainfo.get('classes') or ()))

    @cached_property
    def colours(self) -> Colours:
        """Name and colour of each label."""
        return class_colours(self.classes, self.dataset.metainfo.get('palette'))

    @cached_property
    def category_ids(self) -> list[int]:
        """The annotation file's id of each label."""
        return category_ids(self.dataset, self.path)

    @cached_property
    def digest(self) -> str:
        """Of what the model's answers depend on."""
        hooks = [hook for hook in self.cfg.get('custom_hooks') or [] if is_a(hook, 'ChannelsLastHook', HOOKS)]
        parts = [__version__, sha256(self.checkpoint), self.cfg.model, self.cfg.val_dataloader, hooks]
        images = [(image, os.path.basename(info['img_path'])) for image, info in self.infos.items()]
        return _digest([*parts, images])


def open_run(run: EvaluatedRun | str | os.PathLike) -> EvaluatedRun:
    """A run by its work dir, of which the newest checkpoint counts, or by one of the checkpoints in there.

    One that is open is given as it is.

    Raises:
        UserError: there is no such folder or file, or none of its configs or checkpoints.
    """
    if isinstance(run, EvaluatedRun):
        return run
    path = Path(run)
    if not path.exists():
        raise UserError(f'there is no run {run}: name a work dir of {typed("train")}, or a checkpoint in one')
    work_dir = path if path.is_dir() else path.parent
    cfg = read_config_file(config_file(work_dir))
    cfg.work_dir = str(work_dir)
    name = os.path.basename(os.path.abspath(work_dir))
    if path.is_dir():
        path = CheckpointFolder.of(cfg).newest().path
        if path is None:
            raise UserError(f'the run {run} has no checkpoint (yet), so that it is not known what it detects')
    else:
        name = f'{name}/{path.name}'
    return EvaluatedRun(name, work_dir, path, cfg)


def config_file(work_dir: Path) -> Path:
    """The config that a run was trained with: the first one of :func:`.runs.configs_of`, or the only one beside it.

    Raises:
        UserError: there is none.
    """
    beside = sorted(work_dir.glob('*.py'))
    found = [*configs_of(work_dir), *(beside if len(beside) == 1 else ())]
    if not found:
        raise UserError(
            f'{work_dir} is no work dir of {typed("train")}: it has no DATE_TIME/vis_data/config.py, which says what '
            'was trained'
        )
    return found[0]


def detections(run: EvaluatedRun | str | os.PathLike, images: Sequence | None = None) -> list[dict]:
    """What a run's detector finds, as COCO's format has it: ``{image_id, category_id, bbox, score[, segmentation]}``.

    Computed as the run's own validation does, and kept in the run's folder until checkpoint, config or data change.

    Args:
        run: as :func:`open_run` takes it.
        images: ids of some of the validation set's; all by default.

    Raises:
        UserError: the run has no detector, or cannot be evaluated; the message says why.
    """
    run = open_run(run)
    if run.is_classifier:
        raise UserError(f'the model of {run.path} is an image classifier, which detects nothing')
    ids = _known(run, images)

    def compute() -> list[dict]:
        metric = DumpCocoDetections('', run.category_ids)
        for samples in answers(run, ids):
            if any('pred_instances' not in sample for sample in samples):
                raise UserError(f'the model of {run.path} predicts no instances with boxes or masks')
            metric.process({}, [with_boxes(sample).to_dict() for sample in samples])
        return coco_entries(metric.results, run.category_ids)[0]

    if ids is not None:
        chosen, whole = set(ids), _read(_place(run, None))
        if whole is not None:
            return [entry for entry in whole if entry['image_id'] in chosen]
    return _once(run, ids, compute)


def predictions(run: EvaluatedRun | str | os.PathLike) -> list[dict]:
    """What a run's classifier says of its validation set: ``{img_path, gt_label, pred_label, pred_score}`` an image.

    As for :func:`detections`.
    """
    run = open_run(run)
    if not run.is_classifier:
        raise UserError(f'the model of {run.path} is no image classifier')

    def compute() -> list[dict]:
        return [
            dict(
                img_path=sample.img_path,
                gt_label=int(sample.gt_label),
                pred_label=int(sample.pred_label),
                pred_score=float(sample.pred_score[int(sample.pred_label)]),
            )
            for samples in answers(run, None)
            for sample in samples
        ]

    return _once(run, None, compute)


def side_by_side(
    runs: Sequence[EvaluatedRun | str | os.PathLike],
    images: Sequence | None = None,
    labels: Sequence[str] | None = None,
    score_thr: float = 0.3,
    number: int = 4,
) -> np.ndarray:
    """The same images as several runs see them: a column for the ground truth and for each run, a row for each image.

    Args:
        runs: as :func:`open_run` takes them, of one validation set.
        images: ids of images; by default ``number`` of those with objects, spread over the set.
        labels: what is above the columns; the names of the runs by default.
        score_thr: least score of what is drawn.

    Returns:
        A picture: RGB, uint8.

    Raises:
        UserError: an image is not in the validation set of each run; and as for :func:`detections`.
    """
    runs = [open_run(run) for run in runs]
    first = runs[0]
    images = spread(first, number) if images is None else _known(first, images)
    require_same_images(runs, images)
    found = [instances(run, detections(run, images), score_thr) for run in runs]
    rows = []
    for image in images:
        pixels, truth = picture_of(first, image)
        rows.append([(pixels, truth), *((pixels, of_run.get(image, [])) for of_run in found)])
    headers = ['ground truth', *map(as_text, labels or (run.name for run in runs))]
    sheet = draw_columns(headers, rows, f'{len(images)} images, score at least {score_thr:g}', first.colours)
    return np.asarray(sheet)


def spread(run: EvaluatedRun, number: int) -> list:
    """The ids of some images with objects, spread evenly over the validation set; of all where none has any."""
    full = [
        image for image, info in run.infos.items() if any(not i.get('ignore_flag') for i in info.get('instances', ()))
    ]
    full = full or list(run.infos)
    return evenly(full, number)


def instances(run: EvaluatedRun, entries: Iterable[dict], score_thr: float) -> dict[object, list[Instance]]:
    """Detections in COCO's format, to be drawn: of each image those of a score of at least ``score_thr``."""
    labels = {category: label for label, category in enumerate(run.category_ids)}
    drawn: dict[object, list[Instance]] = {}
    for entry in entries:
        if entry['score'] >= score_thr:
            x, y, width, height = entry['bbox']
            name, colour = run.colours[labels[entry['category_id']]]
            mask = to_mask(entry.get('segmentation'), 0, 0)
            instance = Instance([x, y, x + width, y + height], name, colour, mask, entry['score'])
            drawn.setdefault(entry['image_id'], []).append(instance)
    return drawn


def picture_of(run: EvaluatedRun, image: object) -> tuple[np.ndarray, list[Instance]]:
    """An image of the validation set (RGB, uint8), and its ground truth."""
    info = run.infos[image]
    pixels = read_image(info['img_path'])
    return pixels, objects_of(info, run.colours, pixels.shape)


def require_same_images(runs: Sequence[EvaluatedRun], images: Sequence) -> None:
    """Raise a :class:`UserError` unless each image is in the validation set of every run, under the same name."""
    names = {image: os.path.basename(runs[0].infos[image]['img_path']) for image in images}
    for run in runs[1:]:
        others = [
            name
            for image, name in names.items()
            if image not in run.infos or os.path.basename(run.infos[image]['img_path']) != name
        ]
        if others:
            raise UserError(
                f'{runs[0].path} and {run.path} were validated on different data: {len(others)} of {len(names)} images '
                f'of the one are not in the other, such as {others[0]}; name runs with one validation set'
            )


def answers(run: EvaluatedRun, images: Sequence | None, model: nn.Module | None = None) -> Iterator[list]:
    """What the model says of each batch, as in the run's validation.

    Args:
        images: ids of some of the validation set's; None: all.
        model: of :func:`load_model`, if it is to be looked at meanwhile.
    """
    model = load_model(run) if model is None else model
    dataset, loader = run.dataset, dict(run.cfg.val_dataloader)
    if images is not None:
        position = {image: i for i, image in enumerate(run.infos)}
        dataset = Subset(dataset, [position[image] for image in images])
    if len(dataset) < _FEW:
        loader.update(_ALONE)
    loader = Runner.build_dataloader(dict(loader, dataset=dataset))
    columns = (plain_column('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(stderr=True)) as bar, torch.no_grad():
        task = bar.add_task(as_text(run.path), total=len(dataset))
        for batch in loader:
            samples = model.test_step(batch)
            yield samples
            bar.advance(task, len(samples))


def load_model(run: EvaluatedRun) -> nn.Module:
    """The run's model with its weights, where it is to compute."""
    checkpoint = read_checkpoint(run.checkpoint)
    with DefaultScope.overwrite_default_scope(run.cfg.get('default_scope') or 'mmdet'), torch.random.fork_rng([]):
        model = MODELS.build(run.cfg.model)
    if is_fused(checkpoint.content):
        model = fuse(model, inplace=True)
    found = fit(model, checkpoint.state_dict)
    if not found:
        raise UserError(f'{run.checkpoint} does not fit the model of {run.path}\n{found.explain()}')
    model = model.to(get_device()).eval()
    if any(is_a(hook, 'ChannelsLastHook', HOOKS) for hook in run.cfg.get('custom_hooks') or []):
        model = model.to(memory_format=torch.channels_last)  # as in the run's validation: the same digits
    return model


def _require_data(run: EvaluatedRun) -> None:
    cfg = run.cfg
    if not (cfg.get('val_dataloader') or {}).get('dataset'):
        raise UserError(f'the run {run.path} was trained without validation: its config has no val_dataloader.dataset')
    gone = [source.ann_file for source in sources(cfg, ('val',)) if source.skipped is None]
    gone = [f'there is no annotation file {path}' for path in gone if not os.path.isfile(path)]
    gone += [problem for _, key, entry in image_folders(cfg, 'val') for problem in problems_of(entry, key)]
    if gone:
        raise UserError(
            f'the data that {run.path} was validated on are not here: {gone[0]}. Paths are those of its training: '
            'start this in the same folder'
        )


def _known(run: EvaluatedRun, images: Sequence | None) -> list | None:
    """Raise a :class:`UserError` for an image that is not in the validation set."""
    if images is None:
        return None
    unknown = [str(image) for image in images if image not in run.infos]
    if unknown:
        raise UserError(
            f'the validation set of {run.path} has no image {some(unknown)}; it has {some([*map(str, run.infos)])}'
        )
    return list(dict.fromkeys(images))


def _place(run: EvaluatedRun, images: Sequence | None) -> Path:
    some_only = '' if images is None else f'-{_digest(sorted(map(str, images)))}'
    return run.path / FOLDER / f'val-{run.checkpoint.stem}-{run.digest}{some_only}.json'


def _once(run: EvaluatedRun, images: Sequence | None, compute: Callable[[], list[dict]]) -> list[dict]:
    """What is kept, else what ``compute`` gives; then that is kept, and what is outdated or a part of it deleted."""
    place = _place(run, images)
    kept = _read(place)
    if kept is not None:
        return kept
    found = compute()
    try:
        write_text(place, json.dumps(found))
        for path in place.parent.glob(f'val-{run.checkpoint.stem}-{"[0-9a-f]" * 12}*.json'):
            is_current = path.name.startswith(f'val-{run.checkpoint.stem}-{run.digest}') and images is not None
            if path != place and not is_current:
                path.unlink(missing_ok=True)
    except OSError as error:  # somebody else's run: it is computed again next time
        print(f'warning: {as_text(place)} cannot be written ({error.strerror})', file=sys.stderr)
    return found


def _read(place: Path) -> list[dict] | None:
    try:
        found = json.loads(place.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:12]
