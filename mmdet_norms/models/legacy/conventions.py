"""The names of the two conventions."""

from ...layers._args import ConfigError

MMDET_V1 = 'mmdet-v1'
"""mmdet 0.x and 1.x: the published CBN and AN detectors."""
MASKRCNN_BENCHMARK = 'maskrcnn-benchmark'
"""The published MABN detectors."""
CONVENTIONS = (MMDET_V1, MASKRCNN_BENCHMARK)


def check_convention(owner: object, convention: str) -> str:
    """The convention, if there is one of that name.

    Raises:
        ConfigError: there is none; names the config key and what to write instead.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(
            f'{type(owner).__name__}.convention={convention!r} is unknown; write {MMDET_V1!r} (CBN, AN) or '
            f'{MASKRCNN_BENCHMARK!r} (MABN), or use the stock type for the conventions of mmdet 2 and 3'
        )
    return convention
