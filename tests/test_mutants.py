"""The table of ``tools/mutants.py`` fits the code and the tests, so that none of its changes goes untried."""

import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_mutants_find_what_they_change_and_the_tests_that_notice():
    stale = []
    for mutant in yaml.safe_load((ROOT / 'tests' / 'mutants.yml').read_text(encoding='utf-8')):
        times = (ROOT / mutant['file']).read_text(encoding='utf-8').count(mutant['old'])
        if times != 1 or mutant['old'] == mutant['new']:
            stale.append(f'{mutant["file"]}: {mutant["old"]} is there {times} times')
        for place in shlex.split(mutant['tests']):
            path, _, name = place.partition('::')
            if not path.startswith('tests/'):
                continue
            text = (ROOT / path).read_text(encoding='utf-8') if (ROOT / path).is_file() else ''
            if name and not re.search(rf'^def {re.escape(name.partition("[")[0])}\(', text, re.M):
                stale.append(f'{mutant["file"]}: no test {place}')
            elif not (ROOT / path).exists():
                stale.append(f'{mutant["file"]}: no tests {place}')
    assert stale == []
