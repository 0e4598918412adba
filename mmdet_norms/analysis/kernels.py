"""What BNET's kernels have learned, from a checkpoint; and what they make of an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch import Tensor

from ..checkpoints.read import read_checkpoint
from ..engine.inference import Inference, displayable
from ..engine.results import write_json
from ..errors import UserError
from ..experiments.detections import EvaluatedRun
from ..layers import BNET
from .figures import heat, sheet, short, stage, styled, write
from .runs import load_norms

_WEIGHT = '.bnconv.weight'
_RESPONSES = 'RdBu_r'


@dataclass(frozen=True)
class Stage:
    """The BNETs of a stage of a model.

    Args:
        name: of the stage.
        magnitude: ``(k, k)``: the mean over layers and channels of each tap's absolute value.
        energy: ``(k, k)``: of its square, as a share of the whole.
        layers: how many.
    """

    name: str
    magnitude: np.ndarray
    energy: np.ndarray
    layers: int


def kernels_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> kernels ``(C, k, k)`` of a state dict."""
    return {
        name.removesuffix(_WEIGHT): weight.detach().double()[:, 0]
        for name, weight in state.items()
        if name.endswith(_WEIGHT) and weight.dim() == 4 and weight.shape[1] == 1
    }


def stages_of(kernels: Mapping[str, Tensor]) -> list[Stage]:
    """By stage of the model, in its order; see docs/analyze.md."""
    grouped: dict[tuple[str, int], list[Tensor]] = {}
    for layer, weight in kernels.items():
        grouped.setdefault((stage(layer), weight.shape[-1]), []).append(weight)
    found = []
    for (name, _), weights in grouped.items():
        rows = torch.cat(weights)
        energy = rows.square().mean(0)
        found.append(Stage(name, rows.abs().mean(0).numpy(), (energy / energy.sum()).numpy(), len(weights)))
    return found


def draw(runs: Mapping[str, EvaluatedRun], out: Path) -> list[Path]:
    """``kernels``: a row for each run, a panel for each stage.

    Raises:
        UserError: a run has no BNET.
    """
    found = {}
    for name, run in runs.items():
        found[name] = stages_of(kernels_of(read_checkpoint(run.checkpoint).state_dict))
        if not found[name]:
            raise UserError(f'{run.checkpoint} has no BNET: nothing in it ends in {_WEIGHT} (a fused model has none)')
    with styled():
        figure, axes = sheet(len(found), max(map(len, found.values())), width=1.6, height=1.75, above=0.3)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, (name, stages) in zip(axes, found.items()):
            for axis, own in zip(row, stages):
                axis.set_axis_on()
                heat(axis, own.magnitude, vmin=0)
                centre = own.energy[len(own.energy) // 2, len(own.energy) // 2]
                axis.set_title(own.name, loc='left')
                axis.set_xlabel(f'off the centre: {1 - centre:.1%} of energy', fontsize=6.5)
            if len(found) > 1:
                row[0].set_ylabel(name)
        figure.suptitle('mean |kernel| of each tap', x=0.01, ha='left', fontsize=8)
        paths = write(figure, out, 'kernels')
    numbers = {
        name: {
            own.name: dict(layers=own.layers, magnitude=own.magnitude.tolist(), energy=own.energy.tolist()) for own in s
        }
        for name, s in found.items()
    }
    write_json(out / 'kernels.json', numbers)
    return [*paths, out / 'kernels.json']


@dataclass(frozen=True)
class Response:
    """One channel of one BNET on an image.

    Args:
        layer: its name.
        channel: number.
        before: ``(H, W)``: the normalized map.
        kernel: ``(k, k)``.
        after: ``(H, W)``: what the kernel and its bias make of it.
    """

    layer: str
    channel: int
    before: np.ndarray
    kernel: np.ndarray
    after: np.ndarray


@torch.no_grad()
def responses_of(norm: BNET, x: Tensor, y: Tensor, layer: str, number: int) -> list[Response]:
    """Of the channels that the neighbourhood changes most: by the deviation of what taps off the centre add."""
    bn, kernels = norm.bn, norm.bnconv.weight
    view = (1, -1, 1, 1)
    before = (x - bn.running_mean.view(view)) / (bn.running_var.view(view) + bn.eps).sqrt()
    middle = kernels.shape[-1] // 2
    centre = kernels[:, 0, middle, middle].view(view) * before
    added = (y - centre)[0].flatten(1).std(1, correction=0)
    moving = before[0].flatten(1).std(1, correction=0) > 1e-3  # of a dead channel there is nothing to see
    order = torch.where(moving, added, torch.zeros_like(added)).argsort(descending=True)[:number]
    return [
        Response(layer, int(c), before[0, c].cpu().numpy(), kernels[c, 0].cpu().numpy(), y[0, c].cpu().numpy())
        for c in order
    ]


def draw_responses(
    run: EvaluatedRun, image: str, out: Path, layers: list[str] | None = None, channels: int = 2
) -> list[Path]:
    """``responses``: an image, and maps before and after BNET: of the last layer of each stage, or of those named.

    Raises:
        UserError: no BNET, no such layer, or an image that cannot be read.
    """
    model, norms = load_norms(run, BNET, layers, 6, ' whose responses could be drawn')
    init_default_scope(run.cfg.get('default_scope') or 'mmdet')
    try:
        inference = Inference(model, run.cfg)
        read = inference.read(image)
    except UserError:
        raise
    except Exception as error:  # which one is the reader's choice
        raise UserError(f'--image {image}: cannot be read ({error})') from error
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(_: BNET, args: tuple, y: Tensor, name: str) -> None:
        seen.setdefault(name, (args[0], y.clone()))  # what comes after may work in place

    handles = [norms[name].register_forward_hook(partial(look, name=name)) for name in norms]
    try:
        with torch.no_grad():
            model.test_step(pseudo_collate([read.prepared]))
    finally:
        for handle in handles:
            handle.remove()
    found = {name: responses_of(norms[name], *seen[name], name, channels) for name in norms if name in seen}
    return _responses(found, displayable(read.pixels), channels, out)


def _responses(found: Mapping[str, list[Response]], pixels: np.ndarray, channels: int, out: Path) -> list[Path]:
    rows = list(found.values())
    side = pixels.shape[0] / pixels.shape[1]
    with styled():
        figure, axes = sheet(
            len(rows) + 1, 3 * channels, width=1.3, height=1.3 * min(max(side, 0.5), 1.6) + 0.28, above=0
        )
        for axis in axes.flat:
            axis.set_axis_off()
        axes[0, 0].imshow(pixels)
        axes[0, 0].set_title('image', loc='left')
        for row, (layer, own) in zip(axes[1:], found.items()):
            for number, response in enumerate(own):
                panels = row[3 * number : 3 * number + 3]
                for axis, values, said in zip(
                    panels,
                    (response.before, response.kernel, response.after),
                    (f'channel {response.channel}, before', 'kernel', 'after'),
                ):
                    limit = max(float(np.percentile(np.abs(values), 99.5)), 1e-9)
                    axis.imshow(values, cmap=colormaps[_RESPONSES], vmin=-limit, vmax=limit)
                    axis.set_title(said, loc='left', fontsize=6.5)
            row[0].set_title(f'{short(layer)}\nchannel {own[0].channel}, before', loc='left', fontsize=6.5)
        return write(figure, out, 'responses')
