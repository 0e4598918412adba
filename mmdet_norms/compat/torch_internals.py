"""Every private name of torch that this package uses, each behind a function that says what it is for.

Each docstring names what is private and what happens ``Without it``: some functions then answer what is nearest, the
others fail with the name. Names are those of torch 2.1 to 2.13 unless a docstring says since when they exist.
``tests/compat/test_internals.py`` has a canary for each, which says in words what moved. Imports torch only, so that
layers and kernels may ask, too. What everybody who writes modules relies on (``nn.Module._buffers``,
``_load_from_state_dict``, ``_BatchNorm``) is used in any file; it has a canary, too.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

# ------------------------------------------------------------------------------------------------------ the compiler


def disable_dynamo(function: Callable) -> Callable:
    """``torch.compiler.disable(function)``, which would import the compiler, for seconds, where it is called.

    Private: ``torch._compile._disable_dynamo``. Without it: the public one.
    """
    try:
        from torch._compile import _disable_dynamo
    except ImportError:
        return torch.compiler.disable(function)
    return _disable_dynamo(function)


def constant_in_compiled_code(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result(function)``, without importing the compiler.

    Private: the attribute ``_dynamo_marked_constant`` of a function. Without it: compiled code looks into the function,
    and breaks its graph there.
    """
    function._dynamo_marked_constant = True
    return function


