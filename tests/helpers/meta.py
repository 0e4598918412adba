"""Models without memory for their weights: shapes, names and types cost a tenth of the numbers."""

import contextlib

import torch

from mmdet_norms.cli.weights import NoInit


@contextlib.contextmanager
def on_meta():
    with torch.device('meta'), NoInit():
        yield
