"""Optimizers as a runner needs them. Imported where one is asked for, since pytorch-optimizer may not be there."""

from collections.abc import Callable

import pytorch_optimizer
from torch import Tensor

from ..errors import UserError


class Lookahead(pytorch_optimizer.Lookahead):
    """pytorch-optimizer's, whose slow weights begin where training does.

    Those of pytorch-optimizer are copied when it is built. mmengine's runner builds the optimizer first and then
    initializes the model and loads ``load_from``, so that the first synchronization would pull the loaded weights
    half way back to random ones. Here they are copied in front of the first step.

    Evaluation and checkpoints see the fast weights, which are the slow ones every ``k`` steps.

    Args:
        optimizer, k, alpha: as in pytorch-optimizer.
    """

    def init_group(self, group: dict, **kwargs) -> None:
        """Note k and alpha where a checkpoint has the options; the rest begins with the first step."""
        group.update(lookahead_k=self.k, lookahead_alpha=self.alpha)

    def step(self, closure: Callable | None = None) -> Tensor | None:
        """A step of the optimizer inside and, every k steps, of the slow weights."""
        for group in self.param_groups:
            group.setdefault('counter', 0)
            for p in group['params']:
                if p.requires_grad and 'slow_params' not in self.state[p]:
                    self.state[p]['slow_params'] = p.detach().clone()
        return super().step(closure)

    def state_dict(self) -> dict:
        """That of the optimizer inside, as torch's have it, with slow weights beside its own states."""
        inner = self.optimizer.state_dict()
        states = {number: dict(state) for number, state in inner['state'].items()}
        for number, p in enumerate(self._params()):
            if self.state[p]:
                states.setdefault(number, {}).update(self.state[p])
        return {**inner, 'state': states}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state; as in torch, its options go before those of the config."""
        inner, slow = {}, {}
        for number, values in state['state'].items():
            inner[number] = {key: value for key, value in values.items() if key != 'slow_params'}
            slow[number] = values.get('slow_params')
        self.optimizer.load_state_dict({**state, 'state': inner})
        self.k, self.alpha = (self.param_groups[0][f'lookahead_{key}'] for key in ('k', 'alpha'))
        self.state.clear()
        for number, p in enumerate(self._params()):
            if slow.get(number) is not None:
                self.state[p]['slow_params'] = slow[number].to(p.device, p.dtype, copy=True)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group['params']]


class AdaHessian(pytorch_optimizer.AdaHessian):
    """pytorch-optimizer's, which says so where nobody computes the Hessian's diagonal."""

    def step(self, closure: Callable | None = None, hessian: list[Tensor] | None = None) -> Tensor | None:
        """Update with the diagonal of the wrapper or, after ``loss.backward(create_graph=True)``, with its own.

        Raises:
            UserError: there is neither.
        """
        grads = [p.grad for group in self.param_groups for p in group['params'] if p.grad is not None]
        renews = self.param_groups[0].get('step', 0) % self.update_period == 0
        if hessian is None and closure is None and renews and not any(grad.requires_grad for grad in grads):
            raise UserError(
                "optim_wrapper.optimizer.type='AdaHessian' needs optim_wrapper.type='SecondOrderOptimWrapper', which "
                'differentiates twice'
            )
        return super().step(closure, hessian)
