# The example of BNET's Imagenette implementation; `--norm NAME` puts another norm at every convolution.
_base_ = [
    '../_base_/classification_runtime.py', '../_base_/models/xsemininet_imagenette.py',
    '../_base_/datasets/imagenette160_bs32.py', '../_base_/schedules/imagenette_rangerlars_10e.py'
]
