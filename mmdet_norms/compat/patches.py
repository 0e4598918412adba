"""Every change that ``import mmdet_norms`` makes to another package, with its reason.

docs/changed-modules.md shows them. Names of our own that are added to registries are no change.
``tests/compat/test_patches.py`` compares all modules before and after the import: it finds a change that is not listed
here, and one that is listed and not made.
"""

from importlib import import_module

from . import checkpoints, loading, mmcv_ops, own_configs, safe_files, zoo

_OPS = 'mmcv-lite has none, and compiled ones take every tensor for contiguous'
_WHOLE = 'a process that is killed while it writes leaves the old file'
_LAST = 'what a checkpoint makes superfluous is deleted when the new one is on the disk, not before'
_READER = 'weights are found without torchvision, checked, and read without running code that is in them'
_OWN_CONFIGS = "configs are read as 'mmdet_norms::...', from a checkout or a wheel"

CHANGES = {
    'mmcv._ext': f'the ops of mmcv: {_OPS}',
    'mmcv.cnn.bricks.norm.MODELS': 'an unknown norm_cfg.type is told the closest name; BN takes norm_batch',
    'mmcv.cnn.bricks.norm._InstanceNorm': 'is_norm() finds norms that are no subclass of one of torch',
    'mmdet.evaluation.metrics.coco_metric.eval_recalls': "mmdet's fails since numpy 1.24",
    'mmdet.evaluation.metrics.voc_metric.eval_recalls': "mmdet's fails since numpy 1.24",
    'mmengine.config.config.Config.dump': _WHOLE,
    'mmengine.config.config._get_external_cfg_base_path': _OWN_CONFIGS,
    'mmengine.config.config.get_installed_path': _OWN_CONFIGS,
    'mmengine.config.utils._get_cfg_metainfo': _OWN_CONFIGS,
    'mmengine.config.utils._get_external_cfg_base_path': _OWN_CONFIGS,
    'mmengine.fileio.backends.local_backend.LocalBackend.put': _WHOLE,
    'mmengine.fileio.backends.local_backend.LocalBackend.put_text': _WHOLE,
    'mmengine.hooks.checkpoint_hook.CheckpointHook._save_best_checkpoint': _LAST,
    'mmengine.hooks.checkpoint_hook.CheckpointHook._save_checkpoint_with_step': _LAST,
    'mmengine.hooks.checkpoint_hook.CheckpointHook.before_train': 'a run that was moved deletes its own files only',
    'mmengine.hub.hub._get_cfg_metainfo': _OWN_CONFIGS,
    'mmengine.hub.hub._get_external_cfg_base_path': _OWN_CONFIGS,
    'mmengine.hub.hub.get_installed_path': _OWN_CONFIGS,
    'mmengine.logging.history_buffer.HistoryBuffer.__getstate__': 'checkpoints load with weights_only=True',
    'mmengine.logging.history_buffer.HistoryBuffer.__setstate__': 'checkpoints load with weights_only=True',
    'mmengine.registry.HOOKS[SyncBuffersHook]': 'processes agree on buffers in every checkpoint, those of an EMA, too',
    'mmengine.registry.MODELS[GN]': '32 groups by default, statistics in fp32, the layout of the input kept',
    'mmengine.registry.MODELS[SyncBN]': 'runs where nothing can be synchronized, and on CPUs',
    'mmengine.registry.OPTIM_WRAPPER_CONSTRUCTORS[DefaultOptimWrapperConstructor]': (
        'norm_decay_mult and the like reach the parameters of all norms'
    ),
    'mmengine.runner.checkpoint.CheckpointLoader._schemes': _READER,
    'mmengine.runner.checkpoint.load_from_local': _READER,
    'mmengine.runner.checkpoint.load_url': _READER,
    'mmengine.runner.loops._InfiniteDataloaderIterator': 'resuming does not load the batches of the earlier run',
    'mmengine.runner.runner.find_latest_checkpoint': '--resume passes over a damaged checkpoint',
    'mmengine.utils.dl_utils.misc._InstanceNorm': 'is_norm() finds norms that are no subclass of one of torch',
    'torch.nn.modules.module._global_module_registration_hooks': (
        'a norm of this package takes over what its place holds in a checkpoint of another norm, or refuses it'
    ),
    'torch._weights_only_unpickler._marked_safe_globals_set': 'checkpoints of mmengine load with weights_only=True',
}
"""What is changed -> why."""


def install() -> None:
    """Make the changes that concern mmengine and mmcv. Safe to call again."""
    mmcv_ops.install()  # first, because mmdet's models import mmcv's ops
    put('mmengine.logging.history_buffer.HistoryBuffer.__getstate__', checkpoints.state_without_functions)
    put('mmengine.logging.history_buffer.HistoryBuffer.__setstate__', checkpoints.fill)
    checkpoints.allow_own_checkpoints()
    put('mmengine.runner.loops._InfiniteDataloaderIterator', loading.InfiniteBatches)
    put('mmengine.fileio.backends.local_backend.LocalBackend.put', safe_files.put)
    put('mmengine.fileio.backends.local_backend.LocalBackend.put_text', safe_files.put_text)
    put('mmengine.config.config.Config.dump', safe_files.dump)
    hook = 'mmengine.hooks.checkpoint_hook.CheckpointHook'
    put(f'{hook}.before_train', safe_files.before_train)
    put(f'{hook}._save_checkpoint_with_step', safe_files.save_checkpoint_with_step)
    put(f'{hook}._save_best_checkpoint', safe_files.save_best_checkpoint)
    put('mmengine.runner.checkpoint.load_from_local', zoo.load_from_local)
    put('mmengine.runner.checkpoint.load_url', zoo.load_url)
    zoo.serve_schemes()
    own_configs.serve_own_configs()


def install_in_mmdet() -> None:
    """Make those that concern mmdet, which is imported for it."""
    from . import recalls

    put('mmdet.evaluation.metrics.coco_metric.eval_recalls', recalls.eval_recalls)
    put('mmdet.evaluation.metrics.voc_metric.eval_recalls', recalls.eval_recalls)


def put(where: str, ours: object) -> None:
    """Change an attribute of a module or class.

    Args:
        where: a key of :data:`CHANGES`: no change without a reason.
        ours: what is to be there.
    """
    assert where in CHANGES, f'why {where} is changed has to be said in CHANGES'
    owner, _, name = where.rpartition('.')
    setattr(_find(owner), name, ours)


def _find(name: str) -> object:
    """A module, or a class in one."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition('.')
        return getattr(import_module(module), attribute)
