"""Files are whole or not there."""

import os
import signal
import sys

import pytest

from helpers import warm
from mmdet_norms.files import replacing, unfinished


def test_a_block_that_ends_well_replaces_the_file_and_keeps_a_link(tmp_path):
    real, link = tmp_path / 'real.txt', tmp_path / 'link.txt'
    real.write_text('old')
    link.symlink_to(real)
    with replacing(link) as part:
        part.write_text('new')
        assert real.read_text() == 'old'
    assert real.read_text() == 'new' and link.is_symlink() and unfinished(tmp_path) == []


def test_a_file_keeps_its_permissions(tmp_path):
    path = tmp_path / 'a.txt'
    for mode in (0o600, 0o755):
        path.write_text('old')
        path.chmod(mode)
        with replacing(path) as part:
            part.write_text('new')
        assert path.stat().st_mode & 0o777 == mode


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / 'a.txt').write_text('old')
    with pytest.raises(OSError, match='disk'), replacing(tmp_path / 'a.txt') as part:
        part.write_text('half')
        raise OSError('disk full')
    assert os.listdir(tmp_path) == ['a.txt'] and (tmp_path / 'a.txt').read_text() == 'old'


def test_a_killed_process_leaves_the_old_file_and_a_part_that_is_found(tmp_path):
    (tmp_path / 'a.txt').write_text('old')
    code = 'import os, signal, sys\nfrom mmdet_norms.files import replacing\n'
    code += (
        'with replacing(sys.argv[1]) as part:\n    part.write_text("half")\n    os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    assert warm.run([sys.executable, '-c', code, str(tmp_path / 'a.txt')]).returncode == -signal.SIGKILL
    assert (tmp_path / 'a.txt').read_text() == 'old' and len(unfinished(tmp_path)) == 1


def test_who_reads_the_old_file_keeps_reading_it(tmp_path):
    (tmp_path / 'a.txt').write_text('old')
    with open(tmp_path / 'a.txt') as reader:
        with replacing(tmp_path / 'a.txt') as part:
            part.write_text('new, and longer')
        assert reader.read() == 'old'
