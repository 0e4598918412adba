"""``--cfg-options``: changes of a config that are checked, because one that nothing reads is a silent mistake.

A key must be in the config, or be an argument of the class that its entry names, or something that mmengine's runner
reads; ``--cfg-options-new`` adds whatever it is given.
"""

import argparse
import ast
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mmdet.registry as registries
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import init_dist
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, LogProcessor, Runner, TestLoop, ValLoop
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from mmdet_norms.commands import several
from mmdet_norms.entries import class_of, parameter_of
from mmdet_norms.errors import UserError
from mmdet_norms.layers import GhostBN

_REGISTRIES = tuple(value for value in vars(registries).values() if isinstance(value, Registry))

# What the runner reads from a config besides its own arguments.
_OF_THE_RUN = (
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'tta_model',
)
# What the config holds is not what counts.
_BY_OPTION = {'launcher': '--launcher NAME', 'data_root': '--data-root DIR'}
_DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Of an entry, beside the arguments of its class.
_OF_ANY_ENTRY = {'type', '_scope_', '_delete_'}
# What builders and the runner take out of an entry before its class is called.
_OF_BUILDERS = {'priority', 'convert_to_iter_based', 'requires_grad', 'constructor', 'paramwise_cfg'}
# Dicts whose keys are the user's.
_FREE = ('custom_keys', 'norm_at', 'metainfo', 'data_prefix', 'compile', 'strategy', 'model_wrapper_cfg', 'tta_model')
# What is read of two of them: a slip of the finger is none of the user's keys.
_KNOWN = {'metainfo': ('classes', 'palette'), 'data_prefix': ('img', 'seg')}
# What mmdet 2 called it, or other tools do.
_ELSEWHERE = {
    'seed': 'randomness.seed',
    'deterministic': 'randomness.deterministic',
    'data': 'train_dataloader, val_dataloader or test_dataloader',
    'total_epochs': 'train_cfg.max_epochs',
    'optimizer_config': 'optim_wrapper',
    'lr_config': 'param_scheduler',
    'momentum_config': 'param_scheduler',
    'runner': 'train_cfg',
    'evaluation': 'train_cfg.val_interval or val_evaluator',
    'fp16': '--amp',
    'resume_from': '--resume CKPT',
    'gpu_ids': several('train', 'CONFIG'),
    'gpus': several('train', 'CONFIG'),
    'log_config': 'default_hooks.logger',
    'checkpoint_config': 'default_hooks.checkpoint',
}
_BLANK = '\ue000'  # stands for a blank within a word while mmengine takes out the others
# Dicts that are nothing without a type.
_TYPED = ('norm_cfg', 'conv_cfg', 'act_cfg', 'init_cfg', 'visualizer', 'default_hooks.*', '*_evaluator')


class Options(DictAction):
    """Reads ``KEY=VALUE ...`` as mmengine does, and Python's dicts as well; a slip is an error of the command line."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Parse the values of one ``--cfg-options``."""
        options = dict(getattr(namespace, self.dest, None) or {})
        for text in values:
            key, equals, value = text.partition('=')
            if not equals or not all(key.split('.')):
                parser.error(f'argument {option_string}: {text!r} must be KEY=VALUE, such as train_cfg.max_epochs=1')
            try:
                options[key] = self._value(value.strip(), parser)
                setattr(namespace, self.dest, options)
            except (AssertionError, RecursionError, SyntaxError, TypeError, ValueError):
                parser.error(
                    f'argument {option_string}: the value of {text!r} has brackets or quotes that do not match'
                )

    def _value(self, text: str, parser: argparse.ArgumentParser) -> Any:
        """Lists, tuples and dicts as Python writes them, with ``dict(...)`` as well; all else as mmengine reads it.

        mmengine knows no dicts, splits at commas within quotes, and takes out the blanks of "traffic light".
        """
        if text.startswith(('[', '(', '{', 'dict(')):
            try:
                return literal(ast.parse(text, mode='eval').body)
            except (SyntaxError, ValueError):  # [bbox, segm], without quotes, is no Python
                if '{' in text or 'dict(' in text:
                    raise
        between = r'(?<=[^ "\']) +(?=[^ "\'])' if _is_one_word(text) else r'(?<=[^ ,()\[\]]) +(?=[^ ,()\[\]])'
        kept = re.sub(between, lambda blanks: _BLANK * len(blanks[0]), text)
        read = argparse.Namespace(**{self.dest: {}})
        super().__call__(parser, read, [f'value={kept}'])
        return _with_blanks(getattr(read, self.dest)['value'])


def _is_one_word(text: str) -> bool:
    """Whether mmengine reads it as one value, such as the file ``epoch (1).pth``."""
    return ',' not in text and not text.strip('\'"').startswith(('[', '('))


