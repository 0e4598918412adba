"""Processes that have imported the package already: ``subprocess`` for a test that needs a process and no fresh import.

Importing torch and mmdet takes 5 s of a CPU, and a tiny training one. A server is forked when pytest begins, while it
has one thread and no test has run; it forks a child for each call. The child gets what a new Python would: arguments,
folder, environment, pipes, a ``__main__`` of its own, other random numbers, and the status of a Python that ends. What
libraries read when they are loaded, such as ``OMP_NUM_THREADS``, is that of the server.

    done = warm.run([sys.executable, 'tools/train.py', config], capture_output=True, text=True)

Where the import, or the way in which a process is started, is what is tested, take ``subprocess``.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib.util
import io
import itertools
import logging
import multiprocessing.util
import os
import pickle
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from pathlib import Path

import numpy as np
from mmengine.utils.dl_utils import collect_env

_NUMBER = struct.Struct('!i')
_server = None
_turn = threading.Lock()


def start(orphans: bool = False) -> None:
    """Fork the server of this process. Called by conftest.py, when everything is imported and nothing has run.

    Args:
        orphans: whether the children go on when this process has ended, as other processes do.
    """
    global _server
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _serve(theirs, orphans)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    _server = ours
    atexit.register(_stop, ours, pid)


def _stop(server: socket.socket, pid: int) -> None:
    server.close()
    with contextlib.suppress(ChildProcessError):  # of another process
        os.waitpid(pid, 0)


class Popen(subprocess.Popen):
    """``subprocess.Popen`` of a Python command: ``[python, [-u], [-W FILTER], SCRIPT | -m MODULE | -c CODE, ...]``."""

    # The arguments of subprocess.Popen's own, the same from Python 3.10 to 3.13.
    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, *process_group,
    ):  # fmt: skip
        assert not shell and not pass_fds and preexec_fn is None, 'a warm process takes none of these'
        request = pickle.dumps(
            dict(
                argv=[os.fspath(arg) for arg in args],
                cwd=os.path.abspath(os.fspath(cwd or '.')),
                env=dict(os.environ if env is None else env),
                session=start_new_session,
            )
        )
        if _server is None:  # no pytest
            start()
        self._status, status = os.pipe()
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        try:
            with _turn:
                socket.send_fds(_server, [_NUMBER.pack(len(request))], [*streams, status])
                _server.sendall(request)
                (self.pid,) = _NUMBER.unpack(_received(_server, _NUMBER.size))
        finally:
            os.close(status)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True

    def _internal_poll(self, *_, **__):
        return self._ended(0)

    def _wait(self, timeout):
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _ended(self, seconds):
        """The status, None if the process goes on for longer than that."""
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            answer = os.read(self._status, _NUMBER.size)
            os.close(self._status)
            self.returncode = _NUMBER.unpack(answer)[0] if answer else -signal.SIGKILL  # the server is gone
        return self.returncode


def run(args, *, input=None, capture_output=False, timeout=None, check=False, **options):
    """``subprocess.run``."""
    if capture_output:
        options |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if input is not None:
        options['stdin'] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, error = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, error)
    return subprocess.CompletedProcess(args, process.returncode, out, error)


def begin_warm() -> None:
    """Have ``subprocess`` of this process, a warm one, begin Python commands as warm processes."""
    start(orphans=True)
    cold = subprocess.Popen

    def begin(args, **options):
        return (Popen if args[0] == sys.executable else cold)(args, **options)

    subprocess.Popen = begin


def run_together(args, processes=2, timeout=240, env=None, **options) -> str:
    """Run a command as so many processes of one group, as torchrun starts them; all must succeed.

    Returns:
        What they printed, as on a terminal.
    """
    import torch

    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    group = dict(
        WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, GROUP_RANK=0, GROUP_WORLD_SIZE=1, MASTER_ADDR='127.0.0.1',
        MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RESTART_COUNT=0,
        TORCHELASTIC_RUN_ID='none',
    )  # fmt: skip
    reads, writes = os.pipe()
    started, said = [], []
    for rank in range(processes):
        environment = {**(os.environ if env is None else env), **group, 'RANK': rank, 'LOCAL_RANK': rank}
        environment = {key: str(value) for key, value in environment.items()}
        started.append(Popen(args, env=environment, stdout=writes, stderr=subprocess.STDOUT, **options))
    os.close(writes)
    try:
        end, printing = time.monotonic() + timeout, True
        while printing or any(process.poll() is None for process in started):
            if printing and select.select([reads], [], [], 0.1)[0]:
                said.append(os.read(reads, 1 << 16))
                printing = said[-1] != b''
            failed = [process.returncode for process in started if process.poll()]
            if failed or time.monotonic() > end:
                break
            if not printing:
                time.sleep(0.01)
    finally:
        for process in started:
            process.kill()
            process.wait()
        os.close(reads)
    said = b''.join(said).decode()
    statuses = [process.returncode for process in started]
    assert statuses == [0] * processes, f'the processes ended with {statuses}:\n{said[-5000:]}'
    return said


def _received(connection: socket.socket, size: int) -> bytes:
    parts = b''
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise EOFError('the other process has ended')
        parts += part
    return parts


# ----------------------------------------------------------------------------------------------------------- the server


def _serve(connection: socket.socket, orphans: bool) -> None:
    """Fork a child for each request, and tell who asked how it ended, until nobody can ask any more."""
    _become_a_plain_python(connection.fileno())
    wakes, waker = os.pipe()
    for end in (wakes, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end is ours
    children = {}
    while True:
        ready = select.select([connection, wakes], [], [])[0]
        if wakes in ready:
            os.read(wakes, 1 << 12)
            _tell_who_ended(children)
        if connection in ready:
            size, handles, _, _ = socket.recv_fds(connection, _NUMBER.size, 4)
            if not size:
                for pid in () if orphans else children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os._exit(0)
            request = pickle.loads(_received(connection, *_NUMBER.unpack(size)))
            _warm_up()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for handle in (connection.detach(), wakes, waker, handles[3], *children.values()):
                    os.close(handle)
                _live(request, handles[:3])
            for handle in handles[:3]:
                os.close(handle)
            children[pid] = handles[3]
            connection.sendall(_NUMBER.pack(pid))


@functools.cache
def _warm_up() -> None:
    """What every run begins with."""
    for name in ('mmdet_norms.cli.train', 'mmdet_norms.cli.test', 'torch.distributed.run'):
        importlib.import_module(name)
    collect_env()  # starts compilers, and knows their versions from then on


def _tell_who_ended(children: dict[int, int]) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            handle = children.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                os.write(handle, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
            os.close(handle)


def _become_a_plain_python(kept: int) -> None:
    """Take off what pytest, and execnet where several processes share the tests, have put on."""
    faulthandler.disable()
    nothing = os.open(os.devnull, os.O_RDWR)
    listed = Path('/proc/self/fd') if Path('/proc/self/fd').is_dir() else Path('/dev/fd')
    for handle in [int(path.name) for path in listed.iterdir()]:
        if handle not in (kept, nothing, 2):  # not closed: objects of pytest would close whatever has their number next
            with contextlib.suppress(OSError):
                os.dup2(nothing, handle, inheritable=False)
    _give_streams()
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    atexit.register(logging.shutdown)
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__.partition('.')[0] != '_pytest']
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    spec = importlib.util.find_spec('warnings')  # those of pytest are recorded
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    warnings._showwarnmsg_impl = fresh._showwarnmsg_impl
    warnings.showwarning = warnings._showwarning_orig
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter('ignore', category)
    warnings.filterwarnings('default', category=DeprecationWarning, module='__main__')
    for name in [name for name in os.environ if name.startswith('PYTEST_')]:
        del os.environ[name]
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------------------------------ the child

_kept = []


def _live(request: dict, handles: list[int]) -> None:
    """Be the process that was asked for, and end."""
    status = 1
    try:
        if request['session']:
            os.setsid()
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
        for handle in handles:
            if handle > 2:
                os.close(handle)
        os.chdir(request['cwd'])
        os.environ.clear()
        os.environ.update(request['env'])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _give_streams()
        random.seed()
        np.random.seed()
        multiprocessing.util._finalizer_registry.clear()
        multiprocessing.util._finalizer_counter = itertools.count()
        status = _status_of(request['argv'])
    finally:
        _end(status)


def _give_streams() -> None:
    """``sys.stdin``, ``stdout`` and ``stderr`` as a Python has them that was started with these handles."""
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))  # freeing them would write what they hold and close handles
    raw = [io.FileIO(number, mode, closefd=False) for number, mode in enumerate('rww')]
    through = bool(os.environ.get('PYTHONUNBUFFERED'))
    sys.stdin = io.TextIOWrapper(io.BufferedReader(raw[0]), 'utf-8', errors='surrogateescape')
    out = raw[1] if through else io.BufferedWriter(raw[1])
    sys.stdout = io.TextIOWrapper(out, 'utf-8', write_through=through, line_buffering=os.isatty(1))
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw[2]), 'utf-8', errors='backslashreplace', line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _status_of(argv: list[str]) -> int:
    """Do what a Python with this command line does; its status."""
    try:
        try:
            _run(argv[1:])
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return (end.code or 0) & 0xFF
            print(end.code, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            sys.excepthook(*sys.exc_info())
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(argv: list[str]) -> None:
    while argv[0] in ('-u', '-W'):
        if argv[0] == '-W':
            warnings.simplefilter(argv[1])
        argv = argv[1 if argv[0] == '-u' else 2 :]
    path = [entry for entry in os.environ.get('PYTHONPATH', '').split(os.pathsep) if entry]
    first, *rest = argv
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    if first == '-m':
        sys.argv, sys.path = ['-m', *rest[1:]], [os.getcwd(), *path, *sys.path]
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    elif first == '-c':
        sys.argv, sys.path = ['-c', *rest[1:]], ['', *path, *sys.path]
        exec(compile(rest[0], '<string>', 'exec'), vars(main))
    else:
        main.__file__ = os.path.abspath(first)
        sys.argv, sys.path = argv, [str(Path(first).resolve().parent), *path, *sys.path]
        exec(compile(Path(first).read_bytes(), main.__file__, 'exec'), vars(main))


def _end(status: int) -> None:
    """What an interpreter does when it ends, but for freeing everything."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(status)
