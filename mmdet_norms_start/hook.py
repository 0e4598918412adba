"""Run by ``mmdet_norms.pth`` at every start of Python; ``MMDET_NORMS_HOOK=0`` in the environment leaves it out.

Modules of mmengine and the like are imported before anything imports this package, if ever. What they are to be told
even then is told right after they are loaded. Keep this file small: nothing is imported here that a bare Python has
not imported already.
"""

import sys


def _own_configs(module) -> None:
    from . import own_configs

    own_configs.serve(module)


AFTER_IMPORT = {
    'mmengine.config.utils': _own_configs,
    'mmengine.config.config': _own_configs,
    'mmengine.hub.hub': _own_configs,
}
"""Name of a module -> what to call with it when it has been loaded."""


class Finder:
    """Finds the modules of :data:`AFTER_IMPORT` as all others do, and adds the call to their loading."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """What ``sys.meta_path`` asks; None for every other module."""
        after = AFTER_IMPORT.get(name)
        if after is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not cls and hasattr(finder, 'find_spec'))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        load = getattr(getattr(spec, 'loader', None), 'exec_module', None)
        if load is not None:

            def exec_module(module):
                load(module)
                after(module)

            spec.loader.exec_module = exec_module
        return spec


class MissingOps:
    """Finds ``mmcv._ext`` where nothing else does: beside mmcv-lite, or an mmcv that was installed without its ops."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """What ``sys.meta_path`` asks; None for every other module."""
        if name != 'mmcv._ext':
            return None
        from . import ops

        return ops.ModuleSpec(name, ops.Loader)


def install() -> None:
    """Ask :class:`Finder` first and :class:`MissingOps` last, from now on. Safe to call again."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
    if MissingOps not in sys.meta_path and 'mmdet_norms.compat' not in sys.modules:
        sys.meta_path.append(MissingOps)


install()
