"""Whether the weights that a run starts from can be read and fit its model: asked before anything runs."""

import argparse
import ast
import copy
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mmdet.registry import HOOKS, MODELS, WEIGHT_INITIALIZERS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet_norms.checkpoints.convert import fits_layout
from mmdet_norms.checkpoints.fit import Fit, fit, weights_of
from mmdet_norms.checkpoints.layouts import LAYOUTS
from mmdet_norms.checkpoints.read import Checkpoint, read_checkpoint
from mmdet_norms.checkpoints.report import list_keys
from mmdet_norms.classification.image_folder import classes_of_entry, image_folders, problems_of
from mmdet_norms.commands import runnable
from mmdet_norms.compat.downloads import DownloadError
from mmdet_norms.compat.reading import keep
from mmdet_norms.datasets.annotations import other_order
from mmdet_norms.datasets.checks import in_both
from mmdet_norms.datasets.parts import HELD_BACK
from mmdet_norms.datasets.sources import datasets, metainfo_of, sources
from mmdet_norms.deploy import fuse, is_fused
from mmdet_norms.entries import is_a, is_classifier, mappings
from mmdet_norms.errors import UserError
from mmdet_norms.layers import MABN, CenConv2d
from mmdet_norms.placement import PLACEMENTS, apply_norm

from .common import add_hook, read_config
from .options import literal

ALLOW_PARTIAL = '--allow-partial'
_FILES = ('.pth', '.pt')  # else what a part calls pretrained may be a name that it knows


def add_partial_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        ALLOW_PARTIAL,
        action='store_true',
        help=f'{what} even if the checkpoint does not fit the model: what it lacks starts anew, what has no place is '
        'left out; results.json says so',
    )


def check_test(cfg: Config, args: argparse.Namespace) -> None:
    """Of tools/test.py: the checkpoint is that of the model, fused or not.

    Raises:
        UserError: it cannot be read, holds no weights, or does not fit, unless --allow-partial is given.
    """
    _take_in(cfg, args)
    if _is_first():
        checkpoint = read_checkpoint(args.checkpoint)
        _require_fit(cfg, args, checkpoint, 'CKPT')
        _warn_of_trained(cfg, checkpoint, 'test')


def check_training(cfg: Config, args: argparse.Namespace) -> None:
    """Of tools/train.py: what it resumes or starts from, and the pretrained weights of parts.

    Raises:
        UserError: as :func:`check_test`; or it is the checkpoint of a fused model; or no state to go on from.
    """
    _take_in(cfg, args)
    if not _is_first():
        return
    start, option = cfg.get('load_from'), '--resume' if cfg.get('resume') else 'load_from'
    if start is not None:
        checkpoint = read_checkpoint(start)
        if is_fused(checkpoint.content):
            raise UserError(fused_refusal(option, start))
        if cfg.get('resume'):
            checkpoint.require_resumable()
        _require_fit(cfg, args, checkpoint, option, exact=bool(cfg.get('resume')))
        _warn_of_trained(cfg, checkpoint, 'val')
    _check_pretrained(cfg, args, replaced=start is not None)
    if start is not None:
        keep(start, checkpoint.content)


def fused_refusal(option: str, path: str) -> str:
    return (
        f'{option}: {path} is the checkpoint of a fused model, which has no norms to train; name the checkpoint '
        'that it was made from'
    )


def explain_misfit(found: Fit, cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint, option: str) -> str:
    """What does not fit, and what to write instead."""
    norm = f' with --norm {args.norm}' if getattr(args, 'norm', None) else ''
    lines = [f'{option}: {checkpoint.name} does not fit the model of {args.config}{norm}', found.explain()]
    lines += _advice(cfg, args, checkpoint)
    if hasattr(args, 'allow_partial'):
        if option == '--resume':
            lines.append(
                f'To start from what fits, write instead of --resume: --cfg-options load_from={checkpoint.name} '
                f'{ALLOW_PARTIAL}'
            )
        else:
            lines.append(
                f'If it is meant so, {ALLOW_PARTIAL} starts what is missing anew and leaves out what is left over'
            )
    return '\n'.join(lines)


def built(model_cfg: Mapping, scope: str = 'mmdet', device: str = 'meta') -> nn.Module | None:
    """The model without memory for its weights, where it can be built so; None where it cannot be built at all.

    What is wrong with the config is then for the runner to say.
    """
    for where in dict.fromkeys([device, 'cpu']):  # some models compute with numbers while they are built
        try:
            with DefaultScope.overwrite_default_scope(scope), torch.device(where), torch.random.fork_rng([]), NoInit():
                return MODELS.build(copy.deepcopy(model_cfg))
        except Exception:
            continue
    return None


