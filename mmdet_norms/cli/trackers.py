"""``--tensorboard``, ``--wandb`` and ``--mlflow``: mmengine's logging backends by one word each."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from mmdet_norms.engine.trackers import MLflowTracker, TensorboardTracker, WandbTracker
from mmdet_norms.entries import class_of
from mmdet_norms.errors import UserError
from mmdet_norms_start.requirements import optional

from .common import add_hook

_TRACKERS = {'tensorboard': TensorboardTracker, 'wandb': WandbTracker, 'mlflow': MLflowTracker}
_WHERE = {
    'tensorboard': 'write curves for TensorBoard into the folder tensorboard of the work dir',
    'wandb': 'send curves and config to Weights & Biases (WANDB_MODE=offline: into the work dir)',
    'mlflow': 'write curves, config and results to MLflow (MLFLOW_TRACKING_URI, or the current folder)',
}


def add_tracker_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each."""
    for name, where in _WHERE.items():
        parser.add_argument(f'--{name}', action='store_true', help=where)


def use_trackers(cfg: Config, args: argparse.Namespace) -> None:
    """Add the backends that are asked for; one that the config has keeps its arguments. Call it when resuming is known.

    Raises:
        UserError: a package is missing.
    """
    asked = [name for name in _TRACKERS if getattr(args, name)]
    for name in asked:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'--{name} needs a package that is not installed: pip install {optional(name)}')
    if not asked:
        return
    if not cfg.get('visualizer'):
        cfg.visualizer = dict(type='DetLocalVisualizer', name='visualizer')
    backends = cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')]
    backends = [dict(entry) for entry in (backends if isinstance(backends, (list, tuple)) else [backends])]
    for name in asked:
        tracker = _TRACKERS[name]
        own = next((entry for entry in backends if class_of(entry, VISBACKENDS) in tracker.__mro__[:3]), None)
        if own is None:
            backends.append(own := {})
        own.update(_merged(_arguments(cfg, args, name), own), type=tracker.__name__)
    cfg.visualizer.vis_backends = backends
    add_hook(cfg, 'TrackersHook')


def _arguments(cfg: Config, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A project for each config, a run for each work dir."""
    project = Path(cfg.filename or args.config).stem
    run = os.path.basename(os.path.abspath(cfg.work_dir))
    resume = bool(cfg.get('resume'))
    match name:
        case 'tensorboard':
            return dict(save_dir=os.path.join(cfg.work_dir, 'tensorboard'))
        case 'wandb':
            return dict(save_dir=cfg.work_dir, resume=resume, init_kwargs=dict(project=project, name=run))
        case _:
            return dict(save_dir=cfg.work_dir, resume=resume, exp_name=project, run_name=run)


def _merged(new: dict, own: dict) -> dict:
    """What the config says goes before, in the dicts in it, too."""
    both = {key: _merged(value, own[key]) for key, value in new.items() if isinstance(own.get(key), dict)}
    return {**new, **own, **both}
