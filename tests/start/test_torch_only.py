"""An environment that has torch, what torch needs, and this package: nothing of mmdet, no cv2, no numpy."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESNET = """
class Block(nn.Module):
    def __init__(self, channels, wide, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.short = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 16, 2), Block(16, 32, 2),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 4))
"""


def needs(name, found=None):
    """Names of the distributions without which this one cannot be imported."""
    found = {} if found is None else found
    name = re.match(r'[\w.-]+', name)[0].lower()
    if name not in found:
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return found
        for line in found[name].requires or []:
            if ';' not in line:
                needs(line, found)
    return found


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A folder of links, in place of site-packages."""
    folder = tmp_path_factory.mktemp('site')
    for distribution in needs('torch').values():
        for part in {file.parts[0] for file in distribution.files}:
            place = Path(distribution.locate_file(part))
            if part not in ('..', '__pycache__') and place.exists() and not (folder / part).exists():
                (folder / part).symlink_to(place)
    for name in 'mmdet_norms', 'mmdet_norms_start', 'mmdet_norms.pth':
        (folder / name).symlink_to(ROOT / name)
    assert not (folder / 'numpy').exists()
    return folder


def run(site, code, *options):
    code = f'import site, sys; site.addsitedir({str(site)!r})\n{code}'
    environment = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'MMDET_NORMS'))}
    command = [sys.executable, '-S', '-W', 'ignore', *options, '-c', code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_layers_train_and_import_as_fast_as_torch_allows(site):
    code = """
import time
times = [time.process_time()]
import torch
times.append(time.process_time())
before = set(sys.modules)
from mmdet_norms.layers import BNET, CBN, MABN, AN, link_convs
times.append(time.process_time())
new = {name for name in set(sys.modules) - before if name.partition('.')[0] not in (*sys.stdlib_module_names, 'torch')}
print({name.partition('.')[0] for name in new}, 'torch._dynamo' in sys.modules)
print((times[2] - times[1]) / (times[1] - times[0]))
from torch import nn
for norm in BNET(4), CBN(4), MABN(4), AN(4):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters()), norm
print('trained')
"""
    done = run(site, code)
    assert done.returncode == 0, done.stderr
    modules, share, last = done.stdout.splitlines()
    assert modules in ("{'mmdet_norms', 'mmdet_norms_start'} False", "{'mmdet_norms_start', 'mmdet_norms'} False")
    assert last == 'trained' and float(share) < 0.3


def test_a_resnet_keeps_its_outputs(site):
    code = f"""
import torch
from torch import nn
from mmdet_norms import convert_norms
{RESNET}
for _ in range(3):
    model(torch.randn(4, 3, 20, 20))
model.eval()
x = torch.randn(4, 3, 20, 20)
y = model(x)
print(convert_norms(model, 'bnet5'))
torch.testing.assert_close(model(x), y)
model.train()(x).sum().backward()
"""
    done = run(site, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '7 of 8 batch norms are BNET now\nkept 7: BatchNorm1d is not of maps (N, C, H, W)\n'


def test_what_needs_more_says_what(site):
    code = """
import mmdet_norms
print(hasattr(mmdet_norms, 'nothing'))
try:
    from mmdet_norms import fuse
except ImportError as error:
    print(error)
mmdet_norms.apply_norm
"""
    done = run(site, code)
    lines = done.stdout.splitlines()
    assert lines[0] == 'False' and lines[1].startswith('mmdet_norms needs mmengine, mmcv and mmdet')
    assert done.returncode == 1 and done.stderr.count("pip install 'mmdet_norms[lite]'") == 1
    assert 'ImportError: mmdet_norms needs mmengine, mmcv and mmdet, and there is no mmdet' in done.stderr
    done = run(site, "sys.argv[1:] = ['train', 'x.py']; from mmdet_norms_start.commands import main; main()")
    assert done.returncode == 1 and 'mmdet_norms needs mmengine, mmcv and mmdet' in done.stderr, done.stderr


def test_a_folder_called_mmdet_is_no_mmdet(site, tmp_path):
    (tmp_path / 'mmdet' / 'configs').mkdir(parents=True)
    done = run(site, f'sys.path.insert(0, {str(tmp_path)!r}); from mmdet_norms.layers import BNET; print(BNET(3))')
    assert done.stdout.startswith('BNET('), done.stderr
