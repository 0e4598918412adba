"""Kill real training runs at random moments, go on with ``--resume``, and compare with a run that nobody killed.

    python tools/kill_test.py --kills 45

Every run is a small Mask R-CNN with an exponential average of its weights, random images, ``max_keep_ckpts=1`` and
``save_best``; the choices of ``--norm`` take turns, and with them the loop (epochs, iterations) and the number of
processes (one, two). A kill is SIGKILL to all processes of the run, or to one of two; every other one comes at a file
operation, half of those in the middle of writing. After each, every checkpoint must be readable and the newest one
there; in the end weights, optimizer, averages, schedulers, losses and the best score must be those of the other run to
the last bit.

Takes some ten minutes on two cores and is no part of the test suite, which has a short form of it.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from mmengine.config import config as mmengine_config
from mmengine.fileio import LocalBackend
from mmengine.runner import runner as mmengine_runner

from helpers import tiny
from mmdet_norms import files
from mmdet_norms.cli import train
from mmdet_norms.placement import PLACEMENTS

CONFIG = """
train_pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
train_pipeline.insert(2, dict(type='PhotoMetricDistortion'))
train_dataloader['dataset']['pipeline'] = train_pipeline
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='coco/bbox_mAP_50', rule='greater'))
train_cfg = dict(max_epochs=4, val_interval=1)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=8)]
optim_wrapper = dict(optimizer=dict(lr=0.01))
log_level = 'WARNING'
"""
ITERATIONS = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8, val_interval=2)
train_dataloader.update(sampler=dict(_delete_=True, type='InfiniteSampler'), batch_sampler=None)
default_hooks['checkpoint'].update(by_epoch=False, interval=2)
log_processor = dict(by_epoch=False)
"""
# group norm's 32 groups at the model's 16 channels
NECK_AND_MASK = ['model.neck.norm_cfg.num_groups=4', 'model.roi_head.mask_head.norm_cfg.num_groups=4']
OPTIONS = {
    'gn': [*NECK_AND_MASK, 'model.roi_head.bbox_head.norm_cfg.num_groups=4'],
    'gn-ws': [*NECK_AND_MASK, 'model.roi_head.bbox_head.norm_cfg.num_groups=4'],
    'an-gn-head': [*NECK_AND_MASK, *(f'model.roi_head.bbox_head.norm_cfg.{i}.num_groups=4' for i in range(4))],
}
_DEADLINE = 300  # seconds that one run may take


class Run:
    """One training command in processes of its own, forked from this one, which has imported everything."""

    def __init__(self, config: Path, work_dir: Path, norm: str, processes: int, kill_at: int | None = None):
        argv = [str(config), '--norm', norm, '--work-dir', str(work_dir), '--seed', '0', '--resume']
        argv += ['--threads', '1']  # a run that is killed before its first checkpoint begins anew, as it was
        argv += ['--cfg-options', *OPTIONS[norm]] if norm in OPTIONS else []
        self.log, self._ready = work_dir.with_suffix('.log'), os.pipe()
        port = _free_port()
        self.pids = []
        for rank in range(processes):
            environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1')
            environment['MASTER_PORT'] = port
            more = ['--launcher', 'pytorch'] if processes > 1 else []
            pid = os.fork()
            if pid == 0:
                os.environ.update({key: str(value) for key, value in environment.items()})
                self._train(argv[:1] + more + argv[1:], kill_at if rank == 0 else None)
            self.pids.append(pid)
        os.close(self._ready[1])

    def wait_until_it_trains(self) -> bool:
        """Whether it got so far."""
        began = os.read(self._ready[0], 1) == b'x'
        os.close(self._ready[0])
        return began

    def kill(self, which: int | None = None) -> None:
        """Kill all processes, or one and then the others, as torchrun does."""
        if which is not None:
            _kill(self.pids[which])
            time.sleep(0.2)
        for pid in self.pids:
            _kill(pid)

    def wait(self) -> list[int]:
        """The exit status of every process, negative for a signal; when one dies, the others are killed."""
        end, left, status = time.monotonic() + _DEADLINE, list(self.pids), {}
        while left:
            for pid in list(left):
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    left.remove(pid)
                    status[pid] = os.waitstatus_to_exitcode(code)
            if time.monotonic() > end or any(code < 0 for code in status.values()):
                for pid in left:
                    _kill(pid)
            time.sleep(0.01)
        return [status[pid] for pid in self.pids]

    def _train(self, argv: list[str], kill_at: int | None) -> None:
        """In the child: train, and never return."""
        status = 1
        try:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            build = train.build_runner

            def build_and_tell(*args):
                runner = build(*args)
                os.write(self._ready[1], b'x')
                if kill_at is not None:
                    die_at_file_operation(kill_at)
                return runner

            train.build_runner = build_and_tell
            train.main(argv)
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


