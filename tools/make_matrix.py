#!/usr/bin/env python
"""Run every cell of the matrix norm x situation and write docs/matrix.md. Needs onnx, onnxscript and onnxruntime."""

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / 'tests'))

from matrix.norms import NORMS  # noqa: E402
from matrix.rendering import render  # noqa: E402
from matrix.situation import SITUATIONS, run_cell  # noqa: E402
from matrix.test_graphs import ONNX_NEEDS, test_onnx_runtime  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'matrix.md', help='default: docs/matrix.md')
    parser.add_argument('--check', action='store_true', help='compare with the file instead of writing it')
    args = parser.parse_args(argv)

    absent = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
    if absent and test_onnx_runtime.check in SITUATIONS.values():
        parser.error(f'the ONNX row needs packages that are not installed: pip install {" ".join(absent)}')
    warnings.simplefilter('ignore')
    failed = set()
    for situation in SITUATIONS:
        for norm in NORMS:
            try:
                run_cell(norm, situation)
            except Exception as error:
                failed.add((norm, situation))
                print(f'{norm}, {situation}: {type(error).__name__}: {error}', file=sys.stderr)
    text = render(frozenset(failed))
    total = len(SITUATIONS) * len(NORMS)
    print(f'{total} cells, {len(failed)} failed')
    if not args.check:
        args.out.write_text(text, encoding='utf-8')
    elif not args.out.exists() or args.out.read_text(encoding='utf-8') != text:
        print(f'{args.out} is not what the cells say; write it with: python tools/make_matrix.py', file=sys.stderr)
        return 1
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