def literal(node: ast.expr) -> Any:
    """The value that an expression of a config writes down, without running it; ValueError where it is more."""
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: literal(keyword.value) for keyword in keywords}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {literal(key): literal(value) for key, value in zip(keys, values)}
        case ast.List(elts=elements):
            return [literal(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(literal(element) for element in elements)
        case ast.Set():
            raise ValueError('a set is no value of a config')
        case _:
            return ast.literal_eval(node)


def _with_blanks(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_blanks, value))
    return value.replace(_BLANK, ' ') if isinstance(value, str) else value


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options`` and ``--cfg-options-new``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help='change values of the config, e.g. train_cfg.max_epochs=1 key="[(a,b),(c,d)]" '
        "model.neck.norm_cfg=\"{'type': 'GN', 'num_groups': 16}\" (in place of the old dict); a key that neither the "
        'config has nor its class takes is an error',
    )
    parser.add_argument(
        '--cfg-options-new', nargs='+', action=Options, metavar='KEY=VALUE', help='the same for keys to add, unchecked'
    )


def given_options(args: argparse.Namespace) -> dict:
    """What both options say: key -> value."""
    return {**(getattr(args, 'cfg_options_new', None) or {}), **(args.cfg_options or {})}


def merge_options(cfg: Config, args: argparse.Namespace, leave: Callable[[str], bool] = lambda key: False) -> None:
    """Change ``cfg`` as the two options say, but for keys that ``leave`` is true for.

    Raises:
        UserError: a key that nothing reads, with the nearest one; or a value where there cannot be one.
    """
    if getattr(args, 'work_dir', None) is not None and 'work_dir' in (args.cfg_options or {}):
        raise UserError('--cfg-options work_dir: --work-dir is given as well, and decides; leave one of them out')
    for options, is_new in ((args.cfg_options, False), (getattr(args, 'cfg_options_new', None), True)):
        options = {key: value for key, value in (options or {}).items() if not leave(key)}
        for key in options:
            _check(cfg, key, options, is_new)
        for key, value in sorted(options.items(), key=lambda item: not item[0].endswith('_delete_')):
            _set(cfg, key.split('.'), value)


def _set(node: Any, parts: list[str], value: Any) -> None:
    """As mmengine merges, but that an entry of a list may be a number, and a dict replaces what was there."""
    for part in parts[:-1]:
        part = int(part) if isinstance(node, list) else part
        if not isinstance(node, list) and node.get(part) is None:
            node[part] = ConfigDict()
        node = node[part]
    if parts[-1] == '_delete_':
        if value:
            node.clear()
    elif isinstance(node, list):
        node[int(parts[-1])] = ConfigDict(value) if isinstance(value, dict) else value
    else:
        node[parts[-1]] = value


def _check(cfg: Config, key: str, options: Mapping, is_new: bool) -> None:
    option = '--cfg-options-new' if is_new else '--cfg-options'
    parts, node, parent = key.split('.'), cfg, None
    for depth, part in enumerate(parts):
        parent = node
        path, whole = parts[:depth], '.'.join(parts[:depth])
        if isinstance(node, (list, tuple)):
            _check_index(f'{option} {key}', whole, node, part, parts[depth + 1 :])
            node = node[int(part)]
        elif node is not None and not isinstance(node, (dict, Config)):
            raise UserError(f'{option} {key}: {whole} is {node!r} in the config, which has no keys')
        else:
            if not is_new:
                _check_key(cfg, key, path, node or {}, part, options)
            node = (node or {}).get(part)
    if not is_new:
        _check_value(key, node if node is not None else _default(parent, parts[-1]), options[key])
    entries = options[key] if isinstance(options[key], list) else [options[key]]
    if isinstance(node, dict) and not all(isinstance(entry, (dict, type(None))) for entry in entries):
        keys = ', '.join(f'{key}.{name}' for name in list(node)[:3])
        raise UserError(f'{option} {key}={options[key]}: {key} is a dict in the config; set its keys ({keys}, ...)')


def _check_value(key: str, old: Any, value: Any) -> None:
    """Raise for a word in place of a number or a truth value, as a slip of the finger makes it: 'fasle' is true."""
    if not isinstance(value, str) or not isinstance(old, (bool, int, float)) or re.fullmatch(r'\d+(\.\d+)?e', value):
        return  # '8e', in epochs
    kind = 'True or False' if isinstance(old, bool) else 'a number'
    raise UserError(
        f'--cfg-options {key}={value}: must be {kind}, as {old!r} is, which it replaces. If the word is meant: '
        f'--cfg-options-new {key}={value}'
    )


