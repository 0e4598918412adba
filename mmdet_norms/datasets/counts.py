"""How much is in a data set, as a run gets it: images, objects of each class, images without any."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..console import as_text

_SHOWN = 20  # classes in one line


@dataclass
class Counts:
    """What :func:`count` found.

    Args:
        images: those that an epoch shows, repeated ones as often as they come.
        different: files among them; 0 where the data set does not name them.
        objects: class -> its objects, or the images of the class in the data of a classifier; all classes.
        empty: images without objects; None of a classifier.
        ignored: crowds and other objects that nothing is trained on.
    """

    images: int
    different: int = 0
    objects: dict[str, int] = field(default_factory=dict)
    empty: int | None = 0
    ignored: int = 0

    def line(self, split: str) -> str:
        """One line, the most frequent class first."""
        repeated = f' ({self.different} different ones)' if 0 < self.different < self.images else ''
        there = sorted((name for name, n in self.objects.items() if n), key=lambda name: -self.objects[name])
        names = [f'{name} {self.objects[name]}' for name in there[:_SHOWN]]
        names += [f'{len(there) - _SHOWN} more classes'] if len(there) > _SHOWN else []
        absent = [name for name, n in self.objects.items() if not n]
        line = f'{split}: {self.images} images{repeated}'
        if self.empty is not None:
            line += f', {self.empty} without objects; {sum(self.objects.values())} objects'
        line += f': {", ".join(names)}' if names else ''
        line += f'; {self.ignored} ignored (crowds)' if self.ignored else ''
        if absent:
            line += f'; none of {", ".join(absent[:_SHOWN])}{", ..." * (len(absent) > _SHOWN)}'
        return line


def count(infos: Iterable[Mapping], classes: Sequence[object]) -> Counts:
    """Count what a data set says of its images (``get_data_info`` of each).

    Args:
        infos: with ``instances`` (a detector's) or ``gt_label`` (a classifier's).
        classes: their names, in the order of the labels.
    """
    labels, files = Counter(), set()
    images = empty = ignored = 0
    of_classifier = False
    for info in infos:
        images += 1
        files.update([info['img_path']] if isinstance(info.get('img_path'), str) else [])
        if 'gt_label' in info:
            of_classifier = True
            labels[int(info['gt_label'])] += 1
            continue
        found = info.get('instances') or []
        kept = [one for one in found if not one.get('ignore_flag')]
        labels.update(int(one['bbox_label']) for one in kept)
        ignored += len(found) - len(kept)
        empty += not kept
    names = [as_text(name) for name in classes]
    objects = {name: labels.pop(label, 0) for label, name in enumerate(names)}
    objects |= {f'class {label}': n for label, n in sorted(labels.items())}
    return Counts(images, len(files), objects, None if of_classifier else empty, ignored)
