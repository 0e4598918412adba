"""The ops of ``mmcv.ops``, for each device from the best that is installed: compiled mmcv or plain PyTorch.

``mmcv-lite`` installs without a compiler but has no ``mmcv._ext``, so ``mmcv.ops`` and with it
``mmdet.models`` do not import. :func:`install` puts a stand-in for ``mmcv._ext`` in place. It
supplies the ops of Faster, Mask, Cascade and Cascade Mask R-CNN and RetinaNet, and deformable
convolution (see :data:`.in_torch.OPS`), on CPU and GPU; any other op raises
:class:`NotImplementedError` when called.
A compiled mmcv, where there is one, is left alone and used.
"""

try:
    import mmcv  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mmdet_norms needs mmcv: pip install 'mmcv>=2.0.0,<2.2.0' (compiled ops) or 'mmcv-lite>=2.0.0,<2.2.0' "
        '(no compiler needed), not both'
    ) from error

from .choice import active, announce, choices, describe
from .extension import install

__all__ = ['active', 'announce', 'choices', 'describe', 'install']
