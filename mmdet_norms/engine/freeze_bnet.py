"""BNET's kernels stop training at an epoch, as in the published ImageNet recipe of ResNet-101."""

import functools

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..errors import UserError
from ..layers import BNET
from .together import model_of


@HOOKS.register_module()
class FreezeBNETHook(Hook):
    """From an epoch on, the depthwise kernels and biases of every BNET stay as they are: no step, decay or momentum.

    Their gradients are dropped before each step of the optimizer, and before gradients are clipped. ``requires_grad``
    is left alone: DistributedDataParallel has planned with these gradients and would wait for them. A resumed run goes
    on right, because only the epoch counts. Averaged weights (EMA) still move towards the fixed ones.

    The published code turns ``requires_grad`` off in the epochs after number 60, counted from 0; in torch of its time
    momentum and weight decay moved the weights all the same, which this hook does not repeat.

    Args:
        epoch: how many epochs they train. Default 61, as published, of 100.

    Raises:
        UserError: ``epoch`` is no whole number of at least 0; a training that counts iterations.
    """

    def __init__(self, epoch: int = 61) -> None:
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise UserError(f'FreezeBNETHook: epoch={epoch!r} must be a whole number of at least 0')
        self.epoch = epoch
        self._frozen: list[nn.Parameter] = []

    def before_train(self, runner: Runner) -> None:
        """Find the kernels and biases, and stand in front of the optimizer's step."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            raise UserError(
                f'FreezeBNETHook: epoch={self.epoch} of a training in iterations, which has no epochs; write '
                "train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=...), or leave the hook out"
            )
        model = model_of(runner)
        self._frozen = [value for m in model.modules() if isinstance(m, BNET) for value in m.bnconv.parameters()]
        if not self._frozen:
            runner.logger.warning('FreezeBNETHook: the model has no BNET, so nothing will be frozen')
        elif self.epoch >= runner.max_epochs:
            runner.logger.warning(
                f'FreezeBNETHook: epoch={self.epoch} is never reached, the training ends after {runner.max_epochs}'
            )
        wrapper = runner.optim_wrapper
        for one in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            self._stand_before(one, runner)

    def _stand_before(self, wrapper: OptimWrapper, runner: Runner) -> None:
        step = wrapper.step

        @functools.wraps(step)
        def step_without_them(**kwargs) -> None:
            for value in self._frozen if runner.epoch >= self.epoch else ():
                value.grad = None
            step(**kwargs)

        wrapper.step = step_without_them
