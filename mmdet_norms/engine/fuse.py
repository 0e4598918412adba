"""Test the fused model: the same numbers, as they are when deployed."""

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..deploy import fuse, is_fused
from .together import model_of


@HOOKS.register_module()
class FuseHook(Hook):
    """Fuse the model (:func:`mmdet_norms.fuse`) for each test; recognize checkpoints of fused models.

    Such a checkpoint (``tools/fuse.py CONFIG CKPT OUT.pth``) loads into a fused model only, so the runner's model is
    fused before it is loaded. ``tools/test.py`` adds the hook to every run; for mmdet's own:
    ``custom_hooks=[dict(type='FuseHook')]``.

    Args:
        fuse: fuse the model in tests. False only recognizes the checkpoints. Default True.

    Raises:
        ValueError: training from the checkpoint of a fused model.
    """

    # A test begins after EMAHook has put its averages into the model, which is when they can be folded.
    priority = 'VERY_LOW'

    def __init__(self, fuse: bool = True):
        self.fuse = fuse
        self._unfused: nn.Module | None = None

    def before_run(self, runner: Runner) -> None:
        """Have a checkpoint looked at before any other hook loads it."""
        if not any(isinstance(hook, _FusedFirst) for hook in runner.hooks):
            runner.register_hook(_FusedFirst(), priority='VERY_HIGH')

    def before_test_epoch(self, runner: Runner) -> None:
        """Put a fused copy in the model's place."""
        if self.fuse:
            self._unfused = model_of(runner)
            fused = fuse(self._unfused)
            _set_model(runner, fused)
            runner.logger.info(f'Testing the fused model: {fused.fuse_report}')

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Put the model back."""
        if self._unfused is not None:
            _set_model(runner, self._unfused)
            self._unfused = None


class _FusedFirst(Hook):
    """The part of :class:`FuseHook` that comes before EMAHook: its copy of the model loads the checkpoint, too."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called before the weights go into the model."""
        if not is_fused(checkpoint):
            return
        if isinstance(runner._train_loop, BaseLoop):
            raise ValueError(
                f'load_from={runner._load_from!r} is the checkpoint of a fused model, which has no norms to train; '
                'start from the checkpoint that it was made from'
            )
        fuse(model_of(runner), inplace=True)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # it copied the model before
                hook.before_run(runner)


def _set_model(runner: Runner, model: nn.Module) -> None:
    if is_model_wrapper(runner.model):
        runner.model.module = model
    else:
        runner.model = model
