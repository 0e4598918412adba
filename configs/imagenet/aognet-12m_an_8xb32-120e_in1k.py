# AOGNet-12m with AN: 12.373M parameters, as published. Batch and learning rate are ours (README).
# Trains the weights that its detectors start from (README).
_base_ = './aognet-12m_bn_8xb32-120e_in1k.py'
# The line to edit for another norm: 'AN' or 'BN'.
model = dict(backbone=dict(norm='AN'))
