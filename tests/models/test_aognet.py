"""AOGNet: the published graphs, parameter counts, keys and numbers; a second implementation; the host's rules."""

import copy
import hashlib
import json
import pickle
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import get_state_dict
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_norms.cli.weights import NoInit
from mmdet_norms.layers import AN, BNET, FrozenBN, SyncBN
from mmdet_norms.models.aog_grammar import build_grammar
from mmdet_norms.models.aognet import ARCHS, Arch, NodeOp
from mmdet_norms.reference import ReferenceAN

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared' / 'golden' / 'an'
GOLDEN = ROOT / 'tests' / 'data' / 'golden' / 'an'

BOTH = pytest.mark.parametrize('norm', ['BN', 'AN'])
ALL = pytest.mark.parametrize('arch, norm', [('12m', 'BN'), ('12m', 'AN'), ('40m', 'BN'), ('40m', 'AN')])

# The model of the recorded numbers: the published graphs and number of blocks, with few channels.
TINY = dict(filter_list=(4, 8, 16, 32, 48), blocks=(2, 1, 2, 1), dropout=(0, 0, 0, 0))
K = (3, 3, 5, 5)

# id, node, children, lateral children (* also in the residual), paths from the root; in order of evaluation.
G2 = """
1  T[0,1]  -      -   1
5  T[0]    -      -   1
3  O[0]    5      -   1
6  T[1]    -      -   1
4  O[1]    6      3   1
2  A[0,1]1 3,4    -   1
0  O[0,1]  1,2    -   1
"""
G4A = """
1  T[0,3]  -      -   1
8  T[0]    -      -   2
4  O[0]    8      -   2
9  T[1,3]  -      -   1
13 T[2,3]  -      -   2
19 T[2]    -      -   2
18 T[1]    -      -   2
15 O[1]    18     4   2
16 O[2]    19     15* 2
20 T[3]    -      -   2
17 O[3]    20     16  2
14 A[2,3]1 16,17  -   2
11 T[0,1]  -      -   1
12 A[0,1]1 4,15   14* 1
6  O[0,1]  11,12  -   1
7  O[2,3]  13,14  6   2
10 A[1,3]1 7,15   -   1
5  O[1,3]  9,10   -   1
2  A[0,3]1 4,5    -   1
3  A[0,3]2 6,7    2   1
0  O[0,3]  1,2,3  -   1
"""
G4B = """
1  T[0,3]  -      -   1
8  T[0,2]  -      -   1
11 T[0,1]  -      -   2
19 T[0]    -      -   2
16 O[0]    19     -   2
20 T[1]    -      -   2
17 O[1]    20     16  2
10 T[3]    -      -   2
18 T[2]    -      -   2
15 O[2]    18     17* 2
5  O[3]    10     15  2
14 A[2,3]1 5,15   -   1
12 A[0,1]1 16,17  14* 2
6  O[0,1]  11,12  -   2
9  A[0,2]2 6,15   -   1
4  O[0,2]  8,9    -   1
13 T[2,3]  -      -   1
7  O[2,3]  13,14  6   1
3  A[0,3]2 6,7    -   1
2  A[0,3]3 4,5    3   1
0  O[0,3]  1,2,3  -   1
"""
PUBLISHED_ORDER = {
    G2: '1 5 3 6 4 2 0',
    G4A: '1 8 4 9 13 19 18 15 16 20 17 14 11 12 6 7 10 5 2 3 0',
    G4B: '1 8 11 19 16 20 17 10 18 15 5 14 12 6 9 4 13 7 3 2 0',
}
STAGE_GRAPHS = (G2, G2, G4A, G4B)  # of both published nets, and of the tiny one


def tiny(**changes):
    return dict(arch=TINY | changes)


def rows(table):
    return [line.split() for line in table.strip().splitlines()]


def ids(entry):
    return () if entry == '-' else tuple(int(i.rstrip('*')) for i in entry.split(','))


def build(arch=TINY, **kwargs):
    kwargs = dict(norm_k=K) | kwargs if arch is TINY else kwargs
    return MODELS.build(dict(type='AOGNet', arch=arch) | kwargs)


