"""``tools/benchmark.py``: what the norms cost, beside batch norm and the published formulations."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from mmdet_norms.benchmark import chart, classifiers, detectors, layers, measure, report
from mmdet_norms.benchmark.groups import LAYOUTS, PRECISIONS, Group, Setting, add_triton
from mmdet_norms.commands import runnable, typed
from mmdet_norms.console import plain_column, plain_console
from mmdet_norms.entries import is_classifier
from mmdet_norms.files import require_writable
from mmdet_norms.kernels import compiled, gpu
from mmdet_norms.placement import PLACEMENTS, apply_norm

from .common import UserError, add_threads_argument, command, read_config, use_threads
from .config_checks import config_problems, require_none
from .options import add_option_arguments, merge_options

LEVELS = ('layer', 'conv', 'classifier', 'detector')
_BY_DEFAULT = ('layer', 'conv', 'detector')
_DEFAULT_BATCH = dict(classifier=8, detector=2)
_TITLE_WIDTH = 58


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line says, show it and write it down."""
    args = parse_args(argv)
    if args.redraw is not None:
        _chart(dict(groups=[group for path in args.redraw for group in _read_result(path)['groups']]), args.chart)
        return
    plan = list(make_plan(args))
    chosen = use_threads(args, device=args.device)
    for line in filter(None, (chosen, *_notes(args.device))):
        print(line)
    if args.device != 'cpu':
        torch.cuda.set_device(args.device)
    given = sys.argv[1:] if argv is None else argv
    result = dict(
        command=f'{runnable("benchmark")} {shlex.join(given)}',
        date=measure.now(),
        machine=measure.describe_machine(args.device),
        settings=vars(args),
        groups=[],
    )
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=200)
    paths = []
    while plan:
        group = plan.pop(0)()  # and let go of it, with its models, when it is done
        if args.triton:
            group = add_triton(group)
        repeats = args.detector_repeats if group.level in ('classifier', 'detector') else args.repeats
        result['groups'].append(_measure(group, repeats, args.warmup))
        report.print_group(result['groups'][-1], console)
        paths = report.write(result, args.out)  # after every group: an interrupted run keeps what it has
    print('written:', *paths)
    if args.chart is not None:
        _chart(result, args.chart)


def _chart(result: dict, path: str) -> None:
    try:
        chart.draw(result, path)
    except ValueError as error:
        raise UserError(
            f'--chart {path}: {error}; measure for example --level layer --layers bnet3 mabn an --mode forward+backward'
        ) from error
    print('written:', path)


def _read_result(path: str) -> dict:
    """What an earlier run has written; only its numbers are used."""
    try:
        result = json.loads(Path(path).read_text(encoding='utf-8'))
        if isinstance(result, dict) and all(isinstance(group['rows'], list) for group in result['groups']):
            return result
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--redraw {path}: {error}') from error
    except (ValueError, KeyError, TypeError):  # no JSON, or another
        pass
    raise UserError(f'--redraw {path}: this is no benchmark.json of {typed("benchmark")}')


