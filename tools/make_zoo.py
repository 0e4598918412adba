#!/usr/bin/env python
"""Write docs/zoo.md and the tables of configs/*/README.md from the metafiles that model-index.yml names."""

import argparse
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = 'docs/zoo.md'
BEGIN, END = '<!-- zoo: python tools/make_zoo.py -->', '<!-- end of zoo -->'

_NAME = re.compile(r'(?P<detector>[a-z-]+)_(?P<backbone>[^_]+)_fpn_(?P<norm>.+)_(?P<schedule>[^_]+)_coco')
_DETECTORS = {
    'faster-rcnn': 'Faster R-CNN',
    'mask-rcnn': 'Mask R-CNN',
    'cascade-rcnn': 'Cascade R-CNN',
    'cascade-mask-rcnn': 'Cascade Mask R-CNN',
    'retinanet': 'RetinaNet',
}
_BACKBONES = {
    'r50': 'R-50',
    'r50-scratch': 'R-50 from scratch',
    'r101': 'R-101',
    'aognet-12m': 'AOGNet-12m',
    'aognet-40m': 'AOGNet-40m',
}
_INTRODUCTION = """\
# The zoo: every published row, its config, its size, how to train and test it

Written from the metafiles of [configs](../configs) (index: [model-index.yml](../model-index.yml)) by `python
tools/make_zoo.py`; edit those. **Every AP is the authors' published number on COCO val2017 (with AP50 / AP75 where they
are published); none was measured here.** What keeps a config from being the row to the letter stands in the README of
its folder, under "Deviations". Parameters are those of the detector with 80 classes, frozen ones included.

The norms are the names of `--norm` ([where each sits](../README.md#norms-by-name)), and `none`: no norm in FPN and
heads; `bn-all`, `syncbn-all`, `gn-all`: that norm in backbone, FPN and heads. The number behind a config: the GPUs.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='compare with the files instead of writing them')
    parser.add_argument('--root', type=Path, default=ROOT, help='the repository; default: this one')
    args = parser.parse_args(argv)

    stale = []
    for name, text in documents(args.root).items():
        file = args.root / name
        if file.exists() and file.read_text(encoding='utf-8') == text:
            continue
        stale.append(name)
        if not args.check:
            file.write_text(text, encoding='utf-8')
    for name in stale:
        print(f'{name} is not what the metafiles say' if args.check else f'wrote {name}')
    if args.check and stale:
        print('write them with: python tools/make_zoo.py', file=sys.stderr)
    return int(args.check and bool(stale))


def documents(root: Path) -> dict[str, str]:
    """Every generated file: path below ``root`` -> text."""
    models = read_index(root)
    texts = {DOCUMENT: zoo(models)}
    for folder in dict.fromkeys(model['folder'] for model in models):
        own = [model for model in models if model['folder'] == folder]
        # Baselines of a paper's table are also shown with the rest of it.
        papers = {model['paper'] for model in own}
        shown = own if folder == 'baselines' else [model for model in models if model['paper'] in papers]
        readme = root / 'configs' / folder / 'README.md'
        text = readme.read_text(encoding='utf-8')
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        texts[str(readme.relative_to(root))] = f'{before}{BEGIN}\n\n{readme_table(shown, folder)}\n{END}{after}'
    return texts


def read_index(root: Path) -> list[dict]:
    """The models of all metafiles, those of one paper together, with what their collection says."""
    models = []
    for path in yaml.safe_load((root / 'model-index.yml').read_text(encoding='utf-8'))['Import']:
        content = yaml.safe_load((root / path).read_text(encoding='utf-8'))
        collections = {collection['Name']: collection for collection in content['Collections']}
        for model in content['Models']:
            collection = collections[model['In Collection']]
            resources = re.match(r'(\d+)x GPUs, (\d+) images each', collection['Metadata']['Training Resources'])
            models.append(
                dict(
                    model,
                    paper=collection['Paper']['URL'],
                    method=collection['Name'].split()[0],  # 'BNET baselines' are rows of BNET's tables
                    folder=Path(path).parent.name,
                    gpus=int(resources[1]),
                    metrics={key: value for result in model['Results'] for key, value in result['Metrics'].items()},
                    parts=_NAME.fullmatch(model['Name']),
                )
            )
    detectors = [_family(model) for model in models]
    return sorted(models, key=lambda model: detectors.index(_family(model)))


def _family(model: dict) -> tuple:
    """What one block of a table has in common."""
    parts = model['parts']
    return (model['paper'], *((parts['detector'], parts['backbone']) if parts else ()))


def zoo(models: list[dict]) -> str:
    """The text of docs/zoo.md."""
    lines = [
        '| row | table of | detector | norm | schedule | box AP | mask AP | parameters | train and test |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for model in models:
        if 'Config' not in model:
            continue
        lines.append(
            _line(
                _row(model),
                f'[{model["method"]}](../configs/{model["folder"]}/README.md)',
                *_what(model),
                _ap(model, 'box'),
                _ap(model, 'mask'),
                f'{model["Metadata"]["Parameters"]:,}',
                '<br>'.join(f'`{command}`' for command in _commands(model)),
            )
        )
    notes = ['', *_notes([model for model in models if 'Config' in model])]
    others = ['', '## Published rows that are no detectors', '', *_classification(models)]
    return '\n'.join([_INTRODUCTION, *lines, *notes, *others])


def _classification(models: list[dict]) -> list[str]:
    rows = [model for model in models if 'Config' not in model]
    lines = [_line(_row(model), f'`{model["Name"]}`', model['metrics']['Top 1 Error']) for model in rows]
    return ['| row | model | top-1 error on ImageNet, % |', '|---|---|---|', *lines, ''] if rows else []


def readme_table(models: list[dict], folder: str) -> str:
    """The table of a folder's README; its columns are those that any row fills. Notes stand below it."""
    columns = {
        'row': _row,
        'detector': lambda model: _what(model)[0],
        'norm': lambda model: _what(model)[1],
        'schedule': lambda model: _what(model)[2],
        'box AP': lambda model: _ap(model, 'box'),
        'mask AP': lambda model: _ap(model, 'mask'),
        'img/s': lambda model: model['Published'].get('FPS', '-'),
        'parameters': lambda model: f'{model["Metadata"]["Parameters"]:,}',
        'as printed': lambda model: model['Published'].get('Parameters', '-'),
        'config of the authors': lambda model: model['Published']['Config'],
        'config here': lambda model: _link(model, folder),
    }
    detectors = [model for model in models if 'Config' in model]
    cells = {title: [str(cell(model)) for model in detectors] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if set(column) != {'-'}}
    lines = [_line(*cells), _line(*['---'] * len(cells)), *(_line(*row) for row in zip(*cells.values()))]
    lines += ['', *_notes(detectors), '', *_classification(models)]
    return '\n'.join(lines).rstrip('\n') + '\n'


