"""References of published layers as functions of what the kernels are given."""

from torch.func import functional_call

from mmdet_norms.reference import ReferenceBNET


def bnet(x, weight, bias, mean=None, var=None):
    """BNET with this kernel (C, 1, k, k) and bias (C,), with the statistics of the batch or these (C,)."""
    layer = ReferenceBNET(x.shape[1], weight.shape[-1]).to(x).train(mean is None)
    given = {} if mean is None else dict(running_mean=mean, running_var=var)
    return functional_call(layer, {'bnconv.weight': weight, 'bnconv.bias': bias, **given}, (x,))
