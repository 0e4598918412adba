"""Canaries for the private names of torch: each test says in words which of them moved, and what that breaks.

``mmdet_norms/compat/torch_internals.py`` says of each function what is private about it, and what happens without it.
"""

import inspect
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from helpers.processes import run_in_two
from mmdet_norms.compat import loading
from mmdet_norms.compat import torch_internals as internals

FUNCTIONS = {
    name: function
    for name, function in inspect.getmembers(internals, inspect.isfunction)
    if function.__module__ == internals.__name__
}


@contextmanager
def unless_moved(what):
    """Around a canary: ``what`` says what moved, should it fail."""
    try:
        yield
    except Exception as error:
        pytest.fail(f'torch {torch.__version__}: {what} ({type(error).__name__}: {error})')


def map_and_vectors(dtype=torch.float32):
    x = torch.randn(3, 4, 5, 6).to(dtype)
    return x, *torch.randn(3, 4)


def spread(vector):
    return vector.view(1, -1, 1, 1)


def test_every_function_says_what_is_private_and_what_happens_without_it():
    own = Path(__file__).read_text(encoding='utf-8')
    for name, function in FUNCTIONS.items():
        if name != 'or_plain':  # which uses none
            assert re.search(r'Private: .*\.\s+Without\s+it: ', function.__doc__, re.DOTALL), name
        assert name.startswith('_') or f'internals.{name}' in own, f'{name} has no canary'


def test_nothing_else_uses_a_private_name_of_torch():
    private = r'torch\._C\._|_saved_|_register_state_dict_hook|torch\._foreach|_dynamo_marked|torch\._compile'
    package = Path(internals.__file__).parents[1]
    using = {path.name for path in package.rglob('*.py') if re.search(private, path.read_text(encoding='utf-8'))}
    assert using == {'torch_internals.py'}


# ------------------------------------------------------------------------------------------------------ the compiler


def test_code_is_kept_from_the_compiler():
    seen = []

    def kept(x):
        seen.append(torch.compiler.is_compiling() if hasattr(torch.compiler, 'is_compiling') else False)
        return x + 1

    with unless_moved('torch._compile._disable_dynamo no longer keeps a function out of compiled code'):
        run = torch.compile(lambda x: internals.disable_dynamo(kept)(x) * 2, backend='eager')
        assert run(torch.ones(1)).item() == 4 and seen == [False]


def test_a_constant_in_compiled_code():
    @internals.constant_in_compiled_code
    def answer():
        print('', end='')  # breaks a graph
        return 3

    torch._dynamo.reset()
    with unless_moved('the mark _dynamo_marked_constant no longer makes a constant of the answer of a function'):
        run = torch.compile(lambda x: x * answer(), backend='eager', fullgraph=True)
        assert run(torch.ones(1)).item() == 3


def test_transforms_of_functions_are_seen():
    with unless_moved('torch._C._are_functorch_transforms_active is not as it was: kernels get what they cannot read'):
        seen = []
        torch.func.vmap(lambda x: seen.append(internals.is_functorch_active()) or x)(torch.zeros(2))
        assert seen == [True] and not internals.is_functorch_active()


