_base_ = 'xsemininet_bnet_rangerlars_10e_imagenette160.py'
model = dict(backbone=dict(type='ResNeSt50'), head=dict(in_channels=2048))