@cache
def on_meta(arch, norm, **kwargs):
    with torch.device('meta'), NoInit():
        return build(arch, norm=norm, **kwargs)


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def filled_value(key, shape):
    """The state of the recorded models."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    leaf = key.rpartition('.')[2]
    if leaf == 'num_batches_tracked':
        return np.zeros(shape)
    if leaf == 'running_mean':
        return 0.1 * random.randn(*shape)
    if leaf == 'running_var':
        return (0.5 + random.rand(*shape)) * (25 if 'extra_norm_ac' in key else 1)
    if leaf == 'weight_':
        return (1 + 0.1 * random.randn(*shape)) * 2 / shape[0]
    if leaf == 'bias_':
        return 0.1 * random.randn(*shape) * 2 / shape[0]
    if len(shape) == 4:
        return random.randn(*shape) * np.sqrt(0.5 / np.prod(shape[1:]))
    return 1 + 0.1 * random.randn(*shape) if leaf == 'weight' else 0.1 * random.randn(*shape)


def fill(model):
    model.double()
    state = {key: torch.as_tensor(filled_value(key, tuple(v.shape))) for key, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


def tiny_input(size=64, count=3):
    return torch.from_numpy(np.random.RandomState(7).randn(count, 3, size, size))


def recorded_loss(outputs):
    weights = [np.random.RandomState(100 + i).randn(*out.shape) for i, out in enumerate(outputs)]
    return sum((out * torch.from_numpy(weight)).mean() for out, weight in zip(outputs, weights))


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


# ----------------------------------------------------------------------------------------------------------------------
# A second implementation: a function of the state dict, by the literal tables above.


class Oracle:
    def __init__(self, state, blocks, training):
        self.state, self.blocks, self.training = state, blocks, training

    def __call__(self, x):
        for i in range(3):
            x = self.conv_norm(x, f'stem.{i}.conv_norm.conv_norm', stride=2 if i == 0 else 1).relu()
        x, outputs = F.max_pool2d(x, 2, 2), []
        for stage, table in enumerate(STAGE_GRAPHS):
            if stage > 0:
                x = self.conv_norm(x, f'stage{stage}.stage_{stage}_block_0_transition.0.conv_norm.conv_norm').relu()
                x = F.avg_pool2d(x, 2, 2)
            for block in range(self.blocks[stage]):
                x = self.block(x, table, f'stage{stage}.stage_{stage}_block_{block}')
            outputs.append(x)
        return outputs

    def block(self, x, table, name):
        done, paths = {}, {int(row[0]): int(row[4]) for row in rows(table)}
        own, parents = name.rpartition('.')[2], {}
        for row in rows(table):
            for child in ids(row[2]) + ids(row[3]):
                parents.setdefault(child, set()).add(int(row[0]))
        grid = int(rows(table)[-1][1][4]) + 1
        for number, node, children, lateral, _ in rows(table):
            i, kind = int(number), node[0]
            cells = [int(c) for c in node[2:].split(']')[0].split(',')]
            if kind == 'T':
                unit = x.shape[1] // grid
                p = r = x[:, cells[0] * unit : (cells[-1] + 1) * unit]
            else:
                parts = [done[c] for c in ids(children)]
                scaled = [done[c] * paths[i] / paths[c] for c in ids(children)]
                p, r = (torch.cat(z, 1) if kind == 'A' else torch.stack(z).sum(0) for z in (parts, scaled))
                for other in ids(lateral):
                    p = p + done[other]
                    if not parents.get(i, set()) & parents[other]:
                        r = r + done[other]
            done[i] = self.node(p, r, f'{name}.{own}_node_{i}_op')
        return self.norm(done[0], f'{name}.extra_norm_ac.0').relu()

    def node(self, p, r, name):
        y = self.conv_norm(p, f'{name}.conv_norm_ac_1.conv_norm.conv_norm').relu()
        y = self.conv_norm(y, f'{name}.conv_norm_ac_2.conv_norm.conv_norm').relu()
        y = self.conv_norm(y, f'{name}.conv_norm_3.conv_norm')
        if f'{name}.shortcut.conv_norm.0.weight' in self.state:
            r = self.conv_norm(r, f'{name}.shortcut.conv_norm')
        return (y + r).relu()

    def conv_norm(self, x, name, stride=1):
        weight = self.state[f'{name}.0.weight']
        return self.norm(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), f'{name}.1')

    def norm(self, x, name):
        mixture = self.state.get(f'{name}.weight_')
        layer = nn.BatchNorm2d(x.shape[1]) if mixture is None else ReferenceAN(x.shape[1], k=len(mixture))
        state = {key: self.state[f'{name}.{key}'] for key in layer.state_dict()}
        state |= {key: state[key].detach().clone() for key, _ in layer.named_buffers()}  # which training changes
        return torch.func.functional_call(layer.train(self.training), state, (x,))


class TestGraph:
    @pytest.mark.parametrize(
        'grid, pruning, table', [(2, 1, G2), (2, 2, G2), (4, 1, G4A), (4, 2, G4B)], ids=['G2', 'G2', 'G4a', 'G4b']
    )
    def test_the_published_graphs_node_by_node(self, grid, pruning, table):
        grammar = build_grammar(grid, pruning)
        ours = []
        for node in (grammar.nodes[i] for i in grammar.order):
            lateral = [f'{i}*' if i in node.residual_lateral else str(i) for i in node.lateral]
            children = ','.join(map(str, node.children))
            ours.append([str(node.id), str(node.symbol), children or '-', ','.join(lateral) or '-', str(node.paths)])
        assert ours == rows(table)
        assert ' '.join(map(str, grammar.order)) == PUBLISHED_ORDER[table]

    @pytest.mark.parametrize(
        'grid, pruning, scaled',
        [
            (2, 1, {}),
            (4, 1, {2: (0.5, 1), 3: (1, 0.5), 10: (0.5, 0.5), 12: (0.5, 0.5)}),
            (4, 2, {2: (1, 0.5), 3: (0.5, 1), 9: (0.5, 0.5), 14: (0.5, 0.5)}),
        ],
    )
    def test_only_these_ands_scale_their_children_in_the_residual(self, grid, pruning, scaled):
        nodes = build_grammar(grid, pruning).nodes
        assert {n.id: n.residual_scale for n in nodes if set(n.residual_scale) - {1}} == scaled

    def test_every_recorded_graph_is_the_same(self):
        path = SHARED / 'grammars.json'
        if not path.exists():
            pytest.skip(f'the recorded graphs {path.name} are not beside this checkout')
        recorded = json.loads(path.read_text())
        assert len(recorded) == 42
        for graph in recorded:
            ours = build_grammar(graph['dim'], graph['prune'], graph['lateral'])
            assert len(ours.nodes) == graph['n_nodes']
            for node, theirs in zip(ours.nodes, graph['nodes']):
                assert node.id == theirs['id']
                assert node.symbol[:3] == (theirs['kind'], theirs['a'], theirs['b'])
                assert (list(node.lateral), node.paths) == (theirs['lateral'], theirs['npaths'])
                assert sorted(node.children) == sorted(theirs['children'])
                if graph['children_ascending']:
                    assert list(node.children) == theirs['children']
            if graph['children_ascending']:
                assert list(ours.order) == graph['DFS']

    @pytest.mark.parametrize('grid', [1, 2, 3, 5, 7, 9])
    @pytest.mark.parametrize('pruning', [0, 1, 2])
    def test_every_node_comes_once_and_after_what_it_takes(self, grid, pruning):
        grammar = build_grammar(grid, pruning)
        assert sorted(grammar.order) == list(range(len(grammar.nodes))) and grammar.order[-1] == 0
        place = {i: position for position, i in enumerate(grammar.order)}
        assert all(place[c] < place[n.id] for n in grammar.nodes for c in n.children + n.lateral)

    def test_the_graph_prints_as_a_table(self):
        lines = str(build_grammar(4, 1)).splitlines()
        assert len(lines) == 22 and lines[0].split() == ['id', 'node', 'children', 'lateral', 'paths']
        assert lines[8].split() == ['15', 'O[1]', '18', '4', '2'] and lines[-1].split()[:2] == ['0', 'O[0,3]']

    def test_without_lateral_edges_the_rest_is_the_same(self):
        plain, full = build_grammar(4, 2, lateral=False).nodes, build_grammar(4, 2).nodes
        assert not any(n.lateral or n.residual_lateral for n in plain)
        assert [(n.symbol, n.children, n.paths) for n in plain] == [(n.symbol, n.children, n.paths) for n in full]

    @pytest.mark.parametrize(
        'grid, pruning, message', [(0, 1, 'cells is 0'), (2.0, 1, 'cells is 2.0'), (2, 3, 'pruning=3 is unknown; of')]
    )
    def test_a_graph_that_does_not_exist_is_one_clear_error(self, grid, pruning, message):
        with pytest.raises(ValueError, match=message):
            build_grammar(grid, pruning)


class TestPublishedNets:
    PARTS = {
        ('12m', 'BN'): (11_434_099, 7_472, 116_656, 561_088, 4_066_080, 6_682_803),
        ('12m', 'AN'): (11_548_355, 7_472, 121_144, 570_616, 4_118_368, 6_730_755),
        ('40m', 'BN'): (38_752_004, 22_148, 352_411, 1_705_648, 17_285_602, 19_386_195),
        ('40m', 'AN'): (38_987_880, 22_148, 360_175, 1_722_232, 17_415_770, 19_467_555),
    }
    TRAINABLE = {
        ('12m', 'BN'): 11_309_971,
        ('12m', 'AN'): 11_419_739,
        ('40m', 'BN'): 38_377_445,
        ('40m', 'AN'): 38_605_557,
    }

    @ALL
    def test_the_parameters_of_the_whole_and_of_its_parts(self, arch, norm):
        net = on_meta(arch, norm)
        parts = [net.stem, net.stage0, net.stage1, net.stage2, net.stage3]
        assert (count(net), *map(count, parts)) == self.PARTS[arch, norm]

    @ALL
    def test_the_trainable_parameters_with_one_frozen_stage(self, arch, norm):
        assert count(on_meta(arch, norm, frozen_stages=1), trainable=True) == self.TRAINABLE[arch, norm]

    @pytest.mark.parametrize(
        'arch, widths',
        [
            ('12m', [[32, 80, 128], [128, 192, 256], [256, 384, 512], [512, 824]]),
            ('40m', [[56, 140, 224], [224, 336, 448], [448, 596, 744, 896], [896, 1400]]),
        ],
    )
    def test_block_widths_and_output_channels(self, arch, widths):
        assert [ARCHS[arch].widths(stage) for stage in range(4)] == widths
        net = on_meta(arch, 'BN')
        assert net.out_channels == [stage[-1] for stage in widths]
        for stage, expected in enumerate(widths):
            blocks = [b for n, b in getattr(net, f'stage{stage}').named_children() if 'transition' not in n]
            assert [block.extra_norm_ac[0].num_features for block in blocks] == expected[1:]

    def test_inner_widths_round_halves_up(self):
        block, inner = on_meta('40m', 'AN').stage3.stage_3_block_0, {}
        for node in block.grammar.nodes:
            op = block.get_submodule(f'stage_3_block_0_node_{node.id}_op')
            inner[node.symbol.width] = op.conv_norm_ac_1.conv_norm.conv_norm[0].out_channels
        assert inner == {1: 88, 2: 175, 3: 263, 4: 350}
        assert Arch(**TINY).mid_channels(8) == 4  # at least 4

    @pytest.mark.parametrize('arch, number', [('12m', 24), ('40m', 28)])
    def test_attention_sits_behind_the_3x3_of_nodes_over_all_cells(self, arch, number):
        net = on_meta(arch, 'AN')
        layers = {name: m for name, m in net.named_modules() if isinstance(m, AN)}
        assert len(layers) == number
        assert all(name.endswith('_op.conv_norm_ac_2.conv_norm.conv_norm.1') for name in layers)
        nodes = [name.split('.')[2] for name in layers if name.startswith('stage2.stage_2_block_0.')]
        assert nodes == [f'stage_2_block_0_node_{i}_op' for i in (1, 2, 3, 0)]
        ks = [{m.k for name, m in layers.items() if name.startswith(f'stage{i}')} for i in range(4)]
        assert ks == [{10}, {10}, {20}, {20}]

    def test_keys_shapes_and_order_are_the_published_ones(self):
        net = on_meta('12m', 'AN')
        state, parameters = net.state_dict(), dict(net.named_parameters())
        lines = [f'{k} {tuple(v.shape)} {"p" if k in parameters else "b"}' for k, v in state.items()]
        assert len(lines) == 2069 and len(parameters) == 1031
        published = SHARED / 'aognet12m_an_keys.json'
        if published.exists():
            assert lines == [f'{k} {tuple(s)} {t}' for k, s, t in json.loads(published.read_text())]
        digest = hashlib.sha256('\n'.join(lines).encode()).hexdigest()
        assert digest == '69325cdd06779824e7efca102e126d558bbd051e26ced1cfdba58425b4d57ff9'
        assert list(get_state_dict(net)) == list(state)  # mmengine's own saving code

    @BOTH
    def test_a_state_of_the_published_layout_loads_strictly(self, norm):
        source, target = fill(build(norm=norm)), build(norm=norm).double()
        state = source.state_dict()
        target.load_state_dict(state, strict=True)
        assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


class TestRecordedNumbers:
    @pytest.mark.parametrize('mode', ['eval', 'train'])
    def test_outputs_gradients_and_statistics_of_the_tiny_net(self, golden, mode):
        recorded = golden('an/aognet_tiny_bn.npz')
        net = fill(build(norm='BN', norm_eval=False)).train(mode == 'train')
        assert count(net) == recorded['n_params']
        x = tiny_input().requires_grad_()
        outputs = net(x)
        for i, out in enumerate(outputs):
            close(out, recorded[f'{mode}.out{i}'])
        loss = recorded_loss(outputs)
        loss.backward()
        close(loss, recorded[f'{mode}.loss'])
        close(x.grad[:, :, ::4, ::4], recorded[f'{mode}.gx_probe'])
        parameters = list(net.named_parameters())
        assert [name for name, _ in parameters] == [str(key) for key in recorded['param_keys']]
        close(torch.stack([p.grad.sum() for _, p in parameters]), recorded[f'{mode}.gsum'])
        close(torch.stack([p.grad.abs().sum() for _, p in parameters]), recorded[f'{mode}.gabs'])
        if mode == 'train':
            state = net.state_dict()
            after = torch.stack([state[str(key)].double().sum() for key in recorded['after.keys']])
            close(after, recorded['after.sum'])

    def test_outputs_of_the_12m_net(self):
        recorded = json.loads((GOLDEN / 'aognet12m_bn_stats.json').read_text())
        net = fill(build('12m', norm='BN')).eval()
        with torch.no_grad():
            outputs = net(torch.from_numpy(np.random.RandomState(20190804).randn(1, 3, 64, 64)))
        for out, theirs in zip(outputs, recorded['outputs'], strict=True):
            flat = out.flatten().numpy()
            assert list(out.shape) == theirs['shape']
            probe = (flat * np.cos(0.37 * np.arange(flat.size))).sum()
            ours = [flat.mean(), flat.std(), np.abs(flat).max(), probe, *flat[:8], *flat[-8:]]
            names = ('mean', 'std', 'absmax', 'cos_probe')
            np.testing.assert_allclose(ours, [theirs[n] for n in names] + theirs['head'] + theirs['tail'], rtol=1e-10)

    @BOTH
    @pytest.mark.parametrize('mode', ['eval', 'train'])
    def test_outputs_and_gradients_equal_the_second_implementation(self, norm, mode):
        net = fill(build(norm=norm, norm_eval=False)).train(mode == 'train')
        state = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in net.state_dict().items()}
        x = tiny_input(64).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        theirs = Oracle(state, TINY['blocks'], mode == 'train')(twin)
        ours = net(x)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b.detach().numpy())
        recorded_loss(ours).backward(), recorded_loss(theirs).backward()
        close(x.grad, twin.grad.numpy(), rtol=1e-8)
        for name, parameter in net.named_parameters():
            close(parameter.grad, state[name].grad.numpy(), rtol=1e-8)

    @pytest.mark.parametrize('arch', ['12m', '40m'])
    def test_the_published_an_nets_equal_the_second_implementation(self, arch):
        net = fill(build(arch, norm='AN')).eval()
        x = torch.from_numpy(np.random.RandomState(20190804).randn(1, 3, 64, 64))
        with torch.no_grad():
            theirs = Oracle(net.state_dict(), ARCHS[arch].blocks, training=False)(x)
            for a, b in zip(net(x), theirs, strict=True):
                close(a, b.numpy())


def close(ours, theirs, rtol=1e-10):
    ours, theirs = ours.detach().numpy(), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * max(np.abs(theirs).max(), 1e-3))


class TestHostRules:
    @pytest.mark.parametrize('frozen', [-1, 0, 1, 4])
    def test_frozen_stages_hold_right_after_construction_and_in_training(self, frozen):
        net = build(norm='AN', norm_eval=False, frozen_stages=frozen)
        parts = [net.stem, net.stage0, net.stage1, net.stage2, net.stage3]
        for change in (lambda: None, net.train, lambda: net.eval().train()):
            change()
            is_frozen = [not any(p.requires_grad for p in part.parameters()) for part in parts]
            assert is_frozen == [i <= frozen for i in range(5)]
            assert [not any(m.training for m in batch_norms(part)) for part in parts] == is_frozen
            assert all(all(p.requires_grad for p in part.parameters()) for part in parts[frozen + 1 :])

    def test_norm_eval_is_the_default_and_keeps_all_statistics_but_trains_the_rest(self):
        net = fill(build(norm='AN')).train()
        assert not any(m.training for m in batch_norms(net))
        before = {k: v.clone() for k, v in net.named_buffers()}
        recorded_loss(net(tiny_input(64, 2))).backward()
        assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
        attentive = [m for m in net.modules() if isinstance(m, AN)]
        assert len(attentive) == 3 * 3 + 3 * 4
        assert all(p.grad.any() for m in attentive for p in m.parameters())
        assert net.stem[0].conv_norm.conv_norm[0].weight.grad.any()
        assert all(m.training for m in batch_norms(build(norm='AN', norm_eval=False).train()))

    def test_dropout_stays_active_under_norm_eval_but_not_in_frozen_stages(self):
        arch = dict(TINY, dropout=(0.5, 0, 0.5, 0))
        net = build(arch, frozen_stages=1).train()
        assert [m.p for m in net.modules() if isinstance(m, nn.Dropout2d)] == [0.5] * (2 * 7 + 2 * 21)
        assert list(net.state_dict()) == list(build().state_dict())
        x = tiny_input(64, 2).float()
        (first, _, third, _), (again, _, other, _) = net(x), net(x)
        assert torch.equal(first, again) and not torch.equal(third, other)

    def test_published_dropout_rates(self):
        net = on_meta('12m', 'BN')
        parts = (net.stem, net.stage0, net.stage1, net.stage2, net.stage3)
        rates = [{m.p for m in part.modules() if isinstance(m, nn.Dropout2d)} for part in parts]
        assert rates == [set(), set(), set(), {0.1}, {0.1}]

    @BOTH
    def test_checkpointing_changes_no_output_gradient_or_statistic(self, norm):
        arch = dict(TINY, dropout=(0, 0, 0.3, 0.3))
        results = []
        for with_cp in (False, True):
            net = fill(build(arch, norm=norm, norm_k=K, norm_eval=False, with_cp=with_cp, frozen_stages=0)).train()
            torch.manual_seed(3)
            outputs = net(tiny_input(64, 2))
            recorded_loss(outputs).backward()
            results.append((outputs, [p.grad for p in net.parameters() if p.requires_grad], list(net.buffers())))
        for plain, saved in zip(*results):
            assert len(plain) == len(saved) > 0
            for a, b in zip(plain, saved):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    def test_checkpointing_keeps_fewer_maps_for_the_backward_pass(self):
        kept = []
        for with_cp in (False, True):
            net, sizes = build(norm='AN', with_cp=with_cp).train(), []

            def keep(tensor, sizes=sizes):
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                net(torch.randn(2, 3, 64, 64))
            kept.append(sum(sizes))
        assert kept[1] < kept[0] / 4

    def test_init_from_scratch_is_the_published_one(self):
        torch.manual_seed(0)
        net = build(norm='AN', norm_k=10)
        net.init_weights()
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                if module.weight.numel() >= 500:
                    assert module.weight.detach().std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
                assert module.bias is None
            elif isinstance(module, AN):
                weight, bias = module.weight_.detach(), module.bias_.detach()
                assert weight.mean() == pytest.approx(1, abs=0.1) and 0.05 < weight.std() < 0.15, name
                assert bias.mean() == pytest.approx(0, abs=0.1) and 0.05 < bias.std() < 0.15, name
            elif isinstance(module, _BatchNorm) and module.affine:
                assert (module.weight == 1).all() and (module.bias == 0).all()

    @pytest.mark.parametrize('wrapper, prefix', [('', None), ('module.network.', 'module.network')])
    def test_pretrained_init_loads_plain_and_wrapped_files(self, tmp_path, wrapper, prefix):
        source = fill(build(norm='AN')).float().eval()
        state = {wrapper + key: value for key, value in source.state_dict().items()}
        torch.save({'state_dict': {**state, wrapper + 'fc.weight': torch.zeros(5, 48)}}, tmp_path / 'net.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'net.pth'))
        target = build(norm='AN', init_cfg=dict(init_cfg, prefix=prefix) if prefix else init_cfg)
        target.init_weights()
        loaded = target.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())

    def test_a_batch_norm_state_in_the_an_net_is_the_same_function(self):
        source, target = fill(build(norm='BN')).eval(), build(norm='AN').double().eval()
        result = target.load_state_dict(source.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all('.attention_weights.attention.' in key for key in result.missing_keys)
        with torch.no_grad():
            for a, b in zip(target(tiny_input()), source(tiny_input())):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_out_indices_choose_the_maps_and_their_channels(self):
        whole, part = fill(build()).eval(), fill(build(out_indices=(1, 2))).eval()
        maps = part(tiny_input())
        assert part.out_channels == [16, 32] == [out.shape[1] for out in maps]
        assert all(torch.equal(a, b) for a, b in zip(maps, whole(tiny_input())[1:3], strict=True))
        assert whole.out_channels == [8, 16, 32, 48]

    @pytest.mark.parametrize('height, width', [(64, 96), (50, 70), (32, 32)])
    def test_strides_are_4_8_16_32_rounded_down(self, height, width):
        maps = build(norm='AN').eval()(torch.randn(1, 3, height, width))
        assert [out.shape[2:] for out in maps] == [(height // s, width // s) for s in (4, 8, 16, 32)]

    @BOTH
    @pytest.mark.parametrize('images, size', [(1, 32), (1, 64), (2, 32), (0, 64)])
    def test_one_image_tiny_maps_and_no_image_stay_finite_in_training(self, norm, images, size):
        net = build(norm=norm, norm_eval=False).train()
        outputs = net(torch.randn(images, 3, size, size))
        sum(out.square().sum() for out in outputs).backward()
        assert all(out.isfinite().all() for out in outputs)
        assert all(p.grad.isfinite().all() for p in net.parameters())
        if images:
            assert all(b.isfinite().all() for b in net.buffers())

    def test_two_nets_in_one_process_do_not_share_anything(self):
        first = fill(build(norm='AN')).eval()
        expected = first(tiny_input())
        build('12m', norm='BN'), build(dict(TINY, lateral=False), norm='AN', norm_k=2)
        assert all(torch.equal(a, b) for a, b in zip(first(tiny_input()), expected))

    def test_copies_pickles_and_exports_compute_the_same(self):
        arch = dict(filter_list=(4, 8, 16), blocks=(1, 1), dims=(2, 4), pruning=(1, 2), dropout=(0, 0.1))
        net, x = fill(build(arch, norm='AN', norm_k=3, out_indices=(0, 1))).eval(), tiny_input()
        size = {2: 32 * torch.export.Dim('h', min=2), 3: 32 * torch.export.Dim('w', min=2)}
        with torch.no_grad():
            exported = torch.export.export(net, (x,), dynamic_shapes=(size,)).module()
            for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), exported):
                for image in (x, torch.cat([x, x], 3)):
                    for a, b in zip(other(image), net(image), strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_conv_norm_fusion_keeps_the_function(self):
        for norm in ('BN', 'AN'):
            net, x = fill(build(norm=norm)).eval(), tiny_input()
            with torch.no_grad():
                expected = net(x)
                fused = fuse_conv_bn(copy.deepcopy(net))
                assert len(batch_norms(fused)) < len(batch_norms(net)) / 4
                for a, b in zip(fused(x), expected):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class TestCustomNets:
    @pytest.mark.parametrize(
        'norm_cfg, conv_cfg, kind',
        [
            (dict(type='BNET', kernel_size=3), None, BNET),
            (dict(type='FrozenBN'), None, FrozenBN),
            (dict(type='SyncBN'), None, SyncBN),
            (dict(type='GN', num_groups=2), None, nn.GroupNorm),
            (dict(type='MABN', B=2, real_B=4, warmup_iters=1), dict(type='CenConv'), None),
        ],
        ids=lambda cfg: cfg['type'] if isinstance(cfg, dict) else '',
    )
    @BOTH
    def test_any_norm_takes_the_plain_positions(self, norm, norm_cfg, conv_cfg, kind):
        arch = dict(filter_list=(4, 8, 16), blocks=(1, 1), dims=(2, 2), pruning=(1, 2), dropout=(0, 0))
        host = dict(out_indices=(0, 1), norm_eval=False)
        net = build(arch, norm=norm, norm_k=2, norm_cfg=norm_cfg, conv_cfg=conv_cfg, **host)
        net.init_weights()
        assert sum(isinstance(m, AN) for m in net.modules()) == (6 if norm == 'AN' else 0)
        for op in (m for m in net.modules() if isinstance(m, NodeOp)):
            norms = [op.conv_norm_ac_1.conv_norm.conv_norm[1], op.conv_norm_3.conv_norm[1]]
            assert kind is None or all(isinstance(m, kind) for m in norms)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            sum(out.square().mean() for out in net.train()(torch.randn(2, 3, 64, 64))).backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in net.parameters())

    def test_any_number_of_stages_and_any_grid(self):
        arch = dict(filter_list=[6, 12, 15], blocks=[2, 1], dims=[3, 1], pruning=[0, 0], dropout=[0, 0], lateral=False)
        net = build(Config(dict(arch=arch)).arch, norm='AN', norm_k=[2, 3], out_indices=(0, 1))
        assert [g.grid for g in net.grammars] == [3, 1] and len(net.grammars[0].nodes) == 16
        assert [out.shape for out in net(torch.randn(2, 3, 32, 32))] == [(2, 12, 8, 8), (2, 15, 4, 4)]
        assert isinstance(net.stage1.stage_1_block_0.stage_1_block_0_node_1_op, NodeOp)

    def test_a_narrowing_stage_rounds_to_the_lower_multiple_on_a_tie(self):
        arch = Arch(filter_list=(32, 128, 100), blocks=(2, 3), dims=(2, 4), pruning=(1, 1), dropout=(0, 0))
        assert arch.widths(1) == [128, 116, 104, 100]  # step -28 / 3 -> -10, between -12 and -8

    @pytest.mark.parametrize(
        'kwargs, message',
        [
            (dict(arch='50m'), "arch='50m' is unknown; choose one of: 12m, 40m"),
            (dict(arch=12), 'arch=12 is unknown'),
            (dict(norm='IN'), "norm='IN' is unknown; choose 'BN'"),
            (tiny(depth=3), "unknown key 'depth'; valid keys: filter_list, blocks"),
            (dict(arch=dict(blocks=(1,))), "lacks 'filter_list'"),
            (
                tiny(filter_list=(4, 8, 16, 30, 48)),
                r'filter_list\[3\]=30, output channels of stage 2, does not divide into the arch.dims\[2\]=4 slices of '
                'its blocks; write 28 or 32',
            ),
            (tiny(filter_list=(4, 8, 18, 32, 48)), r'filter_list\[2\]=18, input channels of stage 2'),
            (tiny(dims=(3, 2, 4, 4)), r'filter_list\[0\]=4.*dims\[0\]=3.*write 3 or 6'),
            (tiny(filter_list=(5, 8, 16, 32, 48), dims=(1, 2, 4, 4)), r'filter_list\[0\]=5.*must be even'),
            (tiny(filter_list=(4, 8, 16, 32)), r'has 4 entries.*4 stages; write one per stage, after 4 for the stem'),
            (tiny(dims=(2, 2)), r'arch.dims=\[2, 2\] has 2 entries, but arch.blocks=\[2, 1, 2, 1\]'),
            (tiny(blocks=(2, 0, 2, 1)), r'arch.blocks=\(2, 0, 2, 1\) must be a list of integers, each at least 1'),
            (tiny(pruning=(1, 2, 3, 2)), 'pruning=3 is unknown'),
            (tiny(dropout=(0, 0, 0, 1)), 'rates below 1'),
            (tiny(bottleneck_ratio=0), 'bottleneck_ratio=0 must be'),
            (tiny(filter_list=(4, 100, 4, 32, 48), blocks=(1, 30, 1, 1)), 'use fewer blocks'),
            (dict(norm='AN', norm_k=(10, 20)), r'norm_k=\(10, 20\) must be one number, or one for each of the 4'),
            (dict(norm='AN', norm_k=0), 'k=0, the number of affine transforms'),
            (dict(out_indices=(0, 4)), r'out_indices=\[0, 4\] must be stages from 0 to 3'),
            (dict(frozen_stages=5), r'frozen_stages=5 must be -1 \(none\)'),
            (dict(norm_cfg=dict(type='CBN')), "norm_cfg.type='CBN' corrects the statistics by"),
            (dict(norm_cfg=dict(type='BNETT')), "did you mean 'BNET'"),
        ],
    )
    def test_what_does_not_fit_is_one_clear_error(self, kwargs, message):
        with pytest.raises((ValueError, KeyError), match=message):
            build(**kwargs)


@BOTH
def test_a_mask_rcnn_takes_a_training_step_and_a_test_step(norm):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = Config.fromstring("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'", '.py').model
    model.backbone = dict(type='AOGNet', arch=TINY, norm=norm, norm_k=K, frozen_stages=1)
    model.neck.update(in_channels=[8, 16, 32, 48], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.out_channels = model.roi_head.mask_roi_extractor.out_channels = 16
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    model.train_cfg.rcnn.sampler.num = 16
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    detector = MODELS.build(model)
    detector.init_weights()
    before = {k: v.clone() for k, v in detector.backbone.named_parameters()}

    from mmdet.testing import demo_mm_inputs  # imports mmcv's ops, which mmdet_norms may have to supply first

    data = demo_mm_inputs(2, [[3, 64, 64], [3, 96, 64]], num_items=[2, 1], with_mask=True)
    optim_wrapper = build_optim_wrapper(detector, dict(optimizer=dict(type='SGD', lr=0.02)))
    losses = detector.train().train_step(data, optim_wrapper)
    assert all(value.isfinite().all() for value in losses.values())
    moved = {k for k, v in detector.backbone.named_parameters() if not torch.equal(v, before[k])}
    assert not any(k.startswith(('stem', 'stage0')) for k in moved)
    assert any(k.startswith('stage1') for k in moved) and any(k.startswith('stage3') for k in moved)
    assert all(p.isfinite().all() for p in detector.parameters())
    result = detector.eval().test_step(demo_mm_inputs(1, [[3, 64, 64]], num_items=[1], with_mask=True))
    assert result[0].pred_instances.scores.isfinite().all()
