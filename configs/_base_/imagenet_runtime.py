# A checkpoint of a ResNet-50 with its optimizer takes 200 MB: the last three are kept.
_base_ = './classification_runtime.py'
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
