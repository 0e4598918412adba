#!/usr/bin/env python
"""Run every command and every Python example of the documentation; see CONTRIBUTING.md, section "The documentation".

A block is what Markdown shows as code. Its kind is the language of its fence; an indented one, which has none, is a
shell's where it begins with a command, else Python. Shell blocks are run, Python blocks are run with the names that
they leave open (``model``, ``cfg``, ...), and Python blocks that only assign entries of a config are read as one.
Comments before a block say what is special about it:

    <!-- needs: coco -->      it needs what a checkout lacks (NEEDS): its options, files and configs are checked only
    <!-- in: configs/cbn -->  the folder that it is written for; of a config: where it would lie

All of it happens in copies of the checkout, with a few generated images and a detector trained on them.
"""

import argparse
import ast
import builtins
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmdet_norms_start.commands
from mmdet_norms_start.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

NEEDS = {
    'authors': 'a file that the authors of a paper published',
    'coco': 'the COCO data set, or weights to start from',
    'docker': 'Docker',
    'github': 'a push to GitHub',
    'gpu': 'a GPU',
    'mmcv': 'mmcv with compiled ops',
    'minutes': 'minutes to hours of computing',
    'network': 'the network; and it changes the environment',
    'own': "the reader's own files",
    'slurm': 'Slurm',
}
LIMIT = 600  # seconds, of one block

DEMO = 'configs/demo/mask-rcnn_r50_fpn_bnet5_shapes.py'
# What stands for a value of the reader's, and the value that it gets here. Longer names first.
PLACEHOLDERS = {
    'CHECKPOINT': 'work_dirs/demo/epoch_3.pth',
    'CONFIG': DEMO,
    'CKPT': 'work_dirs/demo/epoch_3.pth',
    'CFG': DEMO,
    'WORK_DIR': 'work_dirs/demo',
    'IMAGE': 'data/shapes/val/000000.png',
    'PHOTOS': 'data/PennFudanPed',
    'DIR': 'data/shapes',
    'OUT': 'work_dirs/out',
    'SRC.pth': 'work_dirs/demo/epoch_3.pth',
    'SRC': 'work_dirs/demo/epoch_3.pth',
    'DST': 'work_dirs/converted.pth',
    '/datasets/coco': 'data/shapes',
}
# What a Python example may use without saying where it comes from.
GIVEN = {
    'torch': 'import torch',
    'mmdet_norms': 'import mmdet_norms',
    'MODELS': 'import mmdet_norms\nfrom mmdet.registry import MODELS',
    'cfg': f'from mmengine.config import Config\ncfg = Config.fromfile({DEMO!r})',
    'model': "import mmdet_norms\nfrom mmdet.apis import init_detector\n"
    f"model = init_detector({DEMO!r}, {PLACEHOLDERS['CHECKPOINT']!r}, device='cpu')",
    'batches': f'import mmdet_norms\nfrom mmengine.config import Config\nfrom mmengine.runner import Runner\n'
    f'batches = Runner.build_dataloader(Config.fromfile({DEMO!r}).val_dataloader)',
    **{name: f'{name} = {PLACEHOLDERS[name]!r}' for name in ('CHECKPOINT', 'CONFIG', 'IMAGE')},
}  # fmt: skip

_SHELL = {'bash', 'sh', 'shell'}
_SHOWN = {'text', 'bibtex', 'json', 'yaml', 'toml', 'console', 'c', 'dockerfile', 'markdown'}
_COMMANDS = {'make', 'python', 'torchrun', 'mmdet-norms', 'pip', 'pytest', 'git', 'docker', 'mim', 'cd', 'export'}
_IN_REPOSITORY = re.compile(r'(?:configs|docs|mmdet_norms|requirements|tests|tools)/[\w./-]*[\w/]')
_MARK = re.compile(r'<!--\s*(needs|in):\s*(.*?)\s*-->')


@dataclass
class Block:
    """A block of code in a page, and what is asked of it."""

    page: str
    line: int
    kind: str  # shell, python, config, shown or unknown
    text: str
    needs: tuple[str, ...] = ()
    folder: str = '.'
    problems: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f'{self.page}:{self.line}'


