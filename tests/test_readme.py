"""The README says what the code does."""
import dataclasses
import re

import train
from conftest import ROOT

README = (ROOT / 'README.md').read_text(encoding='utf-8')


def keys_table():
    return ''.join(f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |\n" for f in dataclasses.fields(train.TrainConfig))


def test_the_table_of_keys_is_that_of_the_code():
    assert '| key | default | meaning |\n|---|---|---|\n' + keys_table() in README


def test_every_picture_and_config_file_is_there():
    for path in re.findall(r'!\[[^]]*\]\(([^)]+)\)', README) + re.findall(r'config/\w+\.py', README):
        assert (ROOT / path).is_file(), path
