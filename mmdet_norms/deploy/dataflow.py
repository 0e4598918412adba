"""Which convolution is in front of a norm, proven by tracing the forward of the model."""

import copy
import inspect
import operator
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers._contract import STOCK, contract_of, is_norm_class
from ..layers._fold import CannotFoldError, InferenceOnly, fold_batch_norm

_PLAIN_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Of mmdet, torchvision and detectron2; and of mmcv. They share names and meaning of the state, but no base class.
_BATCH_NORM_NAMES = ('FrozenBatchNorm2d', 'SyncBatchNorm')


def fold(norm: nn.Module, conv: nn.Module) -> nn.Module | None:
    """Fold ``norm`` into ``conv``, which it changes; what remains of the norm, or None.

    Raises:
        CannotFoldError: nothing was changed.
    """
    return norm.fold_into(conv) if can(norm, 'fold_into') else fold_batch_norm(conv, norm)


def can(norm: nn.Module, method: str) -> bool:
    """Whether it has such a method; an attribute of that name, such as a flag of the user's, is another thing."""
    return callable(getattr(norm, method, None))


def may_fold(norm: nn.Module) -> bool:
    """Whether norms of this type can be folded into a convolution."""
    return can(norm, 'fold_into') or _is_batch_norm(norm)


def _why_not(norm: nn.Module) -> str:
    """The reason why norms of this type are not folded, by whose forward it runs."""
    owner = next(cls for cls in type(norm).__mro__ if 'forward' in vars(cls))
    if owner is _InstanceNorm and norm.running_mean is not None:
        return 'it has running statistics, but training does not use them, and instance norms are left as they are'
    contract = contract_of(owner) if 'contract' in vars(owner) else STOCK.get(owner)
    if contract and contract.stays:
        return contract.stays
    return f'a {type(norm).__name__} has no fold_into(conv), which would say how it folds'


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or type(module).__name__ in _BATCH_NORM_NAMES


def _is_norm(module: nn.Module) -> bool:
    known = is_norm_class(type(module)) or type(module).__name__ in _BATCH_NORM_NAMES
    return known or can(module, 'fold_into') or can(module, 'folded')


def is_observed(module: nn.Module, norm: nn.Module | None = None) -> bool:
    """Whether something sees or changes what goes through the module: hooks, or another ``forward``.

    Hooks of ``norm`` do not count (CBN's, on its convolution), as they go with it.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return 'forward' in vars(module) or any(getattr(hook, '__self__', module) is not norm for hook in hooks)


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Blocks with ``with_cp`` ask whether their input needs a gradient, which tracing cannot answer."""
    changed = [module for module in model.modules() if getattr(module, 'with_cp', None) is True]
    for module in changed:
        module.with_cp = False
    try:
        yield
    finally:
        for module in changed:
            module.with_cp = True


class Dataflow:
    """Which module feeds which, in all forwards of the model that can be traced.

    Attributes:
        norms: name -> norm, in the order of the model. Norms inside other norms are not listed.
        names: id of a module -> its (first) name.
        touched: ids of modules whose parameters a forward reads by itself.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.norms = dict(_outermost_norms(model))
        self.touched: set[int] = set()
        self._sources = defaultdict(list)  # id of a norm -> for each call, the module that made its input (or None)
        self._users = defaultdict(list)  # id of a convolution -> for each call, the modules that use its output
        self._traced: set[int] = set()  # ids of modules whose forward was followed
        self._failed: dict[int, str] = {}  # id of a module -> why its forward could not be traced
        self._owners = defaultdict(list)
        for parent in model.modules():
            for key, child in parent._modules.items():
                self._owners[id(child)].append((parent, key))
        self._held = {id(module) for parent in model.modules() for module in _unregistered(parent)}
        users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        self._shared = {key for key, count in users.items() if count > 1}
        self._hooked = [module for module in model.modules() if module._forward_hooks]
        self._wanted = {id(norm) for norm in self.norms.values() if may_fold(norm)}
        self._alive = list(model.modules())  # so that no id is given away while modules are replaced
        with _without_checkpointing(model):
            self._trace(model)

    # ----------------------------------------------------------------------------------------------- the proof

    def conv_of(self, norm: nn.Module) -> nn.Module:
        """The convolution that the norm can be folded into.

        Raises:
            CannotFoldError: with the reason, if there is none.
        """
        if not may_fold(norm):
            raise CannotFoldError(_why_not(norm))
        sources = self._sources[id(norm)]
        if not sources:
            raise CannotFoldError(self._why_unseen(norm))
        conv = sources[0]
        if any(source is not conv for source in sources):
            raise CannotFoldError('several modules feed it')
        if not isinstance(conv, _ConvNd):
            raise CannotFoldError('its input is not the output of a convolution')
        channels = getattr(norm, 'num_features', conv.out_channels)
        if channels != conv.out_channels:  # the forward will say so
            raise CannotFoldError(f'it has {channels} channels, and its convolution puts out {conv.out_channels}')
        for users in self._users[id(conv)]:
            if users != [norm]:
                raise CannotFoldError('its convolution also feeds other modules')
        if id(conv) in self.touched or id(norm) in self.touched:
            raise CannotFoldError('a forward reads its parameters, or those of its convolution')
        if any(id(p) in self._shared for p in conv._parameters.values()):
            raise CannotFoldError('its convolution shares its weight with another module')
        if self._is_held_elsewhere(conv) or self._is_held_elsewhere(norm):
            raise CannotFoldError('it or its convolution hangs in several places of the model')
        if is_observed(conv, norm) or is_observed(norm):
            raise CannotFoldError('a hook watches it or its convolution')
        if not _is_known(conv, norm) and not _folds_on_trial(conv, norm):
            raise CannotFoldError(f'a {type(conv).__name__} with a {type(norm).__name__} is more than an affine map')
        return conv

    def _is_held_elsewhere(self, module: nn.Module) -> bool:
        owners = self._owners[id(module)]
        return id(module) in self._held or (len(owners) > 1 and any(id(o) not in self._traced for o, _ in owners))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever the model has ``old``."""
        for module in self._hooked:
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, '__self__', None) is old:  # a norm's hook on its convolution
                    del module._forward_hooks[key]
        for parent, key in self._owners[id(old)]:
            parent._modules[key] = new
        self._owners[id(new)] = self._owners.pop(id(old))
        self.names[id(new)] = self.names[id(old)]

    def _why_unseen(self, norm: nn.Module) -> str:
        name = self.names[id(norm)]
        while name:
            name = name.rpartition('.')[0]
            module = self.model.get_submodule(name)
            if id(module) in self._failed:
                return f'the forward of {type(module).__name__} {self._failed[id(module)]}'
        return 'no forward calls it'

    # ----------------------------------------------------------------------------------------------- tracing

    def _trace(self, module: nn.Module) -> None:
        """Follow the forward of the module; then of each part that it does not show."""
        if not self._wants_more_of(module) or _is_norm(module):
            return
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            self._read(module)
        if self._wants_more_of(module):
            for child in module.children():
                self._trace(child)

    def _wants_more_of(self, module: nn.Module) -> bool:
        return any(id(part) in self._wanted and id(part) not in self._sources for part in module.modules())

    def _read(self, root: nn.Module) -> None:
        graph = self._graph(root)
        if graph is None:
            return
        called = {}
        for node in graph.nodes:
            if node.op == 'call_module':
                called[node] = root.get_submodule(node.target)
            elif node.op == 'get_attr':
                self.touched.add(id(root.get_submodule(node.target.rpartition('.')[0])))
        for node, module in called.items():
            if _is_norm(module):
                given = [*node.args, *node.kwargs.values()]
                self._sources[id(module)].append(called.get(given[0]) if given else None)
            elif isinstance(module, _ConvNd):
                self._users[id(module)].append([called.get(user) for user in node.users])

    def _graph(self, root: nn.Module) -> fx.Graph | None:
        opaque: set[type] = set()
        while True:
            tracer = _Tracer(opaque)
            try:
                if 'forward' in vars(root):
                    raise TypeError('it was replaced on the instance')
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    graph = tracer.trace(root, _defaults(root))
            except Exception as error:  # whatever the code of a host raises when it is given no tensors
                culprit = tracer.culprit
                if culprit is None or culprit is root or type(culprit) in opaque:
                    self._failed[id(root)] = f'cannot be traced ({_first_sentence(error)})'
                    return None
                opaque.add(type(culprit))
            else:
                self._traced |= {id(root), *(id(module) for module in tracer.followed)}
                return graph


