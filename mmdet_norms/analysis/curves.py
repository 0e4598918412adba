"""Loss and results over iterations, one line for each run."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from ..choice import fitting
from ..errors import UserError, some
from ..experiments.runs import Run
from .figures import course, legend, look_of, sheet, styled, write
from .runs import names_of

_FIRST = ('loss', '*bbox_mAP', '*segm_mAP', '*accuracy/top1')


def draw(runs: Sequence[Run], out: Path, keys: Sequence[str] | None = None) -> list[Path]:
    """``curves``: a panel for each quantity; runs that differ in the seed alone have one look.

    Args:
        keys: patterns of the quantities; by default loss, the AP of boxes and masks, and top-1.

    Raises:
        UserError: no run has such a quantity.
    """
    known = sorted({key for run in runs for key in run.curves}, key=lambda key: (key != 'loss', key))
    if keys:
        shown = fitting(
            known,
            keys,
            lambda pattern, _: f'--keys {pattern}: the runs have no such quantity; there are {some(known, 12)}',
        )
    else:
        shown = [key for key in known if any(fnmatch(key, pattern) for pattern in _FIRST)]
    if not shown:
        raise UserError(f'the runs have no {" and no ".join(_FIRST)}; name others with --keys: {some(known, 12)}')
    groups = names_of(runs, without=('seed',))
    looks = list(dict.fromkeys(groups))
    columns = min(len(shown), 3)
    with styled():
        figure, axes = sheet(-(-len(shown) // columns), columns, width=7 / columns, height=2.2, above=0.4, sharex=True)
        for axis, key in zip(axes.flat, shown):
            for run, group in zip(runs, groups):
                points = run.curves.get(key, [])
                course(axis, *(zip(*points) if points else ((), ())), look_of(looks.index(group)))
            axis.set_title(key, loc='left')
            axis.set_xlabel('iteration')
            axis.tick_params(labelbottom=True)
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        legend(figure, looks)
        return write(figure, out, 'curves')
