"""Going on from what is there: the newest checkpoint that can be read, and the validation that it was saved before."""

import os
import re
import string
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from ..compat.reading import keep, read_file
from ..deploy import is_fused
from ..errors import UserError
from .course import end_of, position, validates_after

LAST = 'last_checkpoint'
_TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')
_VALIDATED = 'validated'


@HOOKS.register_module()
class PendingValidationHook(Hook):
    """On resuming, first the validation that the checkpoint was saved before; and a word if nothing is left to train.

    A checkpoint is written before the validation of its epoch or iteration. A run that is killed between the two and
    goes on with the next epoch would never know that this was the best one, and schedulers that wait for a metric
    would miss a step.
    """

    priority = 'LOWEST'  # when all others are ready to train

    def before_val_epoch(self, runner: Runner) -> None:
        """Note what is validated; whoever saves after it has it."""
        if isinstance(runner._train_loop, BaseLoop):  # asking for runner.train_loop would build it
            runner.message_hub.update_info(_VALIDATED, position(runner._train_loop))

    def before_train(self, runner: Runner) -> None:
        """Validate if that is due and was not done."""
        loop = runner.train_loop
        key, end = end_of(loop)
        if loop.iter > 0 and end is not None and position(loop) >= end:
            start = runner._load_from or 'the checkpoint'
            runner.logger.warning(
                f'Nothing is left to train: {start} is at epoch {loop.epoch}, iteration {loop.iter}, and '
                f'train_cfg.{key} is {end}; to train longer, raise it: --cfg-options train_cfg.{key}=N'
            )
        if loop.iter == 0 or runner.val_loop is None or not validates_after(loop, position(loop)):
            return
        if runner.message_hub.runtime_info.get(_VALIDATED) != position(loop):
            runner.logger.info('Validation first: the checkpoint was saved before it.')
            runner.val_loop.run()


