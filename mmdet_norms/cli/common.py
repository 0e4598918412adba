"""What training and testing share: arguments, the config they lead to, and errors for people."""

import argparse
import difflib
import functools
import importlib.util
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS, RUNNERS
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import LoggerHook
from mmengine.hub import get_config
from mmengine.runner import Runner

from mmdet_norms import cores
from mmdet_norms.classification.data_root import use_class_folders
from mmdet_norms.classification.image_folder import image_folders
from mmdet_norms.commands import runnable, several, typed
from mmdet_norms.compat import mmcv_ops
from mmdet_norms.compat.checkpoints import explain_refusal
from mmdet_norms.config_files import read_config_file
from mmdet_norms.datasets.locate import DataRootError, use_data_root
from mmdet_norms.datasets.sources import SPLITS, datasets
from mmdet_norms.engine import end_processes, start_cpu_processes, threads
from mmdet_norms.engine.dist import RANKS, explain_lost_process, processes_here
from mmdet_norms.engine.one_value import explain_one_value
from mmdet_norms.entries import class_of, explain_unregistered, is_a, is_classifier, spell_out
from mmdet_norms.errors import UserError
from mmdet_norms.files import explain
from mmdet_norms.kernels import compiled
from mmdet_norms.layers import BNET, AnotherFunctionError, another_function_allowed
from mmdet_norms.layers._args import ConfigError
from mmdet_norms.models.legacy import CONVENTIONS, use_geometry
from mmdet_norms.placement import PLACEMENTS, apply_norm
from mmdet_norms_start import own_configs

from .options import add_option_arguments, given_options, merge_options


