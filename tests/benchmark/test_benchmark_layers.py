"""Layer and convolution level: which candidates, in what state, with which columns."""

import pytest
import torch
from torch import nn

from mmdet_norms.benchmark import layers
from mmdet_norms.benchmark.groups import Setting, add_triton
from mmdet_norms.benchmark.layers import ConvNorm, candidates, conv_group, layer_group, norm_cfg_of, settle
from mmdet_norms.benchmark.measure import interleave
from mmdet_norms.kernels import gpu
from mmdet_norms.layers import CBN, MABN, CenConv2d
from mmdet_norms.reference import ReferenceCBN, ReferenceMABN

CPU = Setting(torch.device('cpu'))
SIZE = (2, 32, 6, 5)


def rows_of(group):
    return {row['name']: row for row in group.measure(2, 1)['rows']}


class TestCandidates:
    def test_batch_norm_leads_and_each_published_layer_brings_its_yardstick(self):
        labels = [label for label, _, _ in candidates(['bnet5', 'gn', 'bnet5'], reference=True)]
        assert labels == ['bn', 'bnet5', 'bnet5 (reference)', 'gn']
        assert [label for label, _, _ in candidates(['bnet5'], reference=False)] == ['bn', 'bnet5']

    def test_a_yardstick_has_the_arguments_of_its_layer(self):
        norm = layers.build_norm(norm_cfg_of('BNET(kernel_size=7, eps=0.1)'), 4, reference=True)
        assert norm.bnconv.kernel_size == (7, 7) and norm.eps == 0.1

    def test_any_registered_norm_can_be_named(self):
        assert norm_cfg_of('bnet5') == dict(type='BNET', kernel_size=5)
        assert norm_cfg_of('GN') == dict(type='GN')
        assert norm_cfg_of("AN(norm='GN', k=3)") == dict(type='AN', norm='GN', k=3)

    @pytest.mark.parametrize('name', ['bnet', 'Nope(k=1)', 'GN(8)', 'os.system()', 'GN(num_groups=f())', 'GN; 1'])
    def test_another_name_is_refused_with_the_choices(self, name):
        with pytest.raises(ValueError, match=r'is unknown.*write one of: bn, bnet3.*types: .*MABN'):
            norm_cfg_of(name)

    def test_a_typo_gets_the_closest_name(self):
        with pytest.raises(ValueError, match="did you mean 'bnet5'"):
            norm_cfg_of('bnett5')


class TestLayerLevel:
    @pytest.mark.parametrize('mode', layers.MODES)
    def test_every_default_layer_is_measured_in_every_mode(self, mode):
        group = layer_group(layers.DEFAULT['layer'], SIZE, mode, CPU)
        rows = rows_of(group)
        assert set(rows) == {'bn'} | {
            name + suffix for name in layers.DEFAULT['layer'][1:] for suffix in ('', ' (reference)')
        }
        for name, row in rows.items():
            assert 'note' not in row and row['ms'] > 0 and row['passes'] > 0 and row['peak_bytes'] > 0, name
            assert ('saved_bytes' in row) == (mode != 'eval')
            assert row['limit_passes'] == layers.LIMITS[norm_cfg_of(name.split(' ')[0])['type']][mode]
            assert (row['over'], 'ratio' in row) == ((None, False) if name == 'bn' else ('bn', True))

    def test_saved_bytes_are_those_of_the_formulation(self):
        rows = rows_of(layer_group(['bnet3'], (2, 32, 40, 40), 'forward+backward', CPU))
        one_map = 2 * 32 * 40 * 40 * 4
        assert rows['bn']['saved_bytes'] == one_map + 2 * 32 * 4
        # x and the normalized map
        assert rows['bnet3 (reference)']['saved_bytes'] == 2 * one_map + 2 * 32 * 4
        assert rows['bnet3 (reference)']['saved_ratio'] == pytest.approx(2, abs=0.01)

    def test_every_norm_is_measured_without_and_with_the_triton_kernels(self):
        group, seen = layer_group(['bnet3', 'mabn'], SIZE, 'forward+backward', CPU), {}
        for entry in group.entries:
            name, run = entry.case.name, entry.case.run
            entry.case.run = lambda name=name, run=run: seen.setdefault(name, []).append(gpu._switched_on) or run()
        rows = rows_of(add_triton(group))
        for name in ('bnet3', 'mabn'):
            assert rows[f'{name}, Triton']['over'] == 'bn' and rows[f'{name}, Triton']['saved_bytes'] > 0
            assert set(seen[name]) == {False, True} and seen[f'{name} (reference)'][0] is None
        assert [name for name in rows if 'Triton' in name] == ['bnet3, Triton', 'mabn, Triton']
        assert gpu._switched_on is None

    def test_cbn_is_sent_to_the_conv_level_except_in_eval(self):
        row = rows_of(layer_group(['cbn'], SIZE, 'forward', CPU))['cbn']
        assert 'ms' not in row and '--level conv' in row['note']
        rows = rows_of(layer_group(['cbn'], SIZE, 'eval', CPU))
        assert rows['cbn']['ms'] > 0 and rows['cbn (reference)']['ms'] > 0

    def test_a_layer_that_does_not_fit_the_size_is_a_note_beside_the_others(self):
        rows = rows_of(layer_group(['an-gn', 'mabn'], (2, 20, 4, 4), 'forward', CPU))
        assert 'num_groups=32 must divide the 20 channels' in rows['an-gn']['note'] and rows['mabn']['ms'] > 0

    @pytest.mark.parametrize('precision, dtype', [('fp32', torch.float32), ('bf16', torch.bfloat16)])
    @pytest.mark.parametrize('layout', ['nchw', 'channels_last'])
    @pytest.mark.parametrize('mode', layers.MODES)
    def test_the_input_has_the_asked_type_layout_and_mode(self, monkeypatch, precision, dtype, layout, mode):
        seen = []

        class Probe(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1))

            def forward(self, x):
                last = x.is_contiguous(memory_format=torch.channels_last)
                seen.append((x.dtype, last, self.training, torch.is_grad_enabled(), x.requires_grad))
                if mode == 'forward+backward':
                    x.register_hook(lambda grad: seen.append(grad.dtype))
                return x * self.weight.to(x.dtype)

        monkeypatch.setattr(layers, 'build_norm', lambda *_: Probe())
        rows = rows_of(layer_group([], SIZE, mode, Setting(CPU.device, precision, layout), reference=False))
        assert 'note' not in rows['bn'], rows
        trains = mode != 'eval'
        calls = [entry for entry in seen if isinstance(entry, tuple)]
        assert set(calls[:-1]) == {(dtype, layout == 'channels_last', trains, trains, trains)}
        assert (set(seen) - set(calls) == {dtype}) == (mode == 'forward+backward')


