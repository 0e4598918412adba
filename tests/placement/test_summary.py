"""Where the norms of a built model are, counted layer by layer."""

import torch
from torch import nn

from mmdet_norms.layers import BNET, CBN, FrozenBN
from mmdet_norms.placement.summary import summarize


class Backbone(nn.Module):
    """A stem, two stages, the first of which does not train."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), FrozenBN(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), BNET(4, kernel_size=3))
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))])
        self.scale = nn.Parameter(torch.ones(2))

    def train(self, mode=True):
        super().train(mode)
        self.layer1.eval()
        for parameter in self.layer1.parameters():
            parameter.requires_grad = False
        return self


class Detector(nn.Module):
    """The head uses a layer of the neck."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.neck = nn.Conv2d(4, 4, 1)
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.Sequential(self.neck, CBN(4))


def test_parts_norms_and_parameters():
    model = Detector().train()
    parts = {part.name: part for part in summarize(model)}
    assert {name: part.described() for name, part in parts.items()} == {
        'backbone (stem)': '1 FrozenBN, fixed',
        'backbone.layer1': '1 BN, fixed; 1 BNET (kernel 3), fixed',
        'backbone.stages.0': '1 GN (2 groups)',
        'neck': '',
        'roi_head.bbox_head': '1 CBN (window 3)',
        'all': '1 BN, fixed; 1 BNET (kernel 3), fixed; 1 CBN (window 3); 1 FrozenBN, fixed; 1 GN (2 groups)',
    }
    layer1, whole = parts['backbone.layer1'], parts['all']
    assert layer1.trainable == 0 and layer1.parameters == sum(p.numel() for p in model.backbone.layer1.parameters())
    assert layer1.of_norms == layer1.parameters - 20
    assert parts['roi_head.bbox_head'].parameters == 8  # the neck has the rest
    assert parts['backbone (stem)'].parameters == 12 + 2 + sum(p.numel() for p in model.backbone.bn1.parameters())
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    assert whole.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_norm_that_is_fixed_in_some_places_only():
    model = nn.Module()
    model.head = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model.train()
    model.head[0].eval()
    assert summarize(model)[0].described() == '2 BN, 1 of them fixed'
