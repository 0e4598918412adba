"""What has to be installed beside this package, in one table: for setup.py, failing imports and the doctor.

Only the standard library is imported here, so that it can be asked whatever is broken.
"""

import importlib.util
import sys

PYTHON = '>=3.10'

# distribution -> versions, as pip takes them
NEEDED = {
    'torch': '>=2.1',
    'numpy': '',
    'matplotlib': '',
    'pillow': '',
    'pycocotools': '',
    'rich': '',
    # the comparison page
    'jinja2': '',
    'scipy': '',
}

# What some configs and options need: an extra of setup.py each. pytorch-optimizer is no hard requirement, because it
# asks for numpy>1.24.4: pip would replace an older numpy by numpy 2, which a torch of that time cannot read.
OPTIONAL = {
    'optim': {'pytorch-optimizer': '>=4.1'},
    'slurm': {'submitit': '>=1.5'},
    'tensorboard': {'tensorboard': ''},
    'wandb': {'wandb': ''},
    'mlflow': {'mlflow': ''},
}

# The mm* packages come in three sets, of which an environment can have one: the extras of setup.py. No set is a hard
# requirement, because pip would install it over another one, whose modules have the same names.
# What is imported -> (distribution, versions).
STACKS = {
    'lite': {
        'mmengine': ('mmengine', '>=0.10.3,<1'),
        'mmcv': ('mmcv-lite', '>=2.0.0,<2.2.0'),
        'mmdet': ('mmdet', '>=3.2,<4'),  # mmdet 3.3.0 itself asks for mmcv>=2.0.0rc4,<2.2.0
    },
    'mmcv': {
        'mmengine': ('mmengine', '>=0.10.3,<1'),
        'mmcv': ('mmcv', '>=2.0.0,<2.2.0'),
        'mmdet': ('mmdet', '>=3.2,<4'),
    },
    'onedl': {
        'mmengine': ('onedl-mmengine', '>=0.10.12,<1'),
        'mmcv': ('onedl-mmcv', '>=2.3.6,<3'),
        'mmdet': ('onedl-mmdetection', '>=3.5.1,<4'),
    },
}
# What a set does not ask for itself, and needs: mmengine reads pkg_resources, which setuptools 82 removed, for
# `_base_ = 'mmdet::...'`; its fork does not. Each mmcv brings opencv-python, for which the headless build may stand.
STACK_NEEDS = {
    'lite': {'setuptools': '<82'},
    'mmcv': {'setuptools': '<82'},
    'onedl': {},
}
STACK_IS = {
    'lite': 'no compiler needed; the ops are those of this package, or of torchvision on a GPU',
    'mmcv': "mmcv's compiled ops: a wheel for your torch and CUDA, or 10-40 minutes of building",
    'onedl': 'the maintained forks onedl-mmcv, onedl-mmengine and onedl-mmdetection',
}

DOCTOR = 'python -m mmdet_norms.check_env'
SEE_DOCTOR = f'what is installed, what does not fit and how to mend it: {DOCTOR}'


def needed() -> list[str]:
    """``install_requires`` of setup.py."""
    return [name + versions for name, versions in NEEDED.items()]


def extra(stack: str) -> list[str]:
    """What an extra of setup.py asks for, e.g. ``extra('lite')``."""
    return [name + versions for name, versions in (*STACKS[stack].values(), *STACK_NEEDS[stack].items())]


def optional(extra: str) -> str:
    """What pip takes to install an extra that is in no set, quoted for a shell: ``'pytorch-optimizer>=4.1'``."""
    return ' '.join(repr(name + versions) for name, versions in OPTIONAL[extra].items())


def choices() -> str:
    """The three sets to choose from, one a line."""
    width = max(len(name) for name in STACKS)
    return '\n'.join(f'  pip install {f"mmdet_norms[{name}]"!r:{width + 15}}  {STACK_IS[name]}' for name in STACKS)


def has_mmdet() -> bool:
    """Whether mmdet is installed; without it there is nothing to register, and the layers are plain torch modules."""
    if 'mmdet' in sys.modules:
        return sys.modules['mmdet'] is not None
    spec = importlib.util.find_spec('mmdet')
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def no_stack(missing: str) -> str:
    """What an import says that finds no mm* packages.

    Args:
        missing: what could not be imported.
    """
    return (
        f'mmdet_norms needs mmengine, mmcv and mmdet, and there is no {missing}. There are three sets, of which to '
        f'choose one:\n{choices()}\n{SEE_DOCTOR}'
    )


def why_no_import(error: BaseException) -> str | None:
    """What to say about an error of importing what is installed beside this package; None if it is one of our own."""
    while isinstance(error, ModuleNotFoundError) and isinstance(error.__cause__, ModuleNotFoundError):
        error = error.__cause__
    name = (getattr(error, 'name', None) or '').partition('.')[0]
    if isinstance(error, ModuleNotFoundError) and name:
        if name in STACKS['lite']:
            return no_stack(name)
        return None if name.startswith('mmdet_norms') else f'mmdet_norms needs {name}, which is missing; {SEE_DOCTOR}'
    text = ' '.join(str(error).split()).rstrip('.')
    return f'what mmdet_norms needs cannot be imported: {text or type(error).__name__}; {SEE_DOCTOR}'
