"""What a norm is: one method per file, importing torch only."""

from .bnet import BNET

__all__ = ['BNET']
