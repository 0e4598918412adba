"""What is wrong with the data that a config reads, found before anything is built; nothing is raised, all is listed."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_norms.choice import sample
from mmdet_norms.commands import runnable
from mmdet_norms.entries import mappings, name_of, parameter_of

from .annotations import DataError, class_order, no_collection, other_order, read_annotations
from .columns import boxes, decompressed, is_id, is_mask, is_polygon, numbers, positions, size_of
from .complete import Needs, complete
from .images import Header, decode, missing_files, read_header, same_but_for_case
from .sources import SPLITS, Source, evaluated_files, sources, wants_masks

LEVELS = ('error', 'warning', 'note')
HEADERS = 2000  # read of each folder's images by the fast check; and masks compared with their boxes
_FEW = 0.01  # a share below which odd objects are no more than a note: COCO itself has some


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one file.

    Args:
        level: 'error' (results would be wrong or the run would fail), 'warning', or 'note'.
        where: the file, or the key in the config.
        what: what is wrong.
        do: what to do about it.
        ids: of the images, annotations or categories concerned.
        fatal: an error that would end the run, so that going on nevertheless is of no use.
    """

    level: str
    where: str
    what: str
    do: str = ''
    ids: tuple = ()
    fatal: bool = False

    def __str__(self) -> str:
        shown = ', '.join(f'{value}' for value in self.ids[:5])
        ids = f' (id {shown}{", ..." if len(self.ids) > 5 else ""})' if self.ids else ''
        return f'{self.where}: {self.what}{ids}' + (f'. {self.do}' if self.do else '')


@dataclass
class Report:
    """What a check found, and the files that it had to complete."""

    findings: list[Finding] = field(default_factory=list)
    completed: dict[str, list[str]] = field(default_factory=dict)  # file -> what was filled in

    def of(self, level: str) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]


def check_config(cfg: Config, splits: tuple[str, ...] = SPLITS, full: bool = False) -> Report:
    """Check the data that the given splits of a config read, its classes and the heads that count them.

    Args:
        full: decode every image; otherwise headers of some are read.
    """
    with no_collection():
        return _check(cfg, splits, full)


def _check(cfg: Config, splits: tuple[str, ...], full: bool) -> Report:
    report = Report()
    found = sources(cfg, splits)
    checked = [source for source in found if source.skipped is None]
    for source in found:
        if source.skipped:
            report.findings.append(Finding('note', source.key, f'not checked: {source.skipped}'))
    faults = [(source, fault) for source in checked for fault in _class_faults(source)]
    report.findings += [fault for _, fault in faults]
    sound = [source for source in checked if source not in [bad for bad, _ in faults]]
    report.findings += _between_splits(sound)
    report.findings += _heads(cfg.get('model'), sound)

    for path, group in groupby(sorted(checked, key=lambda s: s.ann_file), key=lambda s: s.ann_file):
        _check_file(cfg, path, list(group), sound, report, full)
    for split in splits:
        _check_evaluators(cfg, split, [source for source in found if source.split == split], report)
    report.findings += in_both(sound)
    report.findings = sorted(dict.fromkeys(report.findings), key=lambda finding: LEVELS.index(finding.level))
    return report


def _class_faults(source: Source) -> Iterator[Finding]:
    """What is wrong with the classes that a config names, whatever the file says."""
    key, classes = f'{source.key}.metainfo.classes', source.classes
    if isinstance(classes, str):
        yield Finding(
            'error', key, f'is the text {classes!r}, not a list of names', f'Write ({classes!r},), with the comma'
        )
    elif not isinstance(classes, Sequence) or not all(map(is_id, classes)) or not classes:
        yield Finding('error', key, f'is {classes!r:.80}, not a list of names', "Write the names: ('cat', 'dog')")
    elif len(set(classes)) < len(classes):
        twice = [name for name, number in Counter(classes).items() if number > 1]
        yield Finding('error', key, f'names {_list(twice)} twice', 'Name every class once')


def _between_splits(found: list[Source]) -> Iterator[Finding]:
    """The first data set's classes are the model's; another order elsewhere gives labels other names."""
    if found:
        first = found[0]
        for other in found[1:]:
            difference = other_order(first.classes, other.classes)
            if difference:
                yield Finding(
                    'error',
                    f'{other.key}.metainfo.classes',
                    f'{difference} as {first.key} has them',
                    'One order of classes for all splits',
                )


