"""Install mmdet_norms. Which mmcv to install beside it: README, section "Install"."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
version = {}
exec((here / 'mmdet_norms' / 'version.py').read_text(), version)
onnx = ['onnx', 'onnxscript', 'onnxruntime']  # tools/export.py to ONNX

setup(
    name='mmdet_norms',
    version=version['__version__'],
    description='Normalization layers (BNET-k, CBN, MABN, AN) for object detectors, by name, on stock mmdetection 3.x',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['mmdet_norms', 'mmdet_norms.*']),
    # A plain library for ctypes (mmdet_norms/kernels/compiled.py); without a C compiler the package does without it.
    ext_modules=[
        Extension(
            'mmdet_norms.kernels._cpu',
            ['mmdet_norms/kernels/csrc/cpu.c'],
            depends=['mmdet_norms/kernels/csrc/bnet.h'],
            extra_compile_args=['-O3', '-ffp-contract=fast', '-fvisibility=hidden'],
            extra_link_args=['-pthread'],
            libraries=['m'],
            optional=True,
        )
    ],
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.1',
        'mmengine>=0.10.3,<1',
        'mmdet>=3.2,<4',  # mmdet 3.3.0 itself asks for mmcv>=2.0.0rc4,<2.2.0
        'numpy',
        'matplotlib',
        'opencv-python',
        'pillow',
        'pycocotools',
        'rich',
        'setuptools<82',  # `_base_ = 'mmdet::...'` needs pkg_resources, which setuptools 82 removed
    ],
    extras_require={
        # mmcv comes in two distributions that must not be installed together, so neither is a hard requirement.
        'lite': ['mmcv-lite>=2.0.0,<2.2.0'],
        'mmcv': ['mmcv>=2.0.0,<2.2.0'],
        # Triton has wheels for Linux only; on GPUs torch pins its own, and its CPU builds come without.
        'dev': [
            'hypothesis',
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'PyYAML',  # tools/make_zoo.py, tools/mutants.py
            'ruff',
            'triton; platform_system == "Linux"',
            *onnx,
        ],
        'onnx': onnx,
    },
    classifiers=[
        'Programming Language :: Python :: 3',
        'Operating System :: OS Independent',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
