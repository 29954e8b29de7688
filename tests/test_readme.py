"""The README is short, and everything it names is there."""
import ast
import dataclasses
import re
import shlex

import pytest

import prepare
import sample
import extras
import train
from conftest import ROOT, call

README = (ROOT / 'README.md').read_text(encoding='utf-8')
LOG = (ROOT / 'bench' / 'README.md').read_text(encoding='utf-8')
KEYS = {f.name: f for f in dataclasses.fields(train.TrainConfig)}


def commands(script):
    """The commands of the README that call a script, each as a list of words."""
    blocks = re.findall(r'```\w*\n(.*?)```', README, re.S)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
    return [shlex.split(line, comments=True) for line in lines if script in line.split('#')[0]]


def test_it_can_be_read_to_the_end():
    assert len(README.encode()) <= 16_000
    assert all(len(line) <= 200 for line in README.splitlines())


def test_every_file_and_heading_that_it_names_is_there():
    for path in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', README) + re.findall(r'config/\w+\.py', README):
        assert path.startswith('https://') or path == 'config/mine.py' or (ROOT / path).is_file(), path
    headings = [line.lstrip('# ').lower() for line in LOG.splitlines() if line.startswith('#')]
    headings = [re.sub(r'[^\w -]', '', heading).replace(' ', '-') for heading in headings]
    for anchor in re.findall(r'\(bench/README\.md#([^)]+)\)', README):
        assert anchor in headings, anchor


def test_the_lengths_of_the_files_are_about_right():
    for name, lines in re.findall(r'^\| `(\w+\.py)` \| (\d+) \|', README, re.M):
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(int(lines), rel=0.1), name


def test_every_key_that_it_names_is_one():
    assert len(commands('train.py')) >= 5
    for command in commands('train.py'):
        for name in (word.split('=')[0].removeprefix('--') for word in command if word.startswith('--')):
            assert name in KEYS or name in ('standalone', 'nproc_per_node'), command


def test_the_table_of_keys_tells_the_values_of_the_recommended_config():
    config = extras.load_config(train.TrainConfig, ['config/landscape.py'])
    table = README[README.index('| key | `config/landscape.py` |'):].split('\n\n')[0]
    for _, names, values, _, _ in (row.split('|') for row in table.splitlines()[2:]):
        values = values.replace('`', '').strip()
        stated = ast.literal_eval(f'({values},)') if values and '...' not in values else ()
        actual = [getattr(config, name) for name in re.findall(r'`(\w+)`', names)]
        assert not stated or list(stated) == actual, names


@pytest.mark.parametrize('script', ['prepare.py', 'sample.py'])
def test_so_is_every_option(script):
    known = call(script, '--help')
    assert len(commands(script)) >= 2
    for command in commands(script):
        for word in command:
            assert not word.startswith('--') or f'{word} ' in known or f'[{word}]' in known, command
