"""Install mmdet_norms. Which mmcv to install beside it: docs/install.md."""

import os
import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

here = Path(__file__).parent
version = {}
exec((here / 'mmdet_norms' / 'version.py').read_text(), version)
table = {}
exec((here / 'mmdet_norms_start' / 'requirements.py').read_text(), table)
optional = {extra: [name + of for name, of in needs.items()] for extra, needs in table['OPTIONAL'].items()}
onnx = ['onnx', 'onnxscript', 'onnxruntime']  # tools/export.py to ONNX
# Where the repository is published: links of the package's page lead there. GitHub's own builds say it by themselves.
home = os.environ.get('MMDET_NORMS_HOME') or '/'.join(
    filter(None, map(os.environ.get, ('GITHUB_SERVER_URL', 'GITHUB_REPOSITORY')))
)


def page():
    """README.md for a place where no other file of the repository is: its links lead home, or are no links."""
    text = (here / 'README.md').read_text(encoding='utf-8')
    relative = r'(?!\w+:|#)([^)\s"]+)'
    if home:
        text = re.sub(rf'(!\[[^]]*\]\(|\bsrc="){relative}', rf'\1{home}/raw/HEAD/\2', text)
        return re.sub(rf'(?<!!)(\[[^]]*\]\(|\bhref="){relative}', rf'\1{home}/blob/HEAD/\2', text)
    text = re.sub(rf'!\[[^]]*\]\({relative}\)|<img [^>]*\bsrc="{relative}"[^>]*>', '', text)
    return re.sub(rf'\[([^]]*)\]\({relative}\)', r'\1', text)


class Package(build_py):
    """The modules, ``mmdet_norms.pth`` and, where mmengine and mim look for them, configs and model index.

    An editable install gets no copies of these, which would age: ``mmdet_norms/compat`` finds those of the checkout.
    """

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # an earlier build may hold what is gone since
        super().run()
        # Of an editable install, what lies in this folder goes into its site-packages.
        site_packages = self.get_finalized_command('install').install_lib if self.editable_mode else self.build_lib
        shutil.copy('mmdet_norms.pth', site_packages)
        if not self.editable_mode:
            mim = Path(self.build_lib, 'mmdet_norms', '.mim')
            shutil.copytree('configs', mim / 'configs', ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
            shutil.copy('model-index.yml', mim)
            (mim / 'tools').mkdir()
            for tool in ('train.py', 'test.py'):  # which mim train and mim test start
                shutil.copy(f'tools/{tool}', mim / 'tools')


class Library(build_ext):
    """A library for ctypes: without the name of one Python's ABI, and without that ABI's entry point."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + ('.pyd' if os.name == 'nt' else '.so')

    def get_export_symbols(self, ext):
        return ext.export_symbols


class Wheel(bdist_wheel):
    """Tagged ``py3-none-PLATFORM``, or ``py3-none-any`` where the library could not be built."""

    def run(self):
        self.run_command('build')
        if not any(map(os.path.isfile, self.get_finalized_command('build_ext').get_outputs())):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self):
        return ('py3', 'none', super().get_tag()[2])


setup(
    name='mmdet_norms',
    version=version['__version__'],
    description='Normalization layers (BNET-k, CBN, MABN, AN) for object detectors, by name, on stock mmdetection 3.x',
    long_description=page(),
    long_description_content_type='text/markdown',
    url=home or None,
    project_urls={
        **({'Documentation': f'{home}/tree/HEAD/docs', 'Issues': f'{home}/issues'} if home else {}),
        'Paper (BNET)': 'https://arxiv.org/abs/2011.14150',
        'Paper (CBN)': 'https://arxiv.org/abs/2002.05712',
        'Paper (MABN)': 'https://arxiv.org/abs/2001.06838',
        'Paper (AN)': 'https://arxiv.org/abs/1908.01259',
    },
    keywords='normalization batch-norm object-detection instance-segmentation mmdetection pytorch bnet cbn mabn',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['mmdet_norms', 'mmdet_norms.*', 'mmdet_norms_start']),
    entry_points={'console_scripts': ['mmdet-norms = mmdet_norms_start.commands:main']},
    package_data={'mmdet_norms': ['py.typed', 'experiments/report/templates/*']},
    cmdclass={'build_py': Package, 'build_ext': Library, 'bdist_wheel': Wheel},
    # A plain library for ctypes (mmdet_norms/kernels/compiled.py); without a C compiler the package does without it.
    ext_modules=[
        Extension(
            'mmdet_norms.kernels._cpu',
            ['mmdet_norms/kernels/csrc/cpu.c'],
            depends=['mmdet_norms/kernels/csrc/bnet.h'],
            extra_compile_args=['-O3', '-g0', '-ffp-contract=fast', '-fvisibility=hidden'],
            extra_link_args=['-pthread'],
            libraries=['m'],
            optional=True,
        )
    ],
    python_requires=table['PYTHON'],
    install_requires=table['needed'](),
    extras_require={
        **{stack: table['extra'](stack) for stack in table['STACKS']},
        **optional,
        # Triton has wheels for Linux only; on GPUs torch pins its own, and its CPU builds come without.
        'dev': [
            'hypothesis',
            'markdown-it-py',  # tools/check_docs.py
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'PyYAML',  # tools/make_zoo.py, tools/mutants.py
            'ruff',
            'scikit-learn',  # real images for the tests: its digits
            'triton; platform_system == "Linux"',
            *onnx,
            *optional['optim'],
            *optional['slurm'],
            *optional['tensorboard'],
        ],
        'onnx': onnx,
    },
    classifiers=[
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Programming Language :: Python :: Implementation :: CPython',
        'Programming Language :: C',
        'Operating System :: OS Independent',
        'Development Status :: 4 - Beta',
        'Environment :: Console',
        'Environment :: GPU :: NVIDIA CUDA',
        'Intended Audience :: Science/Research',
        'Intended Audience :: Developers',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
