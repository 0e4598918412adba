"""From a published checkpoint to one that mmdet 3.x loads."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..compat.reading import UntrustedCheckpointError, read_file
from ..entries import is_classifier
from ..files import replacing
from ..version import __version__
from .layouts import BOXES, CLASSES, CLASSIFIER_HEAD, COUNTERS, ENTRIES, LAYOUTS, MASKS, WRAPPERS, Layout, Rule
from .report import Report, list_keys
from .verify import Differences, build, find_differences, model_cfg_of, start_absent, unlike_training

_MARK = 'converted_from'


class ConversionError(ValueError):
    """The checkpoint is not what ``source`` and ``config`` say. Nothing was written.

    Attributes:
        left_over: keys without a place: old names where the layout has no rule, new ones where the target lacks them.
        missing: keys of the target that the checkpoint does not supply.
        mismatched: key -> (shape or kind in the checkpoint, in the target).
    """

    def __init__(self, message: str, left_over=(), missing=(), mismatched=None):
        super().__init__(message)
        self.left_over, self.missing, self.mismatched = list(left_over), list(missing), dict(mismatched or {})


@dataclass
class Converted:
    """The result of :func:`convert`.

    Args:
        state_dict: fp32 tensors (counters int64) by their names in mmdet 3.x; of a backbone-only file without
            ``backbone.``, as ``init_cfg=dict(type='Pretrained', checkpoint=...)`` of a backbone wants them.
        report: what was done.
        meta: where the file comes from and, where the source tells them, the classes as mmdet 3.x's ``dataset_meta``.
        path: the source file, if it was one.
    """

    state_dict: dict[str, Tensor]
    report: Report
    meta: dict
    path: Path | None = None

    def save(self, destination: str | os.PathLike, overwrite: bool = False) -> None:
        """Write ``dict(meta, state_dict)``: either the whole file appears under its name, or nothing.

        Raises:
            ValueError: see :func:`check_destination`.
        """
        destination = Path(destination)
        check_destination(destination, self.path, overwrite)
        with replacing(destination) as part, open(part, 'wb') as file:  # by name torch would not tell a full disk
            torch.save(dict(meta=self.meta, state_dict=self.state_dict), file)


def check_destination(
    destination: str | os.PathLike, source: str | os.PathLike | None = None, overwrite: bool = False
) -> None:
    """Refuse to write over what should be kept.

    Raises:
        ValueError: ``destination`` is ``source``, under whatever name; is a folder; is in no folder; or is there
            already and not to be overwritten.
    """
    destination = Path(destination)
    if source is not None and _same_file(source, destination):
        raise ValueError(f'{destination} is the source itself, which stays as it is; choose another name')
    if destination.is_dir():
        raise ValueError(f'{destination} is a folder; give the name of a file')
    if not destination.parent.is_dir():
        raise ValueError(f'there is no folder {destination.parent} to write {destination.name} into')
    if destination.exists() and not overwrite:
        raise ValueError(f'{destination} is there already; pass --force (overwrite=True) to replace it')


def _same_file(one: str | os.PathLike, other: Path) -> bool:
    return os.path.exists(one) and other.exists() and os.path.samefile(one, other)


def convert(
    state_or_path: Mapping | str | os.PathLike, source: str, config=None, *, trust_pickle: bool = False
) -> Converted:
    """Convert a published checkpoint, of a detector or of a backbone pretrained on ImageNet, to mmdet 3.x.

    With the config of an image classifier, an ImageNet file becomes one of that: ``backbone.*`` and ``head.fc.*``.

    In this order:

    1. Unwrap: an entry such as ``state_dict``, and prefixes such as ``module.`` if all keys have them.
    2. Rename by the layout's rules, and drop what they say. A key that no rule names is an error.
    3. Cast to fp32, counters to int64.
    4. Where the background was the first class: ``fc_cls`` rows [1..n, 0]; ``fc_reg`` and ``conv_logits`` lose the
       background's rows, unless they are class-agnostic. The RPN has no classes.
    5. Fold the bias of the stem's convolution, which mmdet's ResNet lacks, into the batch norm behind it:
       BN(conv(x) + b) is BN(conv(x)) with ``running_mean - b``.
    6. Reshape MABN's ``running_var`` to (1, C, 1, 1).
    7. With ``config``: give the buffers that published files lack their layer's initial values, and compare with the
       target. Keys, shapes and kinds (floating point or integer) must be the same, no more and no less.

    Whether a file is a detector or a backbone is seen from its keys; a backbone is compared with
    ``config.model.backbone``. mmdet's own ``upgrade_model_version`` is not used: it keeps the wrong classes of biases.

    Args:
        state_or_path: the file, or what ``torch.load`` gives for it. Not changed.
        source: a key of :data:`LAYOUTS`: 'bnet', 'cbn', 'mabn', 'an' or 'aognet'.
        config: the target: a config, its file or name (``mmdet::...``), or a model dict. None: no comparison.
        trust_pickle: whether the file may run code while it is read. Default False: only tensors and plain data are
            read, and a file that holds more is refused. Set it only for a file that you would run as a program.

    Returns:
        The new state dict and the report; ``.save(path)`` writes it.

    Raises:
        ConversionError: keys are left over or missing, or shapes differ; the message lists them.
        UntrustedCheckpointError: the file holds more than tensors and plain data.
        ValueError: the file is no checkpoint, ``source`` is unknown, or the config's model cannot be built.
        FileNotFoundError: no such file.
    """
    if source not in LAYOUTS:
        raise ValueError(f'source={source!r} is no published layout; choose one of: {", ".join(LAYOUTS)}')
    layout, report, path, content = LAYOUTS[source], Report(source), None, state_or_path
    model_cfg = None if config is None else model_cfg_of(config)
    if not isinstance(content, Mapping):
        path = Path(content)
        content = _read(path, trust_pickle)
    old, meta = _unwrap(content, report)
    classifier = model_cfg is not None and is_classifier(model_cfg)
    state = _rename(_without_prefixes(old, report), source, report, classifier)
    _cast(state, report)
    if layout.background_first:
        _move_background(state, report)
    _fold_stem_bias(state, report)
    if layout.second_moment:
        _reshape_second_moments(state, report)
    if model_cfg is not None:
        _fit(state, layout, model_cfg, report)
    _conclude(state, layout, report)
    meta = {**_classes(meta), _MARK: source, 'mmdet_norms_version': __version__}
    # Copies: a view would take the whole storage it looks into along to the file.
    return Converted({key: tensor.detach().clone().contiguous() for key, tensor in state.items()}, report, meta, path)


# --------------------------------------------------------------------------------------------------------- 1 unwrap


def _read(path: Path, trust_pickle: bool) -> object:
    try:
        return read_file(path, trust_pickle=trust_pickle)
    except UntrustedCheckpointError as error:
        raise UntrustedCheckpointError(
            f'{error} Or read it with trust_pickle=True (--trust-pickle on the command line): the file may then do on '
            'this machine whatever you may.'
        ) from error


def _unwrap(content, report: Report) -> tuple[dict[str, Tensor], Mapping]:
    """The state dict in what a file holds, and its meta entry."""
    meta = content.get('meta') if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    if _MARK in meta:
        raise ConversionError(
            f'this checkpoint was converted before, from {meta[_MARK]!r}; a second time would move its classes again'
        )
    if isinstance(content, Mapping):
        entry = next((name for name in ENTRIES if isinstance(content.get(name), Mapping)), None)
        if entry is not None:
            report.unwrapped.append(f'entry {entry!r}')
            report.dropped.update({f'entry {name!r}': 'not part of the model' for name in content if name != entry})
            if _classes(meta):
                report.dropped["entry 'meta'"] += ', but for the names of its classes'
            content = content[entry]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(
            f'no state dict found: a checkpoint is a dict of tensors, or has one under '
            f'{", ".join(map(repr, ENTRIES))}; this is {_outline(content)}'
        )
    strange = [key for key, value in content.items() if not (isinstance(value, Tensor) and isinstance(key, str))]
    if strange:
        listed = ', '.join(f'{key!r} ({type(content[key]).__name__})' for key in strange)
        raise ConversionError(f'the state dict holds what is no tensor with a name: {listed}', strange)
    return dict(content), meta


def _outline(content) -> str:
    if not isinstance(content, Mapping):
        return f'a {type(content).__name__}'
    entries = ', '.join(f'{key} ({type(value).__name__})' for key, value in list(content.items())[:8])
    return f'a dict with {entries or "no entries"}'


def _without_prefixes(state: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    while True:
        prefix = next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            return state
        report.unwrapped.append(f'prefix {prefix!r}')
        state = {key[len(prefix) :]: tensor for key, tensor in state.items()}


def _classes(meta: Mapping) -> dict:
    """What mmdet 3.x asks a checkpoint for: the names of its classes, which mmdet 1.x and 2.x save as CLASSES."""
    classes = meta.get('CLASSES')
    if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        return dict(dataset_meta=dict(classes=tuple(classes)))
    return {}


# --------------------------------------------------------------------------------------------------------- 2 rename


def fits_layout(state: Mapping[str, Tensor], source: str) -> bool:
    """Whether every key of a published state dict, without prefixes of wrappers, has a place in a layout."""
    return len(_look_up(state, LAYOUTS[source], False)[1]) == len(state)


def _rename(old: dict[str, Tensor], source: str, report: Report, classifier: bool) -> dict[str, Tensor]:
    report.kind, found = _look_up(old, LAYOUTS[source], classifier)
    left_over = [key for key in old if key not in found]
    if left_over:
        fitting = [name for name in LAYOUTS if fits_layout(old, name)]
        hint = f'they would fit --from {" or ".join(fitting)}' if fitting else 'no other layout fits either'
        raise ConversionError(
            f'{len(left_over)} of {len(old)} keys have no place in the layout {source!r} ({LAYOUTS[source].title}); '
            f'{hint}:\n{list_keys(left_over)}',
            left_over,
        )
    state: dict[str, Tensor] = {}
    for key, (new, rule) in found.items():
        if new is None:
            report.dropped[key] = rule.why
            continue
        if new in state:
            raise ConversionError(f'two tensors of the checkpoint would be called {new}; one of them is {key}', [key])
        state[new] = old[key]
        if new != key:
            report.renamed[key] = new
    return state


def _look_up(
    old: Mapping[str, Tensor], layout: Layout, classifier: bool
) -> tuple[str, dict[str, tuple[str | None, Rule]]]:
    """'detector', 'backbone' or 'classifier', and for each key that a rule names its new name (None: dropped) and the
    rule.
    """
    heads = {key: hit for key in old if (hit := _first_rule(layout.heads, key, old))}
    prefix, new_prefix = layout.backbone_prefix, 'backbone.'
    if not heads:
        new_prefix = 'backbone.' if classifier else ''
        if not all(key.startswith(prefix) for key in old):
            prefix = ''
    inside = {key[len(prefix) :]: key for key in old if key.startswith(prefix)}
    found = {}
    for key in old:
        if key in heads:
            found[key] = heads[key]
        elif key.startswith(prefix):
            name = key[len(prefix) :]
            hit = _first_rule(layout.backbone, name, inside)
            last = _first_rule((CLASSIFIER_HEAD,), name, inside) if classifier and not heads else None
            if last is not None:
                found[key] = last
            elif hit is not None:
                found[key] = (None if hit[0] is None else new_prefix + hit[0], hit[1])
    return ('detector' if heads else 'classifier' if classifier else 'backbone'), found


def _first_rule(rules: tuple[Rule, ...], key: str, keys) -> tuple[str | None, Rule] | None:
    for rule in rules:
        match = re.fullmatch(rule.old, key)
        if match and (rule.beside is None or match.expand(rule.beside) in keys):
            return (None if rule.new is None else match.expand(rule.new)), rule
    return None


# --------------------------------------------------------------------------------------------------------- 3-6 values


def _cast(state: dict[str, Tensor], report: Report) -> None:
    for key, tensor in state.items():
        wanted = tensor.dtype
        if key.rpartition('.')[2] in COUNTERS:
            wanted = torch.int64
        elif tensor.is_floating_point():
            wanted = torch.float32
        if wanted != tensor.dtype:
            state[key] = tensor.to(wanted)
            report.cast[key] = f'{tensor.dtype} to {wanted}'.replace('torch.', '')


def _move_background(state: dict[str, Tensor], report: Report) -> None:
    counts = {len(tensor) for key, tensor in state.items() if re.fullmatch(CLASSES, key)}
    if len(counts) > 1:
        raise ConversionError(f'the heads have different numbers of classes: {sorted(counts)} rows of fc_cls')
    rows = next(iter(counts), 0)
    for pattern, width in ((CLASSES, 1), (BOXES, 4), (MASKS, 1)):
        for key in [key for key in state if re.fullmatch(pattern, key)]:
            tensor = state[key]
            if pattern is not CLASSES and len(tensor) == width:
                report.notes.append(f'{key} is class-agnostic: it has no row for the background')
                continue
            if len(tensor) != width * rows or rows < 2:
                raise ConversionError(
                    f'{key} has {len(tensor)} rows, which is neither {width} for each of the {rows} rows of fc_cls '
                    f'(background and classes) nor {width} in all',
                    [key],
                )
            background, others = tensor[:width], tensor[width:]
            if pattern is CLASSES:
                state[key] = torch.cat([others, background])
                report.reordered[key] = f'rows [1..{rows - 1}, 0]: the background is the last of {rows}'
            else:
                state[key] = others
                report.reordered[key] = f'rows {width}..{len(tensor) - 1}: without the background'


def _fold_stem_bias(state: dict[str, Tensor], report: Report) -> None:
    for prefix in ('', 'backbone.'):
        bias, mean = f'{prefix}conv1.bias', f'{prefix}bn1.running_mean'
        if bias in state and mean in state:
            state[mean] = (state[mean].double() - state.pop(bias).double()).float()
            report.folded[mean] = f'{bias} subtracted, the same function: the stem in mmdet has no bias'


def _reshape_second_moments(state: dict[str, Tensor], report: Report) -> None:
    for key, tensor in state.items():
        owner, _, name = key.rpartition('.')
        if name == 'running_var' and f'{owner}.running_mean' not in state and tensor.dim() == 1:
            state[key] = tensor.view(1, -1, 1, 1)
            report.reshaped[key] = '(C,) to (1, C, 1, 1)'


# --------------------------------------------------------------------------------------------------------- 7 target


def _fit(state: dict[str, Tensor], layout: Layout, model_cfg: Mapping, report: Report) -> None:
    """Supply what no published file has, then compare."""
    model = build(model_cfg, report.kind)
    expected = model.state_dict()
    report.initialised = start_absent(state, expected, report.kind)
    differences = find_differences(state, expected)
    if differences:
        raise ConversionError(_explain(differences, report), *differences)
    report.verified = True
    if report.kind != 'backbone':
        layout = layout if report.kind == 'detector' else replace(layout, expects={})
        report.warnings += unlike_training(model, model_cfg, layout)


def _explain(differences: Differences, report: Report) -> str:
    part = 'model.backbone' if report.kind == 'backbone' else 'model'
    old = {new: f' (was {old})' for old, new in report.renamed.items()}
    lines = [f'the checkpoint, a {report.kind} in the layout {report.source!r}, does not fit {part} of the config']
    if differences.missing:
        lines += [f'{len(differences.missing)} missing in the checkpoint:', list_keys(differences.missing)]
    if differences.left_over:
        lines += [f'{len(differences.left_over)} left over:', list_keys(differences.left_over, old)]
    if differences.mismatched:
        remarks = {
            key: f'{old.get(key, "")}: {have} in the checkpoint, {want} in the config'
            for key, (have, want) in differences.mismatched.items()
        }
        lines += [f'{len(remarks)} of another shape or kind:', list_keys(remarks, remarks)]
    return '\n'.join(lines)


def _conclude(state: dict[str, Tensor], layout: Layout, report: Report) -> None:
    """Count what is left, and say what one should know."""
    changed = {*report.renamed.values(), *report.cast, *report.reordered, *report.folded, *report.reshaped}
    report.unchanged = sum(key not in changed and key not in report.initialised for key in state)
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        report.warnings.append(f'{len(broken)} tensors hold inf or nan:\n{list_keys(broken)}')
    if report.kind == 'detector' and layout.convention:
        report.geometry = layout.convention
        report.notes.append(
            f'trained in the box convention of {layout.convention}: evaluate it with --geometry {layout.convention} '
            '(docs/legacy-geometry.md)'
        )
