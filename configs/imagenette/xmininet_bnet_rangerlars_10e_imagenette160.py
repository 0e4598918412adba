_base_ = 'xsemininet_bnet_rangerlars_10e_imagenette160.py'
model = dict(backbone=dict(type='XMiniNet'))
