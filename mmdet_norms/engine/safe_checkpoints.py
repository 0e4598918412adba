"""Going on from what is there."""

import bisect

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

_VALIDATED = 'validated'


@HOOKS.register_module()
class PendingValidationHook(Hook):
    """On resuming, first the validation that the checkpoint was saved before.

    A checkpoint is written before the validation of its epoch or iteration. A run that is killed between the two and
    goes on with the next epoch would never know that this was the best one, and schedulers that wait for a metric
    would miss a step.
    """

    priority = 'LOWEST'  # when all others are ready to train

    def before_val_epoch(self, runner: Runner) -> None:
        """Note what is validated; whoever saves after it has it."""
        if isinstance(runner._train_loop, BaseLoop):  # asking for runner.train_loop would build it
            runner.message_hub.update_info(_VALIDATED, _position(runner._train_loop))

    def before_train(self, runner: Runner) -> None:
        """Validate if that is due and was not done."""
        loop = runner.train_loop
        if loop.iter == 0 or runner.val_loop is None or not _is_due(loop):
            return
        if runner.message_hub.runtime_info.get(_VALIDATED) != _position(loop):
            runner.logger.info('Validation first: the checkpoint was saved before it.')
            runner.val_loop.run()


def _position(loop: BaseLoop) -> int:
    return loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch


def _is_due(loop: BaseLoop) -> bool:
    """As the loops of mmengine decide after an epoch or iteration."""
    now = _position(loop)
    end = loop.max_iters if isinstance(loop, IterBasedTrainLoop) else loop.max_epochs
    interval = loop.dynamic_intervals[bisect.bisect(loop.dynamic_milestones, now + 1) - 1]
    return now >= loop.val_begin and (now % interval == 0 or now == end)
