"""Runs in, files out."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from ...console import as_text
from ...engine.results import read_json, write_json
from ...errors import UserError
from ...files import write_text
from .. import runs
from ..effects import Effect, spread
from ..runs import FAILED, Run
from . import page, pictures
from .answer import answer, method, verdict
from .content import COSTS, Content, Method, Setting
from .figures import figures, legend
from .tables import tables

FILES = ('index.html', 'report.md', 'results.csv', 'results.json')


def write(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    metric: str | None = None,
    baseline: str | None = None,
    images: int = 4,
    on_read: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Compare the runs in some folders, and write the report.

    The same runs give the same bytes.

    Args:
        folders: work dirs of ``train``, or folders that have some below them, such as that of a grid.
        out: the folder to write to.
        metric: what to compare by, a key of results.json; by default box AP, mask AP, top-1 accuracy or what there is.
        baseline: what others are compared with: a norm, or ``KEY=VALUE`` of a label; by default ``bn``.
        images: of the validation set, to be shown as the norms see them; for 0, no model is loaded.
        on_read: called when there is something to write, before figures and pictures take their time.

    Returns:
        The files.

    Raises:
        UserError: a folder has no runs, none is finished, or none has that metric or baseline.
    """
    content = Content(*runs.find(folders), metric=metric, baseline=baseline)
    on_read()
    view = _view(content, images)
    texts = dict(zip(FILES, (page.page(view), page.markdown(view), _csv(content))))
    out = Path(out)
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(out / FILES[-1], _json(content, view))
    return [out / name for name in FILES]


def _view(content: Content, images: int) -> dict:
    first = verdict(content)
    config = _common(run.config for run in content.runs)
    drawn, shown, why_not = figures(content), None, None
    if images:
        try:
            shown = pictures.pictures(content, images)
        except Exception as error:  # a model that cannot be built here: the numbers are there all the same
            why = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
            why_not = f'No pictures: {why.rstrip(".")}.'
    return dict(
        title=f'{first}: comparison of {len(content.runs)} runs',
        over=f'{config}, {content.metric.name}' if config else f'{len(content.runs)} runs, {content.metric.name}',
        verdict=first,
        answer=answer(content),
        method=method(content),
        notes=[*content.notes, *([why_not] if why_not else ())],
        facts=_facts(content, config),
        figures=drawn,
        small=all(len(section.panels) < 3 for section in drawn),
        keys=legend(content),
        pictures=shown,
        failed=[run for run in content.runs if run.status == FAILED],
        tables=tables(content),
    )


def _facts(content: Content, config: str) -> list[tuple[str, str]]:
    """Of what the numbers are, as far as all runs agree."""
    sizes = [str(size) for size in content.batch_sizes if size is not None]
    finished = sum(run.is_finished for run in content.runs)
    lengths = sorted({run.iterations for run in content.compared if run.iterations})
    data = _common(str(run.cfg.get('data_root') or '') for run in content.compared)
    facts = [
        ('runs', f'{finished} of {len(content.runs)} finished' if finished < len(content.runs) else str(finished)),
        ('norms', ', '.join(method.name for method in content.ordered)),
        ('batch sizes', ', '.join(sizes)),
        ('seeds', ', '.join(map(str, content.seeds))),
        ('iterations', ' to '.join(dict.fromkeys(map(str, (lengths[0], lengths[-1])))) if lengths else ''),
        ('config', config),
        ('data', data),
        ('device', _common(str(run.cost.get('device') or '') for run in content.compared)),
    ]
    for grid in content.grids:
        said = runs.commands(grid)
        dates = [str(entry['date']) for entry in (*said, grid) if entry.get('date')]
        facts += [(key, str(grid.get(key) or '')) for key in ('budget', 'machine')]
        facts += [('date', ' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else '')]
        facts += [('command', entry['command']) for entry in said]
    return [(name, text) for name, text in facts if text]


def _common(values) -> str:
    """The value, if there is but one."""
    found = {value for value in values if value}
    return found.pop() if len(found) == 1 else ''


def _csv(content: Content) -> str:
    """A row for each run: labels, status, everything that its evaluation said, costs."""
    labels = list(dict.fromkeys(key for run in content.runs for key in run.labels))
    keys = list(dict.fromkeys(key for run in content.runs for key in run.results))
    costs = list(dict.fromkeys(key for run in content.runs for key in run.cost if key not in labels))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['work_dir', *labels, 'status', 'evaluation', 'iterations', *keys, *costs, 'error'])
    for run in content.runs:
        cells = [run.labels.get(key) for key in labels]
        cells += [run.status, run.of, run.iterations, *map(run.results.get, keys), *map(run.cost.get, costs)]
        writer.writerow([run.folder, *cells, run.error])
    return file.getvalue()


def _json(content: Content, view: dict) -> dict:
    return dict(
        verdict=view['verdict'],
        answer=view['answer'],
        method=view['method'],
        notes=view['notes'],
        metric=content.metric.key,
        baseline=content.baseline_name,
        settings=[_setting(content, setting) for setting in content.settings],
        differences=[
            dict(
                metric=metric.key,
                **_named(difference.setting.method),
                batch_size=difference.setting.batch_size,
                against=difference.baseline.method.as_dict,
                **_effect(difference.effect),
            )
            for metric in content.headlines
            for difference in content.differences_in(metric)
        ],
        falls=[
            dict(
                metric=content.metric.key,
                **_named(fall.small.method),
                from_batch_size=fall.large.batch_size,
                to_batch_size=fall.small.batch_size,
                **_effect(fall.effect),
                beyond_baseline=_effect(fall.more) if fall.more else None,
            )
            for fall in content.falls
        ],
        grids=[dict(machine=grid.get('machine'), commands=runs.commands(grid)) for grid in content.grids],
        runs=[_run(run) for run in content.runs],
    )


def _setting(content: Content, setting: Setting) -> dict:
    found = {}
    for metric in content.metrics:
        values = content.values(setting, metric)
        if values:
            middle, deviation = mean(values.values()), spread(list(values.values()))
            found[metric.key] = dict(mean=middle, std=deviation, seeds={str(s): v for s, v in values.items()})
    costs = {key: value for key in COSTS if (value := setting.cost(key)) is not None}
    counts = dict(finished=sum(run.is_finished for run in setting.runs), runs=len(setting.runs))
    return dict(
        **_named(setting.method),
        batch_size=setting.batch_size,
        **counts,
        results=found,
        classes=setting.classes(content.metric),
        cost=costs,
        published=content.published(setting),
    )


def _named(method: Method) -> dict:
    return dict(name=method.name, labels=method.as_dict)


def _effect(effect: Effect) -> dict:
    return dict(
        difference=effect.difference,
        interval=None if effect.low is None else [effect.low, effect.high],
        p=effect.p,
        p_holm=effect.adjusted,
        seeds=effect.seeds,
        paired=effect.paired,
        seen=effect.is_seen,
    )


def _run(run: Run) -> dict:
    found = dict(
        work_dir=run.folder, labels=run.labels, status=run.status, evaluation=run.of, iterations=run.iterations
    )
    return dict(**found, results=run.results, cost=run.cost, config=run.config, error=run.error, log=run.log)


def said(paths: Sequence[Path]) -> list[str]:
    """Of what :func:`write` wrote: the verdict, the answer and what to know before believing it."""
    content = read_json(Path(paths[-1]))
    texts = (content['verdict'], *content['answer'], content['method'], *content['notes'])
    return [as_text(text) for text in texts if text]
