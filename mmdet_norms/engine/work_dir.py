"""One run in a work dir at a time, and none over another one's by accident."""

import errno
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..errors import UserError, some
from ..files import remove_unfinished, require_writable, write_bytes
from .cost import COST
from .results import kept_results, read_json, write_json
from .safe_checkpoints import LAST, CheckpointFolder

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

RESULTS = 'results.json'
TRAINING, TESTING = '.training', '.testing'
FINISHED = 'finished.json'

_DATE_TIME = re.compile(r'\d{8}_\d{6}')
_BEAT = 10  # seconds between two signs of life
_DEAD = 90  # seconds without one after which a run on another machine counts as dead; network disks tell late


@contextmanager
def claimed(work_dir: str | os.PathLike, name: str = TRAINING, option: str = '--work-dir') -> Iterator[None]:
    """Hold the work dir for one run; it is free again when the process ends, however it ends.

    A lock of the system on a file of that ``name``, which says whose it is. The system drops the lock with the
    process, also on ``kill -9``. Some network disks have no locks or do not tell other machines of them; there the
    file's time counts, which is renewed every ten seconds.

    Args:
        option: by which the command line names the folder.

    Raises:
        UserError: another run has it (the message says which, and what to do), or it cannot be written to.
    """
    path = Path(work_dir) / name
    require_writable(Path(work_dir) / 'file', f'work dir {work_dir}')
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(handle, path, work_dir, option)
        stop = threading.Event()
        threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            with suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def require_unclaimed(work_dir: str | os.PathLike) -> None:
    """Raise a :class:`UserError` if a training runs in the work dir."""
    if (Path(work_dir) / TRAINING).exists():
        with claimed(work_dir):
            pass


def require_fresh(folder: CheckpointFolder) -> None:
    """Raise a :class:`UserError` if there are checkpoints of an earlier run, which a new one would mix with its own."""
    found = folder.all()
    if found:
        raise UserError(
            f'work dir {folder.work_dir} holds {len(found)} checkpoints of an earlier run '
            f'({some([path.name for path in found], 3)}): go on with it by --resume, replace it by --overwrite (which '
            'deletes them), or choose another --work-dir'
        )


@contextmanager
def left_alone_when_refused(work_dir: str | os.PathLike, config: str | None) -> Iterator[threading.Event]:
    """Around a training: one that fails, or is stopped, before it begins leaves the work dir as it was.

    mmengine writes a log, and its copy of the config over that of an earlier run, while it builds the runner. Only for
    who has claimed the work dir as a training: whatever log is new is then its own.

    Args:
        config: the config file, of which the copy has the name.

    Yields:
        An event for :class:`Begins` to set; what is written by then stays.
    """
    folder, begun = Path(work_dir), threading.Event()
    copy = folder / Path(config or '').name
    earlier = copy.read_bytes() if config and copy.is_file() else None
    logs = set(_logs(folder))
    try:
        yield begun
    except BaseException:
        if not begun.is_set():
            with suppress(OSError):
                if earlier is not None:
                    write_bytes(copy, earlier)
                elif config:
                    copy.unlink(missing_ok=True)
            for log in set(_logs(folder)) - logs:
                shutil.rmtree(log, ignore_errors=True)
        raise


class Begins(Hook):
    """The training begins: data and weights are loaded, and no other hook refuses it.

    Register it last.

    Args:
        overwritten: where an earlier run is, which may go now.
    """

    priority = 'LOWEST'

    def __init__(self, begun: threading.Event, overwritten: CheckpointFolder | None = None) -> None:
        self.begun = begun
        self.overwritten = overwritten

    def before_train(self, runner: Runner) -> None:
        """Called behind all others."""
        barrier()  # one that refuses in another process only has ended that by now, and this one with it
        self.begun.set()
        removed = remove_earlier_run(self.overwritten) if self.overwritten and is_main_process() else []
        if removed:
            runner.logger.info(f'--overwrite: deleted {", ".join(path.name for path in removed)}')


def _logs(folder: Path) -> list[Path]:
    """The folders ``DATE_TIME``, one for each start."""
    return [path for path in folder.glob('*_*') if _DATE_TIME.fullmatch(path.name)]


