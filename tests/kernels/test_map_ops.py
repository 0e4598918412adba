"""The map operations against their formulas in float64, in every layout and dtype, and what they may not do."""

import pytest
import torch
from torch import nn

from mmdet_norms.compat.torch_internals import or_plain
from mmdet_norms.kernels import map_aten, map_formula, map_ops

SHAPES = [(2, 6, 7, 9), (6, 3, 5, 4), (1, 5, 4, 4), (3, 1, 5, 5), (3, 4, 1, 1), (4, 3, 1, 8), (2, 3, 140, 150)]
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'channels of a wider map': lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    'one instance, expanded': lambda x: x[:1].expand_as(x),
}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
EVERYWHERE = pytest.mark.parametrize('layout', LAYOUTS)
GROUPS = {
    'batch': lambda images: None,
    'halves': lambda images: 2 if images % 2 == 0 else 1,
    'images': lambda images: images,
}


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


def maps(layout, dtype):
    for seed, shape in enumerate(SHAPES):
        torch.manual_seed(seed)
        x, grad = torch.randn(2, *shape, dtype=torch.float64).add_(1).to(dtype)
        yield LAYOUTS[layout](x), grad, seed


def literal_moments(x, groups):
    by_group = x.double() if groups is None else x.double().unflatten(0, (groups, -1))
    over = (0, 2, 3) if groups is None else (1, 3, 4)
    return by_group.mean(over), by_group.var(over, correction=0)


def literal_sum(x, groups):
    return x.sum((0, 2, 3)) if groups is None else x.unflatten(0, (groups, -1)).sum((1, 3, 4))


