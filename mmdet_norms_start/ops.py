"""A stand-in for ``mmcv._ext`` until this package is imported, so that ``mmcv.ops`` and ``mmdet`` import without it.

Beside mmcv-lite, mmdet's own Python API (``from mmdet.apis import DetInferencer``) and scripts end in ``No module named
'mmcv._ext'`` where nothing imports ``mmdet_norms`` first. It cannot be imported by this hook: it needs mmdet, which is
just being imported. So the first call of an op imports it, and it puts its own module in the place of this one.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME = 'mmcv._ext'


class Later(ModuleType):
    """Has every op; mmcv looks for all of them on import."""

    def __getattr__(self, name: str):
        if name.startswith('_'):
            raise AttributeError(f'module {NAME!r} has no attribute {name!r}')

        def op(*args, **kwargs):
            import mmdet_norms.compat.mmcv_ops  # noqa: F401

            ops = sys.modules[NAME]
            if isinstance(ops, Later):
                raise ImportError(f'mmdet_norms was imported without what it needs, and supplies no mmcv op {name!r}')
            found = getattr(ops, name)
            setattr(self, name, found)  # mmcv looks its functions up with every call
            return found(*args, **kwargs)

        op.__name__ = op.__qualname__ = name
        setattr(self, name, op)
        return op


class Loader:
    """Makes the module."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> Later:
        """As importlib asks."""
        return Later(NAME, 'Stand-in for the compiled ops of mmcv until mmdet_norms is imported.')

    @staticmethod
    def exec_module(module: Later) -> None:
        """As importlib asks."""


def step_aside() -> None:
    """Leave ``mmcv._ext`` to ``mmdet_norms``, which is being imported. What mmcv holds already calls on to it."""
    from . import hook

    if hook.MissingOps in sys.meta_path:
        sys.meta_path.remove(hook.MissingOps)
    if isinstance(sys.modules.get(NAME), Later):
        del sys.modules[NAME]
        vars(sys.modules['mmcv']).pop('_ext', None)