class TestConvLevel:
    @pytest.mark.parametrize('mode', layers.MODES)
    def test_convolutions_with_norms_and_the_convolution_alone(self, mode):
        rows = rows_of(conv_group(layers.DEFAULT['conv'], SIZE, mode, CPU))
        assert list(rows) == ['conv only', 'bn', 'cbn', 'cbn (reference)', 'mabn', 'mabn (reference)']
        assert all(row['ms'] > 0 and 'note' not in row and 'passes' not in row for row in rows.values())

    def test_state_is_compared_with_the_published_formulation(self):
        rows = rows_of(conv_group(['cbn'], SIZE, 'forward+backward', CPU, reference=True))
        weight = 32 * 32 * 9 * 4
        state = rows['cbn (reference)']['state_bytes']
        assert state == 9 * weight + 3 * 2 * 32 * 4 + 2 * 32 * 4  # 3 entries and the running statistics
        assert 3 * weight < rows['cbn']['state_bytes'] < 0.45 * state
        assert rows['cbn']['state_ratio'] == rows['cbn']['state_bytes'] / state

    def test_mabn_has_its_centred_convolution(self, monkeypatch):
        made = []
        monkeypatch.setattr(layers, 'ConvNorm', lambda *parts: made.append(parts) or ConvNorm(*parts))
        conv_group(['bn', 'mabn'], SIZE, 'forward', CPU)
        kinds = [(type(conv), type(norm)) for conv, norm in made]
        assert kinds == [
            (nn.Conv2d, type(None)),
            (nn.Conv2d, nn.BatchNorm2d),
            (CenConv2d, MABN),
            (CenConv2d, ReferenceMABN),
        ]


class TestSteadyState:
    def test_mabn_is_past_warm_up_and_renorm_delay_when_it_is_timed(self, monkeypatch):
        made = []
        build = layers.build_norm
        monkeypatch.setattr(layers, 'build_norm', lambda *args: made.append(build(*args)) or made[-1])
        group = layer_group(['mabn'], SIZE, 'forward+backward', CPU)
        counters = {id(layer): [] for layer in made[1:]}
        for entry, layer in zip(group.entries[1:], made[1:]):

            def run(run=entry.case.run, layer=layer):
                counters[id(layer)].append(int(layer.iters))
                run()

            entry.case.run = run
        interleave([entry.case for entry in group.entries], repeats=3, warmup=0)
        for counts in counters.values():
            assert counts[0] == 0 and min(counts[1:]) > MABN.RENORM_DELAY and len(counts) == 4

    @pytest.mark.parametrize('cls', [MABN, ReferenceMABN])
    def test_settling_fills_the_windows_with_what_the_first_step_found(self, cls):
        layer = cls(4)
        x = torch.randn(2, 4, 5, 5) * 3
        layer(x.requires_grad_()).sum().backward()
        settle(layer)
        moment = x.detach().square().mean((0, 2, 3))
        torch.testing.assert_close(layer.buffer_x2, moment.expand(16, 4))
        torch.testing.assert_close(layer.running_var.flatten(), moment)
        assert layer.buffer_gz.unique(dim=0).shape[0] == 1 and layer.buffer_gz.abs().sum() > 0
        y = layer(x)
        torch.testing.assert_close(y.detach().square().mean((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)

    def test_cbn_has_a_full_history_when_it_is_timed(self, monkeypatch):
        made, lengths = [], []
        build = layers.build_norm
        monkeypatch.setattr(layers, 'build_norm', lambda *args: made.append(build(*args)) or made[-1])
        group = conv_group(['cbn'], SIZE, 'forward+backward', CPU)
        ours, literal = made[1:]
        assert isinstance(ours, CBN) and isinstance(literal, ReferenceCBN)
        by_name = {entry.case.name: entry.case for entry in group.entries}
        for name, length in (
            ('cbn', lambda: ours._history.length if ours._history else 0),
            ('cbn (reference)', lambda: len(literal.history)),
        ):

            def run(run=by_name[name].run, length=length):
                lengths.append(length())
                run()

            by_name[name].run = run
        interleave(list(by_name.values()), repeats=2, warmup=0)
        assert lengths == [0, 1, 2, 3, 0, 1, 2, 3, 3, 3, 3, 3]
