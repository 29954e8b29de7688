"""From any source to whole, deterministic files, whatever lies in the folder."""
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import extras
import prepare
from conftest import ENV, SHARED, call, command


def rows(folder, split):
    meta = extras.load_meta(str(folder))
    return extras.load_tokens(str(folder), split, meta)


def digests(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ('train.bin', 'val.bin', 'meta.pkl', 'preview.png')}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of 30 different pictures in several formats, two levels deep."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'deep' / 'er').mkdir(parents=True)
    source = prepare.Synthetic(30, seed=5)
    for i in range(30):
        name = ['{}.png', 'deep/{}.JPG', 'deep/er/{}.webp', '{}.bmp', 'deep/{}.tif', '{}.gif'][i % 6].format(i)
        Image.fromarray(source.rgb(i, 48)).save(folder / name)
    return folder


def test_synthetic_landscapes_are_the_same_on_every_machine():
    # the benchmark of this project: whoever draws it has these bytes. Not to be changed without changing its name
    drawn = np.stack([prepare.Synthetic(24, 1337).rgb(i, 64) for i in range(24)])
    assert hashlib.sha256(extras.pack_rgb(drawn).astype('<u2').tobytes()).hexdigest() == '9397c22ef465c3303fbb899776179c7ef186414c491176aa0ebc36f91b26e799'
    drawn = np.stack([prepare.Synthetic(24, 7).rgb(i, 32) for i in range(24)])
    assert hashlib.sha256(extras.pack_rgb(drawn).astype('<u2').tobytes()).hexdigest() == '17f2c6f5a193d1164ca12eac1c3c1f7f53f8af8a7e0e385d7582b3cccb6a255a'


def test_synthetic_landscapes_have_sky_above_and_differ():
    drawn = np.stack([prepare.Synthetic(200, 1).rgb(i, 32) for i in range(200)]).astype(int)
    assert len({d.tobytes() for d in drawn}) == 200
    upper, lower = drawn[:, :8].mean((1, 2, 3)), drawn[:, -8:].mean((1, 2, 3))
    assert (upper > lower).mean() > 0.7  # land is darker than sky, but for snow, sand and water
    assert drawn.std(axis=0).mean() > 40  # and no two evenings are alike
    assert len(np.unique(extras.pack_rgb(drawn.astype(np.uint8)))) > 600


def test_the_synthetic_set_is_pinned_as_a_file(tmp_path):
    call('prepare.py', '--source', 'synthetic', '--num_images', 50, '--size', 32, '--out_dir', tmp_path)
    assert hashlib.sha256((tmp_path / 'train.bin').read_bytes()).hexdigest() == 'a3e7c50cf23307d9ab42ef7c42e0b36e489f990511890558e98cc51ace88e9ee'
    assert hashlib.sha256((tmp_path / 'val.bin').read_bytes()).hexdigest() == '1488f4754d01d259ffc37671941c2fdc0fa2255eede0cfdd20e9933dde07954d'


def test_formats(pictures, tmp_path):
    out = call('prepare.py', '--source', pictures, '--size', 24, '--out_dir', tmp_path / 'a' / 'b', '--val_fraction', 0.2)
    folder = tmp_path / 'a' / 'b'
    assert sorted(os.listdir(folder)) == ['meta.pkl', 'preview.png', 'train.bin', 'val.bin']
    assert pickle.loads((folder / 'meta.pkl').read_bytes()) == dict(
        vocab_size=4096, height=24, width=24, tokens_per_image=576, bits_per_channel=4, order='raster',
        train_images=24, val_images=6, source=str(pictures))
    assert (folder / 'train.bin').stat().st_size == 24 * 576 * 2 and (folder / 'val.bin').stat().st_size == 6 * 576 * 2
    assert '24 for training' in out and '6 for validation' in out and 'tokens from 0x' in out and '100%' in out
    train = rows(folder, 'train')
    with Image.open(folder / 'preview.png') as page:  # the first picture of the sheet is the first row of train.bin
        assert (extras.pack_rgb(np.asarray(page)[2:26, 2:26]).reshape(-1) == train[0]).all()
    # every picture of the source is there, once
    ours = sorted(row.tobytes() for split in ('train', 'val') for row in rows(folder, split))
    source = prepare.Folder(str(pictures))
    assert ours == sorted(extras.pack_rgb(source.rgb(i, 24)).astype('<u2').tobytes() for i in range(30))


def test_the_same_bytes_from_any_number_of_workers(pictures, tmp_path):
    made = []
    for workers in (0, 1, 3):
        call('prepare.py', '--source', pictures, '--size', 24, '--out_dir', tmp_path / str(workers), '--workers', workers)
        made.append(digests(tmp_path / str(workers)))
    assert made[0] == made[1] == made[2]
    call('prepare.py', '--source', pictures, '--size', 24, '--out_dir', tmp_path / 'seed', '--seed', 1)
    assert digests(tmp_path / 'seed')['train.bin'] != made[0]['train.bin']