@dataclass
class Page:
    """A page: its blocks, the links in it as (line, target), what links may name, and code within its sentences."""

    name: str
    blocks: list[Block]
    links: list[tuple[int, str]]
    anchors: set[str]
    codes: list[tuple[int, str]]


# --- reading --------------------------------------------------------------------------------------------------------


def pages(root: Path) -> list[str]:
    """The documentation: every page that a reader of the repository is sent to."""
    own = [name for name in ('README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md') if (root / name).exists()]
    found = [*sorted(root.glob('docs/**/*.md')), *sorted(root.glob('configs/**/*.md'))]
    return own + [path.relative_to(root).as_posix() for path in found]


def read_page(name: str, text: str) -> Page:
    """Read one page with the Markdown parser."""
    tokens = MarkdownIt('commonmark').enable('table').parse(text)
    page = Page(name, [], [], set(), [])
    marks: dict[str, str] = {}
    for number, token in enumerate(tokens):
        line = (token.map or [0])[0] + 1
        if token.type in ('fence', 'code_block'):
            page.blocks.append(_block(page, line + (token.type == 'fence'), token, marks))
        if token.type == 'html_block':
            marks = dict(_MARK.findall(token.content))
            page.anchors |= set(re.findall(r'(?:id|name)="([^"]+)"', token.content))
        elif token.level == 0 or token.type in ('fence', 'code_block'):
            marks = {}
        if token.type == 'heading_open':
            page.anchors.add(_free(_slug(tokens[number + 1].children), page.anchors))
        if token.type == 'inline':
            line = token.map[0] + 1
            for child in token.children:
                target = child.attrGet('href') or child.attrGet('src')
                if target is not None:
                    page.links.append((line, target))
                if child.type == 'code_inline':
                    page.codes.append((line, child.content))
    return page


def _block(page: Page, line: int, token, marks: dict[str, str]) -> Block:
    language = token.info.strip()
    block = Block(page.name, line, language, token.content, folder=marks.get('in', '.'))
    block.needs = tuple(marks.get('needs', '').replace(',', ' ').split())
    for need in set(block.needs) - set(NEEDS):
        block.problems.append(f'needs: {need}? One of {", ".join(NEEDS)}')
    if language in _SHELL or (not language and _starts_with_a_command(token.content)):
        block.kind = 'shell'
    elif language in ('python', ''):
        try:
            block.kind = 'config' if _is_config(token.content) else 'python'
        except SyntaxError as error:
            what = 'neither begins with a command nor is Python: fence it as text' if not language else str(error)
            block.problems.append(what)
            block.kind = 'unknown'
    elif language in _SHOWN:
        block.kind = 'shown'
    else:
        block.problems.append(f'a fence of {language!r}: one of {", ".join(sorted(_SHELL | _SHOWN | {"python"}))}')
    return block


def _slug(children: list) -> str:
    """The anchor that GitHub gives a heading."""
    text = ''.join(child.content for child in children if child.type in ('text', 'code_inline'))
    return re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')


def _free(slug: str, taken: set[str]) -> str:
    names = [slug, *(f'{slug}-{number}' for number in range(1, 100))]
    return next(name for name in names if name not in taken)


def _starts_with_a_command(text: str) -> bool:
    for line in text.splitlines():
        words = [word for word in line.split('#')[0].split() if not re.match(r'[A-Z_]+=', word)]
        if words:
            first = words[0]
            return first in _COMMANDS or first.endswith('.sh') or first.startswith('.venv/bin/')
    return False


def _is_config(text: str) -> bool:
    """Whether Python only assigns names, one of which is an entry that configs have, and calls nothing but dict."""
    tree = ast.parse(text)
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    plain = all(isinstance(node, ast.Assign) for node in tree.body) and all(map(_is_name, targets))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    entries = {'_base_', 'model', 'custom_imports', 'custom_hooks', 'train_dataloader', 'val_dataloader', 'data_root'}
    return plain and bool({target.id for target in targets} & entries) and all(_is_name(f, 'dict') for f in calls)


