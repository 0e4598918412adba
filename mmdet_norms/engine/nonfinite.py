"""A step with NaN or inf in it: it is not taken, it is explained, and it can be done again."""

import functools
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..commands import runnable
from ..compat.torch_internals import copy_all, largest_magnitudes
from ..errors import UserError, some
from ..files import replacing
from .optim import wrappers_of
from .rng import kept_random_state, pack, random_state, set_random_state, unpack
from .together import announce_saving, model_of, models_of

FOLDER = 'nonfinite'
"""Where in the work dir the files to replay lie."""
_OVERFLOWS = 40  # in a row; a loss scale of 2**16 is 2**-24 by then
_FILES = 3  # of one run, each as large as a checkpoint


class NonFiniteError(UserError):
    """Training met a number that is NaN or infinite; the message says where."""

    everywhere = True  # raised in all processes, so that one of them says it


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop, or skip the step, where a loss, a gradient or the state of a norm is NaN or infinite.

    ``tools/train.py`` adds the hook to every run. Before each step of the optimizer one flag is read: the losses since
    the last step, all gradients and the running statistics. (mmengine reads every loss in every iteration, too.) All
    processes decide together. If the flag is set, the step is not taken; weights, optimizer and all buffers are those
    before the iteration, so no checkpoint ever has a non-finite number. The message names the first module whose output
    or gradient is bad (the step is computed once more to find it), the iteration and the images.

    What is needed to compute the step again goes to ``WORK_DIR/nonfinite/``:
    ``python tools/replay.py CONFIG WORK_DIR/nonfinite/iter_N.pth``.

    Overflows that a loss scaler meets while it looks for its scale are none of this: only a loss that is itself not
    finite, or 40 overflows in a row.

    Args:
        on_nonfinite: ``'stop'`` (default) ends the run with a :class:`NonFiniteError`; ``'skip'`` counts and goes on.
        max_skips: how many steps in a row may be skipped before the run ends all the same. Default 10.

    Raises:
        NonFiniteError: as above; also for weights that are not finite at the start or after a step.
    """

    priority = 'HIGH'  # what the step left is looked at before averages and checkpoints take it

    def __init__(self, on_nonfinite: str = 'stop', max_skips: int = 10):
        if on_nonfinite not in ('stop', 'skip'):
            raise UserError(f"NonFiniteHook: on_nonfinite={on_nonfinite!r} must be 'stop' or 'skip'")
        if isinstance(max_skips, bool) or not isinstance(max_skips, int) or max_skips < 1:
            raise UserError(f'NonFiniteHook: max_skips={max_skips!r} must be an integer of at least 1')
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.skipped = 0
        self._in_a_row = self._overflows = self._saved = 0
        self._window: list[dict] = []  # the batches since the last step
        self._loss_flag = self._clip_flag = self._weights_flag = None
        self._stepped = False

    def before_run(self, runner: Runner) -> None:
        """Be told before every checkpoint."""
        announce_saving(runner)

    def before_train(self, runner: Runner) -> None:
        """Look at the weights to start from, and put the check in front of the optimizer's step."""
        model = model_of(runner)
        bad = [name for name, value in model.named_parameters() if bool(any_nonfinite([value]))]
        # Buffers may be infinite by design, as masks are; those that are finite now are watched.
        floating = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        finite = [(name, buffer) for name, buffer in floating if not bool(any_nonfinite([buffer]))]
        bad += [name for name, _ in floating if 'running_' in name and name not in dict(finite)]
        if bad:
            source = f' of {runner._load_from}' if runner._load_from else ''
            raise NonFiniteError(
                f'the weights to start from{source} are not finite: {some(bad)}; start from another checkpoint'
            )
        self._watched = dict(finite)
        self._buffers = list(model.buffers())
        self._kept = [buffer.detach().clone() for buffer in self._buffers]
        wrappers = wrappers_of(runner.optim_wrapper)
        for wrapper in wrappers:
            self._guard(runner, wrapper)
        if get_world_size() == 1:  # processes that compute again on their own would wait for the others
            self._explain_errors(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Keep what a step begins from."""
        if not self._window:
            copy_all(self._kept, self._buffers)
        self._window.append(dict(iter=runner.iter, batch=data_batch, rng=random_state()))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """See what the step has made of the weights."""
        flag, self._weights_flag = self._weights_flag, None
        if flag is not None and bool(flag):
            self._stop_for_weights(runner, f'after iteration {runner.iter + 1}')

    def before_saving(self, runner: Runner) -> None:
        """Called in all processes before a checkpoint is written."""
        self._require_finite(runner, 'a checkpoint')

    def before_val_epoch(self, runner: Runner) -> None:
        """Weights that another hook has spoiled meanwhile give no results."""
        self._require_finite(runner, 'a validation')

    def _require_finite(self, runner: Runner, what: str) -> None:
        if not hasattr(self, '_watched'):  # no training
            return
        if self._window:  # amid an accumulation
            flag = any_nonfinite(self._watched.values())
            if _in_any_process(flag | _none_is_false(self._loss_flag, flag)):
                self._met(runner)
                runner.optim_wrapper.zero_grad()
        weights = [value for model in models_of(runner) for value in model.parameters()]
        if _in_any_process(any_nonfinite([*weights, *self._watched.values()])):
            self._stop_for_weights(runner, f'before {what}, after iteration {runner.iter}')

    # -------------------------------------------------------------------------------------------- the check

    def _guard(self, runner: Runner, wrapper: OptimWrapper) -> None:
        update, step = wrapper.update_params, wrapper.optimizer.step
        clip = getattr(wrapper, 'clip_func', None)  # only where the config has clip_grad

        @functools.wraps(clip)
        def clipped(params: list[Tensor], *args, **kwargs) -> Tensor | None:
            flag = any_nonfinite(p.grad for p in params)  # clipping by value makes infinite ones finite
            norm = clip(params, *args, **kwargs)
            if norm is not None:  # one that overflows makes all gradients 0
                flag = flag.to(norm.device) | any_nonfinite([norm])
            self._clip_flag = flag
            return norm

        if clip is not None:
            wrapper.clip_func = clipped

        @functools.wraps(update)
        def update_params(loss: Tensor, *args, **kwargs) -> None:
            flag = any_nonfinite([loss])
            self._loss_flag = flag if self._loss_flag is None else self._loss_flag | flag
            self._stepped = False
            update(loss, *args, **kwargs)
            if wrapper.should_update() and not self._stepped:
                self._after_overflow(runner)

        @functools.wraps(step)
        def guarded_step(*args, **kwargs):
            self._stepped = True
            found = getattr(wrapper.optimizer, 'found_inf', None)
            if found is not None and bool(found):  # a fused optimizer leaves the step out itself
                self._after_overflow(runner)
                return step(*args, **kwargs)
            gradients = [p.grad for group in wrapper.optimizer.param_groups for p in group['params']]
            flag = any_nonfinite([*(g for g in gradients if g is not None), *self._watched.values()])
            flag = flag | _none_is_false(self._loss_flag, flag) | _none_is_false(self._clip_flag, flag)
            if _in_any_process(flag):
                self._met(runner)
                return None
            hessian = kwargs.get('hessian')  # of a SecondOrderOptimWrapper, the mean over all processes
            if hessian is not None and bool(any_nonfinite(hessian)):
                self._met(runner, 'the Hessian is not finite, although loss and gradients are')
                return None
            result = step(*args, **kwargs)
            self._in_a_row = self._overflows = 0
            self._weights_flag = any_nonfinite(p for group in wrapper.optimizer.param_groups for p in group['params'])
            self._begin_window()
            return result

        wrapper.update_params, wrapper.optimizer.step = update_params, guarded_step

    def _begin_window(self) -> None:
        self._window, self._loss_flag, self._clip_flag = [], None, None

    def _after_overflow(self, runner: Runner) -> None:
        """The loss scaler left the step out."""
        self._overflows += 1
        flag = self._loss_flag
        if flag is not None and _in_any_process(flag):
            self._met(runner)
        elif self._overflows >= _OVERFLOWS:
            self._met(runner, f'gradients overflow in {self._overflows} steps in a row whatever the loss scale')
        else:
            self._begin_window()

    def _met(self, runner: Runner, why: str | None = None) -> None:
        """Undo, explain, and stop or go on."""
        model = model_of(runner)
        states = [name for name, buffer in self._watched.items() if bool(any_nonfinite([buffer]))]
        copy_all(self._buffers, self._kept)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state, strict=False)  # layers with copies on the host read them again
        wrapper = wrappers_of(runner.optim_wrapper)[0]
        findings = [find(model, entry, wrapper) for entry in self._window]
        model.load_state_dict(state, strict=False)
        said = [_sentence(entry, finding) for entry, finding in zip(self._window, findings) if finding]
        first = self._window[0]['iter'] + 1
        everybody = all_gather_object(said)
        found = [rank for rank, sentences in enumerate(everybody) if sentences] or [0]
        files = all_gather_object(self._save(runner, first) if get_rank() in found else None)
        message = '; '.join(
            (f'process {rank}: ' if len(everybody) > 1 else '') + '; '.join(sentences)
            for rank, sentences in enumerate(everybody)
            if sentences
        )
        where = f'iteration {self._window[-1]["iter"] + 1}' + (
            f' (epoch {runner.epoch + 1})' if _by_epoch(runner) else ''
        )
        if why or not message:
            images = some(list(dict.fromkeys(i for entry in self._window for i in image_files(entry['batch']))))
            why = why or (
                f'{some(states)} is not finite' if states else 'a loss or gradient that is finite when computed again'
            )
            message = f'{why}, images {images}'
        replay = [_replay_command(runner, file) for file in files if file]
        self._begin_window()
        self.skipped += 1
        self._in_a_row += 1
        text = f'{where}: {message}. The step was not taken.'
        text += f' To compute it again: {replay[0]}' if replay else ''
        if self.on_nonfinite == 'skip' and self._in_a_row <= self.max_skips:
            runner.logger.warning(f'Skipped step {self.skipped}: {text}')
            return
        if self.on_nonfinite == 'skip':
            text = f'{self._in_a_row} steps in a row were not finite; the last one, {text}'
        raise NonFiniteError(f'training stopped at {text} {_advice(runner)}')

    def _stop_for_weights(self, runner: Runner, when: str) -> None:
        model = model_of(runner)
        values = [*model.named_parameters(), *self._watched.items()]
        bad = [name for name, value in values if bool(any_nonfinite([value]))]
        raise NonFiniteError(
            f'training stopped {when}: the weights are not finite ({some(bad) or "the averages of a hook"}), although '
            f'loss and gradients were: the step was too large, or a hook changed them. No such '
            f'checkpoint was written. {_advice(runner)}'
        )

    def _explain_errors(self, runner: Runner) -> None:
        """Where code gives up on NaN with an error of its own, such as a matching, say what came before it."""
        train_step = runner.model.train_step

        @functools.wraps(train_step)
        def explained(*args, **kwargs):
            try:
                return train_step(*args, **kwargs)
            except (UserError, MemoryError, torch.cuda.OutOfMemoryError):
                raise
            except Exception as error:
                copy_all(self._buffers, self._kept)
                try:
                    finding = find(model_of(runner), self._window[-1], wrappers_of(runner.optim_wrapper)[0])
                except Exception:
                    raise error  # noqa: B904  (the first one says it)
                if not finding.explains_errors:
                    raise
                copy_all(self._buffers, self._kept)
                said = f'{_sentence(self._window[-1], finding)}, upon which {type(error).__name__}: {error}'
                path = self._save(runner, self._window[0]['iter'] + 1)
                raise NonFiniteError(
                    f'training stopped at iteration {runner.iter + 1}: {said}. To compute it again: '
                    f'{_replay_command(runner, path)} {_advice(runner)}'
                ) from error

        runner.model.train_step = explained

    def _save(self, runner: Runner, number: int) -> str | None:
        """Write what the step begins from, but not for each of many skips."""
        if self._saved >= _FILES:
            return None
        self._saved += 1
        process = f'_process_{get_rank()}' if get_world_size() > 1 else ''
        path = Path(runner.work_dir) / FOLDER / f'iter_{number}{process}.pth'
        batches = [{**entry, 'rng': pack(entry['rng'])} for entry in self._window]
        content = dict(
            version=1,
            epoch=runner.epoch,
            state_dict=model_of(runner).state_dict(),
            optimizer=runner.optim_wrapper.state_dict(),
            batches=batches,
        )
        with replacing(path) as part:
            torch.save(content, part)
        return str(path)


# ------------------------------------------------------------------------------------------------ explaining


class Finding:
    """Where the first number that is not finite came from.

    Args:
        losses: names of the losses that are not finite.
        place: the first module, parameter or input, in words; None if everything was finite.
        explains_errors: NaN was there before code of the model could fail upon it.
    """

    def __init__(self, losses: list[str], place: str | None, explains_errors: bool, values: dict | None = None):
        self.losses, self.place, self.explains_errors = losses, place, explains_errors
        self.values = values or {}

    def __bool__(self) -> bool:
        return bool(self.losses or self.place)

    def __str__(self) -> str:
        parts = [f'loss {some(self.losses)} is not finite'] * bool(self.losses) + [self.place] * bool(self.place)
        return ', '.join(parts) or 'everything is finite'


class _Probe:
    """Stands in for an optimizer wrapper: keeps the loss."""

    def __init__(self, wrapper: OptimWrapper):
        self._wrapper = wrapper
        self.losses: list[Tensor] = []

    def optim_context(self, model: nn.Module):
        return self._wrapper.optim_context(model)

    def update_params(self, loss: Tensor, *args, **kwargs) -> None:
        self.losses.append(loss)

    def __getitem__(self, name: str) -> '_Probe':
        return self


def find(model: nn.Module, entry: dict, wrapper: OptimWrapper) -> Finding:
    """Compute the losses and gradients of a batch once more, and see where the first bad number appears.

    Generators end as they began; buffers do not. Parameters keep their gradients.

    Args:
        entry: ``batch`` as the loader gave it, and ``rng``, the generators before it.
        wrapper: whose precision to compute in.
    """
    seen = _Watch(model)
    probe = _Probe(wrapper)
    names: list[str] = []
    values: dict = {}
    broken = _bad_inputs(entry['batch'])
    with kept_random_state(), seen.watching():
        set_random_state(entry['rng'])
        try:
            told = type(model).train_step(model, entry['batch'], optim_wrapper=probe)  # plain, not the guarded one
            values = {key: value.detach().clone() for key, value in told.items() if isinstance(value, Tensor)}
            names = [key for key, value in values.items() if not bool(value.isfinite().all())]
            parts = [name for name in names if name != 'loss']
            names = parts or names
        except Exception:
            if not broken and seen.forward is None:
                raise
        if broken:
            return Finding(names, f'the input has NaN or inf: {some(broken)}', True, values)
        if seen.forward is not None:
            return Finding(names, seen.forward, seen.nan, values)
        place = None if names else _first_bad_gradient(model, probe, seen)
    return Finding(names, place, False, values)


def _first_bad_gradient(model: nn.Module, probe: _Probe, seen: '_Watch') -> str | None:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    losses = [loss for loss in probe.losses if loss.requires_grad]
    if not losses:
        return None
    gradients = torch.autograd.grad(sum(losses), [p for _, p in named], allow_unused=True)
    bad = [name for (name, _), g in zip(named, gradients) if g is not None and bool(any_nonfinite([g]))]
    if seen.backward is not None:
        return f'{seen.backward}' + (f' (and so the gradients of {some(bad)})' if bad else '')
    if bad:
        return f'the gradient of {some(bad)} is not finite'
    norm = torch.stack([g.float().norm() for g in gradients if g is not None]).norm()
    return None if bool(norm.isfinite()) else 'the norm of the gradients is not finite, although each of them is'


class _Watch:
    """Hooks that note the first module with a bad output, and the first whose output has a bad gradient."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.forward: str | None = None
        self.backward: str | None = None
        self.nan = False  # infinite values may be meant, as in masks

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(functools.partial(self._look, name))
            for name, module in self.model.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        for tensor in _tensors(output):
            self.nan = self.nan or bool(tensor.isnan().any())
            if self.forward is None and bool(any_nonfinite([tensor])):
                self.forward = f'first in the output of {name} ({type(module).__name__})'
                if any(bool(any_nonfinite([value])) for value in _tensors(inputs)):
                    self.forward = f'first in the input of {name} ({type(module).__name__})'
                bad = [key for key, value in module.named_parameters() if bool(any_nonfinite([value]))]
                self.forward += f', whose {some(bad)} is not finite' if bad else ''
            if tensor.requires_grad and tensor.is_floating_point():
                tensor.register_hook(functools.partial(self._look_back, name, type(module).__name__))

    def _look_back(self, name: str, kind: str, gradient: Tensor) -> None:
        if self.backward is None and bool(any_nonfinite([gradient])):
            self.backward = f'first in the gradient of the output of {name} ({kind})'


def _tensors(node: object, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif depth < 6 and isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value, depth + 1)
    elif depth < 6 and isinstance(node, (list, tuple)):
        for value in node:
            yield from _tensors(value, depth + 1)


def _bad_inputs(batch: object) -> list[str]:
    """Image files, or places in the batch, whose tensors are not finite."""
    files = image_files(batch)
    bad = []
    for number, tensor in enumerate(_tensors(batch)):
        if bool(any_nonfinite([tensor])):
            bad.append(files[number] if number < len(files) else f'tensor {number} of the batch')
    for sample in _samples(batch):
        boxes = getattr(getattr(sample, 'gt_instances', None), 'bboxes', None)
        boxes = getattr(boxes, 'tensor', boxes)
        if isinstance(boxes, Tensor) and bool(any_nonfinite([boxes])):
            bad.append(f'the boxes of {sample.metainfo.get("img_path", "an image")}')
    return bad


def image_files(batch: object) -> list[str]:
    """The files of the images in a batch, as far as its samples name them."""
    files = [sample.metainfo.get('img_path') for sample in _samples(batch)]
    return [str(file) for file in files if file]


def _samples(node: object, depth: int = 0) -> Iterator:
    if hasattr(node, 'metainfo') and isinstance(node.metainfo, dict):
        yield node
    elif depth < 4 and isinstance(node, (dict, list, tuple)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _samples(value, depth + 1)


def _sentence(entry: dict, finding: Finding) -> str:
    images = image_files(entry['batch'])
    return f'{finding}' + (f', images {some(images, 8)}' if images else '')


# ------------------------------------------------------------------------------------------------ of a run


def _in_any_process(flag: Tensor) -> bool:
    if get_world_size() > 1:
        flag = flag.float()
        all_reduce(flag, op='max')
    return bool(flag)


def _none_is_false(flag: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if flag is None else flag.to(like.device)


def _by_epoch(runner: Runner) -> bool:
    return not hasattr(runner.train_loop, 'dataloader_iterator')


def _replay_command(runner: Runner, file: str) -> str:
    return f'{runnable("replay")} {shlex.join([_config(runner), file])}'


def _config(runner: Runner) -> str:
    """The config that the run has dumped."""
    name = runner.cfg.filename
    return str(Path(runner.work_dir) / (Path(name).name if name else f'{runner.timestamp}.py'))


def _advice(runner: Runner) -> str:
    last = runner.message_hub.runtime_info.get('last_ckpt')
    start = f'The last checkpoint, {last}, is finite. ' if last else ''
    return (
        f'{start}A lower learning rate, a longer warm-up or clip_grad in optim_wrapper help where training diverges; '
        '--on-nonfinite skip leaves out single bad steps'
    )


# ------------------------------------------------------------------------------------------------ replaying


def replay(model: nn.Module, content: dict, wrapper: OptimWrapper) -> Iterator[tuple[dict, Finding]]:
    """Compute the batches of a saved step again, with ``model`` in the state that it began from."""
    model.load_state_dict(content['state_dict'])
    model.train()
    for entry in content['batches']:
        entry = {**entry, 'rng': unpack(entry['rng'])}
        yield entry, find(model, entry, wrapper)


def any_nonfinite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether a number among all of these is NaN or infinite, as a tensor: nothing waits for the device."""
    largest = []
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        tensor = tensor.detach()
        if tensor.is_sparse:
            tensor = tensor.coalesce().values()
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault(tensor.device, []).append(tensor)
    for device, group in groups.items():
        if device.type == 'cpu':  # where a norm of this kind takes ten times as long
            extremes = [extreme for tensor in group for extreme in tensor.aminmax()]
        else:
            extremes = largest_magnitudes(group)
        largest.append(torch.stack([extreme.float() for extreme in extremes]).abs().max())
    if not largest:
        return torch.zeros((), dtype=torch.bool)
    bad = [~value.isfinite() for value in largest]
    return torch.stack([value.to(bad[0].device) for value in bad]).any()
