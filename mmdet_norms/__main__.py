"""``python -m mmdet_norms COMMAND [arguments]``: the commands; and scripts of stock mmdet.

``torchrun --standalone --nproc-per-node 2 -m mmdet_norms train CONFIG --launcher pytorch`` starts several processes.

``python -m mmdet_norms SCRIPT.py [arguments]`` runs a script with this package imported first. Beside a compiled mmcv
no script needs this. With mmcv-lite, some of mmdet's scripts (``tools/test.py``) import mmcv's ops before they read the
config that would have imported this package, which supplies them.
"""

import runpy
import sys
from pathlib import Path

from mmdet_norms_start import commands


def main() -> None:
    """Run the command or, with the arguments after it as its own, the script that ``sys.argv[1]`` names."""
    first = sys.argv[1] if len(sys.argv) > 1 else ''
    if first not in commands.COMMANDS and Path(first).is_file():
        del sys.argv[0]
        runpy.run_path(first, run_name='__main__')
    else:
        commands.main(how=commands.MODULE)


if __name__ == '__main__':
    main()