def _is_name(node: ast.expr, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and name in (None, node.id)


# --- what needs no running ------------------------------------------------------------------------------------------


def static_problems(root: Path, read: list[Page]) -> Iterator[str]:
    """What is wrong with links, blocks, commands and paths, found without running any of them."""
    by_name = {page.name: page for page in read}
    yield from _unreachable(by_name)
    for page in read:
        for line, target in page.links:
            problem = _broken(root, by_name, page.name, target)
            if problem:
                yield f'{page.name}:{line}: {problem}'
        for block in page.blocks:
            yield from (f'{block.place}: {problem}' for problem in block.problems)
            if block.kind == 'shell':
                yield from (f'{block.place}: {problem}' for problem in _command_problems(root, block))
            elif block.kind == 'python':
                unknown = sorted(_open_names(block.text) - set(GIVEN))
                if unknown and not block.needs:
                    yield f'{block.place}: where do {", ".join(unknown)} come from? (GIVEN in tools/check_docs.py)'
        for line, code in page.codes:
            yield from (f'{page.name}:{line}: {problem}' for problem in _code_problems(root, code))


def _unreachable(by_name: dict[str, Page]) -> Iterator[str]:
    """Pages that docs/index.md, which orders them, does not name."""
    index = by_name.get('docs/index.md')
    if index is None:
        yield 'docs/index.md: missing'
        return
    named = {_resolve(index.name, target)[0] for _, target in index.links if _is_relative(target)}
    yield from (f'docs/index.md: does not name {name}' for name in by_name if name not in named | {index.name})
    if not any(_resolve('README.md', target)[0] == index.name for _, target in by_name['README.md'].links):
        yield 'README.md: no link to docs/index.md'


def _is_relative(target: str) -> bool:
    return not re.match(r'[a-z+]+:', target)


def _resolve(page: str, target: str) -> tuple[str, str]:
    """File (from the root) and anchor of a link."""
    path, _, anchor = target.partition('#')
    return (os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page), anchor


def _broken(root: Path, by_name: dict[str, Page], page: str, target: str) -> str | None:
    if not _is_relative(target):
        return None
    file, anchor = _resolve(page, target)
    if file.startswith('..') or not (file in by_name or (root / file).exists()):
        return f'a link to {target}, which does not exist'
    if anchor and file in by_name and anchor not in by_name[file].anchors:
        return f'a link to {target}: {file} has no such heading'
    return None


def _command_problems(root: Path, block: Block) -> Iterator[str]:
    for command in commands(block.text):
        if 'pip install' in command and 'network' not in block.needs:
            yield 'pip changes the environment: mark the block <!-- needs: network -->'
        for variant in variants(command):
            for words in _parts(variant):
                yield from _word_problems(root, words)


def _word_problems(root: Path, words: list[str]) -> Iterator[str]:
    """Files that do not exist, options that the tool does not know, targets that the Makefile has not."""
    text = ' '.join(words)
    for path in _IN_REPOSITORY.findall(re.sub(r'\S+::\S+', '', ' '.join(w for w in words if '://' not in w))):
        if not (root / path).exists() and not _is_output(words, path):
            yield f'{path} does not exist: {text}'
    if words[0] == 'make':
        targets = [word for word in words[1:] if '=' not in word and not word.startswith('-')]
        known = set(re.findall(r'^([\w-]+):', (root / 'Makefile').read_text(), re.MULTILINE))
        yield from (f'the Makefile has no {target}' for target in targets if target not in known)
    tool, arguments = _tool(words)
    if words[0] == 'mmdet-norms' and len(words) > 1 and words[1] not in COMMANDS:
        yield f'mmdet-norms has no command {words[1]}'
    if tool and _reads_options(root, tool):
        said = parse(root, tool, arguments)
        if isinstance(said, str):
            yield f'{text}: {said}'
        elif isinstance(config := getattr(said, 'config', None), str) and ('::' in config or (root / config).exists()):
            problem = _config_problem(root, said)
            if problem:
                yield f'{text}: {problem}'


def _is_output(words: list[str], path: str) -> bool:
    options = ('--out', '-o', '--work-dir')
    return any(word in options and path in later for word, later in itertools.pairwise(words))


def _code_problems(root: Path, code: str) -> Iterator[str]:
    """Of code in a sentence: files that do not exist, options that no tool has."""
    if '{' in code or '*' in code or 'NAME' in code or '::' in code:
        return
    if not re.search(r'\s', code) and _IN_REPOSITORY.fullmatch(code) and not (root / code).exists():
        beside = code.split('/')[0] == 'tests'  # pytest's node ids and folders of examples
        if not beside or '.' in code:
            yield f'{code} does not exist'
    try:
        words = shlex.split(code)
    except ValueError:
        return
    tool, arguments = _tool(words) if words else (None, [])
    if tool and arguments and _reads_options(root, tool):
        known = options_of(root, tool)
        for word in arguments:
            option = word.strip('[]').split('=')[0]
            if option.startswith('--') and option not in known:
                yield f'{tool} has no option {option}: {code}'


def _tool(words: list[str]) -> tuple[str | None, list[str]]:
    """The script of ours that a command runs, from the root, and what it is given."""
    words = [word for word in words if not re.match(r'[A-Z_]+=', word)]
    if len(words) > 1 and words[0] == 'mmdet-norms':
        return f'tools/{COMMANDS[words[1]].tool}' if words[1] in COMMANDS else None, words[2:]
    module = next((i for i, pair in enumerate(itertools.pairwise(words)) if pair == ('-m', 'mmdet_norms')), len(words))
    if words[module + 2 :] and words[module + 2] in COMMANDS:  # python -m, torchrun ... -m
        return f'tools/{COMMANDS[words[module + 2]].tool}', words[module + 3 :]
    if words and re.search(r'(^|/)python[\d.]*$', words[0]):
        words = words[1:]
    if not words:
        return None, []
    if words[0] in ('tools/dist_train.sh', 'tools/dist_test.sh') and len(words) > 2:
        count = 3 if words[0] == 'tools/dist_test.sh' else 2
        script = words[0].replace('dist_', '').replace('.sh', '.py')
        return script, [*words[1:count], *words[count + 1 :]]
    if words[0] == 'tools/slurm_train.sh' and len(words) > 4:
        return 'tools/train.py', [words[3], '--work-dir', words[4], *words[5:]]
    if re.fullmatch(r'(tools|tests)/[\w/]+\.py', words[0]) and not Path(words[0]).name.startswith('test_'):
        return words[0], words[1:]
    return None, []


def _reads_options(root: Path, tool: str) -> bool:
    """Whether a script asks argparse first: it, or what it is a door to. Another one would do its work when asked."""
    path = root / tool
    door = r'argparse|import (main|run)$'
    return path.exists() and bool(re.search(door, path.read_text(encoding='utf-8'), re.MULTILINE))


@contextlib.contextmanager
def _in(root: Path) -> Iterator[io.StringIO]:
    """Work in ``root``, quietly, and leave the process as it was: environment, arguments, how commands are called."""
    said = io.StringIO()
    folder = os.getcwd()
    before = dict(os.environ), sys.argv, mmdet_norms_start.commands._started_as, mmdet_norms_start.bare
    os.chdir(root)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            yield said
    finally:
        os.chdir(folder)
        environment, sys.argv, mmdet_norms_start.commands._started_as, mmdet_norms_start.bare = before
        os.environ.clear()
        os.environ.update(environment)


class _ParsedError(BaseException):
    """Carries what a tool's command line was read as out of the tool."""


def parse(root: Path, tool: str, arguments: list[str]) -> argparse.Namespace | str:
    """What the tool's own parser makes of the arguments, or what it says against them; the tool does nothing else."""
    parser, said = _stopped(root, tool, tuple(arguments))
    del parser
    return said


def options_of(root: Path, tool: str) -> set[str]:
    """Every option of a tool."""
    parser, _ = _stopped(root, tool, ('--no-such-option',))
    return set(parser._option_string_actions) if parser else set()


@functools.cache
def _stopped(root: Path, tool: str, arguments: tuple[str, ...]):
    original = argparse.ArgumentParser.parse_args
    seen = []

    def parse_args(self, args=None, namespace=None):
        seen.append(self)
        raise _ParsedError(original(self, args, namespace))

    argparse.ArgumentParser.parse_args = parse_args
    try:
        with _in(root) as said:
            sys.argv = [tool, *arguments]
            runpy.run_path(str(root / tool), run_name='__main__')
        return None, f'{tool} reads no options'
    except _ParsedError as parsed:
        return seen[0], parsed.args[0]
    except SystemExit:
        return (seen[0] if seen else None), said.getvalue().strip().splitlines()[-1]
    finally:
        argparse.ArgumentParser.parse_args = original


def _config_problem(root: Path, args: argparse.Namespace) -> str | None:
    """Why the config cannot be read, or not be changed as ``--norm`` and ``--cfg-options`` say, if it cannot."""
    from mmdet_norms.cli.common import load_config, read_config

    try:
        with _in(root), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if hasattr(args, 'launcher') and not args.data_root:  # what asks for data needs a folder of them
                load_config(copy.deepcopy(args))
            else:
                read_config(args.config)
    except Exception as error:
        return str(error)
    return None


# --- commands and their variants ------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments taken off."""
    lines = text.replace('\\\n', ' ').splitlines()
    return [line for line in (re.sub(r'(^|\s)#.*', '', line).strip() for line in lines) if line]


def variants(command: str) -> list[str]:
    """A synopsis as it is typed: without and with all that is in brackets, the first of several choices."""
    if not re.search(r'(^|\s)\[|\w\|\w', command) or "'" in command or '"' in command:
        return [substituted(command)]
    chosen = re.sub(r'(\w[\w.-]*)(\|[\w.-]+)+', r'\1', command)
    least = re.sub(r'\[[^\]]*\]', '', chosen)
    most = chosen.replace('[', '').replace(']', '')
    return list(dict.fromkeys(substituted(text) for text in (least, most)))


def substituted(text: str) -> str:
    """Text with values in place of the names that stand for them."""
    for name, value in PLACEHOLDERS.items():
        text = re.sub(rf'(?<![\w/.-]){re.escape(name)}(?![\w/=])', value, text)
    return text


def _parts(command: str) -> Iterator[list[str]]:
    """The words of each command of a line with ``&&``, ``;`` or ``|``."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars='&;|')
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ';']:
        if set(word) <= set('&;|'):
            if words:
                yield words
            words = []
        else:
            words.append(word)


def _open_names(text: str) -> set[str]:
    """Names that Python reads before anything in it defines them."""
    found: set[str] = set()
    bound = set(dir(builtins)) | {'__name__', '__file__'}
    for statement in ast.parse(text).body:
        nodes = list(ast.walk(statement))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        defined = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        defined |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                defined |= {alias.asname or alias.name.split('.')[0] for alias in node.names}
        inner = {node.arg for node in nodes if isinstance(node, ast.arg)}
        # model = fuse(model) reads the name first; for row in rows: print(row) does not.
        inner |= set() if isinstance(statement, ast.Assign) else defined
        loops = [node.target for node in nodes if isinstance(node, ast.comprehension)]
        inner |= {name.id for loop in loops for name in ast.walk(loop) if isinstance(name, ast.Name)}
        found |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound - inner
        bound |= defined
    return found


# --- running --------------------------------------------------------------------------------------------------------


def prepare(root: Path, folder: Path) -> None:
    """A copy of the checkout as it would be committed, with a small data set and what ``make demo`` leaves of it."""
    names = [name for name in _tracked(root) if (root / name).is_file()]
    names += [path.relative_to(root).as_posix() for path in (root / 'mmdet_norms' / 'kernels').glob('*.so')]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    own = root / '.venv'
    (folder / '.venv').symlink_to(own.resolve() if own.exists() else sys.prefix)
    for command in (
        'python tools/make_shapes.py --out data/shapes --train 24 --val 8',
        f'python tools/train.py {DEMO} --work-dir work_dirs/demo',
        f'python tools/test.py {DEMO} {PLACEHOLDERS["CHECKPOINT"]} --eval bbox segm --work-dir work_dirs/demo'
        ' --out work_dirs/demo/results.pkl',
    ):
        rc, output, _ = execute(command, folder, LIMIT)
        if rc:
            raise SystemExit(f'preparing failed: {command}\n{output}')
    _photos(folder)


def _photos(folder: Path) -> None:
    """``data/PennFudanPed`` of docs/own-data.md: one file for all photos, one class, and few generated images."""
    shapes, photos = folder / 'data' / 'shapes', folder / PLACEHOLDERS['PHOTOS']
    content = json.loads((shapes / 'annotations' / 'train.json').read_text())
    content['images'] = content['images'][:16]
    kept = {image['id'] for image in content['images']}
    content['annotations'] = [dict(a, category_id=1) for a in content['annotations'] if a['image_id'] in kept]
    content['categories'] = [dict(id=1, name='person')]
    (photos / 'PNGImages').mkdir(parents=True)
    for image in content['images']:
        shutil.copy2(shapes / 'train' / image['file_name'], photos / 'PNGImages')
    (photos / 'annotations.json').write_text(json.dumps(content))


def _tracked(root: Path) -> list[str]:
    """What git would commit; of an unpacked sdist, which has no git, what is not made by running it."""
    if (root / '.git').exists():
        command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split('\0')
    made = {'.venv', 'build', 'data', 'dist', 'work_dirs'}
    names = (path.relative_to(root) for path in root.rglob('*'))
    return [name.as_posix() for name in names if name.parts[0] not in made and '__pycache__' not in name.parts]


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command in a copy: its own package first, the checkout's interpreter as ``python``."""
    interpreter = Path(sys.executable).parent
    return dict(
        os.environ,
        PATH=f'{folder / ".venv" / "bin"}{os.pathsep}{interpreter}{os.pathsep}{os.environ["PATH"]}',
        PYTHONPATH=str(folder),
        GOMP_SPINCOUNT='10000',
        CUDA_VISIBLE_DEVICES='',
        PYTHONWARNINGS='ignore',
    )


# make installs where a file is older than another; a check must not, since the environment is not its own.
_PRELUDE = """\
set -euo pipefail
make() {
    test -e .venv/.installed-dev || { echo 'make would install into .venv' >&2; return 97; }
    command make -o .venv/.installed -o .venv/.installed-dev "$@"
}
pip() { echo 'pip is not run by this check' >&2; return 97; }
mmdet-norms() { python -m mmdet_norms "$@"; }
"""


def execute(script: str, folder: Path, limit: float) -> tuple[int, str, float]:
    """Run a shell script in ``folder``: exit status (124: out of time), output, seconds. Nothing of it goes on."""
    start = time.monotonic()
    process = subprocess.Popen(
        ['bash', '-c', _PRELUDE + script], cwd=folder, env=environment(folder), text=True, errors='replace',
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output, time.monotonic() - start
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, f'{output}\nstopped after {limit:.0f} s', time.monotonic() - start


def run_block(block: Block, folder: Path) -> tuple[int, str, float]:
    """Run a block in its copy."""
    if block.kind == 'shell':
        # Of a synopsis: with all of its options.
        return execute('\n'.join(variants(command)[-1] for command in commands(block.text)), folder, LIMIT)
    if block.kind == 'config':
        path = folder / block.folder / 'of_the_docs.py'
        text = block.text
        if '_base_' not in {node.targets[0].id for node in ast.parse(text).body}:
            text = f'_base_ = {os.path.relpath(folder / DEMO, path.parent)!r}\n{text}'
        path.write_text(text)
        read = 'import mmdet_norms\nfrom mmdet.registry import MODELS\nfrom mmengine import Config\n'
        read += 'from mmengine.registry import init_default_scope\ninit_default_scope("mmdet")\n'
        read += f'MODELS.build(Config.fromfile({str(path)!r}).model)\n'
    else:
        read = '\n'.join(GIVEN[name] for name in GIVEN if name in _open_names(block.text)) + '\n' + block.text
    script = folder / block.folder / 'of_the_docs_run.py'
    script.write_text(read)
    try:
        return execute(f'cd {block.folder}\npython {script.name}', folder, LIMIT)
    finally:
        script.unlink()


def run_pages(read: list[Page], root: Path, also: set[str], keep: Path | None) -> list[tuple]:
    """Run every block that may run, each page in a copy of its own: rows of (block, outcome, seconds, output)."""
    rows = []
    with contextlib.ExitStack() as stack:
        base = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='check_docs-')))
        prepared = base / 'prepared'
        if any(_runs(block, also) for page in read for block in page.blocks):
            print('preparing: copy, data set, a detector trained on it')
            prepare(root, prepared)
        for page in read:
            folder = base / page.name.replace('/', '-').removesuffix('.md')
            if any(_runs(block, also) for block in page.blocks):
                shutil.copytree(prepared, folder, symlinks=True)
            for block in page.blocks:
                if block.kind == 'shown':
                    continue
                if not _runs(block, also):
                    rows.append((block, f'checked ({", ".join(block.needs)})', 0.0, ''))
                    continue
                rc, output, seconds = run_block(block, folder)
                rows.append((block, 'ran' if rc == 0 else f'FAILED ({rc})', seconds, output))
                print(f'{rows[-1][1]:>12} {seconds:6.1f} s  {block.place}', flush=True)
                if rc:
                    print('\n'.join(f'    {line}' for line in [*block.text.splitlines(), *output.splitlines()[-25:]]))
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    return rows


