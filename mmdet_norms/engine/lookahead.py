"""Lookahead as a runner needs it. Imported where it is asked for, since pytorch-optimizer may not be there."""

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
        """Count from 0; each parameter has an entry, empty until it is trained."""
        group.setdefault('counter', 0)
        for p in group['params']:
            self.state[p]  # a defaultdict

    def step(self, closure: Callable | None = None) -> Tensor | None:
        """A step of the optimizer inside and, every k steps, of the slow weights."""
        for group in self.param_groups:
            for p in group['params']:
                if p.requires_grad and 'slow_params' not in self.state[p]:
                    self.state[p]['slow_params'] = p.detach().clone()
        return super().step(closure)

    def load_state_dict(self, state: dict) -> None:
        """Go on from the state of a Lookahead.

        Raises:
            UserError: the state is another optimizer's.
        """
        if 'lookahead_state' not in state:
            raise UserError(
                'the checkpoint has the state of another optimizer than Lookahead (RangerLars): resume with the '
                'optimizer of the run that wrote it, or start from its weights with load_from'
            )
        super().load_state_dict(state)
