# ResNet-50 with batch norm by the recipe of the BNET weights: what BNET is compared with.
_base_ = [
    '../_base_/imagenet_runtime.py', '../_base_/models/resnet50_cls.py', '../_base_/datasets/imagenet_bs64.py',
    '../_base_/schedules/imagenet_100e.py'
]
# With a line for another norm, see the others of this folder; `tools/train.py CONFIG --norm NAME` needs none.
