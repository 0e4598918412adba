"""The commands: ``mmdet-norms NAME``, ``python -m mmdet_norms NAME`` and, in a checkout, ``tools/NAME.py``.

They are started here, because libraries read some environment variables when they are loaded, and because help is not
to wait for torch.
"""

import difflib
import importlib
import os
import runpy
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mmdet_norms_start

from .requirements import SEE_DOCTOR, why_no_import

SCRIPT = 'mmdet-norms'
MODULE = 'python -m mmdet_norms'
TOOLS = 'tools/'

# CPU threads that spin for long while they wait cost a factor of ten where something else uses a core.
_ENVIRONMENT = {'GOMP_SPINCOUNT': '10000'}
# The profiler's allocator would warn of memory that is older than the profile.
_ENVIRONMENT_OF = {'benchmark': {'TORCH_CPP_LOG_LEVEL': 'ERROR'}}

_ROOT = Path(__file__).resolve().parents[1]


class Command(NamedTuple):
    """A command.

    Args:
        tool: the file in ``tools/`` that does the same.
        module: whose ``main(argv)`` does it.
        help: what it does.
    """

    tool: str
    module: str
    help: str


COMMANDS = {
    'train': Command('train.py', 'mmdet_norms.cli.train', 'train a detector'),
    'test': Command('test.py', 'mmdet_norms.cli.test', 'evaluate a checkpoint'),
    'infer': Command('infer.py', 'mmdet_norms.cli.infer', 'detect objects in images, folders and videos'),
    'compare': Command(
        'compare.py', 'mmdet_norms.cli.compare', 'the results of several runs in one table, or on one page'
    ),
    'analyze': Command(
        'analyze.py', 'mmdet_norms.cli.analyze', 'draw what is inside norms: statistics, kernels, weights'
    ),
    'pictures': Command('picture_sheet.py', 'mmdet_norms.cli.picture_sheet', 'draw detections beside ground truth'),
    'browse': Command('browse.py', 'mmdet_norms.cli.browse', 'draw a data set as training sees it'),
    'check': Command('check.py', 'mmdet_norms.cli.check', 'find what is wrong with config and data'),
    'shapes': Command(
        'make_shapes.py', 'mmdet_norms.cli.shapes', 'write a generated data set, for detection or classification'
    ),
    'convert': Command('convert_checkpoint.py', 'mmdet_norms.cli.convert_checkpoint', 'load a published checkpoint'),
    'fuse': Command('fuse.py', 'mmdet_norms.cli.fuse', 'fold the norms of a checkpoint into its convolutions'),
    'export': Command('export.py', 'mmdet_norms.cli.export', 'write the folded model, as *.onnx or *.pth'),
    'benchmark': Command('benchmark.py', 'mmdet_norms.cli.benchmark', 'measure what the norms cost'),
    'norm-batch': Command(
        'norm_batch.py', 'mmdet_norms.cli.norm_batch', 'top-1 error against normalization batch size'
    ),
    'replay': Command('replay.py', 'mmdet_norms.cli.replay', 'compute a step again that was not finite'),
    'doctor': Command('doctor.py', 'mmdet_norms.check_env', 'what is installed, what does not fit, what mends it'),
}

_started_as = TOOLS if (_ROOT / 'tools' / 'make_shapes.py').is_file() else SCRIPT


def started_as(how: str) -> None:
    """Let :func:`typed` name commands as this process was started: :data:`SCRIPT`, :data:`MODULE` or :data:`TOOLS`.

    Without it, as of the process of somebody's own script: the tools in a checkout, else the console script.
    """
    global _started_as
    _started_as = how


def typed(name: str) -> str:
    """``'tools/train.py'``, ``'mmdet-norms train'`` or ``'python -m mmdet_norms train'`` for ``name='train'``."""
    return f'{TOOLS}{COMMANDS[name].tool}' if _started_as == TOOLS else f'{_started_as} {name}'


def runnable(name: str) -> str:
    """The same, to be pasted into a shell: ``'python tools/train.py'``, and the others as they are."""
    return f'python {typed(name)}' if _started_as == TOOLS else typed(name)


def several(name: str, arguments: str) -> str:
    """How to start a command with several processes, to be pasted into a shell: ``train`` or ``test``.

    Args:
        name: of the command.
        arguments: what comes before the number of processes, such as ``'CONFIG'``.
    """
    if _started_as == TOOLS:
        return f'tools/dist_{name}.sh {arguments} GPUS'
    return f'torchrun --standalone --nproc-per-node GPUS -m mmdet_norms {name} {arguments} --launcher pytorch'


def set_environment(name: str | None = None) -> None:
    """Set what libraries read when they are loaded, unless the caller of the process set it. Before torch is loaded.

    Args:
        name: of the command.
    """
    for variable, value in {**_ENVIRONMENT, **_ENVIRONMENT_OF.get(name, {})}.items():
        os.environ.setdefault(variable, value)


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its status.

    Args:
        name: of the command.
        argv: its arguments; default: those of the process.
    """
    set_environment(name)
    mmdet_norms_start.bare = name == 'doctor'
    try:
        main_of_command = importlib.import_module(COMMANDS[name].module).main
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        said = str(error) if SEE_DOCTOR in str(error) else why_no_import(error)
        if said is None:  # a bug of ours
            raise
        sys.exit(f'error: {said}')
    with reader_may_leave():
        sys.exit(main_of_command(argv))


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Where whoever reads the output has had enough, as ``| head``, end without a word and as a shell's tools do."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python flushes once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE


def _nobody_reads() -> bool:
    """Whether it is the output that is broken, and not the pipe to some other process."""
    if not hasattr(select, 'poll'):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(state & select.POLLERR for _, state in poll.poll(0))


def main(argv: Sequence[str] | None = None, how: str = SCRIPT) -> None:
    """The console script: run the command that the first argument names.

    Args:
        argv: the arguments; default: those of the process.
        how: see :func:`started_as`.
    """
    started_as(how)
    given = list(sys.argv[1:] if argv is None else argv)
    first = given[0] if given else ''
    if first in COMMANDS:
        run(first, given[1:])
    elif first in ('-h', '--help', 'help'):
        with reader_may_leave():
            print(_help(how))
    elif first in ('-V', '--version'):
        print('mmdet_norms', runpy.run_path(str(_ROOT / 'mmdet_norms' / 'version.py'))['__version__'])
    elif not given:
        sys.exit(_help(how))
    else:
        close = difflib.get_close_matches(first.removesuffix('.py'), [*COMMANDS, *_OTHER_NAMES], n=1)
        hint = f'; did you mean {_OTHER_NAMES.get(close[0], close[0])}?' if close else ''
        print(f'error: there is no command {first}{hint}\ncommands: {", ".join(COMMANDS)}', file=sys.stderr)
        sys.exit(2)


# What else a command may be called, for hints.
_OTHER_NAMES = {Path(command.tool).stem: name for name, command in COMMANDS.items()} | {
    'eval': 'test',
    'evaluate': 'test',
    'predict': 'infer',
    'demo': 'infer',
    'detect': 'infer',
    'check_env': 'doctor',
}


def _help(how: str) -> str:
    width = max(map(len, COMMANDS))
    listed = '\n'.join(f'  {name:{width}}  {command.help}' for name, command in COMMANDS.items())
    return (
        f'usage: {how} COMMAND [arguments]\n\n'
        'Normalization layers for object detectors, by name, on stock mmdetection 3.x.\n\n'
        f'commands:\n{listed}\n\n'
        f'{how} COMMAND --help says more.\n'
        f'Several processes: {several("train", "CONFIG").replace("GPUS", "2")}'
    )
