"""The page and the Markdown, from the templates beside this file; and what :mod:`..diff_page` makes of them, too."""

import base64
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
from jinja2.utils import markupsafe
from PIL import Image

from ...version import __version__

_TEMPLATES = Path(__file__).with_name('templates')
_MINUS = re.compile(r'(?<![\w.)-])-(?=\d)')


def page(view: Mapping) -> str:
    """``index.html``."""
    return rendered('page.html.jinja', **view, version=__version__)


def rendered(template: str, **values: object) -> str:
    """A page: everything inside, nothing asked for from outside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters['typeset'] = typeset
    style, script = (
        markupsafe.Markup((_TEMPLATES / name).read_text(encoding='utf-8')) for name in ('style.css', 'sort.js')
    )
    return environment.get_template(template).render(**values, style=style, script=script)


def markdown(view: Mapping) -> str:
    """``report.md``: the same without the figures."""
    lines = [f'# {_line(view["verdict"])}', '', _line(view['over']), '']
    for paragraph in view['answer']:
        lines += [_line(paragraph), '']
    lines += [_line(view['method']), '']
    for bullets in (view['notes'], [f'{name}: {text}' for name, text in view['facts']]):
        lines += [*(f'* {_line(text)}' for text in bullets), '']
    if view['failed']:
        lines += ['## Failed', '']
        for run in view['failed']:
            log = f' (log: {_line(run.log)})' if run.log else ''
            lines += [f'* {_line(run.folder)}: {_line(run.error or "no word of why")}{log}']
        lines += ['']
    for table in view['tables']:
        lines += [f'## {_line(table.title)}', '', _line(table.caption), '']
        lines += [markdown_row(map(_line, table.columns))]
        lines += [markdown_row(':---' if table.is_words(i) else '---:' for i in range(len(table.columns)))]
        lines += [
            markdown_row(f'**{cell.text}**' if cell.kind == 'best' else _line(cell.text) for cell in cells)
            for cells in table.rows
        ]
        lines += ['']
    return '\n'.join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))


def markdown_row(cells: Iterable[str]) -> str:
    """Of a table."""
    return f'| {" | ".join(cells)} |'


def typeset(text: str) -> markupsafe.Markup:
    """With minus signs, and without line breaks inside ``p < 0.05`` and ``95 %``."""
    text = _MINUS.sub('\N{MINUS SIGN}', str(text))
    return markupsafe.escape(
        re.sub(r'(?<=\bp) ([<=]) |(?<=\d) (%)', lambda m: f'\xa0{m[1]}\xa0' if m[1] else '\xa0%', text)
    )


def escaped(text: str) -> str:
    """For Markdown: nothing in it is markup."""
    return re.sub(r'([\\`*_<>|\[\]])', r'\\\1', text)


def jpeg(image: Image.Image, quality: int) -> str:
    """A picture as the source of an ``<img>``."""
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=quality)
    return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'


def _line(text: str) -> str:
    """One line in which nothing is markup."""
    return escaped(' '.join(str(text).split()))
