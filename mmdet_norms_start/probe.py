"""What can be imported here, asked in a process of its own: an import may hang, kill its process, or print.

``python -c '...probe.main([...])'`` prints, for each name, a line when it begins and one with what was found; see
``mmdet_norms/check_env.py``.
"""

import importlib
import json
import os
import sys
import tempfile
import warnings


def _torch() -> dict:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        available = torch.cuda.is_available()
    return dict(
        build=f'CUDA {torch.version.cuda}' if torch.version.cuda else 'ROCm' if torch.version.hip else 'CPU',
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else [],
        why_no_gpu='' if available else ' '.join(str(warning.message).split('\n')[0] for warning in said),
        threads=torch.get_num_threads(),
    )


def _numpy() -> dict:
    import numpy
    import torch

    torch.zeros(1).numpy()  # fails where torch was built for numpy 1 and numpy is 2
    return dict(version=numpy.__version__)


def _module(name: str):
    def probe() -> dict:
        module = importlib.import_module(name)
        return dict(version=str(getattr(module, '__version__', '')))

    return probe


def _mmcv_ops() -> dict:
    import importlib.util

    import torch  # noqa: F401  (whose libraries the extension is linked to)

    if importlib.util.find_spec('mmcv._ext') is None:
        return dict(there=False)
    extension = importlib.import_module('mmcv._ext')
    return dict(there=True, cuda=str(extension.get_compiling_cuda_version()))


def _torchvision() -> dict:
    import torch
    import torchvision

    torch.ops.torchvision.nms  # noqa: B018  (of a build for another torch, there is none)
    return dict(version=torchvision.__version__)


def _config() -> dict:
    from mmengine.config import Config

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'config.py')
        with open(path, 'w') as file:
            file.write("_base_ = 'mmdet::_base_/default_runtime.py'\n")
        Config.fromfile(path)
    return {}


def _mmdet_norms() -> dict:
    import mmdet_norms
    from mmdet_norms.compat import mmcv_ops
    from mmdet_norms.kernels import compiled

    return dict(
        version=mmdet_norms.__version__,
        folder=os.path.dirname(mmdet_norms.__file__),
        norms=len(mmdet_norms.NORM_LAYERS.module_dict) if hasattr(mmdet_norms.NORM_LAYERS, 'module_dict') else None,
        ops=mmcv_ops.choices(),
        ops_line=mmcv_ops.describe(),
        no_kernels=compiled.why_not(),
    )


PROBES = {
    'torch': _torch,
    'numpy': _numpy,
    'cv2': _module('cv2'),
    'matplotlib': _module('matplotlib.pyplot'),
    'pillow': _module('PIL.Image'),
    'pycocotools': _module('pycocotools.mask'),
    'rich': _module('rich.console'),
    'jinja2': _module('jinja2'),
    'scipy': _module('scipy.stats'),
    'torchvision': _torchvision,
    'pytorch-optimizer': _module('pytorch_optimizer'),
    'mmengine': _module('mmengine'),
    'mmcv': _module('mmcv'),
    'mmcv ops': _mmcv_ops,
    'mmdet': _module('mmdet'),
    'config': _config,
    'triton': _module('triton'),
    'mmdet_norms': _mmdet_norms,
}


def main(names: list) -> None:
    """Print what the probes of these names find, a line of JSON each."""
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is none of it
    warnings.simplefilter('ignore')
    for name in names:
        print(json.dumps([name, None]), file=out, flush=True)
        try:
            found = PROBES[name]()
        except BaseException as error:
            kind = type(error).__name__
            found = dict(error=f'{kind}: {error}', kind=kind, missing=getattr(error, 'name', None) or '')
        print(json.dumps([name, found]), file=out, flush=True)
    out.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries that were half imported may not end
