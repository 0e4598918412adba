"""What to do about an op that is missing."""

REMEDY = (
    'For all ops replace mmcv-lite by the full mmcv: `pip uninstall mmcv-lite`, then `pip install '
    "'mmcv>=2.0.0,<2.2.0'` (a wheel for your torch and CUDA, or 10-40 minutes of building)."
)