def command(main: Callable[[Sequence[str] | None], None]) -> Callable:
    """Make ``main(argv)`` end with status 2 and one message on a :class:`UserError` or a :class:`ConfigError`.

    Ctrl-C ends it with status 130 and one message. Anything else keeps its traceback: it is a bug, and the traceback
    says where.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        # mmengine reads configs of other packages through it; setuptools is pinned for that
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated', category=UserWarning)
        cores.begin()
        try:
            main(argv)
        except KeyboardInterrupt:
            if os.environ.get('RANK', '0') == '0':
                print('stopped; what was written stays, and a training goes on with --resume', file=sys.stderr)
            sys.exit(130)
        except (UserError, ConfigError) as error:
            if os.environ.get('RANK', '0') == '0' or not getattr(error, 'everywhere', False):
                print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        except (OSError, ValueError, KeyError) as error:
            kinds = {OSError: explain, ValueError: explain_one_value, KeyError: explain_unregistered}
            said = next(said(error) for kind, said in kinds.items() if isinstance(error, kind))
            if said is None:
                raise
            print(f'error: {said}', file=sys.stderr)
            sys.exit(2)
        except RuntimeError as error:
            said = explain_lost_process(error)
            if said is None:
                raise
            print(said, file=sys.stderr)
            sys.exit(1)
        finally:
            end_processes()

    return run


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what train and test both take."""
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='where logs, checkpoints and results.json go; default: work_dirs/, and the names of the config, of --norm '
        'and of --geometry',
    )
    parser.add_argument(
        '--norm',
        metavar='NAME',
        help=f'put these norm layers into the model: {", ".join(PLACEMENTS)}; --cfg-options refine it',
    )
    add_geometry_argument(parser)
    add_data_arguments(parser)
    add_option_arguments(parser)
    add_threads_argument(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help=f'what started the processes; for N of them: {several("train", "CONFIG")}',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_geometry_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--geometry``, for checkpoints of the authors."""
    parser.add_argument(
        '--geometry',
        choices=CONVENTIONS,
        help='for a converted checkpoint of the authors: anchors, boxes, masks and image sizes as when it was trained '
        '(docs/legacy-geometry.md)',
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which data are read: ``--data-root`` and ``--val-fraction``."""
    parser.add_argument(
        '--data-root',
        metavar='DIR',
        help="a folder in COCO format, or of a classifier with folders of classes, to read instead of the config's "
        'data_root; its file layout and classes are taken from it (docs/data.md lists what is looked for)',
    )
    parser.add_argument(
        '--val-fraction',
        type=float,
        metavar='F',
        help='for a --data-root with one annotation file, or without val/: hold back that part of its images, such as '
        '0.2, to validate and test; the same images every time',
    )


def add_seed_argument(parser: argparse.ArgumentParser, default: int | None, help: str) -> None:
    """Add ``--seed``, of the numbers that numpy takes."""

    def seed(text: str) -> int:
        number = int(text)
        if not 0 <= number < 2**32:
            raise argparse.ArgumentTypeError(f'{number} must be at least 0, and less than 2**32')
        return number

    parser.add_argument('--seed', type=seed, default=default, help=help)


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add what everything takes that computes on a CPU; see :func:`use_threads`."""
    parser.add_argument(
        '--threads',
        type=int,
        metavar='N',
        help='CPU threads to compute with; default: OMP_NUM_THREADS, else the cores that nothing else keeps busy',
    )


def use_threads(args: argparse.Namespace, dataloader: dict | None = None, device: str | None = None) -> str | None:
    """Choose how many CPU threads to compute with, and say so in one line; None where a GPU computes.

    Args:
        args: with ``threads``, and ``launcher`` where there may be several processes.
        dataloader: of the config, whose workers need cores, too.
        device: where the model is; default: mmengine's choice.
    """
    if args.threads is not None and args.threads < 1:
        raise UserError(f'--threads {args.threads}: must be at least 1')
    workers = (dataloader or {}).get('num_workers') or 0
    chosen = threads.use_threads(args.threads, workers, processes_here(getattr(args, 'launcher', 'none')), device)
    return None if chosen is None else str(chosen)


def add_check_argument(parser: argparse.ArgumentParser) -> None:
    """Add what train and test take about the checks of their data."""
    parser.add_argument(
        '--allow-data-faults',
        action='store_true',
        help='go on although the data have faults that make results wrong but do not end the run; they are shown as '
        'warnings (docs/data.md)',
    )


def load_config(args: argparse.Namespace) -> Config:
    """The config as the arguments ask for it: file, --norm, --geometry and --data-root, then --cfg-options."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    if args.norm is not None:
        try:
            cfg.model = apply_norm(cfg.model, args.norm)
        except ValueError as error:
            raise UserError(f'--norm {args.norm}: {error}') from error
    if args.geometry is not None:
        try:
            use_geometry(cfg, args.geometry)
        except ConfigError as error:
            raise UserError(f'--geometry {args.geometry}: {error}') from error
    move_and_merge(cfg, args)
    cfg.launcher = args.launcher
    cfg.work_dir = _work_dir(args, cfg)
    _import_this_package(cfg)
    _add_hooks(cfg)
    spell_out(cfg)
    return cfg


def build_runner(cfg: Config, *notes: str | None) -> Runner:
    """The runner for ``cfg``, with the processes it needs already connected; its log begins with ``notes``."""
    setup_cache_size_limit_of_dynamo()
    try:
        start_cpu_processes(cfg)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    mmcv_ops.announce()
    for note in filter(None, (*notes, _without_compiler(runner))):
        runner.logger.info(note)
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.FileHandler):  # a log that cannot be written ends the run, as a checkpoint does
            handler.handleError = _raise
    return runner


def _without_compiler(runner: Runner) -> str | None:
    """What a run with BNET on a CPU loses where the library is not compiled."""
    if get_device() == 'cpu' and any(isinstance(module, BNET) for module in runner.model.modules()):
        return compiled.why_not()
    return None


def is_first_process(args: argparse.Namespace) -> bool:
    """Whether this is the process that writes files, before they are connected."""
    return int(os.environ.get(RANKS.get(args.launcher, ''), 0)) == 0


def _raise(record: logging.LogRecord) -> None:
    raise


def run_with_checkpoint(run: Callable[[], object], args: argparse.Namespace) -> None:
    """Call ``run``, which loads weights: norms take those of another function only where --allow-partial says so."""
    try:
        with another_function_allowed() if getattr(args, 'allow_partial', False) else nullcontext():
            run()
    except AnotherFunctionError as error:
        raise UserError(str(error)) from error
    except pickle.UnpicklingError as error:  # of the storages that mmengine reads by itself
        raise UserError(explain_refusal(getattr(args, 'checkpoint', None) or 'to start from')) from error