def _notes(models: list[dict]) -> list[str]:
    notes = [(_row(model), model['Name'], model['Published'].get('Note')) for model in models]
    return [f'* `{name if row == "(none)" else row}`: {note}.' for row, name, note in notes if note]


def _line(*cells) -> str:
    return f'| {" | ".join(str(cell) for cell in cells)} |'


def _row(model: dict) -> str:
    return model['Published'].get('Row', '(none)')


def _what(model: dict) -> tuple[str, str, str]:
    parts = model['parts']
    return f'{_DETECTORS[parts["detector"]]}, {_BACKBONES[parts["backbone"]]}', f'`{parts["norm"]}`', parts['schedule']


def _ap(model: dict, kind: str) -> str:
    metrics = model['metrics']
    if f'{kind} AP' not in metrics:
        return '-'
    # As many decimals as the table has: a trailing zero is lost in YAML.
    digits = max(len(str(metrics[key]).partition('.')[2]) for key in metrics)
    thresholds = [f'{metrics[key]:.{digits}f}' for key in (f'{kind} AP50', f'{kind} AP75') if key in metrics]
    value = f'{metrics[f"{kind} AP"]:.{digits}f}'
    return f'{value} ({" / ".join(thresholds)})' if thresholds else value


def _commands(model: dict) -> tuple[str, str]:
    kinds = 'bbox segm' if 'mask AP' in model['metrics'] else 'bbox'
    config = model['Config']
    return (
        f'tools/dist_train.sh {config} {model["gpus"]}',
        f'python tools/test.py {config} CHECKPOINT --eval {kinds}',
    )


def _link(model: dict, folder: str) -> str:
    file = Path(model['Config']).name
    return f'[{file}]({file})' if model['folder'] == folder else f'[{file}](../{model["folder"]}/{file})'


if __name__ == '__main__':
    sys.exit(main())
