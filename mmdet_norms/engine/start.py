"""Taking in the checkpoint that a run starts from."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .precise_bn import precise_statistics, take_training_statistics


@HOOKS.register_module()
class StartHook(Hook):
    """Take in a checkpoint of whatever form, and none of its code. ``tools/train.py`` and ``test.py`` add it.

    * A file of bare weights gets the entry ``state_dict`` that other hooks (EMA) look for.
    * The text of a config in ``meta`` is taken out: mmengine would run it on resuming, only to compare numbers of GPUs.
    * Of a checkpoint with precise statistics (PreciseBNHook), training goes on with its own.

    Args:
        partial: of a checkpoint that does not fit, what is started anew, for ``results.json``; None if it fits.
    """

    priority = 'VERY_HIGH'  # before hooks that look into the checkpoint

    def __init__(self, partial: dict | None = None):
        self.partial = partial
        self.precise: dict | None = None  # what the checkpoint says of its running statistics

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called before the weights go into the model."""
        if 'state_dict' not in checkpoint:
            weights = dict(checkpoint)
            checkpoint.clear()
            checkpoint['state_dict'] = weights
        meta = checkpoint.get('meta')
        if isinstance(meta, dict):
            meta.pop('config', None)
        self.precise = precise_statistics(checkpoint)
        if runner._resume:
            take_training_statistics(checkpoint)
        elif self.precise:
            runner.logger.info(
                f'The running statistics of the checkpoint are precise: those of {self.precise["images"]} images '
                '(--precise-bn)'
            )