def _default(parent: Any, part: str) -> Any:
    """Of an argument that the config leaves out."""
    if not isinstance(parent, dict) or parent.get('type') is None:
        return None
    found = (parameter_of(cls, part) for cls in _classes(parent['type']))
    return next((parameter.default for parameter in found if parameter is not None), None)


def _check_index(option: str, whole: str, node: Sequence, part: str, rest: list[str]) -> None:
    if isinstance(node, tuple):
        raise UserError(f'{option}: {whole} is the tuple {node!r}; set it as a whole, {whole}="(...)"')
    if part.isdigit() and int(part) < len(node):
        return
    if not node:
        raise UserError(f'{option}: {whole} is an empty list in the config; set it as a whole, {whole}="[...]"')
    if part.removeprefix('-').isdigit():
        raise UserError(
            f'{option}: {whole} is a list of {len(node)} in the config, with the entries 0 to {len(node) - 1}'
        )
    each = ' '.join(f'{whole}.{i}.{".".join([part, *rest])}=...' for i in range(min(len(node), 3)))
    more = '' if len(node) <= 3 else ' ...'
    raise UserError(
        f'{option}: {whole} is a list of {len(node)} in the config; name each entry by its index: {each}{more}'
    )


def _check_key(cfg: Config, key: str, path: list[str], node: Mapping, part: str, options: Mapping) -> None:
    whole = '.'.join(path)
    if any(name in _FREE for name in path):
        return _check_free_key(key, path[-1], node, part)
    if not path:
        return _check_top(cfg, key, part)
    if part in node or part in _OF_ANY_ENTRY or f'{whole}._delete_' in options:
        return None
    kind = options.get(f'{whole}.type', node.get('type'))
    taken = _taken_by_class(kind) if kind is not None else _taken_at(path, node)
    if part in taken or (kind is not None and not _classes(kind)):
        return None
    if whole == 'default_hooks' and (isinstance(options[key], dict) or f'{whole}.{part}.type' in options):
        return None
    if (
        not node and not taken and _taken(cfg, path)
    ):  # an argument that the config leaves to its default: a dict of who knows what
        if kind is None and any(_matches(whole, pattern) for pattern in _TYPED):
            raise UserError(
                f'--cfg-options {key}: the config has no {whole}, so that its type is missing; set {whole}.type as well'
            )
        return None
    raise UserError(_unknown(cfg, key, whole, part, [*node, *sorted(taken)], kind))


def _check_free_key(key: str, where: str, node: Mapping, part: str) -> None:
    """Of the user's own keys, those that are all but one that is read."""
    known = _KNOWN.get(where, ())
    near = difflib.get_close_matches(part.lower(), known, 1, cutoff=0.6)
    if near and part not in (*node, *known):
        written = f'{key.removesuffix(part)}{near[0]}'
        raise UserError(
            f'--cfg-options {key}: nothing reads {part!r}; did you mean {written}? '
            f'To add it nevertheless: --cfg-options-new {key}=...'
        )


def _check_top(cfg: Config, key: str, part: str) -> None:
    read = _read_by_runner(cfg)
    if part in _BY_OPTION:
        raise UserError(f'--cfg-options {key}: this key changes nothing; give {_BY_OPTION[part]}')
    if part in read:
        return
    if part not in cfg:
        raise UserError(_unknown(cfg, key, '', part, [name for name in cfg if name in read] + sorted(read), None))
    used = [name for name, value in _flat(cfg) if name.partition('.')[0] in read and value == cfg[part]][:3]
    where = f'; its value is in {", ".join(used)}' if used else ''
    raise UserError(
        f'--cfg-options {key}: {part} is a variable that the config file has used up, and nothing reads it any more'
        f'{where}. Set what it was used for, or write it into a config file with _base_'
    )


def _unknown(cfg: Config, key: str, whole: str, part: str, beside: list[str], kind: Any) -> str:
    """The error text, with the nearest key: one beside it, then one of the same name, then one of a similar path."""
    prefix = f'{whole}.' if whole else ''
    rest = key[len(prefix) + len(part) :]
    read = _read_by_runner(cfg)
    everywhere = [
        name for name, _ in _flat(cfg) if name.partition('.')[0] in read and not name.endswith(('.type', '._scope_'))
    ]
    tail = f'.{key.rpartition(".")[2]}'
    near = [f'{prefix}{name}{rest}' for name in difflib.get_close_matches(part, beside, n=1, cutoff=0.75)]
    # of lr, the outermost ones; of bbox_head.num_classes, those whose path is the most alike
    same = [name for name in everywhere if name.endswith(tail)]
    near += sorted(same, key=lambda name: -_alike(name, key) if '.' in key else name.count('.'))[:2]
    near += difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6)
    if not whole and part in _ELSEWHERE:
        near = [_ELSEWHERE[part]]
    hint = f'; did you mean {" or ".join(list(dict.fromkeys(near))[:2])}?' if near else '.'
    what = f'{prefix}{part}'
    who = f', and {getattr(kind, "__name__", kind)} takes no {part!r}' if kind is not None else ''
    return (
        f'--cfg-options {key}: the config has no {what}{who}, so that nothing would read it{hint} '
        f'To add it nevertheless: --cfg-options-new {key}=...'
    )


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _taken(cfg: Config, path: list[str]) -> bool:
    """Whether the entry at ``path`` is one that its host takes."""
    node = cfg
    for part in path[:-1]:
        node = node[int(part)] if isinstance(node, (list, tuple)) else (node or {}).get(part)
    if len(path) == 1:
        return path[0] in _read_by_runner(cfg) and not _taken_at(path, {})
    node = node or {}
    kind = node.get('type')
    taken = _taken_by_class(kind) if kind is not None else _taken_at(path[:-1], node)
    return path[-1] in taken or _matches('.'.join(path), 'default_hooks.*')


