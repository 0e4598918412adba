"""``convert_norms``: the batch norms of any torch model."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from mmdet_norms import convert_norms
from mmdet_norms.errors import UserError
from mmdet_norms.layers import AN, BNET, CBN, NORMS, FrozenBN


class Act(nn.BatchNorm2d):
    """As timm's ``BatchNormAct2d``: the activation is inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU(channels)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), norm(8)
        self.rest = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8))

    def forward(self, x):
        return self.rest(self.bn1(self.conv1(x)))


def trained(model):
    """In eval mode, with statistics and an affine step that are those of no new layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight, module.bias):
                if value is not None:
                    nn.init.uniform_(value, 0.5, 2)
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -1, 1), nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def kept_function(model, norm, x=None, **options):
    x = torch.randn(2, 3, 9, 8) if x is None else x
    y = model(x)
    report = convert_norms(model, norm, **options)
    torch.testing.assert_close(model(x), y)
    return report


@pytest.mark.parametrize('name', ['bnet3', 'bnet5', 'bnet7', 'an', 'bnet', 'brn', 'cbn', 'frozenbn', 'sn', 'syncbn'])
def test_a_name_keeps_the_function(name):
    model = trained(Net())
    report = kept_function(model, name)
    cls = BNET if name[-1].isdigit() else NORMS[next(key for key in NORMS if key.lower() == name)]
    assert report.converted == {'bn1': cls.__name__, 'rest.2': cls.__name__}
    assert type(model.bn1) is type(model.rest[2]) is cls and not model.bn1.training
    assert str(report) == f'2 of 2 batch norms are {cls.__name__} now'
    if name[-1].isdigit():
        assert model.bn1.kernel_size == int(name[-1])


def test_eps_and_momentum_are_those_of_the_batch_norm():
    model = trained(Net(lambda c: nn.BatchNorm2d(c, eps=0.1, momentum=0.01)))
    kept_function(model, 'bnet5')
    assert model.bn1.bn.eps == 0.1 and model.bn1.bn.momentum == 0.01


def test_where_chooses_by_name():
    model = trained(Net())
    report = kept_function(model, 'bnet5', where=r'^rest\.')
    assert list(report.converted) == ['rest.2'] and type(model.bn1) is nn.BatchNorm2d
    with pytest.raises(UserError, match=r"no batch norm .* where='bn2'"):
        convert_norms(model, 'bnet5', where='bn2')


@pytest.mark.parametrize('name', ['bnet5', 'an'])
def test_an_activation_inside_stays(name):
    model = trained(Net(Act))
    nn.init.uniform_(model.bn1.act.weight, 0, 1)
    kept_function(model, name)
    assert list(dict(model.bn1.named_children())) == ['norm', 'drop', 'act']


def test_a_shared_batch_norm_stays_shared():
    model = trained(Net())
    model.rest[2] = model.bn1
    kept_function(model, 'bnet3')
    assert model.rest[2] is model.bn1 and type(model.bn1) is BNET


def test_a_synchronized_one_stays_synchronized():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained(Net()))
    report = kept_function(model, 'bnet5')
    assert type(model.bn1) is BNET and type(model.bn1.bn) is nn.SyncBatchNorm and len(report.converted) == 2


def test_without_an_affine_step():
    kept_function(trained(Net(lambda c: nn.BatchNorm2d(c, affine=False))), 'bnet5')


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = trained(Net()).to(dtype)
    report = convert_norms(model, 'bnet5')
    assert not report.changed and {value.dtype for value in model.parameters()} == {dtype}


def test_a_model_without_values():
    model = Net().to('meta')
    assert convert_norms(model, 'bnet5').converted and model.bn1.bnconv.weight.is_meta


def test_mode_and_frozen_parameters_are_taken_over():
    model = Net()
    model.bn1.eval().weight.requires_grad_(False)
    convert_norms(model, 'bnet5')
    assert not model.bn1.training and not model.bn1.bn.training and model.rest[2].training
    assert not model.bn1.bnconv.weight.requires_grad and model.bn1.bnconv.bias.requires_grad


def test_it_trains_is_pickled_and_loads():
    model = trained(Net()).train()
    convert_norms(model, 'bnet5')
    model(torch.randn(2, 3, 9, 8)).square().mean().backward()
    assert model.bn1.bnconv.weight.grad.count_nonzero() > 8
    again = pickle.loads(pickle.dumps(model.eval()))
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(again(x), model(x))
    fresh = Net()
    convert_norms(fresh, 'bnet5')
    fresh.load_state_dict(model.state_dict())


def test_a_traced_model():
    kept_function(fx.symbolic_trace(trained(Net())), 'bnet5')


def test_what_stays_is_named_with_the_reason():
    model = nn.ModuleDict(
        dict(
            good=nn.BatchNorm2d(4),
            volume=nn.BatchNorm3d(4),
            lazy=nn.LazyBatchNorm2d(),
            untracked=nn.BatchNorm2d(4, track_running_stats=False),
            hooked=nn.BatchNorm2d(4),
            spectral=nn.BatchNorm2d(4),
            ours=BNET(4),
        )
    )
    model.hooked.register_forward_hook(lambda *args: None)
    parametrizations.weight_norm(model.spectral)
    report = convert_norms(model, 'bnet5')
    assert list(report.converted) == ['good'] and model.ours.kernel_size == 3
    reasons = dict(
        volume='BatchNorm3d is not of maps (N, C, H, W)',
        lazy='LazyBatchNorm2d is not of maps (N, C, H, W)',
        untracked='it has no running statistics',
        hooked='somebody has put hooks or another forward() on it',
        spectral='its weight is parametrized',
    )
    assert report.kept == reasons and all(f'\nkept {name}: {why}' in str(report) for name, why in reasons.items())
    assert str(report).startswith('1 of 6 batch norms are BNET now\n')


class TestAFunction:
    def test_gets_the_batch_norm_and_what_it_returns_gets_its_weights(self):
        model = trained(Net())
        weight = model.bn1.weight.detach().clone()
        report = convert_norms(model, lambda bn: nn.GroupNorm(2, bn.num_features))
        assert torch.equal(model.bn1.weight, weight) and report.changed == ['bn1', 'rest.2']
        assert 'another function than before, to be trained: bn1, rest.2' in str(report)

    def test_of_a_norm_of_this_package(self):
        report = kept_function(trained(Net()), lambda bn: AN(bn.num_features, k=3))
        assert not report.changed
        report = convert_norms(trained(Net()), lambda bn: NORMS['LN2d'](bn.num_features))
        assert report.changed == ['bn1', 'rest.2']

    def test_may_leave_some(self):
        model = trained(Net())
        assert kept_function(model, lambda bn: BNET(8) if bn is model.bn1 else None).kept == {
            'rest.2': 'the function returned None'
        }

    def test_may_be_a_class(self):
        model = trained(Net())
        convert_norms(model, lambda bn: FrozenBN(bn.num_features))
        assert type(model.bn1) is FrozenBN


def test_cbn_is_linked_to_the_convolution_in_front():
    model = trained(Net())
    model.rest[1] = nn.Identity()
    report = kept_function(model, 'cbn')
    assert type(model.bn1) is CBN and report.unlinked == ['rest.2']
    assert 'not right behind a convolution, which CBN needs: rest.2' in str(report)


@pytest.mark.parametrize(
    ('norm', 'said'),
    [
        ('bnett5', r"norm='bnett5' is unknown \(did you mean 'bnet5'\?\); choose one of: bnet3"),
        ('bnett5', r'choose one of: bnet3, bnet5, bnet7, an, bin, bnet, brn, cbn, frozenbn, ghostbn, mabn, rbn'),
        ('ln2d', r"norm='ln2d' cannot be the function .*lambda bn: LN2d\(bn.num_features\)"),
        ('gn', r"norm='gn' cannot be the function .*lambda bn: GN\(bn.num_features\)"),
        ('bnet4', 'kernel_size=4 must be an odd positive integer'),
        (5, 'norm=5 must be a name'),
    ],
)
def test_one_error_and_the_model_is_as_it_was(norm, said):
    model = trained(Net())
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises((UserError, ValueError), match=said):
        convert_norms(model, norm)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_batch_norm():
    with pytest.raises(UserError, match=r'no batch norm to replace.*; 0: BatchNorm1d is not of maps'):
        convert_norms(nn.Sequential(nn.BatchNorm1d(3)), 'bnet5')


def test_a_model_in_ddp_is_refused():
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(ddp)
    ddp.module = Net()
    with pytest.raises(UserError, match='not what it returned'):
        convert_norms(ddp, 'bnet5')
