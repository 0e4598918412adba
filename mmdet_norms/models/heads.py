"""RoI heads with a norm per convolution: AN has 10, 10, 20, 20 components there, which one norm_cfg cannot say."""

from mmcv.cnn import ConvModule
from mmdet.models.roi_heads.bbox_heads import Shared4Conv1FCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import nn

from ..layers._args import ConfigError
from ..registry import MODELS


def _is_list(norm_cfg) -> bool:
    return isinstance(norm_cfg, (list, tuple))


def _check_length(head: str, norm_cfg: list, num_convs: int) -> None:
    if len(norm_cfg) != num_convs:
        raise ConfigError(
            f'{head}.norm_cfg lists {len(norm_cfg)} norms for {num_convs} convolutions; write one dict, or one per '
            'convolution (None: no norm)'
        )


@MODELS.register_module()
class NormShared4Conv1FCBBoxHead(Shared4Conv1FCBBoxHead):
    """mmdet's ``Shared4Conv1FCBBoxHead`` whose ``norm_cfg`` may be a list with one norm_cfg (or None) per convolution.

    Raises:
        ConfigError: the list's length is not the number of convolutions.
    """

    def _add_conv_fc_branch(self, num_branch_convs, num_branch_fcs, in_channels, is_shared=False):
        if not (_is_list(self.norm_cfg) and num_branch_convs):
            return super()._add_conv_fc_branch(num_branch_convs, num_branch_fcs, in_channels, is_shared)
        _check_length(type(self).__name__, self.norm_cfg, num_branch_convs)
        widths = [in_channels] + [self.conv_out_channels] * num_branch_convs
        convs = nn.ModuleList(
            ConvModule(a, b, 3, padding=1, conv_cfg=self.conv_cfg, norm_cfg=norm_cfg)
            for a, b, norm_cfg in zip(widths, widths[1:], self.norm_cfg)
        )
        _, fcs, width = super()._add_conv_fc_branch(0, num_branch_fcs, widths[-1], is_shared)
        return convs, fcs, width


@MODELS.register_module()
class NormFCNMaskHead(FCNMaskHead):
    """mmdet's ``FCNMaskHead`` whose ``norm_cfg`` may be a list with one norm_cfg (or None) per convolution.

    Raises:
        ConfigError: the list's length is not ``num_convs``.
    """

    def __init__(self, *args, norm_cfg=None, **kwargs):
        super().__init__(*args, norm_cfg=None if _is_list(norm_cfg) else norm_cfg, **kwargs)
        if not _is_list(norm_cfg):
            return
        _check_length(type(self).__name__, norm_cfg, self.num_convs)
        self.norm_cfg = norm_cfg
        for i, (conv, cfg) in enumerate(zip(self.convs, norm_cfg)):
            self.convs[i] = ConvModule(
                conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, conv_cfg=self.conv_cfg,
                norm_cfg=cfg,
            )  # fmt: skip