class NoInit(TorchFunctionMode):
    """Skips the initialization of weights without memory, which takes half the time of building a model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fills = getattr(func, '__module__', None) == 'torch.nn.init' or func in (Tensor.normal_, Tensor.uniform_)
        tensor = (args[0] if args else kwargs.get('tensor')) if fills else None
        return tensor if isinstance(tensor, Tensor) and tensor.is_meta else func(*args, **kwargs)


def _require_fit(
    cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint, option: str, exact: bool = False
) -> None:
    model = _model_for(cfg, checkpoint)
    if model is None:
        return
    found = fit(model, checkpoint.state_dict, exact=exact)
    if found.unused:
        print(f'{checkpoint.name}: {len(found.unused)} weights are not used, e.g. {found.unused[0]}')
    if found:
        return _require_class_order(cfg, args, checkpoint, option)
    if not getattr(args, 'allow_partial', False) or exact or found.started_anew == found.total:
        raise UserError(explain_misfit(found, cfg, args, checkpoint, option))
    print(f'{ALLOW_PARTIAL}: {checkpoint.name} does not fit the model of {args.config}\n{found.explain()}')
    _start_hook(cfg)['partial'] = dict(checkpoint=checkpoint.name, **found.record())


def _require_class_order(cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint, option: str) -> None:
    """Label 0 is the same thing in the data as in training; names that differ otherwise may be meant."""
    theirs, ours = checkpoint.classes(), classes_of(cfg)
    difference = other_order(theirs, ours) if theirs and ours else None
    if difference is None:
        return
    place = {name: label for label, name in enumerate(ours)}
    moved = [name for label, name in enumerate(theirs) if place.get(name, label) != label]
    if moved and not getattr(args, 'allow_partial', False):
        raise UserError(
            f'{option}: {checkpoint.name} was trained with classes that the data of {args.config} have elsewhere, so '
            f'that {moved[0]} would get another name. The data: {difference}. {_in_that_order(cfg)} in the order of '
            f'the checkpoint; {ALLOW_PARTIAL} goes on nevertheless'
        )
    print(f'warning: {checkpoint.name} was trained with other names of classes; the data of {args.config} {difference}')


def _in_that_order(cfg: Config) -> str:
    if is_classifier(cfg.get('model')):
        return 'Name the classes in metainfo.classes of every data set'
    return 'List the categories of the annotation files, and metainfo.classes,'


def _model_for(cfg: Config, checkpoint: Checkpoint) -> nn.Module | None:
    """The model of a config, fused if the weights are; None where the runner has to say why there is none."""
    if cfg.get('model') is None:
        return None
    fused = is_fused(checkpoint.content)
    model = built(cfg.model, cfg.get('default_scope') or 'mmdet', device='cpu' if fused else 'meta')
    return fuse(model, inplace=True) if fused and model is not None else model


def _check_pretrained(cfg: Config, args: argparse.Namespace, replaced: bool) -> None:
    """The weights that ``init_cfg`` of the model or of parts of it names."""
    files = dict(pretrained_files(cfg.get('model')))
    if not files:
        return
    once = functools.cache(read_checkpoint)

    def read(key: str, name: str) -> Checkpoint:
        try:
            return once(name)
        except DownloadError as error:
            instead = 'leave them out, since a checkpoint replaces them' if replaced else 'start without them'
            raise UserError(
                f'{key}: {error}; or name another file: --cfg-options {key}=FILE; or {instead}: --cfg-options '
                f'{weights_left_out(key)}'
            ) from error

    for key, name in files.items():
        read(key, name)
    model = None if replaced else built(cfg.model, cfg.get('default_scope') or 'mmdet')
    for where, part, rule in weights_of(model) if model is not None else ():
        if not is_a(rule, 'Pretrained', WEIGHT_INITIALIZERS) or _loads_by_itself(part):
            continue
        key = f'model.{where}.init_cfg' if where else 'model.init_cfg'
        checkpoint = read(f'{key}.checkpoint', rule['checkpoint'])
        state, prefix = checkpoint.state_dict, rule.get('prefix')
        if prefix:
            prefix = prefix.rstrip('.') + '.'
            written = checkpoint.content.get('state_dict', checkpoint.content)  # mmengine compares with these names
            state = {name.removeprefix(prefix): value for name, value in written.items() if name.startswith(prefix)}
            if not state:
                first = ', '.join(dict.fromkeys(name.partition('.')[0] for name in written))
                inside = (name.partition(f'.{prefix}') for name in written if f'.{prefix}' in name)
                longer = ' or '.join(dict.fromkeys(f'prefix={f"{before}.{prefix}"!r}' for before, _, _ in inside))
                raise UserError(
                    f'{key}: no weight of {checkpoint.name} starts with prefix={prefix!r}; they start with {first}'
                    + (f': write {longer}' if longer else '')
                )
        found = fit(part, state, pretrained=part is not model)
        if found or (args.allow_partial and found.started_anew < found.total):
            print('\n'.join(_what_it_fills(key, checkpoint, found)))
            _warn_of_convolutions(key, checkpoint, part)
            continue
        lines = [f'{key}: {checkpoint.name} does not fit', found.explain(), *_inner_prefix(found, part, state)]
        lines += _trained_with(checkpoint)
        lines.append(
            f'Name weights of this network with --cfg-options {key}.checkpoint=FILE, leave them out with {key}=None; '
            f'or, if it is meant so, {ALLOW_PARTIAL} starts what is missing anew'
        )
        raise UserError('\n'.join(lines))


def _what_it_fills(key: str, checkpoint: Checkpoint, found: Fit) -> Iterator[str]:
    """That a part gets its weights, and whatever it or the checkpoint has alone, in a line for each kind."""
    anew = [*found.missing, *found.mismatched, *found.anew]
    if anew or found.left_over or found.unused or found.forgotten:
        yield f'{key}: of {checkpoint.name} come all weights and statistics but what is listed here'
    else:
        yield f'{key}: all weights and statistics come from {checkpoint.name}'
    kinds = {
        'start as the identical function of another norm': found.adopted,
        'start anew': anew,
        'of the checkpoint have no place': [*found.left_over, *found.unused, *found.forgotten],
    }
    for what, keys in kinds.items():
        if keys:
            yield f'{len(keys)} {what}:\n{list_keys(keys, most=2)}'


def _warn_of_convolutions(key: str, checkpoint: Checkpoint, part: nn.Module) -> None:
    """Say that MABN was pretrained without the centred convolutions that the model has, or with those that it lacks.

    The weights do not tell: a centred convolution keeps its weight as it is and centres it whenever it computes.
    """
    types = {
        keyword.value.value
        for assigned in _config_of(checkpoint)
        if assigned.targets[0].id == 'model'
        for keyword in ast.walk(assigned)
        if isinstance(keyword, ast.keyword) and keyword.arg == 'type' and isinstance(keyword.value, ast.Constant)
    }
    if 'MABN' not in types or not any(isinstance(module, MABN) for module in part.modules()):
        return
    theirs, ours = 'CenConv' in types, any(isinstance(module, CenConv2d) for module in part.modules())
    if theirs != ours:
        print(
            f'warning: {key}: {checkpoint.name} was trained {"with" if theirs else "without"} centred convolutions in '
            f'front of MABN, the model is {"with" if ours else "without"} them, so it starts as another function. '
            f"Pretrain with conv_cfg=dict(type='CenConv'), as --norm mabn does, and give the detector the same",
            file=sys.stderr,
        )


def pretrained_weights(model_cfg: Mapping) -> Iterator[tuple[str, str]]:
    """What they are called in messages, and their files."""
    for _, rule in _rules(model_cfg):
        yield f'the checkpoint of init_cfg ({rule["checkpoint"]})', rule['checkpoint']


def pretrained_files(model_cfg: object) -> Iterator[tuple[str, str]]:
    """Key and name of all pretrained weights that building the model reads."""
    for key, rule in _rules(model_cfg):
        yield f'{key}.checkpoint', rule['checkpoint']
    for key, entry in mappings(model_cfg, 'model'):  # as mmdet 2 and the necks of DetectoRS write it; or it is a file
        name = entry.get('pretrained')
        if isinstance(name, str) and ('://' in name or name.endswith(_FILES)):
            yield f'{key}.pretrained', name


def weights_left_out(key: str) -> str:
    """The option that lets a model start without the weights that a key of :func:`pretrained_files` names."""
    return f'{key[: key.rindex("init_cfg") + len("init_cfg")] if "init_cfg" in key else key}=None'


def _rules(model_cfg: object) -> Iterator[tuple[str, Mapping]]:
    """Where in a config the entries are that name pretrained weights, and the entries."""
    for key, entry in mappings(model_cfg, 'model'):
        if entry.get('checkpoint') and is_a(entry, 'Pretrained', WEIGHT_INITIALIZERS):
            if not isinstance(entry['checkpoint'], str):
                raise UserError(f'{key}.checkpoint: {entry["checkpoint"]!r} must be the name of a file, in quotes')
            yield key, entry


def _loads_by_itself(part: nn.Module) -> bool:
    """Whether a module converts its pretrained weights in an ``init_weights`` of its own, as transformers do."""
    code = getattr(type(part).init_weights, '__code__', None)
    return bool(
        code and {'load_state_dict', 'load_checkpoint', 'CheckpointLoader', '_load_checkpoint'} & {*code.co_names}
    )


def _inner_prefix(found: Fit, part: nn.Module, state: Mapping) -> list[str]:
    """That the weights are there, one level down: those of a whole detector for its backbone."""
    firsts = {key.partition('.')[0] for key in state}
    for first in sorted(firsts):
        inside = {key.partition('.')[2]: value for key, value in state.items() if key.startswith(first + '.')}
        if fit(part, inside, pretrained=True):
            return [f'Those that start with {first}. fit: write prefix={first!r} beside checkpoint']
    return []


# ------------------------------------------------------------------------------------------------------------ advice


def _advice(cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[str]:
    fused = is_fused(checkpoint.content)
    names = [] if fused else list(_fitting_norms(cfg, args, checkpoint))
    if names:
        yield f'It would fit {" or ".join(names)}'
    if fused:
        yield 'It is a fused model: give the config, and the --norm if any, that it was exported with'
    yield from _other_tasks(cfg, checkpoint)
    yield from _prefixes(cfg, checkpoint)
    yield from _trained_with(checkpoint)
    classes, ours = checkpoint.classes(), classes_of(cfg)
    if classes and ours and len(classes) != len(ours):
        yield (
            f'It was trained for {len(classes)} classes ({_some(classes)}), the config is for {len(ours)} '
            f'({_some(ours)}): give the config or the --data-root that it was trained with'
        )
    beside = sorted(Path(checkpoint.name).expanduser().parent.glob('*.py')) if '://' not in checkpoint.name else []
    if len(beside) == 1 and not _same(beside[0], args.config):
        yield f'The config in its folder, probably the one that it was trained with: {beside[0]}'


def _other_tasks(cfg: Config, checkpoint: Checkpoint) -> Iterator[str]:
    """That the checkpoint is of a detector and the model a classifier, or the other way, and what it is good for."""
    classifies = is_classifier(cfg.get('model'))
    firsts = {key.partition('.')[0] for key in checkpoint.state_dict}
    start = (
        f"--cfg-options model.backbone.init_cfg=\"dict(type='Pretrained', checkpoint='{checkpoint.name}', "
        "prefix='backbone.')\""
    )
    if classifies and {'neck', 'roi_head', 'rpn_head', 'bbox_head', 'mask_head'} & firsts:
        yield f'It is the checkpoint of a detector, the model an image classifier. To start from its backbone: {start}'
    elif not classifies and firsts == {'backbone', 'head'} and 'head.fc.weight' in checkpoint.state_dict:
        yield f'It is the checkpoint of an image classifier. To start a detector from its backbone: {start}'
    elif classifies and 'backbone' not in firsts and {'fc', 'conv1', 'layer1'} & firsts:
        layouts = [name for name in LAYOUTS if fits_layout(checkpoint.state_dict, name)]
        how = f' --from {layouts[0]}' if layouts else ''
        yield (
            f'Its names are those of a backbone alone, as published files have them: {runnable("convert")} '
            f'{checkpoint.name} NEW.pth{how} --config CONFIG makes it a checkpoint of the classifier'
        )


def _fitting_norms(cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[str]:
    """The options under which the weights fit the model: tried out."""
    plain = cfg.model
    if getattr(args, 'norm', None):
        written = read_config(args.config)
        written.merge_from_dict(getattr(args, 'cfg_options', None) or {})
        plain = written.model
        if _fits(plain, cfg, checkpoint):
            yield f'without --norm {args.norm}'
    for name in PLACEMENTS:
        try:
            model_cfg = apply_norm(copy.deepcopy(plain), name)
        except (KeyError, TypeError, ValueError):
            continue
        if _fits(model_cfg, cfg, checkpoint):
            yield f'with --norm {name}'


def _prefixes(cfg: Config, checkpoint: Checkpoint) -> Iterator[str]:
    """That the weights are there under another name: of a teacher, of a wrapper, of another trainer's ``model``."""
    model = built(cfg.model, cfg.get('default_scope') or 'mmdet')
    for first in sorted({key.partition('.')[0] for key in checkpoint.state_dict})[:5] if model is not None else ():
        inside = {key.partition('.')[2]: v for key, v in checkpoint.state_dict.items() if key.startswith(f'{first}.')}
        if inside and fit(model, inside):
            yield f'Those that start with {first}. fit: save them alone, without it, and name that file'


