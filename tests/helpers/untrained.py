"""Work dirs as ``train`` leaves them, of models with random weights: there in a second, and they do detect."""

from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope


def write_run(work_dir: Path, config: Path, seed: int = 0, name: str = 'epoch_1.pth', **changes) -> Path:
    """Write config, log and a checkpoint into ``work_dir``; return it.

    Args:
        changes: of the config, ``__`` for a dot.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    log = work_dir / '20260101_000000' / 'vis_data'
    log.mkdir(parents=True, exist_ok=True)
    cfg.dump(log / 'config.py')
    (log / 'scalars.json').write_text('{"lr": 0.1, "loss": 1.0, "step": 1}\n')
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    content = dict(meta=dict(epoch=1, iter=1), state_dict=model.state_dict(), message_hub={})
    torch.save(content, work_dir / name)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / name))
    return work_dir