def test_identical_pictures_stand_on_one_side():
    rng = np.random.default_rng(0)
    for trial in range(50):
        keys = rng.integers(0, 40, 100).astype(np.uint64)
        train, val = prepare.split_order(keys, 0.1)
        assert sorted([*train, *val]) == list(range(100))
        assert len(train) and len(val) and not set(keys[train]) & set(keys[val])
        assert abs(len(val) - 10) <= 5
    with pytest.raises(extras.UserError, match='at least two different'):
        prepare.split_order(np.zeros(10, np.uint64), 0.1)


def test_copies_under_other_names_stay_together(pictures, tmp_path):
    (tmp_path / 'in').mkdir()
    for i, path in enumerate(sorted(pictures.glob('*.png'))):
        for copy in range(6):
            (tmp_path / 'in' / f'{copy}-{i}.png').write_bytes(path.read_bytes())
    call('prepare.py', '--source', tmp_path / 'in', '--size', 16, '--out_dir', tmp_path / 'out', '--val_fraction', 0.3)
    train, val = ({row.tobytes() for row in rows(tmp_path / 'out', split)} for split in ('train', 'val'))
    assert train and val and not train & val


def bomb(path):
    """A PNG of a few hundred bytes that says it is 60,000 x 60,000."""
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))
                     + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


