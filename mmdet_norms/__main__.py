"""``python -m mmdet_norms SCRIPT [arguments]``: run a script of stock mmdet with this package imported first.

Beside a compiled mmcv no script needs this. With mmcv-lite, some of mmdet's scripts (``tools/test.py``) import mmcv's
ops before they read the config that would have imported this package, which supplies them.
"""

import runpy
import sys


def main() -> None:
    """Run ``sys.argv[1]`` as if it had been called with the arguments after it."""
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        sys.exit('usage: python -m mmdet_norms SCRIPT [arguments of the script]')
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
