"""Cells that are answered otherwise than by the check of their row, and by which."""

import copy

import torch
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from mmdet_norms.layers import AnotherFunctionError

from .harness import batch, build, counts, finite, gradients, loss_of, raises, ready, same, state
from .norms import GOLDEN, NORMS
from .situation import Otherwise
from .test_graphs import check_compiled, test_exported, test_onnx_runtime
from .test_numbers import check_gradient
from .test_processes import DISTRIBUTED, test_distributed
from .test_states import check_checkpointed, load_batch_norm


def _an_empty_batch_is_counted(norm):
    module = ready(norm)
    before = state(module)
    gradients(module, torch.zeros(0, 4, 6, 6))
    before['bn.num_batches_tracked'] += 1
    same(before, state(module))


def _result_is_contiguous(norm):
    module = ready(norm).norm
    z = batch(9, (2, 8, 6, 5))
    y = module(z.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, module(z), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous()


def _the_window_has_moved(norm):
    module = ready(norm)
    before = counts(module)
    sum(loss_of(module(batch(seed))) for seed in (8, 9)).backward()
    finite({key: p.grad for key, p in module.named_parameters()}, state(module))
    assert counts(module) == [count + 2 for count in before]


def _statistics_count_twice(reentrant):
    def check(norm):
        plain = ready(norm)
        saved = copy.deepcopy(plain)
        ours = gradients(saved, batch(9), lambda x: checkpoint(saved, x, use_reentrant=reentrant))
        same(ours, gradients(plain, batch(9)), rtol=1e-6, atol=1e-7)
        plain.norm(plain.conv(batch(9)))  # once more, as the recomputation did
        same(state(saved), state(plain), rtol=1e-6, atol=1e-7)

    return check


def _needs_links(reentrant):
    def check(norm):
        raises(RuntimeError, r'call mmdet_norms\.layers\.cbn\.link_convs\(model\)', check_checkpointed, norm, reentrant)
        check_checkpointed(norm, reentrant, link=True)

    return check


def _gradient_until_the_past_takes_part(norm):
    check_gradient(build(norm))
    check_gradient(ready(norm).eval())
    raises(GradcheckError, 'Jacobian mismatch|Backward is not reentrant', check_gradient, ready(norm))


def _breaks_the_graph_in_training(norm):
    raises(torch._dynamo.exc.Unsupported, '_forward_train', check_compiled, norm, link=True)
    check_compiled(norm, link=True, fullgraph=False)


def _exports_under_another_name(export):
    def check(norm):
        raises(Exception, r'invalid syntax|Failed to decompose', export, norm)
        layer = ready(norm).norm.eval()
        z = batch(9, (2, 8, 6, 6))
        torch.testing.assert_close(torch.export.export(layer, (z,)).module()(z), layer(z))

    return check


def _cbn_loads(norm):
    load_batch_norm(norm)
    load_batch_norm(norm, cfg=dict(eps_in_sqrt=True), tolerance=1e-6)


def _mabn_loads(norm):
    try:
        load_batch_norm(norm)
    except AnotherFunctionError:
        load_batch_norm(norm, centred=True)
    else:
        raise AssertionError('weights that the convolution would centre were loaded')


def _rbn_loads(norm):
    load_batch_norm(norm, weight=lambda weight: weight / torch.ones(()).sigmoid())


def _gradient_inside_the_bounds(norm):
    for training in (True, False):
        module = ready(norm).train(training)
        torch.nn.init.uniform_(module.norm.gate, 0.1, 0.9)
        check_gradient(module)


def _sn_loads(norm):
    *_, said = load_batch_norm(norm)
    assert 'hardly learn' in said


_MABNS = ('MABN', 'MABN norm_batch')
_SINGLE = (ValueError, 'Expected more than 1 value per channel when training')
_SPATIAL = (ValueError, 'Expected more than 1 spatial element when training')
_LOADING = 'a BN checkpoint loads strictly as the identical eval function'
_REENTRANT, _NON_REENTRANT = 'activation checkpointing, reentrant', 'activation checkpointing, non-reentrant'
_TWICE = "torch's batch norm: outputs and gradients are the same, but the statistics count the recomputed batch twice"
_LINKED = (
    'needs `link_convs(model)` once, and is then the same as without checkpointing; without it, a `RuntimeError` says '
    'so'
)
_KEYWORD = (
    'under the attribute name that mmcv gives it, `in`, a Python keyword, torch.export fails with a `SyntaxError`; the '
    'layer itself exports'
)
_NO_NUMBERS = 'no numbers of an independent layer recorded; see the float64 oracle'
EXCEPTIONS = {
    ('BN', 'N = 0: zero gradients, state unchanged'): Otherwise(
        "torch's batch norm: gradients are 0 and the statistics stay, but `num_batches_tracked` counts the empty batch",
        check=_an_empty_batch_is_counted,
    ),
    ('IN', 'N = 0: zero gradients, state unchanged'): Otherwise(
        "torch's instance norm: an `IndexError`; where batches may be empty (RoIs), use GN with a group per channel, "
        'which is the same function',
        error=(IndexError, 'out of range'),
    ),
    ('IN', '1x1 maps'): Otherwise(
        "torch's instance norm: a `ValueError` in training, since a single value per channel has no variance",
        error=_SPATIAL,
    ),
    ('IN', 'a single value per channel'): Otherwise(
        "torch's instance norm: a `ValueError` in training, since a single value per channel has no variance",
        error=_SPATIAL,
    ),
    **{
        (norm, 'a single value per channel'): Otherwise(
            "torch's `ValueError` in training, since a single value has no variance; BNET, AN, BRN, SN, CBN and MABN "
            'document what they return instead',
            error=_SINGLE,
        )
        for norm in ('BN', 'SyncBN')
    },
    ('IN', 'channels_last input: same result, layout kept'): Otherwise(
        "torch's instance norm: the same result, but contiguous", check=_result_is_contiguous
    ),
    **{
        (norm, 'shared module called twice before backward'): Otherwise(
            'each call is an iteration, and finite; gradients are not the sum over calls made one by one, since the '
            "backward window sees the calls' rows in another order",
            check=_the_window_has_moved,
        )
        for norm in _MABNS
    },
    ('BN', _REENTRANT): Otherwise(_TWICE, check=_statistics_count_twice(True)),
    ('BN', _NON_REENTRANT): Otherwise(_TWICE, check=_statistics_count_twice(False)),
    ('CBN', _REENTRANT): Otherwise(_LINKED, check=_needs_links(True)),
    ('CBN', _NON_REENTRANT): Otherwise(_LINKED, check=_needs_links(False)),
    **{
        (norm, 'gradcheck in float64, training and eval'): Otherwise(
            'the true gradient in warm-up and eval; past it r and d count as constants, as published',
            check=_gradient_until_the_past_takes_part,
        )
        for norm in ('BRN', 'BRN norm_batch')
    },
    ('CBN', 'gradcheck in float64, training and eval'): Otherwise(
        'the true gradient in burn-in and eval; past it the history counts as constant, as published (`test_cbn.py` '
        'checks the gradient with the history held constant)',
        check=_gradient_until_the_past_takes_part,
    ),
    **{
        (norm, 'gradcheck in float64, training and eval'): Otherwise(
            'the true gradient in warm-up and eval; past it the backward averages over the window, by design the '
            'derivative of nothing',
            check=_gradient_until_the_past_takes_part,
        )
        for norm in _MABNS
    },
    ('CBN', 'torch.compile without graph breaks: forward, backward and state as eager'): Otherwise(
        'equal to eager with `link_convs(model)`, with a graph break at the layer in training and none in eval',
        check=_breaks_the_graph_in_training,
    ),
    **{
        (norm, 'torch.compile without graph breaks: forward, backward and state as eager'): Otherwise(
            'equal to eager, with a graph break at the layer in training and none in eval',
            check=_breaks_the_graph_in_training,
        )
        for norm in _MABNS
    },
    ('IN', 'torch.export of the eval graph'): Otherwise(
        _KEYWORD, check=_exports_under_another_name(test_exported.check)
    ),
    ('IN', 'ONNX of the eval graph, in onnxruntime'): Otherwise(
        _KEYWORD, check=_exports_under_another_name(test_onnx_runtime.check)
    ),
    ('SyncBN', DISTRIBUTED): Otherwise(
        'statistics are those of all processes: gradients and state equal batch norm on the whole batch',
        check=test_distributed.check,
    ),
    ('CBN', _LOADING): Otherwise(
        'loads strictly as the identical function; eps, which the published layer adds outside the root, is worked '
        'into the variance',
        check=_cbn_loads,
    ),
    **{
        (norm, _LOADING): Otherwise(
            'behind a CenConv, which would centre the weights, refused with an `AnotherFunctionError`; behind a plain '
            'convolution or with weights that are centred already the identical function',
            check=_mabn_loads,
        )
        for norm in _MABNS
    },
    ('RBN', _LOADING): Otherwise(
        'loads strictly as the identical function, which learns as a new layer does: `weight` is divided by sigmoid(1)',
        check=_rbn_loads,
    ),
    ('BIN', 'gradcheck in float64, training and eval'): Otherwise(
        'the true gradient of gates inside of their interval; beyond, it is that of the bound, so that they come back',
        check=_gradient_inside_the_bounds,
    ),
    ('SN', _LOADING): Otherwise(
        'loads strictly as the identical function: `mean_weight` and `var_weight` put all weight on batch norm. A '
        'warning says that they hardly learn from there',
        check=_sn_loads,
    ),
    **{
        (norm, _LOADING): Otherwise(
            'refused with an `AnotherFunctionError`: without running statistics it would be another function',
            error=(AnotherFunctionError, 'would compute something else'),
        )
        for norm in ('GN', 'LN2d', 'LN2d CHW', 'AN-GN')
    },
    ('IN', _LOADING): Otherwise(
        "torch's instance norm refuses running statistics with a `RuntimeError`",
        error=(RuntimeError, r'Unexpected running stats buffer'),
    ),
    **{(norm, 'golden numbers of the published layer'): Otherwise(_NO_NUMBERS) for norm in NORMS if norm not in GOLDEN},
}
