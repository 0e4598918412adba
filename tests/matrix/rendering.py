"""The matrix as a page: docs/matrix.md."""

from . import test_graphs, test_numbers, test_processes, test_references, test_states
from .exceptions import EXCEPTIONS
from .norms import NORMS
from .situation import SITUATIONS

_FILES = (test_numbers, test_states, test_graphs, test_processes, test_references)  # in the order of the page

_HEAD = """\
# Norm x situation

Generated from `tests/matrix` by `python tools/make_matrix.py`, which runs every cell; `--check` compares only.
`make test` runs the same cells, and checks that this file names all of them.

✓ passes the check that the row's name stands for. A number: answered otherwise, as the note says, which is tested too.
A dash: does not exist for the norm, see the note. ✗ fails. Every norm stands behind a convolution in mmcv's
`ConvModule` and, unless a row says otherwise, in the middle of its training: past warm-up, burn-in or schedule, with a
filled window.

The rows "float64 oracle" and "golden numbers" point to tests in `tests/layers`: here, a ✓ says that the test exists,
and `make test` runs it. Golden numbers that are not in the checkout are skipped. The ONNX row needs onnx, onnxscript
and onnxruntime, which `make test` installs; without them it is skipped.

"""


def render(failed: frozenset = frozenset()) -> str:
    """The matrix as markdown. Cells that are not in ``failed`` were run, and were as declared."""
    reasons: list[str] = []
    rows = [f'| situation | {" | ".join(NORMS)} |', '|---|' + ':-:|' * len(NORMS)]
    for name in sorted(SITUATIONS, key=_place):
        marks = []
        for norm in NORMS:
            other, mark = EXCEPTIONS.get((norm, name)), '✓'
            if other is not None:
                if other.reason not in reasons:
                    reasons.append(other.reason)
                number = reasons.index(other.reason) + 1
                mark = f'{number}' if other.error or other.check else f'- ({number})'
            marks.append('✗' if (norm, name) in failed else mark)
        rows.append(f'| {name} | {" | ".join(marks)} |')
    notes = [f'{number}. {reason[0].upper()}{reason[1:]}.' for number, reason in enumerate(reasons, 1)]
    built = [f'| {norm} | `{cfg}` | {f"`{conv}`" if conv else ""} |' for norm, (cfg, conv) in NORMS.items()]
    return '\n'.join(
        [
            _HEAD.rstrip('\n') + '\n',
            *rows,
            '',
            '## Notes',
            '',
            *notes,
            '',
            '## Built with',
            '',
            'Schedules are short, so that a few iterations reach what each norm does in the end.',
            '',
            '| norm | `norm_cfg` | `conv_cfg` |',
            '|---|---|---|',
            *built,
            '',
        ]
    )


def _place(name: str) -> int:
    """Of the file that a row is from; rows of one file stay in their order."""
    files = [file.__name__ for file in _FILES]
    return files.index(SITUATIONS[name].__module__) if SITUATIONS[name].__module__ in files else len(files)
