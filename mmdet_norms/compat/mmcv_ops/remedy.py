"""What to do about an op that is missing."""

from importlib import metadata

from ...commands import runnable


def remedy() -> str:
    """A sentence for messages. The fork onedl-mmcv, which has the same import name, must not be replaced by mmcv."""
    said = f'`{runnable("doctor")}` says whether its ops are there'
    try:
        metadata.distribution('onedl-mmcv')
    except metadata.PackageNotFoundError:
        return (
            'For all ops replace mmcv-lite by compiled mmcv: `pip uninstall mmcv-lite`, `pip install "setuptools<82" '
            'wheel`, `pip install --no-cache-dir --no-build-isolation "mmcv>=2.0.0,<2.2.0"` (without a wheel for '
            f'your torch, it builds for 10-40 minutes); {said}'
        )
    return f'For all ops install an onedl-mmcv that has them, built for your torch and CUDA; {said}'