def _fits(model_cfg: Mapping, cfg: Config, checkpoint: Checkpoint) -> bool:
    model = built(model_cfg, cfg.get('default_scope') or 'mmdet')
    return model is not None and bool(fit(model, checkpoint.state_dict))


def _warn_of_trained(cfg: Config, checkpoint: Checkpoint, split: str) -> None:
    """Say that images are evaluated that the checkpoint was trained on, as with another ``--val-fraction``.

    Only of files that this option wrote: all others are what somebody has chosen, and long to read.
    """
    loader = next((a.value for a in _config_of(checkpoint) if a.targets[0].id == 'train_dataloader'), None)
    try:
        trained = sources(Config(dict(train_dataloader=literal(loader))), ('train',)) if loader is not None else []
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return
    trained = [source for source in trained if HELD_BACK.search(source.ann_file) and os.path.isfile(source.ann_file)]
    for finding in in_both([*trained, *sources(cfg, (split,))]) if trained else ():
        if finding.level == 'warning':
            print(
                f'warning: {checkpoint.name} was trained with another division of the images than --val-fraction '
                f'gives now; {finding}',
                file=sys.stderr,
            )


def _config_of(checkpoint: Checkpoint) -> list[ast.Assign]:
    """What the config that mmengine saves as text assigns: to be looked at, not run."""
    text = checkpoint.meta.get('cfg') or checkpoint.meta.get('config')
    if not isinstance(text, str):
        return []
    try:
        tree = ast.parse(text[: 10**6])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]