@dataclass(frozen=True)
class Newest:
    """The checkpoint to go on from.

    Args:
        path: None where there is none at all.
        epoch, iter: how far it is.
        notes: why it is this one, if that is not the one which was saved last.
    """

    path: Path | None
    epoch: int = 0
    iter: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a run puts its checkpoints, and what they are called.

    Args:
        work_dir: where ``last_checkpoint`` lies.
        folder: where the checkpoints lie.
        templates: their names with ``{}`` for the number.
    """

    work_dir: Path
    folder: Path
    templates: tuple[str, ...] = _TEMPLATES

    @classmethod
    def of(cls, cfg: Config) -> 'CheckpointFolder':
        """As the checkpoint hook of ``cfg`` has it."""
        hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        work_dir, folder = Path(cfg.work_dir), Path(cfg.work_dir)
        if hook.get('out_dir') and hook['out_dir'] != os.path.abspath(cfg.work_dir):  # as the hook compares them
            folder = Path(hook['out_dir']) / os.path.basename(os.path.abspath(cfg.work_dir))
        own = hook.get('filename_tmpl')
        try:
            (own or '{}').format(1)
        except (LookupError, ValueError) as error:
            raise UserError(
                f"default_hooks.checkpoint.filename_tmpl={own!r} must have one {{}} for the number, as 'epoch_{{}}.pth'"
            ) from error
        return cls(work_dir, folder, (own, *_TEMPLATES) if own else _TEMPLATES)

    def numbered(self) -> dict[Path, tuple[str, int]]:
        """The checkpoints of epochs and iterations: path -> (template, number)."""
        return {path: key for path in _files(self.folder) if (key := self._number(path.name)) is not None}

    def all(self) -> list[Path]:
        """Everything that a run made of weights here: of epochs and iterations, best ones, published ones."""
        numbers = '|'.join(_pattern(name.removesuffix('.pth')) for name in self.templates)
        made = re.compile(rf'(best_.+_)?({numbers})(-[0-9a-f]{{8}})?(\.pth)?')
        last = self._last([])  # the run may have named its checkpoints in another way
        return [path for path in _files(self.folder) if made.fullmatch(path.name) or path == last]

    def has(self, path: str) -> bool:
        """Whether a checkpoint lies where this run puts its own."""
        places = {os.path.realpath(self.folder), os.path.realpath(self.work_dir)}
        return os.path.dirname(os.path.realpath(os.path.expanduser(path))) in places

    def newest(self) -> Newest:
        """The newest checkpoint that can be read.

        That is what ``last_checkpoint`` names, unless a newer one is there (the run was killed before it could be
        named), or it is damaged or gone. A work dir that was moved or copied has its own before those of the old place.

        Raises:
            UserError: there are some, and none can be read; or the one that is named is gone, and there is no other.
        """
        notes, numbered = [], self.numbered()
        last = self._last(notes)
        if last is not None and '://' in str(last):
            return Newest(Path(last), notes=notes)
        for path in self._order(last, numbered):
            try:
                epoch, iteration = _progress(path)
            except (OSError, ValueError) as error:
                notes.append(f'{path} is not used: {error}')
                continue
            if notes or (last is not None and path != last):
                notes.append(f'going on from {path} (epoch {epoch}, iteration {iteration})')
            return Newest(path, epoch, iteration, notes)
        if notes and (numbered or last is not None or 'which is not there' in notes[0]):
            raise UserError(
                f'--resume: {self.work_dir} has no checkpoint that can be read:\n  '
                + '\n  '.join(notes)
                + '\nname one with --resume CKPT, or start from the beginning with --overwrite in place of --resume'
            )
        return Newest(None, notes=notes)

    def _number(self, name: str) -> tuple[str, int] | None:
        for template in self.templates:
            found = re.fullmatch(_pattern(template), name)
            if found is not None and found.groups():
                return template, int(found[1])
        return None

    def _last(self, notes: list[str]) -> Path | str | None:
        """What ``last_checkpoint`` names: in the folder of this run, or else where it says."""
        try:
            name = (self.work_dir / LAST).read_text(encoding='utf-8').strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            notes.append(f'{self.work_dir / LAST} cannot be read: {error}')
            return None
        if not name:
            notes.append(f'{self.work_dir / LAST} is empty')
            return None
        if '://' in name:
            return name
        for path in (self.folder / Path(name).name, Path(name)):
            if os.path.isfile(path):  # unlike Path.is_file, no error at a name that no file can have
                return path
        notes.append(f'{self.work_dir / LAST} names {name[:200]!r}, which is not there')
        return None

    def _order(self, last: Path | None, numbered: dict[Path, tuple[str, int]]) -> list[Path]:
        """The most promising first. Numbers alone would not do: a run may have been taken back to an earlier one."""
        times = {path: path.stat().st_mtime_ns for path in numbered}
        kinds = {kind for kind, _ in numbered.values()}

        def by_age(path: Path) -> tuple:  # numbers where they compare: a copy has the times of copying
            return (0 if len(kinds) > 1 else numbered[path][1], times[path])

        paths = sorted(numbered, key=by_age, reverse=True)
        if last is None:
            return paths
        if last not in numbered:
            return [last, *paths]
        kind, number = numbered[last]
        later = [p for p in paths if numbered[p][0] == kind and numbered[p][1] > number and times[p] > times[last]]
        earlier = [p for p in paths if p not in later and (numbered[p][0] != kind or numbered[p][1] < number)]
        return [*later, last, *earlier]


def newest_checkpoint(work_dir: str) -> str | None:
    """What mmengine's runner asks for on ``resume=True``: the newest checkpoint of a work dir that can be read."""
    found = CheckpointFolder(Path(work_dir), Path(work_dir)).newest()
    for note in found.notes:
        print(f'resuming: {note}')
    return None if found.path is None else str(found.path)


def _pattern(template: str) -> str:
    """A regular expression of the names that ``template.format(number)`` makes: ``{}``, ``{0}``, ``{:04d}``."""
    parts = string.Formatter().parse(template)
    return ''.join(re.escape(text) + ('' if field is None else r'(\d+)') for text, field, _, _ in parts)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith('.'))
    except OSError:
        return []


def _progress(path: Path) -> tuple[int, int]:
    """Epoch and iteration of a checkpoint that is whole and can be resumed from; ValueError if it cannot."""
    checkpoint = read_file(path)
    if is_fused(checkpoint):
        raise ValueError('it is the checkpoint of a fused model, which has no norms to train')
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    meta = entries.get('meta') if isinstance(entries.get('meta'), dict) else {}
    lacking = [key for key in ('state_dict', 'message_hub') if key not in entries]
    lacking += [f'meta.{key}' for key in ('epoch', 'iter') if not isinstance(meta.get(key), int)]
    if lacking:
        raise ValueError(f'it is no state of training: it has no {", ".join(lacking)}')
    keep(path, checkpoint)
    return meta['epoch'], meta['iter']