def is_functorch_active() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) is running, whose tensors no kernel can read.

    Private: ``torch._C._are_functorch_transforms_active``. Without it: an error that names it.
    """
    return torch._C._are_functorch_transforms_active()


def is_legacy_batched(tensor: Tensor) -> bool:
    """Whether it stands for many tensors, as ``is_grads_batched=True`` and ``vectorize=True`` hand them to autograd.

    Private: ``torch._C._functorch.is_legacy_batchedtensor`` (since torch 2.3); before, ``torch._C._dispatch_keys``.
    Without it: an error that names it.
    """
    if hasattr(torch._C._functorch, 'is_legacy_batchedtensor'):
        return torch._C._functorch.is_legacy_batchedtensor(tensor)
    return torch._C._dispatch_keys(tensor).has(torch._C._dispatch_key_parse('Batched'))


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator, such as ``'torchvision::nms'``, was compiled for devices of a kind: ``'CPU'``, ``'CUDA'``.

    Private: ``torch._C._dispatch_has_kernel_for_dispatch_key``. Without it: an error that names it.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def name_of_own_backend() -> str:
    """The device type of a backend that is not part of torch; ``'privateuseone'`` if none has been named.

    Private: ``torch._C._get_privateuse1_backend_name``. Without it: ``'privateuseone'``.
    """
    ask = getattr(torch._C, '_get_privateuse1_backend_name', None)
    return ask() if ask else 'privateuseone'


# ---------------------------------------------------------------------------------------------------- backward passes


def backward_pass() -> int | None:
    """A number for the backward pass that this code runs in; None outside of all.

    Private: ``torch._C._current_graph_task_id``. Without it: an error that names it.
    """
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def custom_functions(loss: Tensor) -> set[type]:
    """The subclasses of ``torch.autograd.Function`` behind a loss.

    Private: the attribute ``_forward_cls`` of a node's class. Without it: none are found.
    """
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        cls = getattr(type(node), '_forward_cls', None)
        if cls is not None:
            found.add(cls)
        todo += [following for following, _ in node.next_functions]
    return found


def is_once_differentiable(cls: type) -> bool:
    """Whether the backward pass of such a class is marked so: its derivative is then an error.

    Private: that ``once_differentiable`` wraps every function in the same code. Without it: False.
    """
    code = getattr(cls.backward, '__code__', None)
    return code is not None and code is once_differentiable(lambda ctx: None).__code__


class Convolution(NamedTuple):
    """One call of a convolution: what is needed to differentiate it by its weight ``(C, C_in / groups, k, k)``."""

    input: Tensor
    weight: Tensor
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int


def is_convolution(node) -> bool:
    """Whether a node of the graph is a convolution that is not transposed.

    Private: the name ``ConvolutionBackward0`` and its ``_saved_transposed``. Without it: False, so that CBN names
    what it found instead of a convolution.
    """
    return type(node).__name__ == 'ConvolutionBackward0' and not node._saved_transposed


def weight_source(node):
    """The node that made the weight of a convolution, transposed or not. That of a parameter has it as ``variable``.

    Autocast convolves with a rounded copy of the parameter, which hangs behind the cast. None: no convolution, or a
    frozen parameter.

    Private: the name ``ConvolutionBackward0``, whose ``next_functions`` come in the order of its arguments, and
    ``ToCopyBackward0``. Without it: None, or the cast.
    """
    if type(node).__name__ != 'ConvolutionBackward0':
        return None
    source = node.next_functions[1][0]
    while type(source).__name__ == 'ToCopyBackward0':
        source = source.next_functions[0][0]
    return source


def saved_convolution(node) -> Convolution:
    """The call that such a node belongs to, detached; the weight in full precision where that can be found.

    Private: ``_saved_input`` and the like of ``ConvolutionBackward0``, ``variable`` of a leaf. Without it: an error
    that names it.
    """
    # A frozen parameter leaves no trace: then its rounded copy does not move either.
    weight = getattr(weight_source(node), 'variable', node._saved_weight)
    geometry = node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups
    return Convolution(node._saved_input.detach(), weight.detach(), *geometry)


# --------------------------------------------------------------------------------------------- activation checkpointing


def _saved_tensor_hooks() -> tuple[Callable, Callable] | None:
    """The innermost ``saved_tensors_hooks``: what packs a saved tensor, and what unpacks it.

    Private: ``torch._C._autograd._top_saved_tensors_default_hooks`` (not in torch 2.1). Without it: None.
    """
    top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return top_hooks(False) if top_hooks else None


def hides_its_input(node) -> bool:
    """Whether unpacking what a convolution saved would make non-reentrant checkpointing recompute, mid-forward.

    Private: the module of checkpointing's hooks, ``_raw_saved_input.unpack_hook`` (True where torch does not tell).
    Without it: False, and reading the convolution fails.
    """
    hooks = _saved_tensor_hooks()
    if hooks is None or hooks[0].__module__ != 'torch.utils.checkpoint':
        return False
    return getattr(node._raw_saved_input, 'unpack_hook', True) is not None


def is_looked_at() -> bool:
    """Whether checkpointing repeats a forward because somebody looks at its saved tensors, in no backward pass.

    Private: the name ``_recomputation_hook`` in ``torch.utils.checkpoint``. Without it: False.
    """
    hooks = _saved_tensor_hooks()
    return hooks is not None and hooks[1].__qualname__.startswith('_recomputation_hook.')


def in_first_reentrant_pass() -> bool:
    """Whether this is the first pass of reentrant checkpointing, which hides from autograd what will be trained.

    Private: the code of ``torch.utils.checkpoint.CheckpointFunction.forward``. Without it: False.
    """
    if torch.is_grad_enabled():
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def checkpointed_regions() -> Iterator[tuple[object, Hashable]]:
    """The checkpointed regions around this call, from the inside: an object for each, and which repetition this is.

    The object is the same whenever the region runs, and goes with the graph. The repetition is None where the region
    runs for the first time, and else the same for all that runs in it.

    Private: names of functions and variables in ``torch.utils.checkpoint``. Without it: no regions, and layers go by
    their last calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == CheckpointFunction.forward.__code__.co_filename:
            variables, name = frame.f_locals, frame.f_code.co_name
            if name == 'unpack_hook' and 'gid' in variables:  # repeated, use_reentrant=False
                yield variables['frame'], variables['gid']
            elif name == 'backward' and 'ctx' in variables:  # repeated, use_reentrant=True
                yield variables['ctx'], backward_pass()
            elif name == 'forward' and 'ctx' in variables:
                yield variables['ctx'], None
            elif name == 'checkpoint' and 'gen' in variables:
                generator = variables['gen'].gi_frame
                if generator is not None and 'new_frame' in generator.f_locals:
                    yield generator.f_locals['new_frame'], None
        frame = frame.f_back


# ------------------------------------------------------------------------------------------------------ kernels of aten


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of a map, in fp32 or better.

    Private: ``torch.batch_norm_update_stats``. Without it: an error, see :func:`or_plain`.
    """
    # Running statistics (dummies) make the kernel use their dtype for its results.
    dummies = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return torch.batch_norm_update_stats(x, dummies[0], dummies[1], 0.0)


def row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(R,)`` of contiguous rows ``(R, L)``.

    Private: ``torch.native_group_norm``, whose normalized rows are thrown away. Without it: an error, see
    :func:`or_plain`.
    """
    number, size = rows.shape
    _, mean, rstd = torch.native_group_norm(rows, None, None, 1, number, size, number, 0.0)
    return mean.view(-1), rstd.view(-1).reciprocal().square()


def affine_into(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor) -> None:
    """Write ``scale * (x - mean) + shift`` into ``y``; vectors ``(C,)``, maps ``(N, C, H, W)`` of one layout.

    Private: ``aten::native_batch_norm.out``. Without it: an error, see :func:`or_plain`.
    """
    unused, var = scale.new_empty(0), torch.ones_like(scale)
    torch.ops.aten.native_batch_norm.out(
        x, scale, shift, mean, var, False, 0.0, 0.0, out=y, save_mean=unused, save_invstd=unused
    )