def in_both(found: list[Source]) -> Iterator[Finding]:
    """Images that are trained on and evaluated; a whole file that is both is meant so, as when one tries to overfit."""
    seen: dict[str, set[str]] = {}
    for source in found:
        try:
            images = read_annotations(source.ann_file)['images']
        except DataError:
            continue
        seen.setdefault(source.ann_file, set()).update(
            os.path.normpath(os.path.join(source.images, image['file_name']))
            for image in images
            if isinstance(image.get('file_name'), str)
        )
    trained = dict.fromkeys(source.ann_file for source in found if source.split == 'train' and source.ann_file in seen)
    tested = dict.fromkeys(source.ann_file for source in found if source.split != 'train' and source.ann_file in seen)
    for one in trained:
        for other in tested:
            both = seen[one] & seen[other]
            if both:
                yield Finding(
                    'note' if _same_file(one, other) else 'warning',
                    other,
                    f'{len(both):,} of {len(seen[other]):,} images are trained on as well ({one}), like {min(both)}: '
                    'results on them say little',
                )


def _heads(model: Any, found: list[Source]) -> Iterator[Finding]:
    # of models that read the names as text, num_classes is something else
    classes = [source.classes for source in found if not source.entry.get('return_classes')]
    if not classes or len(set(map(len, classes))) > 1:
        return
    first = found[0]
    unnamed = (
        ''
        if first.own_classes
        else f'; or, if the data have others than those of {name_of(first.entry, DATASETS)}, name them in '
        f'{first.key}.metainfo.classes, or give --data-root'
    )
    for key, count in counted_classes(model):
        if count != len(classes[0]):
            yield Finding(
                'error',
                key,
                f'is {count}, but the data have {len(classes[0])} classes',
                f'Set it to {len(classes[0])} (--cfg-options {key}={len(classes[0])})' + unnamed,
                fatal=count < len(classes[0]) and any(source.split == 'train' for source in found),
            )


def counted_classes(model: Any, key: str = 'model') -> Iterator[tuple[str, int]]:
    """Key and number of every head that counts the data's classes, as mmdet's NumClassCheckHook counts them."""
    for where, part in mappings(model, key):
        head = re.search(r'(?<!rpn_)head(\.\d+)?$', where) and not where.endswith(('semantic_head', 'fusion_head'))
        if head and 'type' in part:
            count = part.get('num_classes', getattr(parameter_of(part, 'num_classes'), 'default', None))
            if isinstance(count, int) and not isinstance(count, bool):
                yield f'{where}.num_classes', count


def _check_file(cfg: Config, path: str, group: list[Source], sound: list[Source], report: Report, full: bool) -> None:
    if not path:
        report.findings.append(Finding('error', group[0].key, 'has no ann_file', 'Set it, or give --data-root DIR'))
        return
    metrics = [
        metric for source in group for _, metric, file in evaluated_files(cfg, source.split) if _same_file(file, path)
    ]
    graded = any(not metric.get('format_only') for metric in metrics)
    needs = Needs(
        masks=any(source.mask_key for source in group),
        segm=any(wants_masks(metric) for metric in metrics if not metric.get('format_only')),
        evaluated=bool(metrics),
        objects=graded or any(_trained_on(source, sound) for source in group),
        filtered=any(source.filter_cfg.get('filter_empty_gt') for source in group),
    )
    try:
        content = read_annotations(path)
    except DataError as error:
        report.findings.append(_unreadable(path, error))
        return
    file = AnnotationFile(path, content, needs)
    source = group[0]
    notes = complete(content, needs, lambda image: file.size_of_file(image, source))
    if notes:
        report.completed[path] = notes
    report.findings += file.check()
    for source in group:
        if source in sound:
            report.findings += file.check_use(source)
    for _, same in groupby(sorted(group, key=lambda s: s.images), key=lambda s: s.images):
        report.findings += file.check_images(list(same), full)


def _trained_on(source: Source, found: list[Source]) -> bool:
    """Whether a data set must have objects: those of semi-supervised training have some without."""
    alone = sum(other.split == 'train' for other in found) < 2
    return source.split == 'train' and (alone or bool(source.filter_cfg.get('filter_empty_gt')))


def _generated() -> str:
    return f'for the generated one: {runnable("shapes")}'


def _unreadable(path: str, error: DataError) -> Finding:
    text = str(error).removeprefix(path).lstrip(': ')
    if not os.path.exists(path):
        text = 'there is no such annotation file'
        return Finding(
            'error',
            path,
            text,
            f'Give the data set with --data-root DIR ({_generated()})',
        )
    return Finding('error', path, text)