class _Tracer(fx.Tracer):
    """Follows calls down to convolutions, norms and torch's own modules, and to classes that it is told to leave alone.

    Attributes:
        followed: modules whose forward was run.
        culprit: the innermost module whose forward raised.
    """

    def __init__(self, opaque: set[type]):
        super().__init__()
        self.opaque, self.followed, self.culprit = opaque, [], None

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = _is_norm(module) or isinstance(module, (_ConvNd, InferenceOnly))
        return known or type(module) in self.opaque or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward, args, kwargs):
        try:
            result = super().call_module(module, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or module
            raise
        self.followed.append(module)
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator:
        return iter([obj[i] for i in range(len(obj))])


class _Proxy(fx.Proxy):
    """Lets ``*x.shape[2:]`` pass, as in ``x.view(n, groups, -1, *x.shape[2:])``.

    How many axes x has is guessed, namely those of a feature map: nothing but shapes depends on it.
    """

    def __len__(self) -> int:
        if self.node.target is operator.getitem:
            whole, part = self.node.args
            if isinstance(part, slice) and whole.target is getattr and whole.args[1] == 'shape':
                return len(range(4)[part])
        return super().__len__()


def _outermost_norms(model: nn.Module, name: str = '', seen: set | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Names and norms, but not those that are a part of another one."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    if _is_norm(model):
        yield name, model
        return
    for key, child in model.named_children():
        yield from _outermost_norms(child, f'{name}.{key}' if name else key, seen)


def _first_sentence(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.split('\n')[0].split('. ')[0][:120]


def _defaults(module: nn.Module) -> dict:
    """Defaults of the forward's arguments. One that branches on an argument cannot be traced without its value."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _unregistered(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that hang at a module in a plain list or dict, where a replacement would not reach them."""
    for key, value in vars(module).items():
        if key in ('_modules', '_forward_hooks') or not isinstance(value, (list, tuple, dict)):
            continue
        yield from (v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, nn.Module))


def _is_known(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether both are of types whose forward is known to be a convolution and an affine map."""
    known_norm = can(norm, 'fold_into') or type(norm) in _PLAIN_BATCH_NORMS
    return known_norm and (type(conv) in _PLAIN_CONVS or hasattr(conv, 'to_conv2d'))


@torch.no_grad()
def _folds_on_trial(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether folding copies of them keeps the function. A subclass may pad, which is fine, or compute its weight."""
    conv, norm = (copy.deepcopy(module).to('cpu', torch.float64).eval() for module in (conv, norm))
    generator = torch.Generator().manual_seed(0)
    size = [3 + 2 * d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation)]
    x = torch.randn(2, conv.in_channels, *size, generator=generator, dtype=torch.float64)
    try:
        expected = norm(conv(x))
        rest = fold(norm, conv)
        result = conv(x) if rest is None else rest(conv(x))
    except Exception:  # a module of somebody else's, with arguments or inputs of its own
        return False
    return torch.allclose(result, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()) + 1e-12)