@pytest.mark.parametrize('old', [False, True])
def test_batched_gradients_are_seen(old, monkeypatch):
    if old:  # torch 2.1
        monkeypatch.delattr(torch._C._functorch, 'is_legacy_batchedtensor', raising=False)
    seen = []

    class Twice(Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(internals.is_legacy_batched(grad))
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    with unless_moved('tensors of is_grads_batched=True are no longer told apart: kernels get what they cannot read'):
        torch.autograd.grad(Twice.apply(x).sum(), x)
        torch.autograd.grad(Twice.apply(x), x, torch.eye(3), is_grads_batched=True)
        assert seen == [False, True]


def test_who_has_a_kernel():
    with unless_moved('torch._C._dispatch_has_kernel_for_dispatch_key no longer tells who has a kernel'):
        assert internals.has_kernel('aten::convolution_backward', 'CompositeExplicitAutograd')
        assert not internals.has_kernel('aten::convolution_backward', 'FPGA')


def test_the_name_of_an_own_backend(monkeypatch):
    with unless_moved('torch._C._get_privateuse1_backend_name is gone: SyncBN leaves no own backend to torch'):
        assert hasattr(torch._C, '_get_privateuse1_backend_name')
    assert internals.name_of_own_backend() == 'privateuseone'
    monkeypatch.delattr(torch._C, '_get_privateuse1_backend_name')
    assert internals.name_of_own_backend() == 'privateuseone'


# ---------------------------------------------------------------------------------------------------- backward passes


class Twice(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        Twice.seen.append(internals.backward_pass())
        return grad * 2


class Once(Twice):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_a_backward_pass_has_a_number():
    with unless_moved(
        'torch._C._current_graph_task_id no longer numbers backward passes: a forward that activation checkpointing '
        'repeats is taken for a new batch'
    ):
        x, Twice.seen = torch.ones(3, requires_grad=True), []
        for _ in range(2):
            Twice.apply(Twice.apply(x)).sum().backward()
        first, second = Twice.seen[0], Twice.seen[2]
        assert Twice.seen == [first, first, second, second]
        assert None not in Twice.seen and first != second and internals.backward_pass() is None


def test_functions_of_ones_own_are_found_behind_a_loss():
    x = torch.ones(3, requires_grad=True)
    with unless_moved('nodes no longer have _forward_cls: AdaHessian cannot say which norm has no second derivative'):
        assert internals.custom_functions((Twice.apply(x).exp() + Once.apply(x)).sum()) == {Twice, Once}
    assert internals.custom_functions(x.exp().sum()) == internals.custom_functions(torch.ones(())) == set()


def test_which_can_be_differentiated_once_only():
    with unless_moved('once_differentiable no longer wraps all functions in one code: such norms are not named'):
        assert internals.is_once_differentiable(Once) and not internals.is_once_differentiable(Twice)


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('autocast', [False, True])
def test_a_convolution_is_found_behind_its_result(autocast, frozen):
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=(1, 2), groups=2).requires_grad_(not frozen)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        node = conv(x).grad_fn
    with unless_moved('ConvolutionBackward0 and its _saved_* are not as they were: CBN finds no convolution'):
        assert internals.is_convolution(node)
        found = internals.saved_convolution(node)
        assert torch.equal(found.input, x.bfloat16() if autocast else x) and not found.input.requires_grad
        assert (*found[2:],) == ((2, 2), (1, 1), (1, 2), 2)
    with unless_moved('the parameter is no longer found behind the cast of autocast: CBN gets a rounded weight'):
        assert torch.equal(found.weight, conv.weight.bfloat16() if autocast and frozen else conv.weight)
        assert found.weight.dtype == (torch.bfloat16 if autocast and frozen else torch.float32)
        assert getattr(internals.weight_source(node), 'variable', None) is (None if frozen else conv.weight)


def test_what_is_no_convolution():
    x = torch.randn(2, 4, 6, 5)
    for module in nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(4):
        assert not internals.is_convolution(module(x).grad_fn)
    assert not internals.is_convolution(None)
    assert internals.weight_source(nn.BatchNorm2d(4)(x).grad_fn) is internals.weight_source(None) is None
    transposed = nn.ConvTranspose2d(4, 6, 3)
    assert internals.weight_source(transposed(x).grad_fn).variable is transposed.weight


# --------------------------------------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize('reentrant', [True, False])
def test_what_checkpointing_hides(reentrant):
    conv, seen = nn.Conv2d(2, 2, 1), []

    def run(x):
        node = conv(x).grad_fn
        seen.append((internals.in_first_reentrant_pass(), node is not None and internals.hides_its_input(node)))
        return conv(x)

    with unless_moved('hooks or code of torch.utils.checkpoint moved: CBN unpacks tensors in the middle of a forward'):
        checkpoint(run, torch.randn(1, 2, 3, 3, requires_grad=True), use_reentrant=reentrant).sum().backward()
        # repeated, it hides nothing that is needed
        assert seen == ([(True, False), (False, False)] if reentrant else [(False, True), (False, True)])
    with torch.autograd.graph.save_on_cpu(), torch.no_grad():
        assert not internals.in_first_reentrant_pass()
    with torch.autograd.graph.save_on_cpu():
        assert not internals.hides_its_input(conv(torch.randn(1, 2, 3, 3)).grad_fn)


@pytest.mark.parametrize('reentrant', [True, False])
def test_regions_are_found(reentrant):
    seen = []

    def run(x):
        seen.append(list(internals.checkpointed_regions()))
        return x.sin()

    def outer(x):
        return checkpoint(run, x, use_reentrant=reentrant)

    with unless_moved(
        'functions or variables of torch.utils.checkpoint have other names: repeated forwards of a norm are told apart '
        'by their values only'
    ):
        checkpoint(run, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
        [(region, first)], [(again, repetition)] = seen
        assert region is again and first is None and repetition is not None
        assert vars(region) is not None  # takes attributes
        seen.clear()
        checkpoint(outer, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert [region for region, repetition in seen[0] if repetition is not None] == [] and len(seen[0]) == 2
    assert not list(internals.checkpointed_regions())


def test_a_look_at_saved_tensors_is_seen():
    seen = []

    def run(x):
        seen.append(internals.is_looked_at())
        return x.exp()

    y = checkpoint(run, torch.ones(2, requires_grad=True), use_reentrant=False)
    with unless_moved('_recomputation_hook has another name: who looks at a graph is counted as a batch'):
        _ = y.grad_fn._saved_result
        assert seen == [False, True]


def test_torch_without_its_hooks_on_top(monkeypatch):
    monkeypatch.delattr(torch._C._autograd, '_top_saved_tensors_default_hooks', raising=False)
    assert not internals.is_looked_at() and not internals.hides_its_input(None)


# ------------------------------------------------------------------------------------------------------ kernels of aten


@pytest.mark.parametrize('groups', [1, 2])
def test_a_convolution_is_saved_as_its_gradient_needs_it(groups):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    y = conv(torch.randn(2, 4, 6, 5))
    grad, call = torch.randn_like(y), internals.saved_convolution(y.grad_fn)
    expected = torch.autograd.grad(y, conv.weight, grad)[0]
    torch.testing.assert_close(torch.nn.grad.conv2d_weight(call.input, call.weight.shape, grad, *call[2:]), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_of_batch_norm(dtype):
    x, scale, shift, mean = map_and_vectors(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift, mean, exact = scale.to(wide), shift.to(wide), mean.to(wide), x.double()
    close = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    close['check_dtype'] = False
    with unless_moved('torch.batch_norm_update_stats is not as it was: moments are computed by the plain formula'):
        found = internals.channel_moments(x)
        assert found[0].dtype == found[1].dtype == wide
        torch.testing.assert_close(found, (exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)), **close)
    with unless_moved('aten::native_batch_norm.out is not as it was: affine steps are computed by the plain formula'):
        internals.affine_into(y := torch.empty_like(x), x, scale, shift, mean)
        torch.testing.assert_close(y, spread(scale) * (exact - spread(mean)) + spread(shift), **close)
    with unless_moved('aten::native_batch_norm_backward is not as it was: sums are computed by the plain formula'):
        grad = torch.randn_like(x)
        expected = grad.double().sum((0, 2, 3)), (grad.double() * (exact - spread(mean))).sum((0, 2, 3))
        torch.testing.assert_close(internals.centred_sums(grad, x, mean), expected, **close)


def test_the_kernel_of_group_norm():
    rows = torch.randn(5, 40) + 3
    with unless_moved('torch.native_group_norm is not as it was: moments are computed by the plain formula'):
        torch.testing.assert_close(internals.row_moments(rows), (rows.mean(1), rows.var(1, correction=0)))


def test_where_kernels_fail_the_plain_formula_computes_and_that_is_said_once():
    calls = []

    @internals.or_plain(lambda x: x + 1)
    def plus_one(x):
        calls.append(x)
        if x < 0:
            raise torch.cuda.OutOfMemoryError('full')
        if x > 1:
            raise RuntimeError('no such overload')
        return x + 1

    with pytest.raises(torch.cuda.OutOfMemoryError):
        plus_one(-1)
    with pytest.raises(TypeError, match='can only concatenate'):  # of the formula, which says what is wrong
        plus_one('a')
    assert plus_one(1) == 2
    with pytest.warns(UserWarning, match=r'plus_one\(\) is computed by its plain formula .* no such overload') as said:
        assert plus_one(2) == 3 and plus_one(3) == 4 and plus_one(0) == 1
    assert len(said) == 1 and calls == [-1, 'a', 1, 2]


# -------------------------------------------------------------------------------------------------- modules and tensors


def test_hooks_of_a_module():
    add = 'forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook'
    with unless_moved('nn.Module keeps its hooks elsewhere: a norm that is looked at is not called as a module'):
        assert not internals.has_hooks(nn.Module())
        for name in add:
            module = nn.Module()
            getattr(module, f'register_{name}')(lambda *args: None)
            assert internals.has_hooks(module), name


def test_hooks_of_state_dicts():
    def publish(module, state, prefix, metadata):
        state[prefix + 'bias'] = state.pop(prefix + 'weight')

    def adopt(module, state, prefix, *args):
        state[prefix + 'weight'] = state.pop(prefix + 'bias')

    parent = nn.Sequential(nn.PReLU())
    with unless_moved('nn.Module._register_state_dict_hook is not as it was: AN and MABN save under other keys'):
        internals.on_state_dict(parent[0], publish)
        assert list(parent.state_dict()) == ['0.bias']
    with unless_moved('nn.Module._register_load_state_dict_pre_hook is not as it was: norms take over no other state'):
        assert not internals.has_load_hook(parent[0], adopt)
        internals.on_load(parent[0], adopt)
        assert internals.has_load_hook(parent[0], adopt) and not internals.has_load_hook(parent[0], publish)
        parent.load_state_dict({'0.bias': torch.tensor([7.0])})
        assert parent[0].weight.item() == 7


@pytest.mark.parametrize('without', [False, True])
def test_many_tensors_at_once(without, monkeypatch):
    if without:
        monkeypatch.delattr(torch, '_foreach_norm')
        monkeypatch.delattr(torch, '_foreach_copy_')
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([[2.0, float('nan')]])]
    with unless_moved('torch._foreach_norm is not as it was: on a GPU, steps that are not finite are taken'):
        found = internals.largest_magnitudes(tensors)
        assert found[0].item() == 3 and found[1].isnan()
    targets = [torch.zeros(2), torch.zeros(1, 2)]
    with unless_moved('torch._foreach_copy_ is not as it was: buffers are not put back after a step that is skipped'):
        internals.copy_all(targets, tensors)
        internals.copy_all([], [])
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(targets, tensors))


def what_ddp_has(rank):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ddp = DistributedDataParallel(model, static_graph=True)
    old, found = ddp.reducer, [internals.number_in_buckets(ddp) == 4, isinstance(ddp.parameters_to_ignore, set)]
    model[0].bias.requires_grad_(False)
    internals.make_buckets_again(ddp)
    found += [ddp.reducer is not old, internals.number_in_buckets(ddp) == 3, not internals.belongs_to_its_buckets(ddp)]
    ddp(torch.randn(2, 3, 5, 5)).square().sum().backward()
    ddp.register_comm_hook(None, lambda state, bucket: None)
    return [*found, internals.belongs_to_its_buckets(ddp)], model[0].weight.grad


def test_buckets_of_distributed_training(tmp_path):
    with unless_moved('DistributedDataParallel is built otherwise: its buckets cannot be planned again'):
        (found, grad), (_, of_other) = run_in_two(tmp_path, what_ddp_has)
        assert found == [True] * 6 and torch.equal(grad, of_other)


def test_a_data_loader_takes_another_batch_sampler():
    """In ``compat/loading.py``."""
    loader = DataLoader(range(4), batch_size=2)
    with unless_moved('DataLoader keeps its batch sampler elsewhere: resumed runs see other images'):
        with pytest.raises(ValueError):
            loader.batch_sampler = None
        loading.replace_batch_sampler(loader, [[3], [0, 1]], seed=0)
        assert [batch.tolist() for batch in loader] == [[3], [0, 1]]


def test_loops_of_mmengine_run_an_epoch_by_these_names():
    with unless_moved('EpochBasedTrainLoop has other methods: resumed epochs start at their first batch'):
        assert {'run_epoch', 'run_iter'} <= set(vars(EpochBasedTrainLoop))


def test_what_subclasses_of_modules_rely_on():
    """Private by name, and relied on by all who write modules: used where it is needed, in any file."""
    with unless_moved('nn.Module keeps its children, values or hooks elsewhere, or has no such methods to override'):
        module = nn.Sequential(nn.BatchNorm2d(2))
        assert module._modules == {'0': module[0]} and set(module[0]._parameters) == {'weight', 'bias'}
        assert set(module[0]._buffers) == {'running_mean', 'running_var', 'num_batches_tracked'}
        methods = '_load_from_state_dict', '_save_to_state_dict', '_forward_hooks', '_forward_pre_hooks'
        assert all(hasattr(module, name) for name in methods) and hasattr(nn.Conv2d, '_conv_forward')
        assert issubclass(nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
        assert issubclass(nn.InstanceNorm2d, nn.modules.instancenorm._InstanceNorm)
        assert issubclass(nn.Conv2d, nn.modules.conv._ConvNd)


def test_what_checkpoints_may_name():
    with unless_moved('torch._weights_only_unpickler has no list of harmless names: torch < 2.6 reads no checkpoint'):
        known = internals.harmless_in_checkpoints()
        assert 'torch._utils._rebuild_tensor_v2' in known and 'posix.system' not in known
