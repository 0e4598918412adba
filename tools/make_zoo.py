#!/usr/bin/env python
"""Write docs/zoo.md and the tables of configs/*/README.md from the metafiles that model-index.yml names."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = 'docs/zoo.md'
BEGIN, END = '<!-- zoo: python tools/make_zoo.py -->', '<!-- end of zoo -->'

_NAME = re.compile(r'(?P<detector>[a-z-]+)_(?P<backbone>[^_]+)_fpn_(?P<norm>.+)_(?P<schedule>[^_]+)_coco')
_CLASSIFIER = re.compile(
    r'(?P<backbone>[^_]+)_(?P<norm>[^_]+)_(\d+xb\d+-|[a-z]+_)(?P<schedule>\d+e)_(?P<data>in1k|imagenette160)'
)
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
    'resnet50': 'ResNet-50',
    'resnet101': 'ResNet-101',
}
_DATA = {'in1k': 'ImageNet', 'imagenette160': 'Imagenette, 160 px'}
_SHOWN_ALONE = ('baselines', 'imagenet', 'imagenette')
_FEEDS = 'The classifiers that train the weights to start from ([recipes](../imagenet/README.md)):\n'
_INTRODUCTION = """\
# The zoo: every published row, its config, its size, how to train and test it

Written from the metafiles of [configs](../configs) (index: [model-index.yml](../model-index.yml)) by `python
tools/make_zoo.py`; edit those. **Every AP is the authors' published number on COCO val2017 (with AP50 / AP75 where they
are published), every top-1 accuracy theirs on ImageNet; none was measured here.** What keeps a config from being the
row to the letter stands in the README of its folder, under "Deviations". Parameters are those of the detector with 80
classes, frozen ones included.