def require_checkpoint(path: str, option: str) -> None:
    """Raise if ``path`` names a local file that is not there."""
    if '://' not in path and not Path(path).expanduser().exists():
        raise UserError(f'{option}: there is no checkpoint file {path}')


def read_config(name: str) -> Config:
    """A config file, or one that ships with a package (``mmdet::retinanet/...``)."""
    if '::' in name:
        return _packaged_config(name)
    if not Path(name).is_file():
        raise UserError(f'there is no config file {name}')
    return read_config_file(name)


def move_and_merge(cfg: Config, args: argparse.Namespace) -> None:
    """--data-root, which heeds the options that say what to read there, and --cfg-options, which have the last word.

    Args:
        args: of the command line. Without ``val_fraction`` there is none. ``reads`` are the splits that must be there,
            all by default. ``copies`` is the folder for annotation files that have to be written, by default that of
            the work dir; None: none is, which is enough where only the classes are needed.
    """
    merge_options(cfg, args)
    fraction = getattr(args, 'val_fraction', None)
    if args.data_root is not None:
        temporary = getattr(args, 'copies', None)
        copies = temporary if hasattr(args, 'copies') else copies_folder(_work_dir(args, cfg))
        options = given_options(args)
        speaks = os.environ.get(RANKS.get(getattr(args, 'launcher', 'none'), ''), '0') == '0'
        reads = getattr(args, 'reads', SPLITS)
        move_data_root(
            cfg, args.data_root, reads, speaks, temporary, val_fraction=fraction, copies=copies, options=options
        )
        merge_options(cfg, args, leave=is_of_data)
    elif fraction is not None:
        raise UserError(
            f"--val-fraction {fraction}: divides the images of a --data-root; give that, too (it may be the config's "
            f'own: {cfg.get("data_root") or "DIR"})'
        )


def move_data_root(
    cfg: Config,
    root: str,
    reads: tuple[str, ...] = SPLITS,
    speaks: bool = True,
    temporary: str | None = None,
    **more: Any,
) -> None:
    """``--data-root``: read another folder, which has the splits ``reads``, and say what had to be adapted to it.

    Args:
        temporary: a folder to leave out of what is said.
        more: as for :func:`mmdet_norms.datasets.locate.use_data_root`, or
            :func:`mmdet_norms.classification.data_root.use_class_folders` where the config reads folders of classes.
    """
    use = use_class_folders if next(image_folders(cfg, *SPLITS), None) else use_data_root
    try:
        notes = use(cfg, root, reads, **more)
    except DataRootError as error:
        raise UserError(str(error) if str(error).startswith('--') else f'--data-root: {error}') from error
    for note in notes if speaks else ():
        print(without_folder(f'--data-root {root}: {note}', temporary))


def require_detector(cfg: Config, config: str, tool: str) -> None:
    """Raise if the model of a config is an image classifier, of which a tool can make nothing."""
    if is_classifier(cfg.get('model')):
        raise UserError(
            f'{typed(tool)} is for detectors, and the model of {config} is an image classifier; {typed("test")} CONFIG '
            'CKPT --out FILE.json writes the class of every image'
        )


def without_folder(text: str, folder: str | None) -> str:
    """``text`` with the files in a folder by their names: it is gone after the command, and a run writes the same."""
    return text.replace(f'{folder}{os.sep}', '') if folder else text


def copies_folder(work_dir: str | os.PathLike) -> str:
    """Where a run writes annotation files that it reads instead of the user's."""
    return os.path.join(work_dir, 'annotations')


def is_of_data(key: str) -> bool:
    """Whether an option is about files, which --data-root has heeded."""
    return key.partition('.')[0] in {f'{split}_{what}' for split in SPLITS for what in ('dataloader', 'evaluator')}


