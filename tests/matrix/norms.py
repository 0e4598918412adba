"""The columns of the matrix: every norm as a config names it, and the tests of its formula."""

from typing import NamedTuple


class Norm(NamedTuple):
    cfg: dict
    conv: dict | None = None


def _bnet(kernel_size):
    return Norm(dict(type='BNET', kernel_size=kernel_size))


# Schedules are short, so that the six warm-up steps of `ready` reach what each norm does in the end.
NORMS = {
    'BN': Norm(dict(type='BN')),
    'BN norm_batch': Norm(dict(type='BN', norm_batch=1)),
    'SyncBN': Norm(dict(type='SyncBN')),
    'FrozenBN': Norm(dict(type='FrozenBN')),
    'GN': Norm(dict(type='GN', num_groups=4)),
    'IN': Norm(dict(type='IN', affine=True)),
    'LN2d': Norm(dict(type='LN2d')),
    'LN2d CHW': Norm(dict(type='LN2d', over='CHW')),
    'BRN': Norm(dict(type='BRN', warmup_iters=2, r_iters=5, d_iters=5, momentum=0.1)),
    'BRN norm_batch': Norm(dict(type='BRN', warmup_iters=2, r_iters=5, d_iters=5, momentum=0.1, norm_batch=1)),
    'SN': Norm(dict(type='SN')),
    'RBN': Norm(dict(type='RBN')),
    'BIN': Norm(dict(type='BIN')),
    'BNET-3': _bnet(3),
    'BNET-5': _bnet(5),
    'BNET-7': _bnet(7),
    'CBN': Norm(dict(type='CBN', buffer_num=3, burnin=2)),
    'MABN': Norm(dict(type='MABN', buffer_size=3, warmup_iters=2), dict(type='CenConv')),
    'MABN norm_batch': Norm(dict(type='MABN', buffer_size=3, warmup_iters=4, norm_batch=1), dict(type='CenConv')),
    'AN-BN': Norm(dict(type='AN', norm='BN', k=3)),
    'AN-GN': Norm(dict(type='AN', norm='GN', k=3, num_groups=4)),
}
BNETS = ('BNET-3', 'BNET-5', 'BNET-7')
_L = 'tests/layers/'
ORACLE = {
    'SyncBN': _L + 'test_sync_bn.py::TestAlone::test_forward_equals_the_formula_written_out',
    'FrozenBN': _L + 'test_frozen_bn.py::test_forward_equals_the_formula_written_out',
    'GN': _L + 'test_group_norm.py::test_forward_equals_the_formula_written_out',
    **dict.fromkeys(('LN2d', 'LN2d CHW'), _L + 'test_layer_norm.py::test_forward_equals_the_formula_written_out'),
    'BRN': _L + 'test_batch_renorm.py::TestMaths::test_three_training_steps_equal_the_formulas_written_out',
    'BN norm_batch': _L + 'test_ghost.py::TestMaths::test_it_equals_a_batch_norm_for_each_group',
    'BRN norm_batch': _L + 'test_batch_renorm.py::TestNormBatch'
    '::test_each_group_equals_the_formulas_written_out_and_the_batch_counts_once',
    'MABN norm_batch': _L + 'test_mabn_groups.py::TestMaths::test_150_iterations_equal_the_published_variant',
    'RBN': _L + 'test_representative_bn.py::test_forward_equals_the_formula_written_out',
    'BIN': _L + 'test_batch_instance_norm.py::test_forward_equals_the_formula_written_out',
    'SN': _L + 'test_switch_norm.py::test_forward_equals_the_formula_written_out',
    **dict.fromkeys(BNETS, _L + 'test_bnet.py::TestMaths::test_forward_equals_the_formula_written_out'),
    'CBN': _L + 'test_cbn.py::TestMaths::test_a_training_run_equals_the_published_algorithm',
    'MABN': _L + 'test_mabn.py::TestMaths::test_every_phase_equals_the_formulas_written_out',
    'AN-BN': _L + 'test_an.py::TestMaths::test_forward_equals_the_formula_written_out',
    'AN-GN': _L + 'test_an.py::TestMaths::test_forward_equals_the_formula_written_out',
}
GOLDEN = {
    **dict.fromkeys(BNETS, _L + 'test_bnet.py::TestMaths::test_twelve_iterations_equal_the_published_layer'),
    'CBN': _L + 'test_cbn.py::TestMaths::test_twelve_iterations_equal_the_published_layer',
    'MABN': _L + 'test_mabn.py::TestMaths::test_24_iterations_equal_the_published_layer',
    **dict.fromkeys(
        ('AN-BN', 'AN-GN'),
        _L + 'test_an.py::TestMaths::test_outputs_gradients_and_statistics_equal_the_published_layer',
    ),
}