class AnnotationFile:
    """One file, its columns, and what is wrong with them."""

    def __init__(self, path: str, content: dict, needs: Needs) -> None:
        self.path, self.needs = path, needs
        self.images, self.categories = content['images'], content['categories']
        self.annotations = content.get('annotations') or []
        self.content = content

    def size_of_file(self, image: dict, source: Source) -> tuple[int, int] | None:
        """Width and height of an image as ``source`` reads it; None where that cannot be."""
        name = image.get('file_name')
        header = read_header(os.path.join(source.images, name)) if isinstance(name, str) and name else None
        return header.size(source.turns_photos) if isinstance(header, Header) else None

    def check(self) -> list[Finding]:
        """What is wrong whoever reads the file."""
        self._columns()
        return [
            *self._check_categories(),
            *self._check_image_entries(),
            *self._check_annotations(),
            *self._check_twice(),
        ]

    def _columns(self) -> None:
        rows = self.annotations
        self.ids = [row.get('id') for row in rows]
        self.image_ids, self.category_ids = ([row.get(key) for row in rows] for key in ('image_id', 'category_id'))
        table = {image['id']: i for i, image in enumerate(self.images) if is_id(image.get('id'))}
        self.of_image = positions(self.image_ids, table)
        self.names = {c['id']: i for i, c in enumerate(self.categories) if is_id(c.get('id'))}
        self.of_category = positions(self.category_ids, self.names)
        self.box, self.area = boxes([row.get('bbox') for row in rows]), numbers([row.get('area') for row in rows])
        self.crowd = np.array([bool(row.get('iscrowd')) for row in rows], bool)
        self.ignored = np.array([bool(row.get('ignore')) for row in rows], bool)
        self.width = numbers([image.get('width') for image in self.images])
        self.height = numbers([image.get('height') for image in self.images])

    def _finding(self, level: str, what: str, do: str = '', ids: Sequence = (), fatal: bool = False) -> Finding:
        return Finding(level, self.path, what, do, tuple(map(str, ids)), fatal)

    def _of(self, rows: np.ndarray) -> tuple:
        return tuple(self.ids[i] for i in np.flatnonzero(rows)[:6])

    def _check_categories(self) -> Iterator[Finding]:
        if not self.categories:
            yield self._finding('error', 'has no categories', 'List every class as dict(id=1, name=...)')
        bad = [i for i, c in enumerate(self.categories) if not is_id(c.get('id')) or not is_id(c.get('name'))]
        if bad:
            yield self._finding('error', f'category {bad[0]} of the list has no id or no name')
        for key in ('id', 'name'):
            values = Counter(c[key] for i, c in enumerate(self.categories) if i not in bad)
            twice = [value for value, number in values.items() if number > 1]
            if twice:
                yield self._finding(
                    'error',
                    f'has two categories of the {key} {_list(twice)}',
                    'Every category needs an id and a name of its own; labels behind them would move',
                )

    def _check_image_entries(self) -> Iterator[Finding]:
        if not self.images:
            yield self._finding('error', 'lists no images', 'Give a file with images')
        bad = [i for i, image in enumerate(self.images) if not is_id(image.get('id'))]
        if bad:
            what = f'{len(bad):,} images have no id, the first at {bad[0]} of the list'
            yield self._finding('error', what, fatal=True)
        ids = [image['id'] for image in self.images if is_id(image.get('id'))]
        if len(set(ids)) < len(ids):
            seen: set = set()
            twice = [value for value in ids if value in seen or seen.add(value)]
            yield self._finding(
                'error',
                f'{len(twice):,} image ids are there twice',
                'Number the images anew',
                list(dict.fromkeys(twice)),
            )
        if len({type(value) is str for value in ids}) > 1:
            what = 'some image ids are text, others numbers'
            yield self._finding('error', what, 'Write all in one way', fatal=self.needs.evaluated)
        names = [i for i in self.images if not isinstance(i.get('file_name'), str) or not i['file_name']]
        if names:
            yield self._finding(
                'error',
                f'{len(names):,} images have no file_name',
                'Name the file of each',
                [i.get('id') for i in names],
                fatal=True,
            )
        no_size = ~((self.width > 0) & (self.height > 0))
        if no_size.any():
            yield self._finding(
                'error',
                f'{no_size.sum():,} images have no width and height, and their files could not be read to fill them in',
                'Write both as numbers',
                [self.images[i].get('id') for i in np.flatnonzero(no_size)[:6]],
                fatal=True,
            )

    def _check_annotations(self) -> Iterator[Finding]:
        total = len(self.annotations)
        if not total:
            if self.needs.objects:
                yield self._finding(
                    'error', 'has no annotations', 'Give a file with objects', fatal=self.needs.filtered
                )
            return
        yield from self._check_references()
        yield from self._check_boxes()
        odd = np.array([annotation.get('iscrowd', 0) not in (0, 1) for annotation in self.annotations])
        if odd.any():
            first = self.annotations[int(np.flatnonzero(odd)[0])]['iscrowd']
            yield self._finding(
                'error',
                f'{odd.sum():,} annotations have an iscrowd like {first!r:.40}',
                'Write 0 or 1',
                self._of(odd),
                fatal=self.needs.evaluated,
            )
        if self.crowd.all():
            yield self._finding(
                'error',
                f'all {total:,} annotations have iscrowd=1: nothing is trained on or evaluated',
                'Write iscrowd=0 for single objects',
            )
        if self.needs.masks or self.needs.segm:
            yield from self._check_masks()

    def _check_references(self) -> Iterator[Finding]:
        total = len(self.annotations)
        for key, ids, rows, level in (
            ('image_id', self.image_ids, self.of_image, 'warning'),
            ('category_id', self.category_ids, self.of_category, 'error'),
        ):
            none = np.array([not is_id(value) for value in ids])
            if none.any():
                what = f'{none.sum():,} annotations have no {key}'
                yield self._finding('error', what, f'Give each its {key}', self._of(none), fatal=True)
            unknown = (rows < 0) & ~none
            if unknown.any():
                kind = 'images' if key == 'image_id' else 'categories'
                values = list(dict.fromkeys(ids[i] for i in np.flatnonzero(unknown)))
                yield self._finding(
                    'error' if (rows < 0).all() else level,
                    f'{unknown.sum():,} of {total:,} annotations have an {key} that {kind} does not list '
                    f'({_list([repr(v) for v in values])}){self._numbering(kind, ids)}',
                    'They would be left out without a word; correct them or list what they name',
                    self._of(unknown),
                )

    def _check_twice(self) -> Iterator[Finding]:
        """What merged exports have twice: a second copy of an object can only be missed, or found for nothing."""
        names = [image.get('file_name') for image in self.images]
        twice = {name for name, number in Counter(n for n in names if isinstance(n, str)).items() if number > 1}
        if twice:
            yield self._finding(
                'warning',
                f'{len(twice):,} image files are listed twice, like {min(twice)}',
                'List each once, with all of its objects: those of one entry are no objects in the other',
                [image.get('id') for image in self.images if image.get('file_name') in twice],
            )
        whole = (self.of_image >= 0) & (self.of_category >= 0) & ~np.isnan(self.box).any(1) & ~self.crowd
        rows = np.flatnonzero(whole)
        columns = [self.of_image[rows], self.of_category[rows], *self.box[rows].T]
        order = np.lexsort(columns)
        same = np.all([column[order[1:]] == column[order[:-1]] for column in columns], axis=0)
        again = np.zeros(len(whole), bool)
        again[rows[order[1:][same]]] = True
        if again.any():
            yield self._finding(
                'note' if again.sum() < _FEW * len(rows) else 'warning',
                f'{again.sum():,} of {len(rows):,} objects are there twice: the same box and class on one image',
                'Leave out the copies',
                self._of(again),
            )

    def _numbering(self, kind: str, used: list) -> str:
        """Category ids that are all one too low or too high."""
        listed = set(self.names)
        used = {value for value in used if is_id(value)}
        if kind != 'categories' or not all(type(value) is int for value in listed | used) or not listed:
            return ''
        if {value + 1 for value in used} <= listed or {value - 1 for value in used} <= listed:
            return (
                f': the categories are numbered from {min(listed)} to {max(listed)}, the annotations from {min(used)} '
                f'to {max(used)}, so that the others are off by one as well'
            )
        return ''

    def _check_boxes(self) -> Iterator[Finding]:
        bad = np.isnan(self.box).any(1)
        if bad.any():
            first = self.annotations[int(np.flatnonzero(bad)[0])].get('bbox')
            yield self._finding(
                'error',
                f'{bad.sum():,} annotations have a bbox like {first!r:.60}',
                'Write four finite numbers: [x, y, width, height] in pixels',
                self._of(bad),
                fatal=True,
            )
        x, y, w, h = self.box.T
        good = ~bad
        thin = good & ((w < 1) | (h < 1))
        share = thin.sum() / max(1, good.sum())
        if thin.any():
            fractions = good.any() and np.abs(self.box[good]).max() <= 1.5
            yield self._finding(
                'error' if thin.sum() == good.sum() else 'note' if share < _FEW else 'warning',
                f'{thin.sum():,} of {len(w):,} boxes are less than a pixel wide or high and are not trained on'
                + (': they look like fractions of the image' if fractions else ''),
                'Write [x, y, width, height] in pixels',
                self._of(thin),
            )
        sized = good & ~thin & (self.of_image >= 0)
        width, height = (np.append(v, np.nan)[self.of_image] for v in (self.width, self.height))
        sized &= (width > 0) & (height > 0)
        outside = sized & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
        if outside.any():
            yield self._finding(
                'error' if outside.sum() > 0.5 * sized.sum() else 'warning',
                f'{outside.sum():,} of {sized.sum():,} boxes lie outside their image and are not trained on',
                'Boxes are [x, y, width, height] in pixels of the image as it is read; they may be of another size of '
                'the images',
                self._of(outside),
            )
        inside = sized & ~outside
        beyond = inside & (
            (x + w > 1.01 * width + 1) | (y + h > 1.01 * height + 1) | (np.minimum(x, y) < -1 - 0.01 * width)
        )
        share = beyond.sum() / max(1, inside.sum())
        if share > 0.1 or (beyond.any() and share >= _FEW):
            corners = ((w > x) & (h > y) & (w <= width + 1) & (h <= height + 1))[inside].all()
            corners = corners and inside.sum() >= 3 and share >= 0.2
            yield self._finding(
                'error' if corners or share > 0.5 else 'warning',
                f'{beyond.sum():,} of {inside.sum():,} boxes reach beyond their image'
                + (': they look like corners [x1, y1, x2, y2]' if corners else ''),
                'Boxes are [x, y, width, height] in pixels of the image as it is read',
                self._of(beyond),
            )
        empty = inside & ~(self.area > 0)
        if empty.any():
            yield self._finding(
                'note' if empty.mean() < _FEW else 'warning',
                f'{empty.sum():,} annotations have an area of 0 and are not trained on',
                ids=self._of(empty),
            )

    def _check_masks(self) -> Iterator[Finding]:
        total = len(self.annotations)
        masks = [annotation.get('segmentation') for annotation in self.annotations]
        none = np.array([not mask for mask in masks])
        fake = np.array([mask == [[0.0, 0.0]] for mask in masks])
        invalid = np.array([bool(mask) and not is_mask(mask) for mask in masks]) & ~fake
        if none.any():
            yield self._finding(
                'error',
                f'{_all(none.sum(), total)} have no segmentation, which the config loads'
                + (' and evaluates' if self.needs.segm else ''),
                'Add the masks, or take a config without: for boxes alone, with_mask=False in LoadAnnotations and '
                "metric='bbox' in the evaluator, and no mask head",
                self._of(none),
                fatal=self.needs.segm or bool(none.all()),
            )
        if invalid.any():
            yield self._finding(
                'error' if self.needs.segm or invalid.all() else 'warning',
                f'{_all(invalid.sum(), total)} have a segmentation that is no mask, like '
                f'{masks[int(np.flatnonzero(invalid)[0])]!r:.60}',
                'Write polygons of three points or more, or run lengths dict(size=[height, width], counts=...)',
                self._of(invalid),
                fatal=self.needs.segm,
            )
        yield from self._check_agreement(masks)
        wrong, sums = np.zeros(total, bool), np.zeros(total, bool)
        looked_at = set(sample(total, HEADERS))
        for i, mask in enumerate(masks):
            if isinstance(mask, dict) and self.of_image[i] >= 0 and is_mask(mask):
                image = self.of_image[i]
                size = size_of(mask)
                wrong[i] = size != (self.height[image], self.width[image])
                counts = mask['counts']
                if isinstance(counts, str) and i in looked_at:
                    counts = decompressed(counts)
                sums[i] = not isinstance(counts, str) and not _adds_up(counts, size)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            image = self.of_image[i]
            yield self._finding(
                'error',
                f'{wrong.sum():,} masks in run lengths have another size than their image: size={masks[i]["size"]} for '
                f'an image of height {self.height[image]:g} and width {self.width[image]:g}',
                'size is [height, width] of the image',
                self._of(wrong),
            )
        if (sums & ~wrong).any():
            yield self._finding(
                'error',
                f'{(sums & ~wrong).sum():,} masks in run lengths do not add up to their size',
                'Encode them again',
                self._of(sums & ~wrong),
                fatal=True,  # pycocotools decodes them to whatever is in memory
            )

    def _check_agreement(self, masks: list) -> Iterator[Finding]:
        """Polygons lie in their boxes; a mask of another object or size does not."""
        single = np.flatnonzero(~np.isnan(self.box).any(1) & (self.box[:, 2:] >= 1).all(1))
        looked_at, apart = 0, np.zeros(len(masks), bool)
        for i in single[sample(len(single), HEADERS)]:
            if isinstance(masks[i], list) and is_mask(masks[i]):
                points = np.concatenate([np.reshape(p, (-1, 2)) for p in masks[i] if is_polygon(p)])
                low, high = points.min(0), points.max(0)
                x, y, w, h = self.box[i]
                common = np.minimum(high, [x + w, y + h]) - np.maximum(low, [x, y])
                looked_at += 1
                apart[i] = (common <= 0).any() and (high > low).all()
        if apart.any():
            yield self._finding(
                'error' if apart.sum() > 0.5 * looked_at else 'note' if apart.sum() < _FEW * looked_at else 'warning',
                f'{apart.sum():,} of {looked_at:,} masks looked at lie outside their box',
                'Masks are polygons [x, y, x, y, ...] in pixels, as the boxes [x, y, width, height] are',
                self._of(apart),
            )

    def check_use(self, source: Source) -> list[Finding]:
        """What is wrong for one data set that reads the file: its classes, and what is left after its filters."""
        return [*self._check_classes(source), *self._check_left(source)]

    def _check_classes(self, source: Source) -> Iterator[Finding]:
        try:
            listed = class_order(self.content, source.classes, source.sorts_by_id)
            known = class_order(self.content)
        except (KeyError, TypeError):  # ids and names that _check_categories has found
            return
        if not all(map(is_id, known)) or len(set(known)) < len(known):
            return
        difference = other_order(source.classes, listed if set(source.classes) <= set(listed) else known)
        if difference:
            yield self._finding(
                'error',
                f'{difference} as {source.key}.metainfo.classes has them; labels follow the order of the file',
                'List all classes in one order in every file (the ids do not matter), and name them in this order in '
                'metainfo.classes, or give --data-root, which takes them from the file',
            )
            return
        unused = [i for i, category in enumerate(self.categories) if category.get('name') not in source.classes]
        objects = np.isin(self.of_category, unused).sum()
        if objects:
            names = [self.categories[i].get('name') for i in unused]
            yield self._finding(
                'warning',
                f'{objects:,} objects are not used, since {source.key} does not name their classes ({_list(names)})',
            )

    def _check_left(self, source: Source) -> Iterator[Finding]:
        if not self.annotations or not self.images or not self.needs.objects:
            return
        wanted = [
            i for i, category in enumerate(self.categories) if str(category.get('name')) in map(str, source.classes)
        ]
        of_class = np.isin(self.of_category, wanted)
        x, y, w, h = self.box.T
        width, height = (np.append(v, np.nan)[self.of_image] for v in (self.width, self.height))
        inside = (np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0))
        no_box = np.isnan(x)
        reasons = {
            'of an image that is not listed': self.of_image < 0,
            'of another class': ~of_class,
            'without a box': no_box,
            'outside the image': ~inside & ~no_box,
            'of no area': ~(self.area > 0) & ~no_box,
            'less than a pixel wide or high': ~((w >= 1) & (h >= 1)) & ~no_box,
            'crowds': self.crowd,
            'to be ignored': self.ignored,
        }
        left = ~np.any(list(reasons.values()), axis=0)
        if not left.any():
            why = ', '.join(f'{rows.sum():,} {reason}' for reason, rows in reasons.items() if rows.any())
            yield self._finding(
                'error',
                f'no object is left for {source.key}: of {len(left):,}, {why}',
                'Correct what leaves them out',
                fatal=not self._kept_images(source).any(),
            )
            return
        with_objects = np.zeros(len(self.images), bool)
        with_objects[self.of_image[of_class & (self.of_image >= 0)]] = True
        kept = self._kept_images(source)
        if not kept.any():
            yield self._finding(
                'error',
                f'no image is left for {source.key} after filter_cfg={dict(source.filter_cfg)}: '
                f'{len(kept):,} images, {with_objects.sum():,} with objects',
                'Loosen filter_cfg, or give other data',
                fatal=True,
            )
        elif not kept.all() and source.split != 'train' and self.needs.evaluated:
            yield self._finding(
                'warning',
                f'{source.key} leaves out {(~kept).sum():,} of {len(kept):,} images by its filter_cfg, but the metric '
                'counts their objects as missed, and no false detections on them',
                f'Set {source.key}.test_mode=True',
            )

    def _kept_images(self, source: Source) -> np.ndarray:
        """Which images are left after filter_cfg, as mmdet filters them."""
        kept = np.ones(len(self.images), bool)
        if source.filter_cfg.get('filter_empty_gt'):
            wanted = [i for i, c in enumerate(self.categories) if c.get('name') in list(source.classes)]
            rows = self.of_image[np.isin(self.of_category, wanted) & (self.of_image >= 0)]
            kept[:] = False
            kept[rows] = True
        kept &= ~(np.minimum(self.width, self.height) < source.filter_cfg.get('min_size', 0))
        return kept

    def check_images(self, group: list[Source], full: bool) -> Iterator[Finding]:
        """What is wrong with the image files: all are there, and headers of some (``full``: all decoded) are right."""
        source = group[0]
        named = np.array([isinstance(i.get('file_name'), str) and bool(i['file_name']) for i in self.images], bool)
        used = named & np.any(
            [self._kept_images(s) for s in group if not isinstance(s.classes, str)] or [named], axis=0
        )
        rows = np.flatnonzero(used)
        names = [self.images[i]['file_name'] for i in rows]
        missing = missing_files(source.images, names)
        if missing:
            yield self._missing(source, [rows[i] for i in missing], len(rows))
        rows = np.delete(rows, missing)
        rows = rows if full else rows[sample(len(rows), HEADERS)]
        broken, sizes, turned, ambiguous = [], [], [], []
        for i in rows:
            image = self.images[i]
            path = os.path.join(source.images, image['file_name'])
            header = decode(path) if full else read_header(path)
            said = (self.width[i], self.height[i])
            if isinstance(header, str):
                broken.append((i, header))
            elif said != header.size(source.turns_photos):
                (turned if said == header.size(not source.turns_photos) else sizes).append((i, header))
            elif header.orientation != 1 and header.size(True) == header.size(False) and source.turns_photos:
                ambiguous.append((i, header))
        of = '' if len(rows) == len(self.images) else f' of {len(rows):,} looked at'
        if broken:
            i, why = broken[0]
            yield self._files(
                'error',
                broken,
                f'{len(broken):,} images{of} cannot be used: {self._file(source, i)} {why}',
                'Copy them again, or take their entries and annotations out of the file',
                fatal=True,
            )
        if sizes:
            i, header = sizes[0]
            width, height = header.size(source.turns_photos)
            yield self._files(
                'error',
                sizes,
                f'{len(sizes):,} images{of} have another size than the file says: {self._file(source, i)} is {width} x '
                f'{height}, the file says {self.width[i]:g} x {self.height[i]:g}',
                'Correct width and height; if the images were resized after labelling, the boxes are wrong as well',
            )
        if turned:
            yield self._turned(source, turned, of)
        if ambiguous:
            yield self._files(
                'warning',
                ambiguous,
                f'{len(ambiguous):,} photos{of} have an EXIF orientation that their size does not show '
                f'({self._file(source, ambiguous[0][0])}), and are turned when they are read',
                'Boxes must be those of the turned photo; if they were drawn on the stored one, add '
                f'{self._option(source, "color_ignore_orientation")}',
            )

    def _turned(self, source: Source, turned: list, of: str) -> Finding:
        i, header = turned[0]
        read, said = header.size(source.turns_photos), (self.width[i], self.height[i])
        as_read = 'turned as the orientation says' if source.turns_photos else 'as stored'
        other = 'as stored' if source.turns_photos else 'as turned'
        flag = 'color_ignore_orientation' if source.turns_photos else 'color'
        return self._files(
            'error',
            turned,
            f'{len(turned):,} photos{of} have an EXIF orientation and are described {other}, but read {as_read}: '
            f'{self._file(source, i)} is read as {read[0]} x {read[1]}, the file says {said[0]:g} x {said[1]:g}',
            f'Read them as they are described: {self._option(source, flag)}',
        )

    def _option(self, source: Source, flag: str) -> str:
        key = source.loader[0] if source.loader else f'{source.key}.pipeline.0'
        return f'--cfg-options {key}.color_type={flag}'

    def _missing(self, source: Source, rows: list, total: int) -> Finding:
        ignore = bool(source.loader and source.loader[1].get('ignore_empty'))
        name = self.images[rows[0]]['file_name']
        hint = 'Copy them there, or set data_prefix'
        base = os.path.basename(name.replace('\\', '/'))
        if '\\' in name:
            hint = "Write file names with '/' in place of '\\'"
        elif not os.path.isdir(source.images):
            hint = f'There is no folder {source.images}; set data_prefix, or give --data-root DIR'
        elif base != name and os.path.isfile(os.path.join(source.images, base)):
            hint = f'{base} is there without the folder; correct file_name or data_prefix'
        else:
            near = same_but_for_case(os.path.join(source.images, name))
            hint = f'{near} is there, which is written in another way (case or accents)' if near else hint
        return self._files(
            'warning' if ignore and not source.is_test else 'error',
            [(i, None) for i in rows],
            f'{len(rows):,} of {total:,} image files are not there: {self._file(source, rows[0])}',
            hint,
            fatal=True,
        )

    def _file(self, source: Source, row: int) -> str:
        return os.path.join(source.images, self.images[row]['file_name'])

    def _files(self, level: str, rows: list, what: str, do: str = '', fatal: bool = False) -> Finding:
        return self._finding(level, what, do, [self.images[i].get('id') for i, _ in rows], fatal)


