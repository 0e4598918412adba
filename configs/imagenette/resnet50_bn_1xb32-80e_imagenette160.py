# Batch norm: what the others of this folder are compared with. The recipe is ours, and was never measured.
_base_ = [
    '../_base_/classification_runtime.py', '../_base_/models/resnet50_cls.py',
    '../_base_/datasets/imagenette160_bs32.py', '../_base_/schedules/imagenette_80e.py'
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
model = dict(head=dict(num_classes=10, label_smoothing=0.1))
