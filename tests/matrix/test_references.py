"""Which tests compare a norm with its formula and with the published numbers."""

import functools
import importlib.util
from pathlib import Path

import torch

from .harness import ROOT, batch, ready
from .norms import GOLDEN, ORACLE
from .situation import situation
from .test_numbers import over


@functools.cache
def _test_module(path: str):
    spec = importlib.util.spec_from_file_location(f'matrix_reference_{Path(path).stem}', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_test(node_id: str) -> None:
    """Fail unless pytest would collect such a test."""
    path, *names = node_id.split('::')
    found = _test_module(path)
    for name in names:
        assert name.startswith(('Test', 'test_')) and hasattr(found, name), f'there is no {node_id}'
        found = getattr(found, name)
    assert callable(found)


@situation('float64 oracle')
def test_oracle(norm):
    if norm in ORACLE:
        return require_test(ORACLE[norm])
    # torch's own layers are tested where they come from; here, that they are what the name gives
    module = ready(norm).double()
    z = module.conv(batch(9, dtype=torch.float64))
    dims = dict(BN=(0, 2, 3), IN=(2, 3))[norm]
    torch.testing.assert_close(module.norm(z), over(z, dims, module.norm), rtol=1e-12, atol=1e-12)


@situation('golden numbers of the published layer')
def test_golden(norm):
    require_test(GOLDEN[norm])
