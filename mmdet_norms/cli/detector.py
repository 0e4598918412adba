"""A trained detector by config and checkpoint, for the commands that compute with it and start no runner."""

import argparse

from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from mmdet_norms.checkpoints.fit import fit
from mmdet_norms.checkpoints.read import Checkpoint
from mmdet_norms.deploy import fuse, is_fused

from .common import UserError
from .weights import explain_misfit


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
