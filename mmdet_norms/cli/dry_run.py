"""``tools/train.py --dry-run``: what a training would do and cost, after all checks of a real one; nothing is kept."""

import argparse
import contextlib
import copy
import errno
import io
import logging
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop, Runner
from rich.table import Table
from torch import nn

from mmdet_norms.benchmark.layers import settle, settling_calls
from mmdet_norms.console import as_text, plain_console
from mmdet_norms.datasets.annotations import forget, read_annotations
from mmdet_norms.datasets.counts import Counts, count
from mmdet_norms.datasets.sources import sources
from mmdet_norms.engine.cost import device_name, images_per_iteration
from mmdet_norms.engine.course import Rates, epoch_length
from mmdet_norms.engine.dist import number_of_processes
from mmdet_norms.engine.dry_run import (
    Course,
    DryRunEnds,
    DryRunHook,
    Timing,
    out_of_memory,
    state_bytes,
    time_precise_statistics,
    time_validation,
)
from mmdet_norms.engine.nonfinite import NonFiniteError
from mmdet_norms.engine.optim import accumulated_batches
from mmdet_norms.engine.results import write_json
from mmdet_norms.engine.safe_checkpoints import LAST, CheckpointFolder
from mmdet_norms.engine.together import model_of
from mmdet_norms.engine.work_dir import require_unclaimed
from mmdet_norms.entries import is_a, name_of, spell_out
from mmdet_norms.errors import UserError, some
from mmdet_norms.files import explain, require_room, require_writable
from mmdet_norms.layers import CBN
from mmdet_norms.placement.summary import Part, summarize

from .common import build_runner, copies_folder, is_first_process, read_config, run_with_checkpoint, use_threads
from .differences import Difference, base_of, differences

# What every run gets from this package, beside what the command line says.
_OF_EVERY_RUN = ('custom_imports', 'launcher', 'work_dir', 'resume', 'load_from', 'default_hooks.logger.type')
_SHOWN = 40  # differences of a kind


def add_dry_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--dry-run`` and what goes with it."""
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='make all checks, show config, norms, data, schedule, and time and memory by some real iterations, and '
        'stop; nothing is written into the work dir',
    )
    parser.add_argument('-v', '--verbose', action='store_true', help='with --dry-run: the whole config, too')
    parser.add_argument('--json', metavar='FILE', help='with --dry-run: write all of it, and the whole config, as JSON')


@contextlib.contextmanager
def nothing_kept(args: argparse.Namespace) -> Iterator[None]:
    """A folder for all that a dry run has to write, gone at the end; None of this without ``--dry-run``."""
    if not args.dry_run:
        for option in ('verbose', 'json'):
            if getattr(args, option):
                raise UserError(f'--{option} goes with --dry-run')
        yield
        return
    if args.json:
        require_writable(args.json, '--json')
    with tempfile.TemporaryDirectory(prefix='mmdet_norms-') as folder:
        args.copies = os.path.join(folder, 'annotations')
        yield


def dry_run(cfg: Config, args: argparse.Namespace) -> None:
    """Show what the run of a config would be.

    Args:
        cfg: as a training would get it; its checks are made, those of the work dir included.
        args: the command line, within :func:`nothing_kept`.
    """
    first = is_first_process(args)
    if first:
        require_unclaimed(cfg.work_dir)
        _require_writable_later(cfg.work_dir)
        print('dry run: building all of it and timing some iterations ...', flush=True)
    threads = use_threads(args, cfg.get('train_dataloader'))
    said = _Warnings()
    with contextlib.redirect_stdout(io.StringIO()):
        runner, hook = _run(cfg, args, said)
        facts = _facts(runner, hook, cfg, args)
    if not first:
        return
    require_room(_nearest(cfg.work_dir) / LAST, facts['checkpoint_bytes'], 'training')
    facts['threads'] = threads
    facts['warnings'] = said.lines
    console = plain_console(soft_wrap=True)
    _show(console, facts, args)
    if args.json:
        write_json(Path(args.json), facts)
        print(f'written to {args.json}')
    print(f'dry run: nothing was written into {cfg.work_dir}, and nothing is trained')


# ------------------------------------------------------------------------------------------------------------ the run


def _run(cfg: Config, args: argparse.Namespace, said: logging.Handler) -> tuple[Runner, DryRunHook]:
    """Train until :class:`DryRunHook` ends it, in another work dir; ``said`` gets what it logs."""
    hook = DryRunHook(_settle)
    runner = build_runner(_elsewhere(cfg, args))
    runner.logger.addHandler(said)
    runner.register_hook(hook)
    try:
        with out_of_memory():
            run_with_checkpoint(runner.train, args)
    except DryRunEnds:
        pass
    except NonFiniteError as error:
        raise UserError(f'{error} (of a dry run, that file is not kept)') from error
    except MemoryError as error:
        size = (cfg.get('train_dataloader') or {}).get('batch_size')
        raise UserError(
            f'the training does not fit into the memory of this {"GPU" if get_device() == "cuda" else "machine"} '
            f'({as_text(error)}): by --cfg-options choose a smaller train_dataloader.batch_size (now {size}) or '
            'smaller images, or add --amp'
        ) from error
    return runner, hook


def _elsewhere(cfg: Config, args: argparse.Namespace) -> Config:
    """The config of a run that writes into another folder only, tells no tracker of it, and logs warnings only."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = os.path.join(os.path.dirname(args.copies), 'run')
    cfg.log_level = 'WARNING'
    if isinstance(cfg.get('visualizer'), dict):
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    for entry in hooks:
        if isinstance(entry, Mapping) and (is_a(entry, 'LoggerHook', HOOKS) or is_a(entry, CheckpointHook, HOOKS)):
            entry.pop('out_dir', None)
    pending = 'PendingValidationHook'  # would validate now
    cfg.custom_hooks = [entry for entry in cfg.get('custom_hooks') or [] if not is_a(entry, pending, HOOKS)]
    return cfg


