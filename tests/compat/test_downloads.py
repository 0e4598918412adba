"""Weights by name and address: from a small internet on this machine, into a cache of the test's own."""

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import mmdet
import pytest
import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from helpers import tiny
from mmdet_norms.checkpoints.read import read_checkpoint
from mmdet_norms.cli import train
from mmdet_norms.compat import downloads, zoo
from mmdet_norms.compat.downloads import DownloadError
from mmdet_norms.compat.reading import CheckpointError, UntrustedCheckpointError

CONFIGS = [Path(__file__).resolve().parents[2] / 'configs', Path(mmdet.__file__).parent / '.mim' / 'configs']
RESNET18 = 'resnet18-f37072fd.pth'


class Calls:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Internet(ThreadingHTTPServer):
    """Serves the files of a folder by their names, under any path; as a proxy, of any host."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Answer)
        self.folder, self.asked, self.missing, self.pause, self.says_length = folder, [], 0, 0.0, True
        self.url = f'http://127.0.0.1:{self.server_port}'


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.server.folder / os.path.basename(self.path)
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        self.send_response(200)
        if self.server.says_length:
            self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        sent = content[: len(content) - self.server.missing]
        self.wfile.write(sent[:1000])
        self.wfile.flush()
        time.sleep(self.server.pause)
        self.wfile.write(sent[1000:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'no_proxy', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(urllib.request, '_opener', None)  # it remembers the proxies
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    (tmp_path / 'web').mkdir()
    server = Internet(tmp_path / 'web')
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def redirected(web, monkeypatch):
    """Addresses of the lists of names, too, lead to the small internet."""
    real = urllib.request.urlopen

    def urlopen(request, **options):
        here = f'{web.url}/{os.path.basename(request.full_url)}'
        return real(urllib.request.Request(here), **options)

    monkeypatch.setattr(downloads.urllib.request, 'urlopen', urlopen)
    return web


@pytest.fixture
def offline(monkeypatch):
    """Every address is asked of a proxy that is not there: the same on a machine with and without a network."""
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    monkeypatch.setattr(urllib.request, '_opener', None)


def cache(tmp_path):
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


def weights(size=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, size, 3), nn.BatchNorm2d(size)).state_dict()


def refused(name, kind=CheckpointError):
    with pytest.raises(kind) as error:
        read_checkpoint(name)
    assert '\n' not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_name_in_a_config_has_an_address(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    names = set()
    for folder in CONFIGS:
        found = set()
        for path in folder.rglob('*.py'):
            found |= set(re.findall(r"['\"]((?:torchvision|modelzoo|open-?mmlab|mmcls)://[^'\"]+)", path.read_text()))
        assert 'torchvision://resnet101' in found
        names |= found
    assert len(names) > 30
    for name in names:
        url = zoo.address(name)
        hosts = ('download.pytorch.org',) if name.startswith('torchvision') else downloads._WITH_HASHES[1:]
        assert re.fullmatch(r'https://\S+-[0-9a-f]{8}\.pth', url) and urlparse(url).hostname in hosts, name


def test_torchvision_means_the_same_weights_with_and_without_its_package(monkeypatch):
    assert zoo.address('torchvision://resnet50').endswith('/resnet50-0676ba61.pth')
    assert zoo.address('modelzoo://resnet101').endswith('/resnet101-63fe2227.pth')
    pytest.importorskip('torchvision', reason='torchvision is not installed')
    urls = mmengine_checkpoint.get_torchvision_models()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'torchvision', None)
        for name, url in urls.items():
            model, _, version = name.partition('.')
            again = version and model.startswith('efficientnet')  # uploaded again under the later name
            if url and version in ('', 'imagenet1k_v1') and urls.get(model) and not again:
                assert zoo.address(f'torchvision://{name}') == url
    assert zoo.address('torchvision://resnet50.imagenet1k_v2') == urls['resnet50.imagenet1k_v2']


def test_a_name_that_is_none_says_which_there_are(monkeypatch):
    assert "'resnet51' is none of mmengine's list" in refused('open-mmlab://resnet51')
    assert 'mobilenet_v2' in refused('mmcls://mobilenet_v3')
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    message = refused('torchvision://resnet50.imagenet1k_v2')
    assert 'resnet50.imagenet1k_v1' in message and 'pip install torchvision' in message
    assert "'shufflenetv2_x1.5' is none" in refused('torchvision://shufflenetv2_x1.5')  # it has no address


def test_names_that_are_old_and_lists_of_the_users_own(tmp_path, monkeypatch):
    assert zoo.address('openmmlab://resnet50_caffe') == zoo.address('open-mmlab://detectron/resnet50_caffe')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text('{"mine": "mine.pth", "evil": "evil.pth"}')
    torch.save(weights(), tmp_path / 'mine.pth')
    torch.save(dict(extra=Calls(str(tmp_path / 'ran'))), tmp_path / 'evil.pth')
    assert read_checkpoint('open-mmlab://mine').state_dict.keys() == weights().keys()
    assert 'more than tensors' in refused('open-mmlab://evil', UntrustedCheckpointError)
    assert not (tmp_path / 'ran').exists()


def test_what_is_used_of_mmengine_is_there():
    loaders = mmengine_checkpoint.CheckpointLoader._schemes
    for scheme in ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://', 'http://', 'https://'):
        assert loaders[scheme].__module__ == zoo.__name__ and loaders[scheme].__name__.startswith('load_from_')
    for name in ('_process_mmcls_checkpoint', '_get_mmengine_home', 'get_external_models', 'get_mmcls_models'):
        assert callable(getattr(mmengine_checkpoint, name))
    assert callable(mmengine_checkpoint.get_torchvision_models) and mmengine_checkpoint.get_deprecated_model_names()


def test_of_a_classifier_the_backbone_is_taken(redirected):
    name = os.path.basename(zoo.address('mmcls://mobilenet_v2'))
    state = {**{f'backbone.{key}': value for key, value in weights().items()}, 'head.fc.bias': torch.zeros(2)}
    torch.save(dict(state_dict=state), redirected.folder / name)
    assert read_checkpoint('mmcls://mobilenet_v2').state_dict.keys() == weights().keys()


# --- downloads -------------------------------------------------------------------------------------------------------


def test_what_is_downloaded_is_read_by_the_same_reader_and_kept(web, tmp_path):
    torch.save(dict(meta=dict(epoch=1), state_dict=weights()), web.folder / 'a.pth')
    torch.save(dict(extra=Calls(str(tmp_path / 'ran'))), web.folder / 'evil.pth')
    for _ in range(2):
        assert read_checkpoint(f'{web.url}/x/a.pth').meta['epoch'] == 1
    assert web.asked == ['/x/a.pth']
    assert 'more than tensors' in refused(f'{web.url}/evil.pth', UntrustedCheckpointError)
    assert not (tmp_path / 'ran').exists()
    assert sorted(path.name for path in cache(tmp_path).iterdir()) == ['a.pth', 'evil.pth']  # no locks, no parts
    loaded = CheckpointLoader.load_checkpoint(f'{web.url}/x/a.pth', logger='silent')
    assert loaded['state_dict'].keys() == weights().keys()


def test_a_download_with_another_hash_than_its_name_says_is_none(redirected, tmp_path):
    torch.save(weights(), redirected.folder / RESNET18)
    digest = hashlib.sha256((redirected.folder / RESNET18).read_bytes()).hexdigest()
    message = refused('torchvision://resnet18', DownloadError)
    assert f'SHA-256 that starts with {digest[:8]}, not f37072fd' in message
    assert list(cache(tmp_path).iterdir()) == []


def test_a_download_with_the_hash_of_its_name_is_taken(redirected, tmp_path, capfd):
    torch.save(weights(), redirected.folder / 'a.pth')
    name = f'a-{hashlib.sha256((redirected.folder / "a.pth").read_bytes()).hexdigest()[:8]}.pth'
    (redirected.folder / 'a.pth').rename(redirected.folder / name)
    assert read_checkpoint(f'https://download.pytorch.org/models/{name}').state_dict
    assert 'published' not in ''.join(capfd.readouterr()) and (cache(tmp_path) / name).is_file()


def test_digits_that_are_no_hash():
    assert downloads.published_hash('https://download.pytorch.org/models/a-0676ba61.pth') == '0676ba61'
    assert downloads.published_hash('https://download.openmmlab.com/x/a_20200130-047c8118.pth') == '047c8118'
    for url in ('download.openmmlab.com/x/a-20200130.pth', 'example.org/a-0676ba61.pth', 'download.pytorch.org/a.pth'):
        assert downloads.published_hash(f'https://{url}') is None


@pytest.mark.parametrize('fault', ['cut off', 'web page', 'empty', 'not there', 'silent', 'refused', 'no address'])
def test_a_download_that_fails_leaves_nothing_and_is_one_message(web, tmp_path, monkeypatch, fault):
    torch.save(weights(200), web.folder / 'a.pth')
    (web.folder / 'login.pth').write_text('<html>please log in</html>')
    (web.folder / 'empty.pth').touch()
    monkeypatch.setattr(downloads, 'SECONDS', 0.3)
    web.missing, web.pause = (500 if fault == 'cut off' else 0), (2 if fault == 'silent' else 0)
    url, said = {
        'cut off': (f'{web.url}/a.pth', 'the connection ended after'),
        'web page': (f'{web.url}/login.pth', 'a web page'),
        'empty': (f'{web.url}/empty.pth', 'empty (0 bytes)'),
        'not there': (f'{web.url}/none.pth', 'Not Found'),
        'silent': (f'{web.url}/a.pth', 'timed out'),
        'refused': ('http://127.0.0.1:9/a.pth', 'refused'),
        'no address': ('https://a b/a.pth', ''),
    }[fault]
    message = refused(url, DownloadError)
    assert said in message and url in message and f'put it at {cache(tmp_path) / os.path.basename(url)}' in message
    assert list(cache(tmp_path).iterdir()) == []


def test_without_a_length_a_download_that_is_cut_off_is_none(web, tmp_path):
    torch.save(weights(200), web.folder / 'a.pth')
    web.says_length, web.missing = False, 500
    assert 'before the end of the file' in refused(f'{web.url}/a.pth', DownloadError)
    assert list(cache(tmp_path).iterdir()) == []
    web.missing = 0
    assert read_checkpoint(f'{web.url}/a.pth').state_dict.keys() == weights().keys()


@pytest.mark.parametrize('name', ['s3://bucket/a.pth', 'petrel://a.pth', 'pavi://a'])
def test_an_address_whose_client_is_not_installed_is_one_message(name):
    assert name in refused(name) and 'fetch the file' in refused(name)


@pytest.mark.parametrize('url', ['https://[x/c.pth', 'https://example.org/', 'https:///', 'http:///c.pth'])
def test_an_address_that_is_none_is_one_message(url, web):
    with pytest.raises(CheckpointError, match=r'could not be downloaded|is no address|of a folder'):
        zoo.load_url(url)


def test_a_cache_that_cannot_be_written_to_is_one_message(web, tmp_path):
    torch.save(weights(), web.folder / 'a.pth')
    (tmp_path / 'torch').write_text('')
    message = refused(f'{web.url}/a.pth', DownloadError)
    assert 'a.pth' in message and 'TORCH_HOME=FOLDER' in message and str(cache(tmp_path)) in message


def test_a_cached_file_is_used_and_said_to_be_another(web, offline, tmp_path, capfd):
    cache(tmp_path).mkdir(parents=True)
    torch.save(weights(), cache(tmp_path) / RESNET18)
    assert read_checkpoint('torchvision://resnet18').state_dict.keys() == weights().keys()
    assert 'is used as it is, but it is not the published file' in ''.join(capfd.readouterr())


def test_a_cached_file_that_is_cut_off_is_one_message(web, offline, tmp_path):
    cache(tmp_path).mkdir(parents=True)
    path = cache(tmp_path) / RESNET18
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-100])
    message = refused('torchvision://resnet18')
    assert message.startswith(f'torchvision://resnet18: {path} is cut off')
    assert 'not the published file' in message and 'delete it to download it again' in message
    assert path.is_file()


def test_without_torch_home_the_cache_is_that_of_torch(web, tmp_path, monkeypatch):
    torch.save(weights(), web.folder / 'a.pth')
    monkeypatch.delenv('TORCH_HOME')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    path = downloads.cached(f'{web.url}/a.pth')
    assert path == tmp_path / 'home' / '.cache' / 'torch' / 'hub' / 'checkpoints' / 'a.pth' and path.is_file()


def test_proxies_of_the_environment_are_used_and_named(web, tmp_path, monkeypatch):
    torch.save(weights(), web.folder / 'a.pth')
    monkeypatch.setenv('http_proxy', web.url)
    assert read_checkpoint('http://weights.example/a.pth').state_dict
    assert web.asked == ['http://weights.example/a.pth']
    assert 'asked through the proxy of http_proxy' in refused('http://weights.example/none.pth')


def test_of_processes_that_ask_together_one_downloads(web, tmp_path):
    torch.save(weights(200), web.folder / 'a.pth')
    web.pause = 0.5
    fork = multiprocessing.get_context('fork')
    processes = [fork.Process(target=downloads.cached, args=(f'{web.url}/a.pth',)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and web.asked == ['/a.pth']
    assert [path.name for path in cache(tmp_path).iterdir()] == ['a.pth']


def test_a_killed_download_leaves_no_file_of_that_name_and_the_next_one_tidies_up(web, tmp_path):
    torch.save(weights(200), web.folder / 'a.pth')
    web.pause = 30
    process = multiprocessing.get_context('fork').Process(target=downloads.cached, args=(f'{web.url}/a.pth',))
    process.start()
    end = time.time() + 30
    while not list(cache(tmp_path).glob('.a.part-*')) and time.time() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (cache(tmp_path) / 'a.pth').exists() and len(list(cache(tmp_path).iterdir())) == 2  # part and lock
    web.pause = 0
    downloads.cached(f'{web.url}/a.pth')
    assert [path.name for path in cache(tmp_path).iterdir()] == ['a.pth']


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tiny.write_config(tmp_path)
    init_cfg = 'dict(type="Pretrained", checkpoint="torchvision://resnet18")'
    path.write_text(f'{path.read_text()}model["backbone"]["init_cfg"] = {init_cfg}\n')
    return path


def test_training_without_a_network_is_one_message_with_the_key(web, offline, config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([str(config), '--work-dir', str(tmp_path / 'run')])
    assert stopped.value.code == 2 and not (tmp_path / 'run').exists()
    said = capsys.readouterr().err
    assert said.startswith('error: model.backbone.init_cfg.checkpoint: torchvision://resnet18: https://download.')
    for part in (f'put it at {cache(tmp_path) / RESNET18}', '--cfg-options model.backbone.init_cfg=None'):
        assert part in said
    assert said.count('\n') == 1 and 'Traceback' not in said


def test_weights_under_their_old_key_are_one_message_with_it(web, offline, config, tmp_path, capsys):
    options = ['model.backbone.init_cfg=None', 'model.backbone.pretrained=torchvision://resnet18']
    with pytest.raises(SystemExit):
        train.main([str(config), '--work-dir', str(tmp_path / 'out'), '--cfg-options', *options])
    said = capsys.readouterr().err
    assert 'error: model.backbone.pretrained: torchvision://resnet18' in said
    assert '--cfg-options model.backbone.pretrained=None' in said


def test_training_starts_from_the_cached_file(web, offline, config, tmp_path):
    cfg = train.train_config(train.parse_args([str(config), '--work-dir', str(tmp_path / 'run')]))
    backbone = train.Runner.build_model(None, cfg.model).backbone
    state = {key: torch.full_like(value, 0.125) for key, value in backbone.state_dict().items()}
    cache(tmp_path).mkdir(parents=True)
    torch.save({**state, 'fc.weight': torch.zeros(10, 64)}, cache(tmp_path) / RESNET18)
    frozen = ['--cfg-options', 'optim_wrapper.optimizer.lr=0', 'optim_wrapper.optimizer.weight_decay=0']
    train.main([str(config), '--work-dir', str(tmp_path / 'run'), *frozen])
    trained = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=True)['state_dict']
    assert torch.equal(trained['backbone.conv1.weight'], state['conv1.weight'])