def spread(vector, images):
    """What each image takes from the vectors of its group, for broadcasting over a map."""
    rows = vector.double()
    if vector.dim() == 2:
        rows = torch.stack([rows[n * len(vector) // images] for n in range(images)])
    return rows[..., None, None]


@EVERYWHERE
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('grouping', GROUPS)
def test_every_operation_equals_its_formula(grouping, dtype, tolerance, layout):
    statistics = max(1e-5, tolerance / 100) if dtype != torch.float64 else tolerance  # computed in fp32 of any map
    for x, grad, _ in maps(layout, dtype):
        check_every_operation(map_ops, x, grad, GROUPS[grouping](len(x)), tolerance, statistics)


@pytest.mark.parametrize('grouping', GROUPS)
def test_the_formulas_of_other_devices_and_compiled_code_do(grouping):
    for layout in ('contiguous', 'channels_last'):
        for x, grad, _ in maps(layout, torch.float64):
            check_every_operation(map_formula, x, grad, GROUPS[grouping](len(x)), 1e-12, 1e-12)


def check_every_operation(ops, x, grad, groups, tolerance, statistics):
    exact, exact_grad, wide = x.double(), grad.double(), torch.promote_types(x.dtype, torch.float32)
    shape = (x.shape[1],) if groups is None else (groups, x.shape[1])
    vectors = torch.randn(4, *shape, dtype=wide)
    gain, centre, scale, shift = (spread(vector, len(x)) for vector in vectors)
    mean, var = ops.moments(x, groups)
    assert mean.dtype == var.dtype == wide
    expected_mean, expected_var = literal_moments(x, groups)
    close(mean, expected_mean, statistics)
    close(var, expected_var, statistics)
    close(ops.second_moment(x, groups), expected_var + expected_mean.square(), statistics)
    y = ops.affine(x, *vectors[1:])
    assert y.dtype == x.dtype
    close(y, scale * (exact - centre) + shift, tolerance)
    total, centred = ops.gradient_sums(grad, x, vectors[1])
    assert total.dtype == centred.dtype == wide
    size = exact[:, 0].numel() ** 0.5  # of which a sum of that many may cancel to nothing
    close(total / size, literal_sum(exact_grad, groups) / size, 10 * statistics)
    close(centred / size, literal_sum(exact_grad * (exact - centre), groups) / size, 10 * statistics)
    y = ops.gradient(grad, x, *vectors)
    assert y.dtype == x.dtype
    close(y, gain * exact_grad + scale * (exact - centre) + shift, tolerance)


def test_groups_in_channels_last_take_a_call_each_and_images_none(monkeypatch):
    """Their statistics did take one for each image."""
    calls = []
    for name in ('channel_moments', 'centred_sums', 'affine_into'):
        run = getattr(map_aten, name)
        monkeypatch.setattr(map_aten, name, lambda *args, run=run, name=name: calls.append(name) or run(*args))
    x, vectors = LAYOUTS['channels_last'](torch.randn(12, 3, 4, 5)), torch.rand(4, 2, 3)
    map_ops.moments(x, 2), map_ops.gradient_sums(x, x, vectors[0]), map_ops.affine(x, *vectors[1:])
    assert sorted(calls) == sorted(['channel_moments', 'centred_sums', 'affine_into'] * 2)


def test_what_fails_in_aten_is_computed_by_its_formula(monkeypatch):
    def gone(*args):
        raise RuntimeError('no such kernel')

    x, vectors = torch.randn(2, 3, 4, 5), torch.rand(3, 3)
    expected, run = map_ops.affine(x, *vectors), []
    monkeypatch.setattr(map_aten, 'affine_into', gone)
    monkeypatch.setattr(map_aten, 'affine', or_plain(map_formula.affine)(map_aten.affine.__wrapped__))
    with pytest.warns(UserWarning, match=r'affine.*no such kernel'):
        run.append(map_ops.affine(x, *vectors))
    run.append(map_ops.affine(x, *vectors))
    for actual in run:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('per_instance', [False, True])
def test_maps_keep_their_layout_and_are_no_views(per_instance):
    """A view, returned by an autograd function, could not be changed in place by what follows, such as a ReLU."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
        vectors = torch.rand(4, 2, 3) if per_instance else torch.rand(4, 3)
        for y in (map_ops.affine(x, *vectors[:3]), map_ops.gradient(x.clone(), x, *vectors)):
            assert y.is_contiguous(memory_format=layout) and not y._is_view()


@EVERYWHERE
def test_no_input_is_changed(layout):
    for x, grad, _ in maps(layout, torch.float32):
        before = x.clone(), grad.clone()
        vectors = torch.rand(4, *x.shape[:2])
        map_ops.moments(x), map_ops.moments(x, len(x)), map_ops.second_moment(x), map_ops.affine(x, *vectors[:3])
        map_ops.gradient_sums(grad, x, vectors[0]), map_ops.gradient(grad, x, *vectors)
        assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('per_instance', [False, True])
def test_the_variance_of_values_far_from_zero_keeps_its_digits(per_instance, layout):
    """``E[x^2] - E[x]^2`` in fp32 would have none left."""
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 4, 30, 40) + 3000)
    expected = x.double().var((2, 3) if per_instance else (0, 2, 3), correction=0)
    _, var = map_ops.moments(x, len(x) if per_instance else None)
    torch.testing.assert_close(var.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_moments_of_large_maps_are_as_exact_as_those_of_small_ones(layout):
    """Added one after the other in fp32, a million values leave three digits."""
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(1, 2, 700, 1500) + 1)
    exact = x.double()
    torch.testing.assert_close(map_ops.moments(x)[1].double(), exact.var((0, 2, 3), correction=0), rtol=2e-5, atol=0)
    torch.testing.assert_close(map_ops.second_moment(x).double(), exact.square().mean((0, 2, 3)), rtol=2e-6, atol=0)


def test_a_constant_map_has_no_variance():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.full((2, 3, 6, 5), 7.0).contiguous(memory_format=layout)
        for per_instance in (False, True):
            mean, var = map_ops.moments(x, len(x) if per_instance else None)
            assert torch.all(mean == 7) and torch.all(var < 1e-10)


def test_compiled_code_gets_formulas_it_can_fuse():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith('call'))
        return graph

    torch._dynamo.reset()
    x, vectors = torch.randn(2, 3, 4, 4), torch.rand(4, 3)

    def every(x, grad, gain, centre, scale, shift):
        results = [map_ops.second_moment(x), *map_ops.moments(x), map_ops.affine(x, centre, scale, shift)]
        results += map_ops.gradient_sums(grad, x, centre)
        return [*results, map_ops.gradient(grad, x, gain, centre, scale, shift)]

    expected = every(x, x, *vectors)
    for ours, eager in zip(torch.compile(every, backend=backend, fullgraph=True)(x, x, *vectors), expected):
        torch.testing.assert_close(ours, eager)
    assert seen and not any('batch_norm' in target or 'group_norm' in target for target in seen)


def test_batch_norms_kernels_still_mean_what_the_operations_take_them_for():
    """Its gradients in eval mode with statistics 0 and 1 are the sums that :func:`map_ops.gradient_sums` promises."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, eps=0, dtype=torch.float64).eval()
    grad = torch.randn_like(x)
    norm(x).backward(grad)
    total, centred = map_ops.gradient_sums(grad, x, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(norm.bias.grad, total)
    torch.testing.assert_close(norm.weight.grad, centred)
