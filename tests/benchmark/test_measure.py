"""Interleaving, ratios and the accounting of memory, on cases whose answers are known."""

import gc

import pytest
import torch
from torch import nn

from mmdet_norms.benchmark import measure
from mmdet_norms.benchmark.groups import ONE_PASS, Entry, Group, Setting
from mmdet_norms.benchmark.measure import Case, held_bytes, interleave, owned_tensors, peak_bytes, saved_bytes
from mmdet_norms.layers import AN


def recording(names, log):
    return [Case(name, lambda name=name: log.append(name)) for name in names]


def group_of(cases, over=None):
    entries = [Entry(case, None if case.name == over or case.name == ONE_PASS else over) for case in cases]
    return Group('layer', 'forward', Setting(torch.device('cpu')), (1, 1, 2, 3), entries)


class TestInterleave:
    NAMES = 'abcd'

    def test_every_repeat_has_every_case_once_and_the_order_changes(self):
        log = []
        times = interleave(recording(self.NAMES, log), repeats=6, warmup=2)
        assert log[:8] == list('aabbccdd')
        blocks = [''.join(log[i : i + 4]) for i in range(8, len(log), 4)]
        assert len(blocks) == 6 and all(sorted(block) == list(self.NAMES) for block in blocks)
        assert len(set(blocks)) > 2
        assert {name: len(ms) for name, ms in times.ms.items()} == dict.fromkeys(self.NAMES, 6)

    def test_the_same_order_every_time(self):
        logs = [[], []]
        for log in logs:
            interleave(recording(self.NAMES, log), repeats=5)
        assert logs[0] == logs[1]

    def test_warm_up_and_resets_are_not_timed(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(measure.time, 'perf_counter', lambda: now[0])

        def wait(seconds):
            now[0] += seconds

        calls = []
        case = Case('a', lambda: (calls.append(1), wait(0.002 if len(calls) > 3 else 9.0)), reset=lambda: wait(5.0))
        assert interleave([case], repeats=4, warmup=3).ms['a'] == pytest.approx([2.0] * 4)

    def test_a_layer_is_settled_once_after_its_first_call(self):
        log = []
        case = Case('a', lambda: log.append('run'), lambda: log.append('reset'), lambda: log.append('settle'), 2)
        interleave([case], repeats=2, warmup=1)
        assert log == ['reset', 'run', 'settle', *['reset', 'run'] * 4]
        assert measure.count_calls([case], 2, 1) == log.count('run')

    def test_a_failing_case_is_left_out_and_the_others_go_on(self):
        log, seen = [], []

        def fail():
            if len(log) > 3:
                raise ValueError('no more\nmany details')
            log.append('bad')

        times = interleave([Case('bad', fail), *recording('ab', log)], repeats=3, warmup=1, on_call=seen.append)
        assert times.failed == {'bad': 'ValueError: no more'}
        assert set(times.ms) == {'a', 'b'} and all(len(ms) == 3 for ms in times.ms.values())
        assert seen.count('a') == 4 and seen.count('bad') < 4

    def test_no_garbage_is_collected_between_timed_calls(self):
        assert gc.isenabled()
        states = []
        interleave([Case('a', lambda: states.append(gc.isenabled()))], repeats=2, warmup=1)
        assert states == [True, False, False] and gc.isenabled()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    def test_a_gpu_is_timed_by_events(self):
        x = torch.randn(2048, 2048, device='cuda')
        times = interleave([Case('a', lambda: x @ x), Case('b', lambda: [x @ x for _ in range(8)])], 5, 2, 'cuda')
        assert min(times.ms['a']) > 0 and 4 * min(times.ms['a']) < min(times.ms['b'])


class TestRatios:
    def test_a_ratio_is_taken_within_a_repeat_so_that_drift_cancels(self, monkeypatch):
        drift = {'bn': [1.0, 10.0, 100.0, 1000.0], 'x': [2.0, 20.0, 200.0, 2000.0], ONE_PASS: [0.5, 5.0, 50.0, 500.0]}
        monkeypatch.setattr(measure, 'time_call', lambda run, *_: drift[run()].pop(0))
        cases = [Case(name, lambda name=name: name) for name in drift]
        result = group_of(cases, 'bn').measure(4, 0)
        bn, x = result['rows']
        assert x['ratio'] == x['ratio_q1'] == x['ratio_q3'] == 2 and 'ratio' not in bn
        assert x['ms'] == 110 and x['ms_min'] == 2 and x['times_ms'] == [2, 20, 200, 2000]
        assert (bn['passes'], x['passes'], result['one_pass_ms']) == (2, 4, 27.5)

    def test_quartiles_interpolate(self):
        assert measure.quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
        assert measure.quartiles([7.0]) == (7, 7, 7)

    def test_a_candidate_keeps_its_time_where_its_facts_fail(self):
        def facts():
            raise RuntimeError('cannot say')

        group = group_of([])
        group.entries = [Entry(Case('a', lambda: None), None, facts)]
        (row,) = group.measure(2, 0)['rows']
        assert row['ms'] >= 0 and row['note'] == 'RuntimeError: cannot say'


class SavesTwoViews(torch.autograd.Function):
    """Saves x and half of it (one storage), keeps a tensor as an attribute, and another in a list."""

    @staticmethod
    def forward(ctx, x, buffer):
        ctx.save_for_backward(x, x[: len(x) // 2])
        ctx.kept = torch.empty(100, dtype=torch.float64)
        ctx.more = [torch.empty(10, dtype=torch.float32)]
        ctx.buffer = buffer
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


class TestSavedBytes:
    def test_of_a_custom_function_counts_storages_once_attributes_too_and_not_what_is_owned(self):
        x, buffer = torch.randn(64, requires_grad=True), torch.randn(1000)
        assert saved_bytes(lambda: SavesTwoViews.apply(x, buffer), [buffer]) == 64 * 4 + 100 * 8 + 10 * 4
        assert saved_bytes(lambda: SavesTwoViews.apply(x, buffer), [buffer, x]) == 100 * 8 + 10 * 4

    def test_a_saved_view_keeps_its_whole_storage(self):
        x = torch.randn(1000)
        weight = torch.randn(10, requires_grad=True)
        assert saved_bytes(lambda: x[:10] * weight) == 4000

    def test_of_batch_norm_is_the_input_and_two_vectors(self):
        norm, x = nn.BatchNorm2d(4), torch.randn(2, 4, 5, 6, requires_grad=True)
        assert saved_bytes(lambda: norm(x), owned_tensors(norm)) == x.nbytes + 2 * 4 * 4

    def test_an_intermediate_map_counts_and_a_saved_output_once(self):
        x = torch.randn(100, requires_grad=True)
        assert saved_bytes(lambda: x.exp().exp()) == 2 * 400
        assert saved_bytes(lambda: {'a': [x.exp()], 'b': x.detach()}) == 400
        assert saved_bytes(lambda: x + 1) == 0

    def test_the_graph_is_freed_afterwards(self):
        freed = []
        x = torch.randn(10, requires_grad=True)

        class Notice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.marker = Marker()
                y = x * 2
                ctx.save_for_backward(y)
                return y

            @staticmethod
            def backward(ctx, grad):
                return grad

        class Marker:
            def __del__(self):
                freed.append(1)

        saved_bytes(lambda: Notice.apply(x))
        gc.collect()
        assert freed


class TestHeldBytes:
    def test_reaches_buffers_lists_and_objects_but_no_parameters(self):
        class Box:
            def __init__(self):
                self.tensor = torch.zeros(7)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1000))
                self.register_buffer('b', torch.zeros(3))
                self.history = [torch.zeros(5), (torch.zeros(2, dtype=torch.float64), None)]
                self.box = Box()
                self.box.self = self.box
                self.view = self.history[0][1:]
                self.alias = [self.weight.detach()]
                self.child = nn.BatchNorm2d(4)

        assert held_bytes(Layer()) == 4 * (3 + 5 + 7) + 2 * 8 + (4 + 4) * 4 + 8


class TestPeakBytes:
    def test_on_a_cpu_it_is_the_most_held_at_once(self):
        def run():
            a = torch.empty(1000, 1000)
            b = torch.empty(1000, 500)
            del a
            return torch.empty(1000, 100), b

        peak_bytes(run)
        assert 6_000_000 <= peak_bytes(run) < 6_010_000

    def test_of_nothing_is_nothing(self):
        assert peak_bytes(lambda: None) == 0


def test_the_machine_is_described():
    machine = measure.describe_machine('cpu')
    assert machine['torch'] == torch.__version__ and machine['threads'] == torch.get_num_threads()
    assert machine['cpu'] and machine['gpu'] is None
    assert measure.now()[4] == '-' and 'T' in measure.now()


def test_what_a_graph_holds_ends_at_pythons_modules(recwarn):
    layer = AN(3, k=2)  # whose function remembers a module
    assert saved_bytes(lambda: layer(torch.randn(2, 3, 4, 4, requires_grad=True)), owned_tensors(layer)) > 0
    assert not [said for said in recwarn if 'deprecated' in str(said.message)]
