"""The optimizer wrapper of AdaHessian: gradients, and the Hessian's diagonal, without graphs that stay in memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, all_reduce_params, broadcast, get_world_size
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointFunction

from ..compat.torch_internals import custom_functions, is_once_differentiable
from ..errors import UserError, some
from ..layers import contract_of

_SEED = 'hessian_seed'  # of this step; in the first group, which is saved with a checkpoint amid an accumulation
_OTHERS = "take another optimizer, such as optim_wrapper.optimizer.type='AdamW' or 'RangerLars'"
# What torch says where there is no second derivative, and what to say of it.
_SAID_BY_TORCH = {
    'support double backward': 'compiled code, which is differentiable once only: leave compile out of the config',
    'derivative for aten': 'an operator of torch that is differentiable once only',
    "derivative for 'aten": 'an operator of torch that is differentiable once only',
}


class SecondOrderError(UserError):
    """A model, or a way to train it, for which AdaHessian would compute something else than the Hessian."""

    everywhere = True  # raised in all processes, so that one of them says it


@OPTIM_WRAPPERS.register_module()
class SecondOrderOptimWrapper(OptimWrapper):
    r"""For optimizers that take a Hessian diagonal, as :func:`AdaHessian`; chosen by itself where one is named.

    The diagonal is Hutchinson's estimate :math:`z \odot Hz` with random signs z, the mean of the optimizer's
    ``num_samples``, in each of its ``update_period`` steps; :math:`Hz` is a second backward pass through the first.
    Gradients are kept without their graph, so nothing of a step outlives it.

    All images of a step count as one batch: the signs are the same for the ``accumulative_counts`` batches and in all
    processes, and gradients and diagonal are averaged over both. (With norms that synchronize, each process
    differentiates through all the others, and signs of its own would miss the terms between them.) ``clip_grad``
    clips gradients only.

    Args:
        optimizer, accumulative_counts, clip_grad: as for :class:`mmengine.optim.OptimWrapper`.
        dtype: ``'bfloat16'`` for mixed precision. float16 would need a loss scale, which is not supported.

    Raises:
        SecondOrderError: the model has a layer without second derivative, or a parameter without curvature (of a
            piecewise linear loss), by which the step would be divided.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
        dtype: str | None = None,
    ):
        super().__init__(optimizer, accumulative_counts, clip_grad)
        if dtype not in (None, 'bfloat16'):
            raise UserError(
                f"optim_wrapper.dtype={dtype!r}: with AdaHessian write 'bfloat16', or leave it out for float32 "
                '(float16 needs a loss scale, which would scale the Hessian, too)'
            )
        if not hasattr(optimizer, 'num_samples'):
            raise UserError(
                "optim_wrapper.type='SecondOrderOptimWrapper' is for optimizers that take a Hessian diagonal, such as "
                f"optim_wrapper.optimizer.type='AdaHessian'; this is {type(optimizer).__name__}: leave the type out"
            )
        self.dtype = dtype
        self._named: dict[str, Tensor] = {}  # parameters by name, once the model is known
        self._modules: list[tuple[str, nn.Module]] = []
        self._seen_graph = False

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass: in lower precision if asked for, and without DDP's own averaging of gradients."""
        if is_model_wrapper(model) and not isinstance(model, DistributedDataParallel):
            raise SecondOrderError(
                f'AdaHessian cannot be trained in {type(model).__name__}, whose gradients are only complete after its '
                "own backward pass; write model_wrapper_cfg=dict(type='MMDistributedDataParallel'), or " + _OTHERS
            )
        if not self._named:
            inner = model.module if is_model_wrapper(model) else model
            require_second_derivatives(inner)
            self._named, self._modules = dict(inner.named_parameters()), list(inner.named_modules())
        with ExitStack() as stack:
            if hasattr(model, 'no_sync'):
                stack.enter_context(model.no_sync())
            if self.dtype is not None:
                stack.enter_context(autocast(device_type=get_device(), dtype=getattr(torch, self.dtype)))
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Add to the gradients and, in a step that renews it, to the diagonal."""
        if self._renews_hessian():
            self._second_order(loss)
        else:
            loss.backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs) -> None:
        """Average over processes, clip, and step."""
        params = self._params()
        self._average_gradients(params)
        state = self.optimizer.state
        if any('hessian' in state[p] for p in params):
            hessian = [state[p].pop('hessian', None) for group in self.optimizer.param_groups for p in group['params']]
            every = [p for group in self.optimizer.param_groups for p in group['params']]
            kwargs['hessian'] = [torch.zeros_like(p) if h is None else h for p, h in zip(every, hessian)]
            self._require_curvature(every, kwargs['hessian'])
        super().step(**kwargs)
        for p in params:  # where the optimizer keeps it, although the next step begins with another one
            state[p].pop('hessian', None)
        self.optimizer.param_groups[0].pop(_SEED, None)

    # ------------------------------------------------------------------------------------------------ the diagonal

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group['params'] if p.requires_grad]

    def _renews_hessian(self) -> bool:
        steps = self.optimizer.param_groups[0].get('step', 0)
        return steps % getattr(self.optimizer, 'update_period', 1) == 0

    def _second_order(self, loss: Tensor) -> None:
        params, diagonal = self._params(), None
        if not self._seen_graph:
            _require_twice_differentiable(loss, self._modules)
            self._seen_graph = True
        try:
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            curved = [i for i, grad in enumerate(grads) if grad is not None and grad.requires_grad]
            samples = self.optimizer.num_samples if curved else 0
            generator = self._generator(params[0].device)
            for number in range(samples):
                signs = [_signs(p, generator, self.optimizer.distribution) for p in params]
                products = torch.autograd.grad(
                    [grads[i] for i in curved],
                    params,
                    [signs[i] for i in curved],
                    retain_graph=number + 1 < samples,
                    allow_unused=True,
                )
                terms = [torch.zeros_like(p) if h is None else z * h for p, z, h in zip(params, signs, products)]
                diagonal = terms if diagonal is None else [a + b for a, b in zip(diagonal, terms)]
        except RuntimeError as error:
            said = _explained(error)
            if said is None:
                raise
            raise SecondOrderError(said) from error
        if diagonal is None:
            diagonal = [torch.zeros_like(p) for p in params]
        diagonal = [part / max(1, samples) for part in diagonal]
        # At once, and not before the step: a checkpoint amid an accumulation has the optimizer of one process.
        all_reduce_params(diagonal, op='mean')
        for p, grad, part in zip(params, grads, diagonal):
            if grad is not None:
                p.grad = grad.detach().clone() if p.grad is None else p.grad + grad.detach()
            state = self.optimizer.state[p]
            state['hessian'] = state['hessian'] + part if 'hessian' in state else part

    def _generator(self, device: torch.device) -> torch.Generator:
        """The same in all processes and for all batches of a step."""
        group = self.optimizer.param_groups[0]
        if _SEED not in group:
            seed = torch.randint(2**62, (1,)).to(device)
            broadcast(seed)
            group[_SEED] = int(seed)
        return torch.Generator(device).manual_seed(group[_SEED])

    def _average_gradients(self, params: Sequence[Tensor]) -> None:
        """As DDP does, which has not seen them: one that is unused here counts as 0 where another process has it."""
        if get_world_size() == 1:
            return
        used = torch.tensor([p.grad is not None for p in params], dtype=torch.float32, device=params[0].device)
        all_reduce(used, op='max')
        grads = []
        for p, is_used in zip(params, used.tolist()):
            if is_used:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                grads.append(p.grad)
        all_reduce_params(grads, op='mean')

    def _require_curvature(self, params: Sequence[Tensor], hessian: Sequence[Tensor]) -> None:
        """Raise if a tensor has a gradient and never had curvature: its step would be the gradient over eps."""
        state = self.optimizer.state
        trained = [(p, h) for p, h in zip(params, hessian) if p.grad is not None]
        if not trained:
            return
        flat = []
        for p, h in trained:
            earlier = state[p].get('exp_hessian_diag_sq')
            never = (h == 0).all() if earlier is None else (h == 0).all() & (earlier == 0).all()
            flat.append(never & (p.grad.norm() > 0))  # not of a nan, which others tell
        if not bool(torch.stack(flat).any()):
            return
        which = {id(p) for (p, _), is_flat in zip(trained, flat) if bool(is_flat)}
        names = [name for name, p in self._named.items() if id(p) in which]
        raise SecondOrderError(
            f'AdaHessian divides by the curvature of the loss, which has none in {some(names)}: it is piecewise '
            "linear there, as with L1Loss. Use a curved loss, such as dict(type='SmoothL1Loss'), or " + _OTHERS
        )


def _signs(p: Tensor, generator: torch.Generator, distribution: str) -> Tensor:
    z = torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    if distribution == 'rademacher':
        return z.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(p.dtype)
    return z.normal_(generator=generator).to(p.dtype)


# ------------------------------------------------------------------------------------ what has no second derivative


def require_second_derivatives(model: nn.Module) -> None:
    """Raise a :class:`SecondOrderError` if a layer of ``model`` is known to have none where it is trained."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # norm_eval and frozen_stages keep norms in eval mode, where MABN is an affine map
    once = {
        name: contract_of(module).kind
        for name, module in model.named_modules()
        if module.training and not contract_of(module).is_differentiable_twice
    }
    for module, mode in modes:
        module.training = mode
    if once:
        kind = next(iter(once.values()))
        raise SecondOrderError(
            f"optim_wrapper.optimizer.type='AdaHessian' needs second derivatives, and {kind} has none, by design: its "
            f'backward pass averages over iterations and is the derivative of no function. The model has {kind} at '
            f"{some(list(once))}. Take another norm for small batches (norm_cfg type 'GN', 'CBN' or 'BRN'), keep "
            f'{kind} in eval mode (norm_eval=True of the backbone), or {_OTHERS}'
        )


