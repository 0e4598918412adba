"""A trained detector by config and checkpoint, for the commands that compute with it and start no runner."""

import argparse

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_norms.checkpoints.fit import fit
from mmdet_norms.checkpoints.read import Checkpoint
from mmdet_norms.deploy import fuse, is_fused
from mmdet_norms.placement import PLACEMENTS

from .common import UserError, add_geometry_argument, add_threads_argument, load_config, require_checkpoint
from .config_checks import config_problems, require_none
from .options import add_option_arguments
from .weights import explain_misfit


def add_detector_arguments(parser: argparse.ArgumentParser, reads: tuple[str, ...], data_root: str) -> None:
    """What says which detector it is, and what :func:`detector_config` reads besides.

    Args:
        reads: the splits that a ``--data-root`` must have.
        data_root: what that is good for.
    """
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('checkpoint', help='checkpoint file or URL, of the trained or of the fused model')
    parser.add_argument(
        '--norm', metavar='NAME', help=f'the norms that the model was trained with: {", ".join(PLACEMENTS)}'
    )
    add_geometry_argument(parser)
    parser.add_argument('--data-root', metavar='DIR', help=data_root)
    add_option_arguments(parser)
    add_threads_argument(parser)
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0, reads=reads, copies=None)


def detector_config(args: argparse.Namespace) -> Config:
    """The config of :func:`add_detector_arguments`; its default scope becomes the current one."""
    cfg = load_config(args)
    require_none(config_problems(cfg, ()))
    require_checkpoint(args.checkpoint, 'CKPT')
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    return cfg


def load_detector(cfg: Config, args: argparse.Namespace, checkpoint: Checkpoint, fused: bool) -> nn.Module:
    """The model of ``cfg`` with the weights of a checkpoint, of the trained or of the fused model.

    Args:
        cfg: as ``load_config`` gives it; its default scope is the current one.
        args: the command line, which messages speak of.
        checkpoint: that of ``args.checkpoint``.
        fused: fold the norms into the convolutions. A checkpoint of a fused model gives a fused one either way.

    Raises:
        UserError: the weights are not those of this model. Strictly where it counts: of a detector with weights that
            nobody trained, no detections and no export are of use.
    """
    model = MODELS.build(cfg.model)
    already = is_fused(checkpoint.content)
    if already:
        model = fuse(model, inplace=True)
    found = fit(model, checkpoint.state_dict)
    if not found:
        raise UserError(explain_misfit(found, cfg, args, checkpoint, 'CKPT'))
    if found.unused:
        print(f'not used: {len(found.unused)} entries of the checkpoint, e.g. {found.unused[0]}')
    return fuse(model, inplace=True) if fused and not already else model