def _runs(block: Block, also: set[str]) -> bool:
    return block.kind in ('shell', 'python', 'config') and not block.problems and set(block.needs) <= also


def main(argv: list[str] | None = None) -> int:
    """Check, run, and say what came of it; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog='tools/check_docs.py', description=__doc__.partition(';')[0] + '.')
    parser.add_argument('pages', nargs='*', metavar='PAGE', help='as docs/norms.md; default: all')
    parser.add_argument('--quick', action='store_true', help='links, files, options and configs only; run nothing')
    parser.add_argument('--also', nargs='+', default=[], choices=['gpu', 'minutes'], help='run blocks that need it')
    parser.add_argument('--keep', type=Path, metavar='DIR', help='make the copies there and leave them')
    args = parser.parse_args(argv)

    every = [read_page(name, (ROOT / name).read_text(encoding='utf-8')) for name in pages(ROOT)]
    chosen = [page for page in every if not args.pages or page.name in args.pages]
    problems = [text for text in static_problems(ROOT, every) if not args.pages or text.startswith(tuple(args.pages))]
    rows = [] if args.quick else run_pages(chosen, ROOT, set(args.also), args.keep)
    for problem in problems:
        print(problem)
    blocks = [block for page in chosen for block in page.blocks]
    failed = [row for row in rows if row[1].startswith('FAILED')]
    if rows:
        print(f'\n{"page":34} {"ran":>4} {"failed":>6} {"checked":>7} {"shown":>5} {"s":>6}')
        for page in chosen:
            own = [row for row in rows if row[0].page == page.name]
            shown = sum(block.kind == 'shown' for block in page.blocks)
            if own or shown:
                counts = [sum(row[1].startswith(word) for row in own) for word in ('ran', 'FAILED', 'checked')]
                print(
                    f'{page.name:34} {counts[0]:4} {counts[1]:6} {counts[2]:7} {shown:5} {sum(r[2] for r in own):6.0f}'
                )
    marked = sum(bool(block.needs) for block in blocks)
    shown = sum(block.kind == 'shown' for block in blocks)
    print(
        f'{len(chosen)} pages, {len(blocks)} blocks ({marked} need what is not here, {shown} show output): '
        f'{len(problems)} problems, {len(failed)} failed'
    )
    return int(bool(problems or failed))


if __name__ == '__main__':
    sys.exit(main())
