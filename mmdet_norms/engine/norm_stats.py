"""A look inside the norms while they train: what each layer sees, forward and backward, every few iterations."""

import json
import warnings
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import is_seq_of
from mmengine.visualization import LocalVisBackend
from torch import Tensor, nn

from ..choice import evenly, fitting
from ..errors import UserError
from ..kernels import map_ops
from ..layers import CBN
from ..layers._args import is_count
from ..layers._contract import contract_of, is_norm_class
from ..layers._replay import in_backward
from .norm_quantities import WITHOUT_CHANNELS, Past, Seen, as_map, first_group, is_synchronized, parts, summary
from .optim import wrappers_of
from .together import model_of

NORM_STATS = 'norm_stats.json'
"""In ``vis_data`` of a run: a line of JSON for each look."""


@HOOKS.register_module()
class NormStatsHook(Hook):
    """Record what norm layers see in training: batch statistics, those of the backward pass, and a method's own.

    ``docs/analyze.md`` defines each quantity; ``tools/analyze.py stats`` draws them. For some channels of each layer
    they go to ``vis_data/norm_stats.json`` of the run, and summed up over all channels to mmengine's visualizer
    (TensorBoard and the like; of its JSON log, which other tools read as losses and results, they stay out): BNET's
    energy for each tap, AN's weights for each component.

    Training is the same bit by bit. Between looks nothing is hooked. A look reads each chosen map twice and keeps its
    input until the backward pass. For a CBN, the inputs of its convolution are kept for the ``buffer_num`` iterations
    before a look, and each is convolved once more.

    A layer that is called several times in an iteration (a head on several levels) is looked at in its first call. With
    several processes it is the first one's batch, and the batch of all for a synchronized norm.

    Args:
        interval: iterations between two looks. Default 50.
        layers: names of norm layers in the model, with ``*`` and ``?``; one or several. Default: eight, evenly
            spread; of the norms that are not batch norm, where there are such.
        channels: for how many channels of each layer values are kept, evenly spread from the first on; or their
            numbers. Default 8.

    Raises:
        UserError: an argument that is none of that; names that fit no norm layer.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        interval: int = 50,
        layers: str | Sequence[str] | None = None,
        channels: int | Sequence[int] = 8,
    ) -> None:
        if not is_count(interval):
            raise UserError(f'NormStatsHook: interval={interval!r} must be a number of iterations, at least 1')
        named = [layers] if isinstance(layers, str) else layers
        if named is not None and not (named and is_seq_of(named, str)):
            raise UserError(f"NormStatsHook: layers={layers!r} must be names of layers, such as '*.layer1.*.bn1'")
        numbers = channels if isinstance(channels, (list, tuple)) else []
        if not (is_count(channels) or (numbers and all(is_count(number, 0) for number in numbers))):
            raise UserError(f'NormStatsHook: channels={channels!r} must be how many, or a list of their numbers')
        self.interval, self.layers, self.channels = interval, named, channels
        self._norms: dict[str, nn.Module] = {}
        self._pasts: dict[str, Past] = {}
        self._seen: dict[str, Seen] = {}
        self._handles: list = []
        self._loss_scale, self._accumulated = 1.0, 1
        self._looks = False

    def before_train(self, runner: Runner) -> None:
        """Choose the layers."""
        model = model_of(runner)
        self._norms = chosen(model, self.layers)
        self._pasts = {
            name: Past(deque(maxlen=max(norm.buffer_num, 1)))
            for name, norm in self._norms.items()
            if isinstance(norm, CBN)
        }
        if not is_main_process():  # whose batches count for synchronized norms only
            self._norms = {name: norm for name, norm in self._norms.items() if is_synchronized(norm)}
            self._pasts = {}
        runner.logger.info(f'NormStatsHook: {", ".join(self._norms)}')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Hook the layers if this iteration is looked at; a CBN also shortly before."""
        self._release()
        ahead = -(runner.iter + 1) % self.interval
        self._looks = ahead == 0
        if self._looks:
            self._loss_scale, self._accumulated = _loss_scale(runner.optim_wrapper), _accumulated(runner.optim_wrapper)
        for name, norm in self._norms.items():
            past = self._pasts.get(name)
            if self._looks:
                self._handles.append(norm.register_forward_pre_hook(partial(self._before, name)))
                self._handles.append(norm.register_forward_hook(partial(self._after, name)))
            elif past is not None and ahead <= past.calls.maxlen:
                self._handles.append(norm.register_forward_pre_hook(partial(self._remember, name)))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Write what was seen."""
        looked, seen = self._looks, self._seen
        self._release()
        if not looked:
            return
        step, layers, scalars = runner.iter + 1, {}, {}
        for name, norm in self._norms.items():
            everywhere = norm.training and is_synchronized(norm)
            if name not in seen and not everywhere:
                continue
            look = seen.get(name) or Seen.nothing(norm)
            values = look.values(self._loss_scale, everywhere)
            of_loss = dict(images=look.images, accumulated=self._accumulated)
            totals = {key: number for key in values if (number := summary(key, values[key])) is not None}
            layers[name] = dict(type=contract_of(norm).kind, **of_loss, **self._line(values, totals))
            scalars |= {f'norm_stats/{name}/{key}': number for key, number in (totals | parts(values)).items()}
        if is_main_process():
            self._write(runner, step, layers, scalars)

    def after_train(self, runner: Runner) -> None:
        """Hold nothing any more."""
        self._release()

    # -------------------------------------------------------------------------------------------- hooks of a layer

    def _before(self, name: str, norm: nn.Module, args: tuple) -> None:
        if in_backward() or not args or args[0].numel() == 0:
            return
        if name not in self._seen:
            self._seen[name] = Seen.of(norm, args[0], self._pasts.get(name))
        elif name in self._pasts:
            self._remember(name, norm, args)

    def _after(self, name: str, norm: nn.Module, args: tuple, y: Tensor) -> None:
        seen = self._seen.get(name)
        if seen is None or seen.hooked or not args or not y.requires_grad or args[0].numel() == 0:
            return
        # Reentrant checkpointing has no graph in the first pass: then it is the repetition that has the same input.
        if in_backward() and not torch.equal(_mean(norm, args[0]), seen.mean):
            return
        seen.hooked = True
        y.register_hook(seen.take_gradient)

    def _remember(self, name: str, norm: CBN, args: tuple) -> None:
        if not in_backward() and args and args[0].numel() and norm.training:
            self._pasts[name].take(norm, args[0])

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._looks = [], {}, False

    # -------------------------------------------------------------------------------------------- writing

    def _line(self, values: dict[str, Tensor], totals: dict[str, float]) -> dict:
        count = len(values['mean'])
        if is_count(self.channels):
            kept = sorted({int(i * count / min(self.channels, count)) for i in range(min(self.channels, count))})
        else:
            kept = [number for number in self.channels if number < count]
        of_channels = {
            key: _numbers(value if key in WITHOUT_CHANNELS else value[kept]) for key, value in values.items()
        }
        return dict(channels=kept, **of_channels, all={key: _number(number) for key, number in totals.items()})

    def _write(self, runner: Runner, step: int, layers: dict, scalars: dict) -> None:
        if not layers:
            warnings.warn(
                f'NormStatsHook: no layer was called in iteration {step}: compiled models, and norms that --tune-mode '
                'has made part of their convolutions, cannot be looked at',
                stacklevel=2,
            )
            return
        path = Path(runner.log_dir) / 'vis_data' / NORM_STATS
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'a', encoding='utf-8') as file:  # a killed process leaves half a line, which readers skip
            file.write(json.dumps(dict(step=step, layers=layers), allow_nan=False, separators=(',', ':')) + '\n')
        for backend in runner.visualizer._vis_backends.values():
            if not isinstance(backend, LocalVisBackend):
                backend.add_scalars(scalars, step)


_PLAIN = ('BN', 'FrozenBN')


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model by name, without those that are part of another one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f'{outer}.') for outer in found)
        if is_norm_class(type(module)) and not inside:
            found[name] = module
    return found


def chosen(model: nn.Module, patterns: Sequence[str] | None, most: int = 8) -> dict[str, nn.Module]:
    """The norm layers whose names fit one of the patterns; without any, ``most`` of them, evenly spread.

    Of a model with other norms than batch norm these are of the others, which is what it is trained for.

    Raises:
        UserError: a pattern that fits none; no norm layers.
    """
    norms = norm_layers(model)
    if not norms:
        raise UserError('NormStatsHook: the model has no norm layers')
    if patterns is None:
        others = [name for name, norm in norms.items() if contract_of(norm).kind not in _PLAIN]
        names = others or list(norms)
        return {name: norms[name] for name in evenly(names, most)}
    names = fitting(
        list(norms),
        patterns,
        lambda pattern, close: (
            f'NormStatsHook: layers={pattern!r} fits none of the {len(norms)} norm layers; their '
            f'names are such as {", ".join(close[:3])}'
        ),
    )
    return {name: norms[name] for name in names}


def _mean(norm: nn.Module, x: Tensor) -> Tensor:
    return map_ops.moments(first_group(norm, as_map(norm, x.detach())))[0]


def _accumulated(wrapper: object) -> int:
    """By which the loss of this iteration is divided, because gradients of several batches are added."""
    scaled = [one.scale_loss(torch.ones(())) for one in wrappers_of(wrapper) if isinstance(one, OptimWrapper)]
    return round(1 / float(scaled[0])) if scaled else 1


def _loss_scale(wrapper: object) -> float:
    """By which a loss scaler multiplies the loss of this iteration."""
    scalers = [scaler for one in wrappers_of(wrapper) if (scaler := getattr(one, 'loss_scaler', None)) is not None]
    return float(scalers[0].get_scale()) if scalers else 1.0


def _number(value: float) -> float | None:
    return float(f'{value:.6g}') if abs(value) < float('inf') else None


def _numbers(values: Tensor) -> list:
    nested = values.double().cpu().tolist()

    def plain(value):
        return [plain(entry) for entry in value] if isinstance(value, list) else _number(value)

    return plain(nested)