def test_a_folder_of_bad_files(pictures, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    good = sorted(pictures.glob('*.png'))
    for path in good:
        (folder / path.name).write_bytes(path.read_bytes())
    jpeg = io.BytesIO()
    Image.fromarray(prepare.Synthetic(1, 0).rgb(0, 300)).save(jpeg, 'jpeg')
    bad = ['truncated.jpg', 'truncated.png', 'empty.png', 'corrupt.jpg', 'text.jpg', 'bomb.png', 'link.png']
    (folder / 'truncated.jpg').write_bytes(jpeg.getvalue()[:len(jpeg.getvalue()) // 2])
    (folder / 'truncated.png').write_bytes(good[0].read_bytes()[:400])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'corrupt.jpg').write_bytes(b'\xff\xd8\xff\xe0' + np.random.default_rng(0).bytes(5000))
    (folder / 'text.jpg').write_text('this is no picture')
    bomb(folder / 'bomb.png')
    (folder / 'link.png').symlink_to(folder / 'nowhere')
    (folder / 'folder.png').mkdir()  # a folder by an odd name
    (folder / 'notes.txt').write_text('neither is this')
    (folder / '.hidden.png').write_bytes(b'')
    Image.new('RGB', (1, 1), (255, 0, 255)).save(folder / 'one.png')
    Image.new('RGB', (20000, 40), (0, 255, 255)).save(folder / 'wide.png')
    out = call('prepare.py', '--source', folder, '--size', 16, '--out_dir', tmp_path / 'out')
    for name in bad:
        assert f'skipped {name} (' in out, name
    assert out.count('\nskipped ') == len(bad) and f'{len(bad)} unreadable' in out
    assert 'notes.txt' in out and 'hidden' not in out and 'Traceback' not in out
    tokens = {row.tobytes() for split in ('train', 'val') for row in rows(tmp_path / 'out', split)}
    assert len(tokens) == len(good) + 2
    for token in (0xF0F, 0x0FF):  # the 1x1 picture and the wide one
        assert np.full(256, token, '<u2').tobytes() in tokens


def test_no_usable_picture_is_an_error_and_leaves_the_old_data(pictures, tmp_path):
    call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path / 'out')
    before = digests(tmp_path / 'out')
    (tmp_path / 'in').mkdir()
    out = call('prepare.py', '--source', tmp_path / 'in', '--out_dir', tmp_path / 'out', code=1)
    assert 'error: no usable image' in out
    (tmp_path / 'in' / 'a.png').write_bytes(b'no')
    out = call('prepare.py', '--source', tmp_path / 'in', '--out_dir', tmp_path / 'out', code=1)
    assert '1 could not be read' in out and 'a.png' in out
    assert digests(tmp_path / 'out') == before and sorted(os.listdir(tmp_path / 'out')) == sorted(before)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_the_old_data(pictures, tmp_path, how):
    call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path)
    before = digests(tmp_path)
    process = subprocess.Popen(command('prepare.py', '--source', 'synthetic', '--num_images', 5000, '--size', 64, '--out_dir', tmp_path, '--workers', 1),
                               env=ENV, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # `make test &` ignores it, and so would a child
    scratch = tmp_path / '.partial' / 'rows'
    while not (scratch.exists() and scratch.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    # communicate() also waits for the workers, who hold the same stderr: they must not outlive their parent
    assert 'Traceback' not in process.communicate(timeout=30)[1] and process.returncode != 0
    assert digests(tmp_path) == before
    call('prepare.py', '--source', 'synthetic', '--num_images', 20, '--size', 16, '--out_dir', tmp_path)  # nothing left in the way
    assert len(rows(tmp_path, 'train')) == 18 and '.partial' not in os.listdir(tmp_path)


# -----------------------------------------------------------------------------
# tables: Hub and parquet

@pytest.fixture(scope='module')
def files(pictures):
    source = prepare.Folder(str(pictures))
    return [(name, (pictures / name).read_bytes()) for name in source.paths]


def save_parquet(path, files, kind, column='image'):
    import datasets
    cells = [{'bytes': data, 'path': name} if kind != 'bytes' else data for name, data in files]
    features = {'text': datasets.Value('string'),
                column: {'image': datasets.Image(), 'bytes': datasets.Value('binary'),
                            'struct': {'bytes': datasets.Value('binary'), 'path': datasets.Value('string')}}[kind]}
    table = datasets.Dataset.from_dict({'text': [name for name, _ in files], column: cells}, features=datasets.Features(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))


@pytest.mark.parametrize('column', ['image', 'picture'])
@pytest.mark.parametrize('kind', ['image', 'struct', 'bytes'])
def test_parquet_gives_what_the_folder_gives(pictures, files, tmp_path, kind, column):
    save_parquet(tmp_path / 'in' / 'a.parquet', files[:17], kind, column)
    save_parquet(tmp_path / 'in' / 'b.parquet', files[17:], kind, column)
    call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path / 'folder')
    for source in (tmp_path / 'in', tmp_path / 'in' / '*.parquet'):
        call('prepare.py', '--source', source, '--size', 16, '--out_dir', tmp_path / 'table')
        assert digests(tmp_path / 'table')['train.bin'] == digests(tmp_path / 'folder')['train.bin']


def test_a_data_set_of_the_hubs_shape_with_odd_splits(pictures, files, tmp_path):
    import datasets
    save_parquet(tmp_path / 'repo' / 'data' / 'train-00000-of-00002.parquet', files[:9], 'image')
    save_parquet(tmp_path / 'repo' / 'data' / 'train-00001-of-00002.parquet', files[9:15], 'image')
    save_parquet(tmp_path / 'repo' / 'data' / 'test-00000-of-00001.parquet', files[15:], 'image')
    splits = datasets.load_dataset(str(tmp_path / 'repo'), cache_dir=str(tmp_path / 'cache'))
    assert set(splits) == {'train', 'test'}
    table = prepare.Table(splits)
    assert len(table) == 30 and table.name(0) == 'row 0 of test' and table.name(29) == 'row 14 of train'
    by_name = prepare.Folder(str(pictures))
    for i, name in ((0, files[15][0]), (29, files[14][0])):
        assert (table.rgb(i, 16) == by_name.rgb(by_name.paths.index(name), 16)).all()


@pytest.mark.parametrize('layout', ['imagefolder', 'parquet'])
def test_a_repository_in_the_very_shape_of_the_default_data_set(tmp_path, layout):
    # Nature-Landscape: 512x512 PNG, the columns image and text, an image folder with metadata.jsonl; through load_dataset, as from the Hub
    import datasets
    drawn, repo = prepare.Synthetic(4, 0), tmp_path / 'ferrariedhgs' / 'Nature-Landscape'
    repo.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(drawn.rgb(i, 512)).save(repo / f'image_{i}.png')
    (repo / 'metadata.jsonl').write_text(''.join(json.dumps({'file_name': f'image_{i}.png', 'text': 'a landscape'}) + '\n' for i in range(4)))
    (repo / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# Nature-Landscape\n')
    splits = datasets.load_dataset(str(repo), cache_dir=str(tmp_path / 'cache'))
    if layout == 'parquet':  # as the Hub converts it
        splits['train'].to_parquet(str(tmp_path / 'converted' / 'default' / 'train' / '0000.parquet'))
        splits = datasets.load_dataset(str(tmp_path / 'converted' / 'default'), cache_dir=str(tmp_path / 'cache'))
    assert list(splits) == ['train'] and list(splits['train'].features) == ['image', 'text'] and isinstance(splits['train'].features['image'], datasets.Image)
    table = prepare.Table(splits)
    assert len(table) == 4
    for i in range(4):
        with Image.open(repo / f'image_{i}.png') as picture:
            expected = np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS))
        assert (table.rgb(i, 64) == expected).all()


def test_bad_cells_of_a_table_are_named(files, tmp_path):
    save_parquet(tmp_path / 'a.parquet', [*files[:4], ('bad', b'no picture'), ('empty', None)], 'bytes')
    out = call('prepare.py', '--source', tmp_path / 'a.parquet', '--size', 16, '--out_dir', tmp_path / 'out')
    assert 'skipped row 4 of rows (UnidentifiedImageError' in out and 'skipped row 5 of rows (ValueError: empty cell)' in out


def test_a_table_without_pictures(tmp_path):
    import datasets
    datasets.Dataset.from_dict({'text': ['a', 'b']}).to_parquet(str(tmp_path / 'a.parquet'))
    assert "no column of images among ['text']" in call('prepare.py', '--source', tmp_path / 'a.parquet', '--out_dir', tmp_path / 'out', code=1)


@pytest.mark.skipif(not (SHARED / 'photos_mixed').is_dir(), reason='no photographs here')
def test_photographs_of_many_kinds(tmp_path):
    out = call('prepare.py', '--source', SHARED / 'photos_mixed', '--out_dir', tmp_path)
    assert '9 images of 64x64' in out and '0 unreadable' in out