def _check_evaluators(cfg: Config, split: str, found: list[Source], report: Report) -> None:
    """A COCO metric reads the file of its split's loader, or one of the same images and classes."""
    readable = [source for source in found if source.skipped is None]
    if not readable or len(readable) < len(found):
        return
    files = [source.ann_file for source in readable]
    for key, metric, path in evaluated_files(cfg, split):
        if '://' in path or (any(_same_file(path, file) for file in files) and len(files) == 1):
            _check_subset(key, readable, report)
            continue
        advice = f'Set {key}.ann_file={files[0]}' if len(files) == 1 else f'Set {key}.ann_file to a file of all images'
        try:
            content = read_annotations(path)
            loaded = [read_annotations(file) for file in files]
        except DataError as error:
            if not any(_same_file(path, file) for file in files):
                report.findings.append(replace(_unreadable(path, error), do=advice))
            continue
        file = AnnotationFile(path, content, Needs(evaluated=True, segm=wants_masks(metric)))
        notes = complete(content, file.needs, lambda image, file=file: file.size_of_file(image, readable[0]))
        if notes:
            report.completed[path] = notes
        report.findings += [*file.check(), *file.check_use(readable[0])]
        images = {str(image.get('id')) for part in loaded for image in part['images']}
        own = {str(image.get('id')) for image in content['images']}
        if own != images or not _same_names(content, loaded):
            report.findings.append(
                Finding(
                    'error',
                    f'{key}.ann_file',
                    f'{path} has other images ({len(own):,}) than {", ".join(files)} ({len(images):,}), which the '
                    'data set loads',
                    advice,
                )
            )


def _check_subset(key: str, found: list[Source], report: Report) -> None:
    for source in found:
        if source.entry.get('indices') is not None:
            report.findings.append(
                Finding(
                    'warning',
                    f'{source.key}.indices',
                    f'the data set takes a part of the images, but {key} counts the objects of all as missed',
                    'Write an annotation file of that part',
                )
            )


def _same_names(content: dict, loaded: list[dict]) -> bool:
    """Whether the images of the same id are the same file."""
    names = {str(i.get('id')): i.get('file_name') for part in loaded for i in part['images']}
    return all(names.get(str(image.get('id'))) == image.get('file_name') for image in content['images'])


def _same_file(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _adds_up(counts: list | None, size: tuple) -> bool:
    try:
        return sum(counts) == size[0] * size[1] and min(counts, default=0) >= 0
    except TypeError:
        return False


def _all(number: int, total: int) -> str:
    return f'all {total:,} annotations' if number == total else f'{number:,} of {total:,} annotations'


def _list(values: Sequence, limit: int = 5) -> str:
    return ', '.join(map(str, values[:limit])) + (', ...' if len(values) > limit else '')
