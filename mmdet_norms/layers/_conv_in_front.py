"""The convolution in front of a norm: found through autograd, or linked where autograd cannot tell."""

from torch import Tensor, nn

from ..compat.torch_internals import (
    Convolution,
    hides_its_input,
    in_first_reentrant_pass,
    is_convolution,
    saved_convolution,
)

PLAIN_CONVS: set[type] = {nn.Conv2d}
"""Classes that compute nothing but ``F.conv2d`` with their ``weight``. Subclasses may compute with another one."""


class BehindConv:
    """Mixin of norms that need input and weight of the convolution in front. Their signature has ``num_features``.

    Copies and pickles keep the link.
    """

    name: str | None = None
    """Place in the model, for messages. :func:`link_convs` sets it."""

    _linked_call: tuple[nn.Module, Tensor, Tensor] | None = None
    """Convolution, input and output, from the linked convolution's forward to the norm's."""

    def _take_linked_call(self) -> tuple[nn.Module, Tensor, Tensor] | None:
        """What the linked convolution left, which is then forgotten: its tensors must not outlive the forward."""
        call, self._linked_call = self._linked_call, None
        return call

    def _conv_in_front(self, x: Tensor, linked: tuple | None, may_be_bare: bool) -> Convolution | None:
        """The convolution that made ``x``. None where it will not be trained, as nothing is that made x.

        Args:
            linked: of :meth:`_take_linked_call`.
            may_be_bare: let an x that nothing made pass, too.

        Raises:
            RuntimeError: x was made by something else; or autograd cannot tell and there is no link.
        """
        if not x.requires_grad:
            if not in_first_reentrant_pass():
                return None
            if linked is None or linked[2] is not x:
                self._fail('runs inside reentrant activation checkpointing, where its convolution cannot be found')
        if linked is not None and linked[2] is x:
            conv, source, _ = linked
            geometry = conv.stride, conv.padding, conv.dilation, conv.groups
            return Convolution(source.detach().to(x.dtype), conv.weight.detach(), *geometry)
        if x.grad_fn is None and may_be_bare:
            return None
        if not is_convolution(x.grad_fn):
            origin = 'nothing' if x.grad_fn is None else f"'{type(x.grad_fn).__name__}'"
            self._fail(f'must follow a convolution directly, but autograd says its input comes from {origin}')
        if hides_its_input(x.grad_fn):
            self._fail('runs inside activation checkpointing, where its convolution cannot be found')
        return saved_convolution(x.grad_fn)

    def _fail(self, what: str):
        raise RuntimeError(
            f'{self._called()} {what}. Put it right behind an nn.Conv2d (order conv, norm, act); under activation '
            'checkpointing or torch.compile call mmdet_norms.layers.cbn.link_convs(model) before training; elsewhere '
            'use another norm'
        )

    def _called(self) -> str:
        return f'{type(self).__name__}(num_features={self.num_features})' + (f' {self.name!r}' if self.name else '')

    def _remember_conv(self, conv: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the linked convolution."""
        if self.training:
            self._linked_call = (conv, args[0], output)

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(_linked_call=None)


def link_convs(model: nn.Module) -> list[str]:
    """Tell every CBN of a model its name and the convolution before it. Call once after building, or again.

    Needed where autograd cannot lead from a norm to its convolution: activation checkpointing (both kinds) and
    ``torch.compile``. Linked is the child right before the norm among the children of its parent -- ``conv, bn`` of a
    ``ConvModule``, ``conv1, bn1, conv2, bn2`` of a residual block, a ``Sequential`` -- if it is a plain ``Conv2d`` with
    zero padding. A convolution that computes with weights other than its ``weight`` is left to autograd. Links follow
    ``deepcopy`` and pickling, and are in no state dict.

    Returns:
        Names of the CBN layers without a link.
    """
    unlinked = []
    for parent_name, parent in model.named_modules():
        previous = None
        for child_name, child in parent.named_children():
            if isinstance(child, BehindConv):
                child.name = f'{parent_name}.{child_name}'.lstrip('.')
                if not _is_plain(previous):
                    unlinked.append(child.name)
                elif child._remember_conv not in previous._forward_hooks.values():
                    previous.register_forward_hook(child._remember_conv)
            previous = child
    return unlinked


def _is_plain(module: nn.Module | None) -> bool:
    return type(module) in PLAIN_CONVS and module.padding_mode == 'zeros' and not isinstance(module.padding, str)
