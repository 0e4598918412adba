"""Run by ``mmdet_norms.pth`` at every start of Python; ``MMDET_NORMS_HOOK=0`` in the environment leaves it out.

Keep it small: it must not import anything that a plain ``python -c pass`` has not imported already, and must not raise.
"""