def require_replaceable(folder: CheckpointFolder, needed: dict[str, str]) -> None:
    """Raise a :class:`UserError` if ``--overwrite`` would delete what the new run starts from (option -> path)."""
    found = {os.path.realpath(path) for path in folder.all()}
    for option, path in needed.items():
        if os.path.realpath(path) in found:
            raise UserError(
                f'--overwrite deletes {path}, from which {option} starts: move it to another folder, or choose another '
                '--work-dir'
            )


def remove_earlier_run(folder: CheckpointFolder) -> list[Path]:
    """Delete the checkpoints of an earlier run and what says how good they were; returns them. Nothing else goes."""
    notes = [folder.work_dir / name for name in (LAST, RESULTS, FINISHED, COST)]
    removed = folder.all() + [path for path in notes if path.is_file()] + kept_results(folder.work_dir)
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def tidy(folder: CheckpointFolder) -> list[Path]:
    """Delete what killed runs left half-written; returns it."""
    return [path for place in {folder.work_dir, folder.folder} for path in remove_unfinished(place)]


def mark_finished(work_dir: str | os.PathLike, epoch: int, iteration: int, end: dict) -> None:
    """Note that a training came to the end that it was to have."""
    write_json(Path(work_dir) / FINISHED, dict(epoch=epoch, iter=iteration, **end))


def is_finished(work_dir: str | os.PathLike, iteration: int, end: dict) -> bool:
    """Whether a training that is at that iteration now came to that end."""
    noted = read_json(Path(work_dir) / FINISHED)
    return noted.get('iter') == iteration and all(noted.get(k) == end[k] for k in end)


def _take(handle: int, path: Path, work_dir: str | os.PathLike, option: str) -> None:
    locked, owner = _lock(handle), _owner(handle)
    if locked is False:
        raise UserError(_in_use(work_dir, option, owner))
    if owner.get('host') not in (None, socket.gethostname()):
        if _is_alive(path):
            raise UserError(_in_use(work_dir, option, owner, f'; if it is not running any more, delete {path}'))
        locked = locked and _lock(handle)  # looking at the file let go of the lock
        if locked is False:
            raise UserError(_in_use(work_dir, option, _owner(handle)))
    elif locked is None and owner and _has_process(owner.get('pid')):
        raise UserError(_in_use(work_dir, option, owner, f'; if that process is another one by now, delete {path}'))
    own = dict(pid=os.getpid(), host=socket.gethostname(), since=time.strftime('%Y-%m-%d %H:%M:%S'))
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(own) + '\n').encode(), 0)


def _in_use(work_dir: str | os.PathLike, option: str, owner: dict, more: str = '') -> str:
    who = f'process {owner.get("pid", "?")} on {owner.get("host", "?")}, since {owner.get("since", "?")}'
    return (
        f'work dir {work_dir}: another run is at work there ({who}); wait for it or stop it, or choose another '
        f'{option}{more}'
    )


def _lock(handle: int) -> bool | None:
    """Whether the lock was to be had; None where the disk has no locks."""
    if fcntl is None:
        return None
    for attempt in range(3):  # a test may be asking whether it is free
        try:
            # not flock: that one goes on in the workers of a killed process
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
        time.sleep(0.1 * attempt)
    return False


def _owner(handle: int) -> dict:
    try:
        owner = json.loads(os.pread(handle, 1 << 16, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _has_process(pid: object) -> bool:
    try:
        os.kill(int(pid), 0)
    except (TypeError, ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return int(pid) != os.getpid()


def _is_alive(path: Path) -> bool:
    """Whether the file's time is renewed; by the disk's clock, since those of two machines differ."""
    seen = _time_of(path)
    now = path.with_name(f'{path.name}.{os.getpid()}')
    now.touch()
    age = now.stat().st_mtime - seen
    now.unlink()
    if age < _DEAD:
        print(f'{path} was written on another machine: waiting up to {_DEAD - max(age, 0):.0f} s for a sign of life')
    end = time.monotonic() + _DEAD - age
    while time.monotonic() < end:
        time.sleep(0.5)
        if _time_of(path) != seen:
            return True
    return False


def _time_of(path: Path) -> float:
    with open(path, 'rb') as file:  # opening asks a network disk anew
        return os.fstat(file.fileno()).st_mtime


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT):
        with suppress(OSError):
            os.utime(path)
