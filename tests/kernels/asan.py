"""The C kernels' tests under AddressSanitizer and UBSan, which stop at the first access out of bounds: ``make asan``.

Builds the library apart, with the sanitizers; tells it a lie about the length of a tensor, which must be reported, or
the tests would prove nothing; then runs the tests with it. Needs gcc or clang with both runtimes, on Linux.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / 'mmdet_norms' / 'kernels' / 'csrc' / 'cpu.c'
TESTS = ('test_depthwise_on_cpu.py', 'test_pointers.py', 'test_fuzz_depthwise.py')
FLAGS = '-O1 -g -shared -fPIC -ffp-contract=fast -fno-omit-frame-pointer'
SANITIZERS = '-fsanitize=address,undefined -fno-sanitize-recover=all'
# In a process of its own, as it ends there: a call in which the memory of one tensor is a value shorter than is said.
PLANTED = """
import ctypes, os, sys, torch
from mmdet_norms.kernels import compiled

n, c, h, w, k = 2, 5, 4, 6, 3
size = dict.fromkeys(('x', 'grad', 'residual', 'y', 'grad_x'), n * c * h * w)
size |= dict.fromkeys(('weight', 'grad_weight'), c * k * k) | dict.fromkeys(('bias', 'grad_bias', 'mean', 'var'), c)
used = {
    'bnet_forward': ('x', 'weight', 'bias', 'residual', 'y', 'mean', 'var'),
    'bnet_backward': ('x', 'grad', 'weight', 'grad_x', 'grad_weight', 'grad_bias', 'mean', 'var'),
}

def call(function, dtype, last, short):
    memory = [torch.ones(size[name] - (name == short), dtype=dtype) for name in compiled._NAMES]
    values = (ctypes.c_int64 * 11)(*(size[name] for name in compiled._NAMES))
    job = compiled._Job(*(t.data_ptr() for t in memory), values, 1e-5, n, c, h, w, k, last, 1, 1, 1, 0)
    return getattr(compiled.library(), function + '_' + compiled._SUFFIX[dtype])(ctypes.byref(job), 1, None)

seen = planted = 0
for function, names in used.items():
    for dtype in (torch.float32, torch.float64):
        for last in (0, 1):
            assert call(function, dtype, last, None) == 0
            for short in names:
                reader, writer = os.pipe()
                if not os.fork():
                    os.dup2(writer, 2), os.close(reader)
                    call(function, dtype, last, short)
                    os._exit(0)
                os.close(writer)
                with open(reader, errors='replace') as said:
                    reported = 'AddressSanitizer: heap-buffer-overflow' in said.read()
                os.wait()
                planted, seen = planted + 1, seen + reported
                if not reported:
                    print('not seen: a short', short, 'in', function, dtype, 'channels last' if last else '')
print(f'AddressSanitizer reports {seen} of {planted} planted accesses out of bounds')
sys.exit(seen != planted)
"""


def file_of(compiler: str, library: str) -> str:
    done = subprocess.run([compiler, f'-print-file-name={library}'], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    compiler = os.environ.get('CC', 'cc')
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / '_cpu_asan.so'
        # One copy of each function: the loader would choose between several before the sanitizer is ready.
        flags = [*FLAGS.split(), *SANITIZERS.split(), '-DCLONES=', '-march=native']
        subprocess.run([compiler, *flags, str(SOURCE), '-o', str(library), '-pthread', '-lm'], check=True)
        env = os.environ | {
            'MMDET_NORMS_COMPILED': str(library),
            # C++'s runtime as well, whose exceptions the sanitizer looks for when it starts.
            'LD_PRELOAD': ' '.join(file_of(compiler, name) for name in ('libasan.so', 'libstdc++.so.6')),
            'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=0',  # Python and torch keep much until the end
            'UBSAN_OPTIONS': 'print_stacktrace=1',
            'OMP_NUM_THREADS': '1',
            'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))),
        }
        if subprocess.run([sys.executable, '-c', PLANTED], env=env).returncode:
            return 1
        files = [str(ROOT / 'tests' / 'kernels' / name) for name in TESTS]
        return subprocess.run([sys.executable, '-m', 'pytest', '-q', *files, *sys.argv[1:]], env=env).returncode


if __name__ == '__main__':
    sys.exit(main())
