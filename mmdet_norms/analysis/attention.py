"""Which mixture weights AN gives to images of which class."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..choice import evenly
from ..console import as_text
from ..engine.norm_quantities import mixture_weights
from ..engine.results import write_json
from ..experiments.detections import EvaluatedRun, answers
from ..layers import AN
from .figures import LAMBDA, heat, legend, look_of, sheet, short, some_of, styled, write
from .runs import load_norms

ALL = 'all instances'
_BINS = 20
_MOST_CLASSES = 8  # lines that can be told apart


@dataclass(frozen=True)
class Weights:
    """lambda of a layer over images.

    Args:
        rows: ``(N, k)``, of each instance.
        classes: name -> which rows. Images count for every class that is in them. Of regions in a head, whose class
            nobody knows, there is only :data:`ALL`.
    """

    rows: np.ndarray
    classes: dict[str, np.ndarray]

    def means(self) -> dict[str, list[float]]:
        """Of each component by class."""
        return {name: self.rows[which].mean(0).tolist() for name, which in self.classes.items()}

    def histograms(self) -> dict[str, list[float]]:
        """Of all components by class: the share of weights in each of 20 bins from 0 to 1."""
        return {
            name: (np.histogram(self.rows[which], _BINS, (0, 1))[0] / self.rows[which].size).tolist()
            for name, which in self.classes.items()
        }


def collect(run: EvaluatedRun, number: int, layers: Sequence[str] | None = None) -> dict[str, Weights]:
    """lambda of AN layers on images of a run's validation set, spread over it.

    Raises:
        UserError: no AN, no such layer, no validation set.
    """
    model, norms = load_norms(run, AN, layers, 4, ', whose mixture weights could be drawn')
    names = list(norms)
    ids = evenly(list(run.infos), number)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    labels: list[set[int]] = []
    whole = dict.fromkeys(names, True)
    with _watched(norms, rows):
        done = dict.fromkeys(names, 0)
        for samples in answers(run, ids, model):
            for sample in samples:
                labels.append(_labels(run, sample))
            for name in names:
                added = sum(map(len, rows[name][done[name] :]))
                whole[name] &= added == len(samples)
                done[name] = len(rows[name])
    return {name: _by_class(torch.cat(rows[name]), labels if whole[name] else None, run.classes) for name in names}


def _by_class(weights: Tensor, labels: Sequence[set[int]] | None, classes: Sequence[str]) -> Weights:
    rows = weights.double().cpu().numpy()
    if labels is None:
        return Weights(rows, {ALL: np.arange(len(rows))})
    which = {label: [i for i, own in enumerate(labels) if label in own] for label in sorted(set().union(*labels))}
    named = {as_text(classes[label]): np.array(own) for label, own in which.items() if label < len(classes)}
    return Weights(rows, named or {ALL: np.arange(len(rows))})


def _labels(run: EvaluatedRun, sample: object) -> set[int]:
    """Of the objects in an image, or the class of the image."""
    if run.is_classifier:
        return {int(sample.gt_label)}
    found = run.infos[sample.img_id].get('instances', ())
    return {int(instance['bbox_label']) for instance in found if not instance.get('ignore_flag')}


@contextmanager
def _watched(norms: Mapping[str, nn.Module], rows: dict[str, list[Tensor]]) -> Iterator[None]:
    """Inside, every forward of the layers adds its weights to ``rows``."""

    @torch.no_grad()
    def look(name: str, norm: AN, args: tuple) -> None:
        rows[name].append(mixture_weights(norm, args[0]))

    handles = [norm.register_forward_pre_hook(partial(look, name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def draw(found: Mapping[str, Weights], out: Path, stem: str = 'attention') -> list[Path]:
    """A row for each layer: histograms by class, and the mean of each component by class."""
    with styled():
        figure, axes = sheet(len(found), 2, width=3.4, height=1.7, above=0.5)
        classes: list[str] = []
        for weights in found.values():
            by_size = sorted(weights.classes, key=lambda name: -len(weights.classes[name]))
            classes += [name for name in by_size[:_MOST_CLASSES] if name not in classes]
        for (left, right), (layer, weights) in zip(axes, found.items()):
            edges = np.linspace(0, 1, _BINS + 1)
            for name, shares in weights.histograms().items():
                if name in classes:
                    look = look_of(classes.index(name))
                    left.stairs(shares, edges, color=look['color'], ls=look['ls'])
                    middles = (edges[1:] + edges[:-1]) / 2
                    left.plot(middles, shares, **look | dict(ls=''), markevery=some_of(_BINS, look, few=0))
            left.set_title(short(layer), loc='left')
            left.set_ylabel('share')
            means = {name: row for name, row in weights.means().items() if name in classes}
            heat(right, np.array(list(means.values())), '.2f', aspect='auto', vmin=0, vmax=1)
            right.set_yticks(range(len(means)), list(means))
            right.tick_params(length=0)
        axes[0, 1].set_title(f'mean {LAMBDA} of each component', loc='left')
        axes[-1, 0].set_xlabel(f'{LAMBDA}, all components')
        axes[-1, 1].set_xlabel('component')
        legend(figure, classes)
        paths = write(figure, out, stem)
    numbers = {
        layer: dict(
            instances={name: len(which) for name, which in weights.classes.items()},
            mean=weights.means(),
            histogram=weights.histograms(),
        )
        for layer, weights in found.items()
    }
    write_json(out / f'{stem}.json', numbers)
    return [*paths, out / f'{stem}.json']