def _trained_with(checkpoint: Checkpoint) -> Iterator[str]:
    """The norms in the config that the checkpoint holds."""
    found = {}
    for node in (node for assigned in _config_of(checkpoint) for node in ast.walk(assigned)):
        if isinstance(node, ast.keyword) and node.arg in ('norm_cfg', 'norm_at'):
            for inner in ast.walk(node.value):
                if isinstance(inner, ast.Call):
                    keys = {key.arg: key.value.value for key in inner.keywords if isinstance(key.value, ast.Constant)}
                    if isinstance(keys.get('type'), str):
                        size = f'(kernel_size={keys["kernel_size"]})' if 'kernel_size' in keys else ''
                        found[keys['type'] + size] = None
    if found:
        yield f'The config that it was trained with has the norms {", ".join(found)}'


def classes_of(cfg: Config) -> tuple[str, ...] | None:
    """The names of the classes of a config's data, the test data's first; None if it does not say them."""
    for split in ('test', 'val', 'train'):
        for _, _, entry in image_folders(cfg, split):
            if not problems_of(entry):
                return classes_of_entry(entry)
        loader = cfg.get(f'{split}_dataloader') or {}
        dataset = next(datasets(loader.get('dataset')), None) or {}  # of several, all have the same
        found = metainfo_of(dataset).get('classes')
        if isinstance(found, (list, tuple)):
            return tuple(map(str, found))
    return None


def _some(names: tuple[str, ...]) -> str:
    return ', '.join(names[:4]) + (', ...' if names[4:] else '')


def _same(one: Path, other: str) -> bool:
    return os.path.exists(other) and os.path.samefile(one, other)


# -------------------------------------------------------------------------------------------------------------- runs


def _is_first() -> bool:
    """Whether this process is the one of its machine that looks: the others would only read and download it again."""
    return int(os.environ.get('LOCAL_RANK') or 0) == 0


def _take_in(cfg: Config, args: argparse.Namespace) -> None:
    """Every run has the hook that takes a checkpoint in; hooks that would refuse a part of one take it."""
    _start_hook(cfg)
    for hook in cfg.custom_hooks if args.allow_partial else ():
        if is_a(hook, 'EMAHook', HOOKS):
            hook['strict_load'] = False


def _start_hook(cfg: Config) -> dict:
    """The config's entry of :class:`mmdet_norms.engine.StartHook`."""
    add_hook(cfg, 'StartHook')
    return next(hook for hook in cfg.custom_hooks if is_a(hook, 'StartHook', HOOKS))
