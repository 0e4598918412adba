"""The name under which ``mmengine.hub.get_model('mmdet_norms::...')`` asks a package to register what it has."""

from mmdet.utils import register_all_modules

__all__ = ['register_all_modules']
