"""What the package imports is what setup.py asks for."""

import ast
import re
import sys
from pathlib import Path

import pytest

import mmdet_norms
from mmdet_norms_start import requirements

PACKAGE = Path(mmdet_norms.__file__).parent
ROOT = PACKAGE.parent
# Where a distribution is not called what one imports.
DISTRIBUTIONS = {
    'PIL': 'pillow',
    'markdown_it': 'markdown-it-py',
    'yaml': 'PyYAML',
    'pytorch_optimizer': 'pytorch-optimizer',
}
# By the extras of setup.py, of which one is chosen; cv2 comes with each mmcv.
STACK = {'mmengine', 'mmcv', 'mmdet', 'cv2'}
# Used where they are there.
OPTIONAL = {
    'triton',
    'onnx',
    'onnxscript',
    'onnxruntime',
    'torchvision',
    'pytorch_optimizer',
    'submitit',
    'wandb',
    'mlflow',
}


def imported(folder):
    """Names of the third-party modules that the files of a folder import."""
    names = set()
    for path in folder.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    tops = (
        {name.partition('.')[0] for name in names} - set(sys.stdlib_module_names) - {'mmdet_norms', 'mmdet_norms_start'}
    )
    return tops - {path.name for path in (ROOT / 'tests').iterdir() if path.is_dir()}  # pytest's pythonpath


def declared():
    """Distributions in setup.py, and the extra (or None) that each stands in."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
        if getattr(node, 'keywords', None) and any(keyword.arg == 'install_requires' for keyword in node.keywords)
    )
    texts = dict.fromkeys((name for needs in requirements.OPTIONAL.values() for name in needs), 'extras_require')
    texts |= dict.fromkeys(map(str.lower, requirements.NEEDED), 'install_requires')
    for keyword in call.keywords:
        if keyword.arg == 'extras_require':
            for node in ast.walk(keyword.value):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.setdefault(re.match(r'[\w.-]+', node.value)[0].lower(), keyword.arg)
    return texts


@pytest.mark.parametrize('folder', ['mmdet_norms', 'tools'])
def test_every_import_is_declared(folder):
    known = declared()
    known |= dict.fromkeys(OPTIONAL, 'extras_require')
    missing = {name for name in imported(ROOT / folder) - STACK if DISTRIBUTIONS.get(name, name).lower() not in known}
    assert not missing


def test_no_set_of_mm_packages_is_installed_over_another():
    """All of them are extras, whose distributions differ where the modules are not the same ones."""
    assert not {name for name in requirements.NEEDED if 'mm' in name and name != 'mmdet_norms'}
    by_name = [{dist for dist, _ in stack.values()} for stack in requirements.STACKS.values()]
    upstream, forks = by_name[0] | by_name[1], by_name[2]
    assert not upstream & forks and len(by_name) == 3


def test_extras_are_what_pip_takes():
    assert 'mmcv-lite>=2.0.0,<2.2.0' in requirements.extra('lite') and 'setuptools<82' in requirements.extra('lite')
    assert requirements.optional('optim') == "'pytorch-optimizer>=4.1'"
    assert requirements.extra('onedl')[1].startswith('onedl-mmcv>=') and 'torch>=2.1' in requirements.needed()


def test_what_the_package_cannot_do_without_is_no_extra():
    known = declared()
    for name in imported(PACKAGE) - STACK - OPTIONAL:
        assert known[DISTRIBUTIONS.get(name, name).lower()] == 'install_requires', name