def _settle(model: nn.Module) -> int:
    """End the warm-ups of norms; returns how many iterations CBN's window takes to be full."""
    calls = settling_calls(model)
    settle(model)
    for module in model.modules():
        if isinstance(module, CBN):
            module.burnin_iters = 0
    return max(0, calls - 1)


class _Warnings(logging.Handler):
    """Collects what the log of the run warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)


def _nearest(work_dir: str) -> Path:
    """The folder itself, or the one that it would be made in."""
    path = Path(os.path.realpath(work_dir))
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _require_writable_later(work_dir: str) -> None:
    """Raise, without making it, if the work dir could not be written to."""
    place = _nearest(work_dir)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return
    code = errno.EACCES if place.is_dir() else errno.ENOTDIR
    raise UserError(f'work dir {work_dir}: {explain(OSError(code, os.strerror(code), str(place)))}')


# ---------------------------------------------------------------------------------------------------------- the facts


def _facts(runner: Runner, hook: DryRunHook, cfg: Config, args: argparse.Namespace) -> dict:
    """All that there is to say, as JSON has it."""
    loop, course, timing = runner.train_loop, hook.course, hook.timing
    batches = time_validation(runner)
    precise = time_precise_statistics(runner, course)
    by_iter = isinstance(loop, IterBasedTrainLoop)
    facts = dict(
        config=args.config,
        work_dir=cfg.work_dir,
        start=_start(cfg, args),
        notes=list(args.notes),
        device=device_name(),
        processes=number_of_processes(args.launcher),
        precision=_precision(cfg),
        **_config_facts(cfg, args),
        model=name_of(cfg.model),
        parts=[_part(part) for part in summarize(model_of(runner).train())],
        data={
            split: _data(loader, cfg, split)
            for split, loader in (('train', loop.dataloader), ('val', runner.val_loop and runner.val_dataloader))
            if loader is not None
        },
        schedule=dict(
            unit='iterations' if by_iter else 'epochs',
            start=course.iteration if by_iter else course.epoch,
            end=loop.max_iters if by_iter else loop.max_epochs,
            start_iteration=course.iteration,
            iterations=loop.max_iters,
            iterations_per_epoch=epoch_length(loop),
            batch_size=images_per_iteration(runner),
            iterations_per_step=accumulated_batches(runner.optim_wrapper),
            learning_rates=[_rates(rates) for rates in course.rates],
            evaluations=course.validations,
            checkpoints=[dict(unit=unit, after=steps, kept=kept) for unit, steps, kept in course.checkpoints],
        ),
        checkpoint_bytes=state_bytes(runner),
        memory=dict(peak_bytes=timing.peak, of=timing.peak_of, total_bytes=_memory_of_gpu()),
        time=_time(timing, batches, precise, loop.max_iters - course.iteration, course, runner),
    )
    folder, there = os.path.dirname(args.copies), cfg.work_dir
    return _replaced(facts, (args.copies, copies_folder(there)), (os.path.join(folder, 'run'), there))


def _start(cfg: Config, args: argparse.Namespace) -> str:
    if cfg.get('resume'):
        return f'goes on from {cfg.load_from}'
    weights = f', from the weights of {cfg.load_from}' if cfg.get('load_from') else ''
    if args.overwrite:
        found = CheckpointFolder.of(cfg).all()
        deleted = f'deletes {len(found)} checkpoints of an earlier run ({some([path.name for path in found])})'
        return f'starts anew{weights}' + (f', and {deleted}' if found else '')
    return f'starts anew{weights}'


def _precision(cfg: Config) -> str:
    wrapper = cfg.get('optim_wrapper') or {}
    if not isinstance(wrapper, Mapping):
        return 'as its optimizer has it'
    amp = 'Amp' in name_of(wrapper) or wrapper.get('dtype')
    return str(wrapper.get('dtype') or ('bfloat16' if get_device() == 'cpu' else 'float16')) if amp else 'float32'


def _config_facts(cfg: Config, args: argparse.Namespace) -> dict:
    plain = read_config(args.config)
    spell_out(plain)
    changed = [one for one in differences(plain.to_dict(), cfg.to_dict()) if not one.key.startswith(_OF_EVERY_RUN)]
    hooks = [one for one in changed if one.key == 'custom_hooks' or one.key.startswith('custom_hooks.')]
    names, base = base_of(plain)
    from_base = list(differences(base.to_dict(), plain.to_dict())) if base is not None else []
    return dict(
        changed_by_command=[one._asdict() for one in changed if one not in hooks],
        hooks=[name_of(entry, HOOKS) for entry in cfg.get('custom_hooks') or []],
        base=names,
        changed_from_base=[one._asdict() for one in from_base],
        whole_config=cfg.pretty_text,
    )


def _part(part: Part) -> dict:
    return dict(
        part=part.name,
        parameters=part.parameters,
        trainable=part.trainable,
        of_norms=part.of_norms,
        norms=dict(part.norms),
        fixed={label: n for label, n in part.fixed.items() if n},
        described=part.described(),
    )


def _data(loader: object, cfg: Config, split: str) -> dict:
    """What an epoch of a loader shows."""
    dataset = loader.dataset
    try:
        infos = (dataset.get_data_info(i) for i in range(len(dataset)))
        counts = count(infos, dataset.metainfo.get('classes') or ())
    except (AttributeError, KeyError, TypeError, NotImplementedError):  # somebody's own data set
        counts = Counts(len(dataset) if hasattr(dataset, '__len__') else 0, empty=None)
    files = {source.ann_file for source in sources(cfg, (split,)) if source.skipped is None and source.ann_file}
    listed = sum(len(read_annotations(file)['images']) for file in files)
    forget()
    return dict(vars(counts), left_out=max(0, listed - counts.different) if counts.different else 0)


def _rates(rates: Rates) -> dict:
    points = [dict(iteration=i, learning_rate=rate) for i, rate in sorted(rates.points.items())]
    return dict(vars(rates), points=points, factors=list(rates.factors))


def _time(
    timing: Timing,
    batches: list[float],
    precise: tuple[int, float] | None,
    iterations: int,
    course: Course,
    runner: Runner,
) -> dict:
    each = statistics.median(timing.iterations) if timing.iterations else None
    evaluation = statistics.median(batches) * len(runner.val_dataloader) if batches else None
    training = each * iterations if each is not None else None
    evaluations = evaluation * len(course.validations) if evaluation is not None else 0.0
    times, seconds = precise or (0, None)
    whole = evaluations + (times * seconds if times else 0.0)
    return dict(
        timed_iterations=len(timing.iterations),
        settled=timing.settled,
        seconds_per_iteration=each,
        fastest=min(timing.iterations, default=None),
        slowest=max(timing.iterations, default=None),
        waiting_for_data=sum(timing.data) / sum(timing.iterations) if timing.iterations else None,
        training_seconds=training,
        seconds_per_evaluation=evaluation,
        evaluation_seconds=evaluations,
        precise_statistics=times,
        seconds_per_precise_statistics=seconds,
        seconds=training + whole if training is not None else None,
    )


def _memory_of_gpu() -> int | None:
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if get_device() == 'cuda' else None
    )


def _replaced(node: object, *pairs: tuple[str, str]) -> object:
    """With the folders of the real run in place of those of the dry one."""
    if isinstance(node, dict):
        return {key: _replaced(value, *pairs) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, *pairs) for value in node]
    if isinstance(node, str):
        for old, new in pairs:
            node = node.replace(old, new)
    return node


# ------------------------------------------------------------------------------------------------------------- output


def _show(console: object, facts: dict, args: argparse.Namespace) -> None:
    def say(*lines: str) -> None:
        for line in lines:
            console.print(as_text(line))

    several = f', {facts["processes"]} processes' if facts['processes'] > 1 else ''
    say(
        '',
        f'{facts["config"]} in {facts["work_dir"]}: {facts["start"]}',
        f'on {facts["device"]}{several}, {facts["precision"]}' + (f'; {facts["threads"]}' if facts['threads'] else ''),
    )
    _section(say, 'Config', _config_lines(facts))
    say('', f'Model: {facts["model"]}')
    console.print(_model_table(facts['parts']))
    lines = [
        Counts(**{key: value for key, value in data.items() if key != 'left_out'}).line(split)
        + (f'; {data["left_out"]} more images are listed and left out by filter_cfg' if data['left_out'] else '')
        for split, data in facts['data'].items()
    ]
    _section(say, 'Data, as an epoch shows them', lines)
    _section(say, 'Schedule', [*facts['notes'], *_schedule_lines(facts)])
    _section(say, 'Time and memory, by some real iterations', _cost_lines(facts))
    if facts['warnings']:
        _section(say, 'Warnings', facts['warnings'])
    if args.verbose:
        say('', 'The whole config')
        print(facts['whole_config'])
    say('')


def _section(say: object, title: str, lines: list[str]) -> None:
    say('', title, *(f'  {line}' for line in lines))


def _config_lines(facts: dict) -> list[str]:
    lines = []
    for title, key in (
        ('the command line changes', 'changed_by_command'),
        (f'the config changes in its base ({", ".join(facts["base"])})', 'changed_from_base'),
    ):
        found = [Difference(**one) for one in facts[key]]
        if key == 'changed_from_base' and not facts['base']:
            continue
        lines.append(f'{title}:' if found else f'{title}: nothing')
        lines += [f'  {one.line()}' for one in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f'  and {len(found) - _SHOWN} more (-v shows the whole config)')
    lines.append(f'hooks: {", ".join(facts["hooks"])}')
    return lines


def _model_table(parts: list[dict]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column('  part', no_wrap=True)
    for name in ('parameters', 'trained', 'of norms'):
        table.add_column(name, justify='right', no_wrap=True)
    table.add_column('norms', no_wrap=True)
    for part in parts:
        numbers = (f'{part[key]:,}' for key in ('parameters', 'trainable', 'of_norms'))
        table.add_row(f'  {part["part"]}', *numbers, part['described'])
    return table


def _schedule_lines(facts: dict) -> list[str]:
    schedule = facts['schedule']
    unit, length, total = schedule['unit'], schedule['iterations_per_epoch'], schedule['iterations']
    images = f' of {schedule["batch_size"]} images' if schedule['batch_size'] else ''
    if unit == 'epochs':
        line = f'{schedule["end"]} epochs of {length} iterations{images}: {total} iterations'
    else:
        epochs = f', {total / length:.3g} epochs' if length else ''
        line = f'{total} iterations{images}{epochs}'
    per_step, start = schedule['iterations_per_step'], schedule['start_iteration']
    if per_step > 1:
        line += f'; the optimizer steps every {per_step} iterations'
    if start:
        line += f'; goes on at iteration {start}' + (', amid a step' if start % per_step and start < total else '')
    if start >= total:
        line += '; nothing is left to train'
    lines = [line]
    for rates in schedule['learning_rates']:
        name = f' of {rates["optimizer"]}' if rates['optimizer'] else ''
        points = ', '.join(
            f'{point["learning_rate"]:.4g} at {_when(point["iteration"], schedule)}' for point in rates['points']
        )
        same = rates['lowest'] == rates['highest']
        points = f'{rates["highest"]:.4g} throughout' if same else points
        line = f'learning rate{name}: {points}'
        if not same and max(point['learning_rate'] for point in rates['points']) < 0.999 * rates['highest']:
            line += f'; at most {rates["highest"]:.4g}'
        low, high = rates['factors']
        if rates['groups'] > 1 and (low, high) != (1.0, 1.0):
            line += f'; {rates["groups"]} groups of parameters, with {low:.3g} to {high:.3g} times that'
        lines.append(line + ('; falls with the results of the validation, besides' if rates['waits'] else ''))
    lines.append(_several(schedule['evaluations'], 'evaluation') + _after(schedule['evaluations'], unit))
    for hook in schedule['checkpoints']:
        kept = f', the last {hook["kept"]} are kept' if 0 < hook['kept'] < len(hook['after']) else ''
        count_kept = min(hook['kept'], len(hook['after'])) if hook['kept'] > 0 else len(hook['after'])
        size = f'; about {_mb(facts["checkpoint_bytes"])} each, {_mb(count_kept * facts["checkpoint_bytes"])} in all'
        lines.append(f'{_several(hook["after"], "checkpoint")}{_after(hook["after"], hook["unit"])}{kept}{size}')
    return lines


def _cost_lines(facts: dict) -> list[str]:
    cost, memory = facts['time'], facts['memory']
    lines = []
    if cost['seconds_per_iteration'] is None:
        return ['no iteration was run']
    lines.append(
        f'{cost["seconds_per_iteration"]:.3g} s per iteration (median of {cost["timed_iterations"]}, '
        f'{cost["fastest"]:.3g} to {cost["slowest"]:.3g}), of which {100 * cost["waiting_for_data"]:.0f} % waiting for '
        'data'
    )
    if not cost['settled']:
        lines.append('norms were still in their warm-up (CBN, MABN): later iterations may take longer')
    line = f'about {_duration(cost["seconds"])} in all: training {_duration(cost["training_seconds"])}'
    if cost['seconds_per_evaluation'] is not None:
        evaluations = _several(facts['schedule']['evaluations'], 'evaluation')
        line += f', {evaluations} of {_duration(cost["seconds_per_evaluation"])} (without their metrics)'
    if cost['precise_statistics']:
        line += f', {cost["precise_statistics"]} times precise statistics of '
        line += _duration(cost['seconds_per_precise_statistics'])
    lines.append(line)
    total = f' of {_mb(memory["total_bytes"])}' if memory['total_bytes'] else ''
    of = 'of the GPU' if memory['of'] == 'GPU' else 'of the process, data workers beside it'
    lines.append(f'memory {of}: at most {_mb(memory["peak_bytes"])}{total} so far')
    return lines


def _when(iteration: int, schedule: dict) -> str:
    length = schedule['iterations_per_epoch']
    if schedule['unit'] == 'epochs' and length and iteration and iteration % length == 0:
        return f'iteration {iteration} (after epoch {iteration // length})'
    return f'iteration {iteration}'


def _after(steps: list[int], unit: str) -> str:
    if not steps:
        return ''
    one = {'epochs': 'epoch', 'iterations': 'iteration'}[unit]
    listed = f'{one} ' + ', '.join(map(str, steps if len(steps) <= 4 else [*steps[:3], '...', steps[-1]]))
    return f', after {listed}'


def _several(things: list, name: str) -> str:
    return f'{len(things) or "no"} {name}{"s" * (len(things) != 1)}'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f'{seconds:.3g} s'
    minutes = round(seconds / 60)
    if minutes < 60:
        return f'{minutes} min'
    return f'{minutes // 60} h {minutes % 60:02d} min' if minutes < 2880 else f'{minutes / 1440:.1f} days'


def _mb(size: int) -> str:
    return f'{size / 2**30:.1f} GB' if size >= 2**30 else f'{size / 2**20:.0f} MB'