The norms are the names of `--norm` ([where each sits](../README.md#norms-by-name)), and `none`: no norm in FPN and
heads; `bn-all`, `syncbn-all`, `gn-all`: that norm in backbone, FPN and heads. The number behind a config: the GPUs.

## Detectors
"""
_CLASSIFIERS = """\
## Classifiers

Backbones for detectors to start from ([how](pretrained.md#weights-of-your-own)). `bn32`, `bn2`, `brn2`, `mabn2`:
statistics over so many of the 32 images of a GPU. Parameters with the linear layer, of 1000 classes for ImageNet and of
10 for Imagenette.
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
        shown = (
            own
            if folder in _SHOWN_ALONE
            else [m for m in models if m['paper'] in papers and m['folder'] != 'imagenette']
        )
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
            resources = re.match(r'(\d+)x GPUs?, (\d+) images each', collection['Metadata']['Training Resources'])
            models.append(
                dict(
                    model,
                    paper=collection['Paper']['URL'],
                    method=collection['Name'].split()[0],  # 'BNET baselines' are rows of BNET's tables
                    folder=Path(path).parent.name,
                    gpus=int(resources[1]),
                    metrics={
                        key: value for result in model.get('Results', []) for key, value in result['Metrics'].items()
                    },
                    parts=_parts(model['Name'], path),
                )
            )
    families = [_family(model) for model in models]
    return sorted(models, key=lambda model: families.index(_family(model)))


def _parts(name: str, path: str) -> dict[str, str]:
    for pattern in (_NAME, _CLASSIFIER):
        found = pattern.fullmatch(name)
        if found:
            return found.groupdict()
    raise SystemExit(f'{path}: {name!r} is named neither as a detector nor as a classifier: {_CLASSIFIER.pattern}')


def _family(model: dict) -> tuple:
    """What one block of a table has in common."""
    return (model['paper'], *(model['parts'].get(key) for key in ('detector', 'data', 'backbone')))


def _split(models: list[dict]) -> tuple[list[dict], list[dict]]:
    """Detectors and classifiers."""
    return [m for m in models if 'detector' in m['parts']], [m for m in models if 'data' in m['parts']]


def zoo(models: list[dict]) -> str:
    """The text of docs/zoo.md."""
    detectors, classifiers = _split(models)
    both = {
        'table of': lambda model: f'[{model["method"]}](../configs/{model["folder"]}/README.md)',
        'parameters': _parameters,
        'train and test': lambda model: '<br>'.join(f'`{command}`' for command in _commands(model)),
    }
    of_detectors = {
        'row': _row,
        'table of': both['table of'],
        'detector': lambda model: _what(model)[0],
        'norm': lambda model: _what(model)[1],
        'schedule': lambda model: _what(model)[2],
        'box AP': lambda model: _ap(model, 'box'),
        'mask AP': lambda model: _ap(model, 'mask'),
        **both,
    }
    of_classifiers = {**_columns_of_classifiers('docs'), **both}
    tables = [*_table(detectors, of_detectors), '', *_notes(detectors), '', _CLASSIFIERS]
    return '\n'.join([_INTRODUCTION, *tables, *_table(classifiers, of_classifiers), '', *_notes(classifiers), ''])


def _table(models: list[dict], columns: dict[str, Callable]) -> list[str]:
    """Of the columns those that any row fills."""
    cells = {title: [str(cell(model)) for model in models] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if set(column) != {'-'}}
    return [_line(*cells), _line(*['---'] * len(cells)), *(_line(*row) for row in zip(*cells.values()))]


def _columns_of_classifiers(folder: str) -> dict[str, Callable]:
    return {
        'config': lambda model: _link(model, folder),
        'backbone': lambda model: _what(model)[0],
        'norm': lambda model: _what(model)[1],
        'data': lambda model: _DATA[model['parts']['data']] if folder == 'docs' else '-',
        'row': lambda model: model.get('Published', {}).get('Row', '-'),
        'top-1 (error), %': _top1,
        'parameters': _parameters,
        'as published': lambda model: model.get('Published', {}).get('Parameters', '-'),
        'weights of the authors': lambda model: model.get('Published', {}).get('Weights', '-'),
    }


def readme_table(models: list[dict], folder: str) -> str:
    """The tables of a folder's README, with notes below each."""
    of_detectors = {
        'row': _row,
        'detector': lambda model: _what(model)[0],
        'norm': lambda model: _what(model)[1],
        'schedule': lambda model: _what(model)[2],
        'box AP': lambda model: _ap(model, 'box'),
        'mask AP': lambda model: _ap(model, 'mask'),
        'img/s': lambda model: model['Published'].get('FPS', '-'),
        'parameters': _parameters,
        'as printed': lambda model: model['Published'].get('Parameters', '-'),
        'config of the authors': lambda model: model['Published']['Config'],
        'config here': lambda model: _link(model, folder),
    }
    detectors, classifiers = _split(models)
    lines = []
    if detectors:
        lines += [*_table(detectors, of_detectors), '', *_notes(detectors), '']
    if classifiers:
        lines += [_FEEDS] * bool(detectors)
        lines += [*_table(classifiers, _columns_of_classifiers(folder)), '', *_notes(classifiers)]
    return '\n'.join(lines).rstrip('\n') + '\n'


def _notes(models: list[dict]) -> list[str]:
    notes = [(model['Name'], model.get('Published', {})) for model in models]
    return [f'* `{said.get("Row", name)}`: {said["Note"]}.' for name, said in notes if 'Note' in said]


def _parameters(model: dict) -> str:
    return f'{model["Metadata"]["Parameters"]:,}'


def _line(*cells) -> str:
    return f'| {" | ".join(str(cell) for cell in cells)} |'


def _row(model: dict) -> str:
    return model['Published'].get('Row', '(none)')


def _what(model: dict) -> tuple[str, str, str]:
    parts = model['parts']
    backbone = _BACKBONES.get(parts['backbone'], parts['backbone'])
    detector = f'{_DETECTORS[parts["detector"]]}, {backbone}' if 'detector' in parts else backbone
    return detector, f'`{parts["norm"]}`', parts['schedule']


def _ap(model: dict, kind: str) -> str:
    metrics = model['metrics']
    if f'{kind} AP' not in metrics:
        return '-'
    # As many decimals as the table has: a trailing zero is lost in YAML.
    digits = max(len(str(metrics[key]).partition('.')[2]) for key in metrics)
    thresholds = [f'{metrics[key]:.{digits}f}' for key in (f'{kind} AP50', f'{kind} AP75') if key in metrics]
    value = f'{metrics[f"{kind} AP"]:.{digits}f}'
    return f'{value} ({" / ".join(thresholds)})' if thresholds else value


def _top1(model: dict) -> str:
    if not model['metrics']:
        return '-'
    return f'{model["metrics"]["Top 1 Accuracy"]:.2f} ({model["Published"]["Top 1 Error"]:.2f})'


def _commands(model: dict) -> tuple[str, str]:
    config, gpus = model['Config'], model['gpus']
    kinds = ''
    if 'detector' in model['parts']:
        kinds = ' --eval bbox segm' if 'mask AP' in model['metrics'] else ' --eval bbox'
    return (
        f'tools/dist_train.sh {config} {gpus}' if gpus > 1 else f'python tools/train.py {config}',
        f'python tools/test.py {config} CHECKPOINT{kinds}',
    )


def _link(model: dict, folder: str) -> str:
    file = Path(model['Config']).name
    if folder == 'docs':
        return f'[{model["Name"]}](../{model["Config"]})'
    return f'[{file}]({file})' if model['folder'] == folder else f'[{file}](../{model["folder"]}/{file})'


if __name__ == '__main__':
    sys.exit(main())