def _require_twice_differentiable(loss: Tensor, modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise if a custom function behind a loss is differentiable once, or hides its parameters from the graph."""
    functions = custom_functions(loss)
    if CheckpointFunction in functions:
        raise SecondOrderError(
            _lacks(
                'activation checkpointing of the reentrant kind: leave out with_cp=True and activation_checkpointing'
            )
        )
    once = {cls for cls in functions if is_once_differentiable(cls)}
    if once:
        files = {cls.__module__ for cls in once}
        layers = [name for name, module in modules if type(module).__module__ in files]
        where = f', in {some(layers)}' if layers else ''
        names = ', '.join(sorted(cls.__qualname__ for cls in once))
        raise SecondOrderError(_lacks(f'functions that are differentiable once only ({names}{where})'))


def _explained(error: RuntimeError) -> str | None:
    """What to say about an error of a second backward pass; None if it is about something else."""
    what = next((said for words, said in _SAID_BY_TORCH.items() if words in str(error)), None)
    return what and f'{_lacks(what)}. (torch: {" ".join(str(error).split())})'


def _lacks(what: str) -> str:
    return (
        f"optim_wrapper.optimizer.type='AdaHessian' needs second derivatives, and the model has {what}; otherwise "
        f'{_OTHERS}'
    )
