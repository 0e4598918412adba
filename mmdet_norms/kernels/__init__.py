"""Faster ways to compute what the layers define; torch only. A layer asks for one and falls back to its formula.

* ``choose.py``: which operations exist, and who computes them.
* ``map_ops.py``: statistics of a map, affine steps, their gradients; ``map_formula.py`` in torch, ``map_aten.py`` by
  kernels of torch's batch norm. ``image_groups.py`` is made of them.
* ``depthwise.py``: BNET; ``depthwise_torch.py`` in torch, ``depthwise_compiled.py`` by the C library (``csrc/``,
  ``compiled.py``).
* ``gpu/``: both by Triton.
* ``pointers.py``: the check of every tensor whose address compiled code gets.
* ``double_backward.py``: gradients that are to be differentiated again.
* ``layouts.py``, ``groups.py``: of maps, and of the images in them.
"""
