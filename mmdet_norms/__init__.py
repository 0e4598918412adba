"""mmdet_norms: normalization layers for object detectors, by name, on stock mmdetection 3.x.

Importing the package registers everything and does nothing else; in a config::

    custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)

Where mmdet is not installed there is nothing to register. :mod:`mmdet_norms.layers` and :func:`convert_norms` need
torch only; every other name says what is missing.
"""

import sys

from mmdet_norms_start import doctor_is_asked_for, module_asked_for
from mmdet_norms_start.commands import set_environment
from mmdet_norms_start.requirements import has_mmdet, no_stack, why_no_import

from .version import __version__

__all__ = [
    'NORM_LAYERS',
    'PLACEMENTS',
    '__version__',
    'apply_norm',
    'convert_norms',
    'fuse',
    'recompute_statistics',
    'register_norm',
    'replace_norm_cfg',
]

if module_asked_for(sys.orig_argv)[0].partition('.')[0] == 'mmdet_norms':  # python -m mmdet_norms train ...
    set_environment()

if not doctor_is_asked_for(sys.orig_argv):  # python -m mmdet_norms.check_env is there for when all this fails
    try:
        from .convert import convert_norms

        if has_mmdet():
            from .everything import (
                NORM_LAYERS,
                PLACEMENTS,
                apply_norm,
                fuse,
                recompute_statistics,
                register_norm,
                replace_norm_cfg,
            )
    except (ImportError, AssertionError, OSError) as error:  # of mmdet at a version of mmcv; of torch's libraries
        said = why_no_import(error)
        if said is None:
            raise
        raise ImportError(said, name=getattr(error, 'name', None)) from error


def __getattr__(name: str):
    if name in __all__ and not has_mmdet():
        raise ImportError(no_stack('mmdet'), name='mmdet')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
