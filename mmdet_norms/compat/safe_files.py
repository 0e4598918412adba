"""mmengine writes its files whole or not at all, and deletes an old checkpoint after the new one is on the disk.

Stock mmengine 0.10 opens a checkpoint under its own name and writes it there, as it does ``last_checkpoint``, and the
hook deletes what ``max_keep_ckpts`` and ``save_best`` make superfluous *before* it writes what replaces it: a process
that is killed meanwhile leaves nothing to go on from. Both are changed in the classes themselves, so that the stock
tools, python-style configs and subclasses have it, too; other file backends than the local disk write as they did.

What a checkpoint makes superfluous is noted in it, and deleted a second time on resuming: the kill may have come
between the two.
"""

from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..files import replacing, write_bytes, write_text

OUTDATED = 'outdated_checkpoints'
"""Where the message hub, and with it every checkpoint, has the names of files to delete."""

_stock_before_train = CheckpointHook.before_train
_stock_save = CheckpointHook._save_checkpoint_with_step  # replaced as a whole; a test compares it with what it was
_stock_save_best = CheckpointHook._save_best_checkpoint
_stock_dump = Config.dump


def put(backend: LocalBackend, obj: bytes, filepath: str | Path) -> None:
    """``LocalBackend.put``."""
    write_bytes(filepath, obj)


def put_text(backend: LocalBackend, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
    """``LocalBackend.put_text``."""
    write_text(filepath, obj, encoding)


def dump(cfg: Config, file: str | Path | None = None) -> str | None:
    """``Config.dump``."""
    if file is None or not str(file).endswith('.py'):  # the others go through the file backend
        return _stock_dump(cfg, file)
    with replacing(file) as part:
        return _stock_dump(cfg, part)


def before_train(hook: CheckpointHook, runner: Runner) -> None:
    """``CheckpointHook.before_train``."""
    _stock_before_train(hook, runner)
    # what lies in another folder, where this run was moved, copied or resumed from, is not its own to delete
    if getattr(hook, 'best_ckpt_path', None):
        hook.best_ckpt_path = _here(hook, hook.best_ckpt_path)
    _forget_best_of_another_metric(hook, runner)
    for key, path in (getattr(hook, 'best_ckpt_path_dict', None) or {}).items():
        hook.best_ckpt_path_dict[key] = path and _here(hook, path)
    last = runner.message_hub.runtime_info.get('last_ckpt')
    hook.last_ckpt = last and _here(hook, last)
    if hook.last_ckpt is not None:
        _delete_outdated(hook, runner)


def _forget_best_of_another_metric(hook: CheckpointHook, runner: Runner) -> None:
    """A score is kept without the name of its metric, which only the name of the file has."""
    known, keys = runner.message_hub.runtime_info, getattr(hook, 'key_indicators', None) or []
    if len(keys) != 1 or keys[0] == 'auto' or 'best_ckpt' not in known:
        return
    name = Path(known['best_ckpt']).name
    if name.startswith('best_') and not name.startswith(f'best_{keys[0]}_'.replace('/', '_')):
        runner.logger.warning(
            f'{name}, the best checkpoint until now, is not of save_best={keys[0]}, which begins anew'
        )
        for key in ('best_ckpt', 'best_score'):
            known.pop(key, None)
        hook.best_ckpt_path = None


def save_checkpoint_with_step(hook: CheckpointHook, runner: Runner, step: int, meta: dict) -> None:
    """Stock order is delete, write, name; here it is write, name, delete."""
    if hook.max_keep_ckpts > 0 and step not in list(hook.keep_ckpt_ids)[-1:]:
        if len(hook.keep_ckpt_ids) == hook.max_keep_ckpts:
            _outdate(hook, runner, hook.filename_tmpl.format(hook.keep_ckpt_ids[0]))
        hook.keep_ckpt_ids.append(step)  # a deque: lets go of the first when it is full
        runner.message_hub.update_info('keep_ckpt_ids', list(hook.keep_ckpt_ids))
    name = hook.filename_tmpl.format(step)
    hook.last_ckpt = hook.file_backend.join_path(hook.out_dir, name)
    runner.message_hub.update_info('last_ckpt', hook.last_ckpt)
    runner.save_checkpoint(
        hook.out_dir,
        name,
        hook.file_client_args,
        save_optimizer=hook.save_optimizer,
        save_param_scheduler=hook.save_param_scheduler,
        meta=meta,
        by_epoch=hook.by_epoch,
        backend_args=hook.backend_args,
        **hook.args,
    )
    if is_main_process():
        write_text(Path(runner.work_dir) / 'last_checkpoint', str(hook.last_ckpt))
    _delete_outdated(hook, runner)


def save_best_checkpoint(hook: CheckpointHook, runner: Runner, metrics: dict) -> None:
    """The stock method, with deletions that are noted and done when the new files are there."""
    hook.file_backend = _DeletesLater(hook.file_backend, lambda path: _outdate(hook, runner, Path(path).name))
    try:
        _stock_save_best(hook, runner, metrics)
    finally:
        hook.file_backend = hook.file_backend.backend
    _delete_outdated(hook, runner)


class _DeletesLater:
    """A file backend that tells what it is to delete, and keeps it."""

    def __init__(self, backend: object, note: Callable[[str], None]) -> None:
        self.backend, self.remove, self.rmtree = backend, note, note

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)


def _outdate(hook: CheckpointHook, runner: Runner, name: str) -> None:
    names = runner.message_hub.runtime_info.get(OUTDATED, [])
    runner.message_hub.update_info(OUTDATED, [*names, name])


def _delete_outdated(hook: CheckpointHook, runner: Runner) -> None:
    names = runner.message_hub.runtime_info.get(OUTDATED)
    if not names:
        return
    runner.message_hub.update_info(OUTDATED, [])
    if not is_main_process():
        return
    best = [getattr(hook, 'best_ckpt_path', None), *(getattr(hook, 'best_ckpt_path_dict', None) or {}).values()]
    current = {Path(path).name for path in (hook.last_ckpt, *best) if path}
    backend = getattr(hook.file_backend, 'backend', hook.file_backend)
    for name in names:
        path = backend.join_path(hook.out_dir, name)
        if name in current:
            continue
        if backend.isfile(path):
            backend.remove(path)
        elif backend.isdir(path):  # of deepspeed
            backend.rmtree(path)


def _here(hook: CheckpointHook, path: str) -> str | None:
    """A checkpoint of the message hub where the work dir is now, which may have been moved, or copied."""
    here = hook.file_backend.join_path(hook.out_dir, Path(path).name)
    return here if hook.file_backend.isfile(here) else None