def _notes(device: str) -> Iterator[str]:
    """What makes times on a CPU others than people expect."""
    if device == 'cpu' and (told := compiled.why_not()):
        yield told
    if device == 'cpu' and torch.get_num_threads() > 1 and 'GOMP_SPINCOUNT' not in os.environ:
        yield (
            'GOMP_SPINCOUNT was not set when torch was loaded, so threads that wait keep cores busy: beside other work '
            'ratios of layers are wrong by up to a factor of 5. Set it to 10000 first, as the command does'
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and fill in what depends on other options."""
    parser = argparse.ArgumentParser(
        prog=typed('benchmark'),
        description='Time and memory of norm layers, of convolutions with norms, and of detectors, beside batch norm. '
        'docs/benchmark.md says what the columns mean.',
    )
    parser.add_argument(
        '--level', nargs='+', choices=LEVELS, default=list(_BY_DEFAULT), help=f'default: {" ".join(_BY_DEFAULT)}'
    )
    parser.add_argument(
        '--mode',
        nargs='+',
        choices=[*layers.MODES, *detectors.MODES],
        help='what to time: the first three for layer and conv, the others for classifiers and detectors; default: all',
    )
    parser.add_argument(
        '--layers',
        nargs='+',
        metavar='NAME',
        help='layers for layer and conv, and everywhere in a ResNet-50 for classifier, from: '
        f"{', '.join(layers.named_layers())}; or any norm_cfg: 'BNET(kernel_size=9)'",
    )
    parser.add_argument('--no-reference', action='store_true', help='without the published formulations')
    parser.add_argument(
        '--size',
        nargs=4,
        type=int,
        metavar=('N', 'C', 'H', 'W'),
        help='feature map of level layer; default 2 256 100 160',
    )
    parser.add_argument(
        '--conv-size', nargs=4, type=int, metavar=('N', 'C', 'H', 'W'), help='input of level conv; default 2 256 50 80'
    )
    parser.add_argument(
        '--config',
        nargs='+',
        metavar='CONFIG',
        help=f'detectors; default {detectors.CONFIG}. Or classifiers, by --level classifier; default: ResNet-50',
    )
    parser.add_argument(
        '--norm',
        nargs='+',
        metavar='NAME',
        help=f'put each of these into every --config: {", ".join(PLACEMENTS)}; default: the configs as they are, or '
        f'{" ".join(detectors.NORMS_BY_DEFAULT)} without --config (detectors)',
    )
    add_option_arguments(parser)
    parser.add_argument(
        '--image',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='image of detectors, 512 800 by default, or of classifiers, 224 224',
    )
    parser.add_argument(
        '--batch', type=int, help='images of a training step of detectors, default 2; of any call of classifiers, 8'
    )
    parser.add_argument('--no-fuse', action='store_true', help='without inference with folded norms')
    parser.add_argument(
        '--tune-mode',
        action='store_true',
        help='train detectors with norms of fixed statistics computed in their convolutions as well',
    )
    parser.add_argument(
        '--triton', action='store_true', help='on a GPU, measure the norms by the Triton kernels as well'
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ...; default: cuda where there is one')
    parser.add_argument(
        '--precision',
        nargs='+',
        choices=list(PRECISIONS),
        default=['fp32'],
        help='fp32, or mixed precision in bf16 or fp16; default fp32',
    )
    parser.add_argument('--layout', nargs='+', choices=list(LAYOUTS), default=['nchw'], help='default nchw')
    add_threads_argument(parser)
    parser.add_argument(
        '--repeats', type=int, help='timed calls of each candidate; default 20, and 5 of a detector on a CPU'
    )
    parser.add_argument('--warmup', type=int, help='calls before, beside those that full histories take; default 3')
    parser.add_argument('--quick', action='store_true', help='small maps and images, 3 repeats: a look, not a result')
    parser.add_argument(
        '--out',
        default='work_dirs/benchmark',
        metavar='DIR',
        help='for benchmark.json, .md and .png; default work_dirs/benchmark',
    )
    parser.add_argument(
        '--chart',
        metavar='FILE',
        help='draw the training steps that were measured beside their published formulation into one chart, *.svg or '
        '*.png',
    )
    parser.add_argument(
        '--redraw',
        nargs='+',
        metavar='JSON',
        help='measure nothing: draw --chart from benchmark.json of earlier runs',
    )
    args = parser.parse_args(argv)
    if args.redraw is not None and args.chart is None:
        raise UserError('--redraw: say with --chart FILE.svg where to draw it')
    if args.chart is not None:
        if Path(args.chart).suffix not in chart.FORMATS:
            raise UserError(f'--chart {args.chart}: write {" or ".join(f"FILE{suffix}" for suffix in chart.FORMATS)}')
        require_writable(args.chart, '--chart')
    args.device = str(_device(args.device))
    _fill_in(args)
    return args


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as error:
        raise UserError(f'--device {name}: {measure.explain(error)}') from error
    if device.type == 'cpu':
        return torch.device('cpu')
    if device.type != 'cuda':
        raise UserError(f'--device {name}: this measures on cpu and cuda only')
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UserError(f'--device {name}: torch {torch.__version__} sees {count} CUDA devices here')
    return torch.device('cuda', device.index or 0)


def _require_triton(device: str) -> None:
    with gpu.switched(True):
        if device == 'cpu' or not gpu.is_available(torch.device(device)):
            raise UserError(f'--triton: the Triton kernels need a GPU and a Triton that work; not found for {device}')


def _fill_in(args: argparse.Namespace) -> None:
    quick, on_cpu = args.quick, args.device == 'cpu'
    for name in ('repeats', 'batch'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)}: must be at least 1')
    if args.warmup is not None and args.warmup < 0:
        raise UserError(f'--warmup {args.warmup}: must be at least 0')
    for name in ('size', 'conv_size', 'image'):
        size = getattr(args, name)
        if size is not None and min(size) < 1:
            raise UserError(f'--{name.replace("_", "-")} {" ".join(map(str, size))}: sizes are at least 1')
    if args.triton:
        _require_triton(args.device)
    if on_cpu and 'fp16' in args.precision:
        raise UserError('--precision fp16: a CPU has bf16 only; write --precision bf16')
    args.detector_repeats = args.repeats or (3 if quick else 5 if on_cpu else 20)
    args.repeats = args.repeats or (3 if quick else 20)
    args.warmup = (1 if quick else 3) if args.warmup is None else args.warmup
    args.size = args.size or ([2, 64, 50, 80] if quick else [2, 256, 100, 160])
    args.conv_size = args.conv_size or ([2, 64, 25, 40] if quick else [2, 256, 50, 80])
    args.images = dict(detector=[128, 192] if quick else [512, 800], classifier=[64, 64] if quick else [224, 224])
    args.images = {level: args.image or image for level, image in args.images.items()}
    args.batches = {level: args.batch or batch for level, batch in _DEFAULT_BATCH.items()}
    args.detector_norms = args.norm
    if args.norm is None and args.config is None:
        args.detector_norms = ['bn', 'bnet5'] if quick else list(detectors.NORMS_BY_DEFAULT)


def make_plan(args: argparse.Namespace) -> Iterator[Callable[[], Group]]:
    """The groups to measure, each made when its turn comes. What is wrong with the arguments is said before."""
    levels = [level for level in LEVELS if level in args.level]
    modes = {level: [mode for mode in _modes(level) if args.mode is None or mode in args.mode] for level in levels}
    if not any(modes.values()):
        raise UserError(
            f'--mode {" ".join(args.mode)}: level {" ".join(levels)} has none of them; it has '
            f'{", ".join(mode for level in levels for mode in _modes(level))}'
        )
    for name in args.layers or ():
        try:
            layers.norm_cfg_of(name)
        except ValueError as error:
            raise UserError(f'--layers: {error}') from error
    configs = {level: _configs(args, level) for level in ('classifier', 'detector') if modes.get(level)}
    return _groups(args, modes, configs)


def _modes(level: str) -> tuple[str, ...]:
    return detectors.MODES if level in ('classifier', 'detector') else layers.MODES


def _groups(args: argparse.Namespace, modes: dict[str, list[str]], configs: dict) -> Iterator[Callable[[], Group]]:
    for precision in args.precision:
        for layout in args.layout:
            setting = Setting(torch.device(args.device), precision, layout)
            bare = ('layer', layers.layer_group, args.size), ('conv', layers.conv_group, args.conv_size)
            for level, make, size in bare:
                names = args.layers or layers.DEFAULT[level]
                for mode in modes.get(level, ()):
                    yield lambda make=make, names=names, size=tuple(size), mode=mode, setting=setting: make(
                        names, size, mode, setting, not args.no_reference
                    )
            for level, named in configs.items():
                more = named, setting, tuple(args.images[level]), args.batches[level]
                published = args.config is None and args.norm is None
                models = (
                    classifiers.Classifiers(*more, published) if level == 'classifier' else detectors.Detectors(*more)
                )
                for mode in modes[level][::-1]:  # inference first
                    yield lambda models=models, mode=mode: models.group(mode, not args.no_fuse, args.tune_mode)


def _configs(args: argparse.Namespace, level: str) -> dict[str, Config]:
    """Name -> config, for every --config with every --norm; without a --config, the networks of that level."""
    if level == 'classifier' and args.config is None and args.norm is None:
        configs = classifiers.resnet50(args.layers or classifiers.NORMS_BY_DEFAULT)
        for cfg in configs.values():
            merge_options(cfg, args)
        return configs
    configs, paths = {}, args.config or [detectors.CONFIG if level == 'detector' else None]
    norms = args.detector_norms if level == 'detector' else args.norm
    for path in dict.fromkeys(paths):
        stem = 'resnet50' if path is None else path.replace('\\', '/').rsplit('/', 1)[-1].removesuffix('.py')
        for norm in dict.fromkeys(norms or [None]):
            cfg = read_config(path) if path is not None else classifiers.resnet50([])[layers.BASELINE]
            if is_classifier(cfg.get('model')) != (level == 'classifier'):
                other = 'detector' if level == 'classifier' else 'classifier'
                raise UserError(
                    f'--config {path}: this is a {other}, and not for --level {level}; write --level {other}'
                )
            if norm is not None:
                try:
                    cfg.model = apply_norm(cfg.model, norm)
                except ValueError as error:
                    raise UserError(f'--norm {norm}: {error}') from error
            merge_options(cfg, args)
            require_none(config_problems(cfg, ()))
            name = stem if norm is None else norm if len(paths) == 1 else f'{stem} {norm}'
            if name in configs:
                raise UserError(f'--config: two files are called {stem}.py; measure them one at a time')
            configs[name] = cfg
    return configs


def _measure(group: Group, repeats: int, warmup: int) -> dict:
    columns = (
        plain_column('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    title = group.title[:_TITLE_WIDTH]
    with Progress(*columns, console=plain_console(stderr=True)) as bar:
        task = bar.add_task(title, total=group.count_calls(repeats, warmup))

        def on_call(name: str) -> None:
            bar.update(task, advance=1, description=f'{title}: {name}')

        row = group.measure(repeats, warmup, on_call)
        bar.update(task, completed=group.count_calls(repeats, warmup), description=title)
    return row


if __name__ == '__main__':
    main()
