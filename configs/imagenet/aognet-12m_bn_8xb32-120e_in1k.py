# AOGNet-12m with batch norm: 12.259M parameters, as published. Batch and learning rate are ours (README).
_base_ = [
    '../_base_/imagenet_runtime.py', '../_base_/models/aognet-12m_cls.py', '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_cosine-120e.py'
]
# The line to edit for another norm: 'AN' or 'BN'.
model = dict(backbone=dict(norm='BN'))
