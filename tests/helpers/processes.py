"""Two processes that talk over gloo, forked from the test's so that nothing is imported again."""

import multiprocessing
import os
import pickle
import traceback
import uuid
from pathlib import Path

import torch
import torch.distributed as torch_dist


def run_in_two(folder: Path, function, *args, timeout: float = 240) -> list:
    """``function(rank, *args)`` in two processes of one group; what they return, which must survive pickling."""
    context = multiprocessing.get_context('fork')
    store = Path(folder) / f'store_{uuid.uuid4().hex}'
    pipes, children = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(rank, store, sender, function, args))
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f'process {rank} does not answer'
            results.append(pickle.loads(pipe.recv_bytes()))
    finally:
        for child in children:
            child.join(20)
            child.kill()
    for rank, (fine, result) in enumerate(results):
        assert fine, f'process {rank}:\n{result}'
    return [result for _, result in results]


def _child(rank, store, sender, function, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    try:
        torch.set_num_threads(1)
        torch_dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
        answer = True, function(rank, *args)
    except BaseException:
        answer = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(answer))  # not send, which hands tensors over in memory of this process
    sender.close()
    os._exit(0)  # nothing of the test's own process, such as pytest, must run its exit in here
