"""The end of a residual block, ``relu(norm(x) + shortcut)``, in the one pass that a folded BNET makes anyway."""

import functools

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..layers.bnet import FoldedBNET
from .dataflow import is_observed


def join_ends(model: nn.Module) -> list[str]:
    """Let the last norm of residual blocks add the shortcut and apply ReLU; names of the blocks where it does now.

    Of blocks that compute what mmdet's ``BasicBlock`` or ``Bottleneck`` computes (ResNet, ResNeXt, RegNet, HRNet) and
    end in a :class:`FoldedBNET`. Only their class changes, to a subclass of the same name.
    """
    joined = []
    for name, block in model.named_modules():
        plain = type(block)
        if plain.forward in _ENDS and not is_observed(block) and _ends_in_bnet(block):
            block.__class__ = _class(plain)
            joined.append(name)
    return joined


def _ends_in_bnet(block: nn.Module) -> bool:
    conv, norm = _end(block)
    after = getattr(block, 'after_conv3_plugin_names', ()) if getattr(block, 'with_plugins', False) else ()
    return isinstance(norm, FoldedBNET) and isinstance(conv, _ConvNd) and type(block.relu) is nn.ReLU and not after


def _end(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    return (block.conv3, block.norm3) if hasattr(block, 'norm3_name') else (block.conv2, block.norm2)


class _Joined:
    """Mixin of the classes that such blocks have. A watched part gets to see what it would see in a plain block."""

    _plain: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = _end(self)
        if any(is_observed(module) for module in (conv, norm, self.relu)):
            return super().forward(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        # In place, as the convolution's output is new, and nobody else's.
        return norm(conv(_ENDS[self._plain.forward](self, x)), shortcut, relu=True, inplace=True)

    def __reduce_ex__(self, protocol):
        _, (_, *args), *rest = super().__reduce_ex__(protocol)
        return _new, (self._plain, *args), *rest


def _new(plain: type, *args) -> object:
    cls = _class(plain)
    return cls.__new__(cls, *args)


@functools.cache
def _class(plain: type) -> type:
    return type(
        plain.__name__, (_Joined, plain), dict(_plain=plain, __module__=plain.__module__, __doc__=plain.__doc__)
    )


def _basic(block: nn.Module, x: Tensor) -> Tensor:
    return block.relu(block.norm1(block.conv1(x)))


def _bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    x = _basic(block, x)
    if block.with_plugins:
        x = block.forward_plugin(x, block.after_conv1_plugin_names)
    x = block.relu(block.norm2(block.conv2(x)))
    return block.forward_plugin(x, block.after_conv2_plugin_names) if block.with_plugins else x


# What comes before the last convolution, by the forward of the block. Blocks with a forward of their own are not here.
_ENDS = {BasicBlock.forward: _basic, Bottleneck.forward: _bottleneck}