def _matches(path: str, pattern: str) -> bool:
    if '.' in pattern:  # default_hooks.*
        return path.startswith(pattern[:-1]) and '.' not in path[len(pattern) - 1 :]
    last = path.rpartition('.')[2]
    return last.endswith(pattern[1:]) if pattern.startswith('*') else last == pattern


@functools.cache
def _arguments(function: Callable) -> frozenset[str]:
    """Names that a function or class takes; of a class whose ``**kwargs`` go to its base, the base's as well."""
    names: set[str] = set()
    inits = (cls for cls in getattr(function, '__mro__', ()) if '__init__' in vars(cls) and cls is not object)
    for init in (cls.__init__ for cls in inits) if inspect.isclass(function) else [function]:
        parameters = inspect.signature(init).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names - {'self'})


def _classes(kind: Any) -> list[Callable]:
    """What a type may mean in any registry: the place in the config does not tell which one will be asked."""
    found = [class_of(kind, registry) for registry in _REGISTRIES]
    if isinstance(kind, str) and nn.BatchNorm2d in found:
        found.append(GhostBN)  # what the name is with a norm_batch: see registry.py
    return list(dict.fromkeys(cls for cls in found if cls is not None))


def _taken_by_class(kind: Any) -> set[str]:
    return _OF_BUILDERS.union(*(_arguments(cls) for cls in _classes(kind)))


def _taken_at(path: list[str], node: Mapping) -> set[str]:
    """Keys of a dict without a type, for those that mmengine reads."""
    match path:
        case [name] if name in _DATALOADERS:
            return {'dataset', 'num_batch_per_epoch', *_arguments(DataLoader)}
        case ['train_cfg']:
            loops = (EpochBasedTrainLoop,) if node.get('by_epoch') else (IterBasedTrainLoop, EpochBasedTrainLoop)
            loops = (IterBasedTrainLoop,) if node.get('by_epoch') is False else loops
            return {'by_epoch'}.union(*map(_arguments, loops))
        case ['val_cfg']:
            return set(_arguments(ValLoop))
        case ['test_cfg']:
            return set(_arguments(TestLoop))
        case ['optim_wrapper']:
            return {'constructor', 'paramwise_cfg', 'optimizer', *_arguments(OptimWrapper)}
        case ['optim_wrapper', 'paramwise_cfg']:
            return set(_PARAMWISE)
        case ['optim_wrapper', 'clip_grad']:
            return {'type', 'clip_value', *_arguments(clip_grad_norm_)}
        case ['log_processor']:
            return set(_arguments(LogProcessor))
        case ['randomness']:
            return set(_arguments(Runner.set_randomness))
        case ['env_cfg']:
            return {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'}
        case ['env_cfg', 'mp_cfg']:
            return set(_arguments(set_multi_processing))
        case ['env_cfg', 'dist_cfg']:
            return {'timeout', 'init_method', *_arguments(init_dist)}
        case ['auto_scale_lr']:
            return {'enable', 'base_batch_size'}
        case ['custom_imports']:
            return {'imports', 'allow_failed_imports'}
    return set()


_PARAMWISE = (
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
    'num_layers',
    'decay_rate',
    'decay_type',
)


def _read_by_runner(cfg: Config) -> set[str]:
    runner = class_of(cfg.get('runner_type'), registries.RUNNERS) or Runner
    return {*_OF_THE_RUN, *_arguments(Runner), *_arguments(runner)} - {'cfg'}


def _flat(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Every key of a config by its path, and its value."""
    items = node.items() if isinstance(node, (dict, Config)) else enumerate(node)
    for key, value in items:
        name = f'{path}.{key}' if path else str(key)
        yield name, value
        if isinstance(value, (dict, list)):
            yield from _flat(value, name)
