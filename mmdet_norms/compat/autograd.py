"""What torch's graph of a loss says about the functions in it."""

from torch import Tensor
from torch.autograd.function import once_differentiable


def custom_functions(loss: Tensor) -> set[type]:
    """The subclasses of ``torch.autograd.Function`` behind a loss."""
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
    """Whether the backward pass of such a class is marked so: its derivative is then an error."""
    code = getattr(cls.backward, '__code__', None)
    return code is not None and code is once_differentiable(lambda ctx: None).__code__
