"""What :mod:`.diff` found, for people: a page with pictures that needs no network, Markdown, and a few sentences."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..console import as_text
from ..engine.picture import Instance, draw_panel, read_image
from ..engine.results import write_json
from ..files import write_text
from .bootstrap import FEW_IMAGES
from .detections import EvaluatedRun, detections, instances, picture_of
from .diff import BETTER, IOU, KIND_NAMES, WORSE
from .effects import INTERVAL, LEVEL, number, p_in_words, signed
from .report.page import escaped, jpeg, markdown_row, rendered

JSON, PAGE, MARKDOWN = 'diff.json', 'diff.html', 'diff.md'

_BAR = 80  # pixels of half a bar
_QUALITY = 85


def write(content: dict, runs: Sequence[EvaluatedRun], out: Path, number: int) -> None:
    """Write the page, the Markdown and the data into a folder.

    Args:
        content: of :func:`.diff.compare`.
        runs: the two of it, for the pictures.
        out: the folder.
        number: images to show of those that are better, and of those that are worse.
    """
    page = html(content, pictures(content, runs, number))
    write_json(out / JSON, content)  # the first one: it says whose the others are
    write_text(out / MARKDOWN, markdown(content))
    write_text(out / PAGE, page)


def sentences(content: dict) -> list[str]:
    """The answer: of boxes, masks or top-1."""
    a, b = (as_text(content[side]['name']) for side in 'ab')
    if 'accuracy' in content:
        found = content['accuracy']
        return [f'top-1: {_in_words(found, a, b, content["images"])}, {p_in_words(found["p"])} (McNemar)']
    return [
        f'AP of {KIND_NAMES[kind]}: {_in_words(found["overall"]["AP"], a, b, content["images"])}'
        for kind, found in content['kinds'].items()
    ]


def markdown(content: dict) -> str:
    """Everything but the pictures."""
    a, b = (as_text(content[side]['name']) for side in 'ab')
    lines = [f'# {b} against {a}', '', *(f'* {line}' for line in sentences(content)), '', about(content), '']
    lines += [f'* {side.upper()}: {as_text(content[side]["checkpoint"])}' for side in 'ab']
    for table in _tables(content):
        lines += ['', f'## {table["title"]}', '']
        lines += [table['note'], ''] if table['note'] else []
        lines += [markdown_row(map(escaped, table['columns']))]
        lines += [f'|---|{"---:|" * (len(table["columns"]) - 1)}']
        lines += [markdown_row(map(escaped, entry['cells'])) for entry in table['rows']]
    lines += ['', '## Images', '', counted(content), '']
    for title, changes in _groups(content, 20):
        lines += [f'{title}:', '', *(f'* {escaped(_caption(content, change))}' for change in changes), '']
    return '\n'.join(lines)


def html(content: dict, groups: Sequence[dict]) -> str:
    """The page.

    Args:
        groups: as :func:`pictures` gives them.
    """
    return rendered(
        'diff.html.jinja',
        made_by=content['made_by'],
        **{side: {key: as_text(content[side][key]) for key in ('name', 'checkpoint')} for side in 'ab'},
        said=sentences(content),
        about=about(content),
        tables=_tables(content),
        counted=counted(content),
        groups=groups,
    )


def about(content: dict) -> str:
    """What the intervals mean, and what they leave out."""
    with_objects = '' if 'accuracy' in content else ' with objects'
    return (
        f'Intervals: {content["samples"]} resamples of the {content["images"]} images of the validation set, both '
        'models on the same ones. They say how sure the difference of these two checkpoints is on images like these; '
        f'what another seed would give is not in them. Of fewer than {FEW_IMAGES} images{with_objects} there is none.'
    )


def counted(content: dict) -> str:
    """On how many images which of the two is better, and how that is counted."""
    counts = content['counts']
    text = f'B is better on {counts[BETTER]} images, worse on {counts[WORSE]}, and as good on {counts["same"]}.'
    if 'accuracy' in content:
        return text
    a, b = (content[side]['score_thr'] for side in 'ab')
    return (
        f'{text} That is objects found less false detections, of {KIND_NAMES[content["shown"]]} at an IoU of {IOU}: of '
        f'A with a score of at least {a:.2f}, of B {b:.2f}.'
    )


def pictures(content: dict, runs: Sequence[EvaluatedRun], number: int) -> list[dict]:
    """The images that changed most, drawn for :func:`html`."""
    groups = [(title, changes) for title, changes in _groups(content, number) if changes]
    shown = [change['image'] for _, changes in groups for change in changes]
    if not shown:
        return []
    draw = _classified if 'accuracy' in content else _detected(content, runs, shown)
    return [
        dict(
            title=title,
            small='accuracy' in content,
            figures=[dict(caption=_caption(content, change), panels=draw(change)) for change in changes],
        )
        for title, changes in groups
    ]


def _detected(content: dict, runs: Sequence[EvaluatedRun], images: Sequence):
    """What draws an image: the ground truth, and what each run finds."""
    found = [instances(run, detections(run, images), content[side]['score_thr']) for side, run in zip('ab', runs)]

    def draw(change: dict) -> list[dict]:
        pixels, truth = picture_of(runs[0], change['image'])
        panels = [_panel('ground truth', pixels, truth, 'no objects')]
        for side, of_run in zip('ab', found):
            counts = f'{change[f"found_{side}"]} of {change["objects"]} found, {change[f"false_{side}"]} false'
            caption = f'{side.upper()}, {as_text(content[side]["name"])}: {counts}'
            panels.append(_panel(caption, pixels, of_run.get(change['image'], []), 'no detections'))
        return panels

    return draw


def _classified(change: dict) -> list[dict]:
    return [_panel(as_text(change['label']), read_image(change['file']), [], '')]


def _panel(caption: str, pixels, drawn: Sequence[Instance], if_empty: str) -> dict:
    return dict(caption=caption, source=jpeg(draw_panel(pixels, drawn, if_empty, longest=420), _QUALITY))


def _groups(content: dict, number: int) -> list[tuple[str, list[dict]]]:
    changes = content['changes']  # the greatest gain first
    better = [change for change in changes if change['gain'] > 0]
    worse = [change for change in reversed(changes) if change['gain'] < 0]
    return [
        (f'{title}: {min(number, len(group))} of {len(group)} images', group[:number])
        for title, group in (('Better with B', better), ('Worse with B', worse))
        if group
    ]


def _caption(content: dict, change: dict) -> str:
    if 'accuracy' in content:
        said = (f'{s.upper()} says {change[f"said_{s}"]["label"]} ({change[f"said_{s}"]["score"]:.2f})' for s in 'ab')
        return as_text(f'{change["image"]}, which is {change["label"]}: {", ".join(said)}')
    parts = [f'{what} {_listed(change[what])}' for what in ('gained', 'lost') if change[what]]
    false = change['false_b'] - change['false_a']
    parts += [f'{abs(false)} {"more" if false > 0 else "fewer"} false'] if false else []
    return as_text(f'{change["file"]}: {", ".join(parts)}')


def _listed(names: Sequence[str]) -> str:
    return ', '.join(f'{count} {name}' if count > 1 else name for name, count in Counter(names).items())


def _tables(content: dict) -> list[dict]:
    if 'accuracy' in content:
        rows = [_row('top-1', [content['images']], content['accuracy'])]
        tables = [_table('Accuracy', ['', 'images'], rows, 2)]
        rows = [
            _row(entry['name'], [entry['objects']], entry['accuracy'], [entry['only_a'], entry['only_b']])
            for entry in content['classes']
        ]
        more = ['only A is right', 'only B is right']
        return [*tables, _table('Classes', ['class', 'images'], rows, 2, more, _by_chance(rows), bars=True)]
    tables = []
    for kind, found in content['kinds'].items():
        rows = [_row(name, [], entry) for name, entry in found['overall'].items()]
        tables.append(_table(f'Average precision of {KIND_NAMES[kind]}', [''], rows, 1))
    more = ['only A finds', 'only B finds', 'false in A', 'false in B']
    for kind, found in content['kinds'].items():
        shown = kind == content['shown']
        rows = [
            _row(
                counts['name'],
                [counts['objects']],
                entry,
                [counts[key] for key in ('only_a', 'only_b', 'false_a', 'false_b')] if shown else [],
            )
            for counts, entry in zip(content['classes'], found['classes'])
        ]
        columns = more if shown else []
        title = f'Classes, by AP of {KIND_NAMES[kind]}'
        tables.append(_table(title, ['class', 'objects'], rows, 2, columns, _by_chance(rows), bars=True))
    return tables


def _table(
    title: str, first: list[str], rows: list[dict], before: int, more: Sequence[str] = (), note: str = '', bars=False
) -> dict:
    if bars:
        rows = sorted(rows, key=lambda row: -(row['difference'] or 0))
        reach = max((abs(value) for row in rows for value in row['ends'] if value is not None), default=0) or 1
        for row in rows:
            at, low, high = (
                None if value is None else _BAR + round(value / reach * (_BAR - 5), 1) for value in row['ends']
            )
            row['bar'] = None if at is None else dict(at=at, low=low, high=high)
    columns = [*first, 'A', 'B', 'B - A', INTERVAL, *more]
    return dict(title=title, columns=columns, rows=rows, marked=before + 2, note=note, bars=bars)


def _row(name: str, before: Sequence[int], found: dict, after: Sequence[int] = ()) -> dict:
    difference, low, high = (found[key] for key in ('difference', 'low', 'high'))
    interval = '-' if low is None else f'{_number(low)} to {_number(high)}'
    numbers = [_number(found['a']), _number(found['b']), _signed(difference), interval]
    direction = None if low is None else 'up' if low > 0 else 'down' if high < 0 else None
    cells = [as_text(name), *map(str, before), *numbers, *map(str, after)]
    return dict(cells=cells, direction=direction, difference=difference, ends=(difference, low, high))


def _by_chance(rows: Sequence[dict]) -> str:
    known = [row for row in rows if row['ends'][1] is not None]
    seen = sum(row['direction'] is not None for row in known)
    if not known:
        return ''
    return (
        f'Of {len(known)} intervals {seen} leave{"s" if seen == 1 else ""} 0 out; chance alone would do so for '
        f'{(1 - LEVEL) * len(known):.1f}.'
    )


def _in_words(found: dict, a: str, b: str, images: int) -> str:
    """``'no difference seen: +0.4, 95 % interval -0.9 to 1.7, 200 images'``."""
    difference, low, high = (found[key] for key in ('difference', 'low', 'high'))
    if difference is None:
        return f'not known of {a if found["a"] is None else b}: there is nothing to find'
    values = f'{_number(found["a"])} and {_number(found["b"])}'
    if low is None:
        return f'{_signed(difference)} ({values}), no interval: too few images'
    details = f'{INTERVAL} {_number(low)} to {_number(high)}, {images} images ({values})'
    if low <= 0 <= high:
        return f'no difference seen: {_signed(difference)}, {details}'
    return f'{b} is {"better" if low > 0 else "worse"} than {a}: {_signed(difference)}, {details}'


def _number(value: float | None) -> str:
    """In percent."""
    return '-' if value is None else number(100 * value)


def _signed(value: float | None) -> str:
    return '-' if value is None else signed(100 * value)
