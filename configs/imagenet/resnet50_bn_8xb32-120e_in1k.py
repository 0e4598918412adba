# AN's ResNet-50 with batch norm: 25.557M parameters, as published. Batch and learning rate are ours (README).
_base_ = [
    '../_base_/imagenet_runtime.py', '../_base_/models/resnet50_cls.py', '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_cosine-120e.py'
]
# With a line for another norm, see the others of this folder; `tools/train.py CONFIG --norm NAME` needs none.
