# CBN everywhere: statistics of the last four iterations, after eight of its burn-in.
_base_ = './resnet50_bn_1xb32-80e_imagenette160.py'
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(_delete_=True, type='CBN', buffer_num=3, burnin=8)
model = dict(backbone=dict(norm_cfg=norm_cfg))
