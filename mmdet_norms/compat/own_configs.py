"""mmengine reads ``mmdet_norms::...`` as it reads ``mmdet::...``."""

import mmengine.config.config as config
import mmengine.config.utils as utils
import mmengine.hub.hub as hub
from mmdet import registry as mmdets
from mmengine.registry import Registry

from mmdet_norms_start import own_configs


class _Scope(Registry):
    """What ``_scope_='mmdet_norms'`` means, which mmengine writes into what it reads from our configs: mmdet's."""

    def import_from_location(self) -> None:
        """Called before a name is looked up, of the child only."""
        self.parent.import_from_location()


def serve_own_configs() -> None:
    """Tell mmengine's readers of configs, and give every registry of mmdet a child of our name. Idempotent."""
    for module in (utils, config, hub):
        own_configs.serve(module)
    for registry in vars(mmdets).values():
        if isinstance(registry, Registry) and registry.scope == 'mmdet' and own_configs.NAME not in registry.children:
            _Scope(registry.name, parent=registry, scope=own_configs.NAME)
