# Published row r50-mabn-2: top-1 error 23.67.
_base_ = './resnet50_bn32_8xb32-120e_in1k.py'
# The moments of pairs, averaged over 16 of them; all convolutions centred, the stem's included.
model = dict(backbone=dict(
    norm_cfg=dict(_delete_=True, type='MABN', norm_batch=2),
    conv_cfg=dict(type='CenConv')))
