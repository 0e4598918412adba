# AOGNet-40m with batch norm: 40.153M parameters, as published. Batch and learning rate are ours (README).
_base_ = './aognet-12m_bn_8xb32-120e_in1k.py'
# The line to edit for another norm: 'AN' or 'BN'.
model = dict(
    backbone=dict(arch='40m', norm='BN'), head=dict(in_channels=1400))