def centred_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """``sum grad`` and ``sum grad * (x - mean)``, each ``(C,)``.

    Private: ``aten::native_batch_norm_backward``. Without it: an error, see :func:`or_plain`.
    """
    one = torch.ones_like(mean)
    _, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
        grad, x, one, mean, one, mean, one, False, 0.0, [False, True, True]
    )
    return by_shift, by_scale


def or_plain(plain: Callable) -> Callable[[Callable], Callable]:
    """Decorate a function that calls kernels of aten: where it fails, ``plain`` computes the same from its arguments.

    That is said once, and from then on only ``plain`` is called. Running out of memory is no failure of this kind, nor
    is what fails in ``plain``, too.
    """

    def decorate(function: Callable) -> Callable:
        failed = False

        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal failed
            if failed:
                return plain(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                raise
            except (AttributeError, RuntimeError, TypeError) as error:
                result, failed = plain(*args, **kwargs), True
                warnings.warn(
                    f'{function.__name__}() is computed by its plain formula from now on, which is slower: the kernels '
                    f'of torch {torch.__version__} that it calls fail with {type(error).__name__}: {error}',
                    stacklevel=2,
                )
                return result

        return call

    return decorate


# ------------------------------------------------------------------------------------------------ modules and tensors


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks.

    Private: ``_forward_hooks`` and the like of ``nn.Module``. Without it: an error that names it.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def on_state_dict(module: nn.Module, hook: Callable) -> None:
    """Have ``hook(module, state_dict, prefix, metadata)`` called when a state dict of the module is made.

    Not the public ``register_state_dict_post_hook``, which torch 2.1 lacks, and which mmengine's saving does not call.

    Private: ``nn.Module._register_state_dict_hook``. Without it: an error that names it.
    """
    module._register_state_dict_hook(hook)


def has_load_hook(module: nn.Module, hook: Callable) -> bool:
    """Whether :func:`on_load` was called so.

    Private: ``nn.Module._load_state_dict_pre_hooks``. Without it: an error that names it.
    """
    return any(getattr(known, 'hook', None) is hook for known in module._load_state_dict_pre_hooks.values())


def on_load(module: nn.Module, hook: Callable) -> None:
    """Have ``hook(module, state_dict, prefix, ...)`` called before the module takes its values from a state dict.

    Private: ``nn.Module._register_load_state_dict_pre_hook``; public, without the underscore, since torch 2.5.
    Without it: an error that names it.
    """
    module._register_load_state_dict_pre_hook(hook, with_module=True)


def largest_magnitudes(tensors: list[Tensor]) -> list[Tensor]:
    """The largest absolute value of each; NaN where a tensor has one.

    Private: ``torch._foreach_norm``. Without it: one after the other.
    """
    at_once = getattr(torch, '_foreach_norm', None)
    if at_once is None:
        return [tensor.abs().max() for tensor in tensors]
    return at_once(tensors, float('inf'))


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``target.copy_(source)`` for each pair.

    Private: ``torch._foreach_copy_``. Without it: one after the other.
    """
    if targets and hasattr(torch, '_foreach_copy_'):
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources):
            target.copy_(source)


# ---------------------------------------------------------------------------------------------- DistributedDataParallel


def belongs_to_its_buckets(ddp: DistributedDataParallel) -> bool:
    """Whether it has a communication hook or mixed precision, which belong to the buckets that it has.

    Private: ``_comm_hooks``. Without it: an error that names it.
    """
    return bool(ddp._comm_hooks) or getattr(ddp, 'mixed_precision', None) is not None


def number_in_buckets(ddp: DistributedDataParallel) -> int:
    """How many parameters have a place in its buckets.

    Private: ``_get_ddp_logging_data``. Without it: an error that names it.
    """
    return ddp._get_ddp_logging_data()['num_parameter_tensors']


def make_buckets_again(ddp: DistributedDataParallel) -> None:
    """What unpickling a wrapper does, in the process group that it has.

    Private: ``_build_params_for_reducer``, ``_build_debug_param_to_name_mapping``, ``_ddp_init_helper`` and
    ``_set_static_graph``. Without it: an error that names it.
    """
    del ddp.reducer, ddp.logger  # the last references: their hooks leave the parameters
    parameters, expect_sparse_gradient = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse_gradient, names, ddp.static_graph)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()


# ------------------------------------------------------------------------------------------------------------- files


def harmless_in_checkpoints() -> Mapping[str, Any]:
    """What torch's restricted unpickler lets a checkpoint name, by full name.

    Private: ``torch._weights_only_unpickler._get_allowed_globals``. Without it: an error that names it. It is asked by
    torch before 2.6 only.
    """
    from torch._weights_only_unpickler import _get_allowed_globals

    return _get_allowed_globals()
