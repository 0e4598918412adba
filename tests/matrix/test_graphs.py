"""The norms in compiled and exported graphs."""

import copy
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from .harness import batch, gradients, ready, same, state
from .situation import situation


def check_compiled(norm, link=False, fullgraph=True):
    torch._dynamo.reset()
    eager = ready(norm, link=link)
    module = copy.deepcopy(eager)
    run = torch.compile(module, backend='aot_eager', fullgraph=fullgraph)
    for seed in (7, 8):
        same(gradients(module, batch(seed), run), gradients(eager, batch(seed)), rtol=1e-4, atol=1e-5)
    same(state(module), state(eager), rtol=1e-5, atol=1e-6)
    module.eval(), eager.eval()
    full = torch.compile(module, backend='aot_eager', fullgraph=True)
    same(gradients(module, batch(9), full), gradients(eager, batch(9)), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@situation('torch.compile without graph breaks: forward, backward and state as eager')
def test_compiled(norm):
    check_compiled(norm)


_ANOTHER = (3, 4, 9, 7)


def _any_size():
    return ({axis: torch.export.Dim(name, min=2) for axis, name in ((0, 'n'), (2, 'h'), (3, 'w'))},)


@situation('torch.export of the eval graph')
def test_exported(norm):
    module = ready(norm).eval()
    program = torch.export.export(module, (batch(8),), dynamic_shapes=_any_size())
    operators = {str(n.target) for n in program.graph.nodes if n.op == 'call_function'}
    assert not {name for name in operators if not name.startswith('aten.') and 'getitem' not in name}
    x = batch(9, _ANOTHER)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


ONNX_NEEDS = ('onnx', 'onnxscript', 'onnxruntime')


@situation('ONNX of the eval graph, in onnxruntime')
def test_onnx_runtime(norm):
    for package in ONNX_NEEDS:
        pytest.importorskip(package)
    import onnxruntime

    module = ready(norm).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        path = Path(folder) / 'norm.onnx'
        program = torch.onnx.export(module, (batch(8),), dynamo=True, verbose=False, dynamic_shapes=_any_size())
        assert not {node.domain for node in program.model_proto.graph.node} - {''}
        program.save(path)
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        x = batch(9, _ANOTHER)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(x).detach(), rtol=1e-4, atol=1e-5)
