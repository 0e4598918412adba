"""What to do about an op that is missing."""

from ...commands import runnable


def remedy() -> str:
    """A sentence for messages."""
    return (
        'For all ops replace mmcv-lite by compiled mmcv: `pip uninstall mmcv-lite`, `pip install "setuptools<82" '
        'wheel`, `pip install --no-build-isolation "mmcv>=2.0.0,<2.2.0"` (where there is no wheel for your torch, it '
        f'builds for 10-40 minutes); `{runnable("doctor")}` says whether its ops are there'
    )