def require_annotations(cfg: Config, dataloader: str) -> None:
    """Raise if a dataset of ``cfg[dataloader]`` has a local annotation file that is not there."""
    for dataset in datasets((cfg.get(dataloader) or {}).get('dataset')):
        path = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
        if dataset.get('ann_file') and '://' not in path and not os.path.isfile(path):
            raise UserError(f'{dataloader}: there is no annotation file {path}; {_where_data_are(dataset, path)}')


def _where_data_are(dataset: dict, path: str) -> str:
    """What to do about annotations that are not there: the two data sets that configs of the package read are known."""
    root = os.path.normpath(dataset.get('data_root') or os.path.dirname(path) or '.')
    if root == os.path.join('data', 'shapes'):
        return f'{runnable("shapes")} generates them; or give another folder with --data-root DIR'
    given = 'name the folder with --data-root DIR'
    if re.search(r'(train|val|test|unlabeled|test-dev)2017', os.path.basename(path)):
        return (
            f'COCO 2017 is to be had at https://cocodataset.org/#download: unpack it so that {root} holds '
            f'annotations/, train2017/ and val2017/, or {given}. Any data in COCO format will do'
        )
    return f'{given}, or the file with --cfg-options'


def _packaged_config(name: str) -> Config:
    package, path = name.split('::', 1)
    spec = importlib.util.find_spec(package)
    if spec is None:  # mmengine would try to install it
        raise UserError(f'config {name}: the package {package} is not installed')
    mim = own_configs.folder() if package == own_configs.NAME else Path(spec.origin).parent / '.mim'
    file = mim / 'configs' / path
    if file.is_file():  # without the metafile that get_config looks up, which not every config has
        return read_config_file(file)
    try:
        return get_config(name)
    except (FileNotFoundError, ValueError) as error:
        known = [str(file.relative_to(mim / 'configs')) for file in (mim / 'configs').glob('[!_]*/**/*.py')]
        close = difflib.get_close_matches(path, known, n=1)
        hint = f'; those that it has are in {mim / "configs"}' if known else f' ({error})'
        hint = f'; did you mean {package}::{close[0]}?' if close else hint
        raise UserError(f'config {name}: {package} has no such config{hint}') from error


def _work_dir(args: argparse.Namespace, cfg: Config) -> str:
    """--work-dir, else the config's own, else ./work_dirs/<config>; each norm and geometry has its own default."""
    if args.work_dir is not None:
        if not args.work_dir.strip():  # of a shell variable that is not set
            raise UserError("--work-dir '' names no folder")
        return args.work_dir
    default = cfg.get('work_dir') or os.path.join('./work_dirs', Path(args.config).stem)
    return '_'.join(filter(None, (default, args.norm, args.geometry)))


def _import_this_package(cfg: Config) -> None:
    """Let the stock mmdet tools run the config that is dumped into the work dir."""
    custom = cfg.get('custom_imports') or {}
    imports = custom.get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmdet_norms' not in imports:
        allow_failed = custom.get('allow_failed_imports', False)
        cfg.custom_imports = dict(imports=['mmdet_norms', *imports], allow_failed_imports=allow_failed)


def _add_hooks(cfg: Config) -> None:
    """Results after every evaluation, and progress lines that do not keep one waiting."""
    logger = (cfg.get('default_hooks') or {}).get('logger')
    if class_of(logger, HOOKS) is LoggerHook:  # a subclass is somebody's own
        logger.type = 'TimedLoggerHook'
    add_hook(cfg, 'NormHook')
    add_hook(cfg, 'ResultsHook')


def add_hook(cfg: Config, name: str) -> None:
    """Append a hook without arguments to the custom hooks, unless the config has one of that type."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(is_a(hook, name, HOOKS) for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=name)]


def set_on_hook(cfg: Config, name: str, **arguments: Any) -> None:
    """Give a custom hook these arguments; it keeps what else the config says of it, and is added where it is not."""
    add_hook(cfg, name)
    hooks = [dict(hook) for hook in cfg.custom_hooks]
    next(hook for hook in hooks if is_a(hook, name, HOOKS)).update(arguments)
    cfg.custom_hooks = hooks