def die_at_file_operation(number: int) -> None:
    """SIGKILL this process at that write, rename or deletion; a write that is even in number is half done."""
    done = 0

    def dying(function: Callable, half: bool = False) -> Callable:
        def operation(*args, **kwargs):
            nonlocal done
            done += 1
            if done >= number:
                if half and number % 2 == 0:
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return operation

    files.Path.write_bytes = dying(Path.write_bytes, half=True)
    files.os.replace = dying(os.replace)
    LocalBackend.remove = dying(LocalBackend.remove)


def problems_of(work_dir: Path, had_one: bool) -> list[str]:
    """What a kill must not leave: something unreadable, or nothing to go on from."""
    found, steps = [], 0
    for path in sorted(work_dir.glob('*.pth')):
        if path.name.startswith('.'):
            continue
        try:
            torch.load(path)
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
            steps += not path.name.startswith('best')
        except Exception as error:
            found.append(f'{path.name} cannot be read: {error}')
    last = work_dir / 'last_checkpoint'
    if last.exists() and not Path(last.read_text()).is_file():
        found.append(f'last_checkpoint names {last.read_text()!r}')
    if had_one and not steps:
        found.append('there was a checkpoint, and there is none')
    return found


def state(path: Path) -> dict[str, np.ndarray]:
    """What must be the same in two runs, by name, as bytes."""
    checkpoint = torch.load(path)
    hub = checkpoint['message_hub']
    parts = {key: checkpoint.get(key) for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')}
    parts['losses'] = hub['log_scalars']['train/loss']._log_history
    parts['best'] = {key: hub['runtime_info'].get(key) for key in ('best_score', 'iter', 'epoch')}
    parts['meta'] = {key: checkpoint['meta'][key] for key in ('epoch', 'iter', 'seed')}
    return dict(_leaves(parts, ''))


def differing_bits(one: Path, two: Path) -> int:
    """Of two checkpoints; a key that only one of them has counts with all its bits."""
    first, second = state(one), state(two)
    total = sum(8 * value.size for key, value in {**first, **second}.items() if (key in first) != (key in second))
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        total += 8 * max(a.size, b.size) if a.size != b.size else int(np.unpackbits(a ^ b).sum())
    return total


def _leaves(node: object, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f'{name}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _leaves(value, f'{name}.{i}')
    elif isinstance(node, torch.Tensor):
        yield name, np.frombuffer(node.contiguous().numpy().tobytes(), np.uint8)
    elif isinstance(node, np.ndarray):
        yield name, np.frombuffer(node.tobytes(), np.uint8)
    else:
        yield name, np.frombuffer(repr(node).encode(), np.uint8)


def checkpoints_in(folder: Path) -> list[str]:
    """Their names, without what is being written."""
    return sorted(path.name for path in folder.glob('*.pth') if not path.name.startswith('.'))


def try_out(folder: Path, norm: str, loop: str, processes: int, kills: int, chance: random.Random) -> dict:
    """One norm: a run that nobody kills, and one that is killed that often."""
    folder.mkdir()
    config = tiny.write_config(folder, CONFIG + (ITERATIONS if loop == 'iterations' else ''))
    whole, killed = folder / 'whole', folder / 'killed'
    run = Run(config, whole, norm, processes)
    run.wait_until_it_trains()
    began = time.monotonic()
    status = run.wait()
    if any(status):
        return dict(kills=0, moments=[], problems=[f'the run without a kill ended with {status}, see {run.log}'])
    duration = time.monotonic() - began
    moments, problems, had_one = [], [], False
    for attempt in range(4 * kills):
        if len(moments) == kills:
            break
        at = chance.randint(1, 16) if attempt % 2 else None
        run = Run(config, killed, norm, processes, at)
        if run.wait_until_it_trains() and at is None:
            time.sleep(chance.uniform(0, 0.8 * duration))
            run.kill(chance.randrange(processes) if chance.random() < 0.5 else None)
        status = run.wait()
        if any(code == -signal.SIGKILL for code in status):
            there = checkpoints_in(killed)
            half = len(list(killed.glob('.*.part-*')))
            moments.append(f'{there[-1] if there else "no checkpoint"}{" and half a file" if half else ""}')
        elif any(status):
            problems.append(f'a resumed run ended with {status}, see {run.log}')
            break
        else:  # it came to its end before the kill: once more from the beginning
            shutil.rmtree(killed)
            had_one = False
            continue
        problems += problems_of(killed, had_one)
        had_one = had_one or any(not name.startswith('best') for name in checkpoints_in(killed))
    run = Run(config, killed, norm, processes)
    run.wait_until_it_trains()
    status = run.wait()
    if any(status):
        problems.append(f'the last run ended with {status}, see {run.log}')
    else:
        problems += compare(whole, killed)
    return dict(kills=len(moments), moments=moments, problems=problems)


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs in two work dirs that should be the same."""
    names = checkpoints_in(whole)
    if checkpoints_in(killed) != names:
        return [f'checkpoints {checkpoints_in(killed)}, without a kill {names}']
    found = list(killed.glob('.*.part-*'))
    problems = [f'{path.name} is left over' for path in found]
    for name in names:
        if not name.startswith('best'):
            bits = differing_bits(whole / name, killed / name)
            problems += [f'{name}: {bits} bits differ'] if bits else []
        else:
            one, two = (torch.load(folder / name)['state_dict'] for folder in (whole, killed))
            problems += [f'{name}: {key} differs' for key in one if not torch.equal(one[key], two[key])]
    return problems


def quicker() -> None:
    """Without what takes the time in a run of seconds: compilers asked for their versions, configs formatted."""
    texts, format_code = {}, mmengine_config.FormatCode

    def format_once(text: str, **style) -> tuple:
        if text not in texts:
            texts[text] = format_code(text, **style)
        return texts[text]

    mmengine_config.FormatCode = format_once
    mmengine_runner.collect_env = dict


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def main() -> None:
    """Try norm after norm until enough processes were killed; exit with 1 if anything was lost or differs."""
    parser = argparse.ArgumentParser(prog='tools/kill_test.py', description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=45, help='how many in all; default: 45')
    parser.add_argument('--norms', nargs='+', default=list(PLACEMENTS), choices=list(PLACEMENTS), metavar='NAME')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--keep', metavar='DIR', help='an empty or new folder for the runs, which stays')
    args = parser.parse_args()
    quicker()
    torch.set_num_threads(1)  # sums in another order would be other numbers
    chance = random.Random(args.seed)
    folder = Path(args.keep or tempfile.mkdtemp(prefix='kill_test_'))
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-args.kills // len(args.norms))
    kills, wrong = 0, 0
    for number, norm in enumerate(args.norms):
        loop, processes = ('epochs', 'iterations')[number % 2], 1 + number // 2 % 2
        result = try_out(folder / f'{number}_{norm}', norm, loop, processes, each, chance)
        kills += result['kills']
        wrong += bool(result['problems'])
        said = '; '.join(result['problems']) or '0 bits differ, nothing unreadable'
        print(f'{norm:12} {loop:10} {processes} process(es)  {result["kills"]} kills ({", ".join(result["moments"])})')
        print(f'{"":12} {said}', flush=True)
    print(f'{kills} processes or groups of two killed, {len(args.norms) - wrong} of {len(args.norms)} norms as if not')
    if not args.keep and not wrong:
        shutil.rmtree(folder)
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
