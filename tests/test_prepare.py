"""From any source to whole, deterministic files, whatever lies in the folder."""
import argparse
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

import extras
import prepare
from conftest import ENV, PIPED, call, command, heed_signals, wait_until
from helpers import PHOTOS, needs_photos


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def rows(folder, split):
    meta = extras.load_meta(str(folder))
    return extras.load_tokens(str(folder), split, meta)


def digests(folder):
    names = ('train.bin', 'val.bin', 'meta.pkl', 'preview.png')
    return {name: sha256((folder / name).read_bytes()) for name in names}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of 30 different pictures in several formats, two levels deep."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'deep' / 'er').mkdir(parents=True)
    source = prepare.Synthetic(30, seed=5, size=48)
    for i in range(30):
        name = ['{}.png', 'deep/{}.JPG', 'deep/er/{}.webp', '{}.bmp', 'deep/{}.tif', '{}.gif'][i % 6].format(i)
        source.picture(i).save(folder / name)
    return folder


def test_synthetic_landscapes_are_the_same_on_every_machine():
    # the benchmark of this project: whoever draws it has these bytes. Not to be changed without changing its name
    drawn = np.stack([prepare.Synthetic(24, 1337, 64).picture(i) for i in range(24)])
    digest = sha256(extras.pack_rgb(drawn).astype('<u2').tobytes())
    assert digest == '9397c22ef465c3303fbb899776179c7ef186414c491176aa0ebc36f91b26e799'
    drawn = np.stack([prepare.Synthetic(24, 7, 32).picture(i) for i in range(24)])
    digest = sha256(extras.pack_rgb(drawn).astype('<u2').tobytes())
    assert digest == '17f2c6f5a193d1164ca12eac1c3c1f7f53f8af8a7e0e385d7582b3cccb6a255a'


def test_synthetic_landscapes_have_sky_above_and_differ():
    drawn = np.stack([prepare.Synthetic(200, 1, 32).picture(i) for i in range(200)]).astype(int)
    assert len({d.tobytes() for d in drawn}) == 200
    upper, lower = drawn[:, :8].mean((1, 2, 3)), drawn[:, -8:].mean((1, 2, 3))
    assert (upper > lower).mean() > 0.7  # land is darker than sky, but for snow, sand and water
    assert drawn.std(axis=0).mean() > 40  # and no two evenings are alike
    assert len(np.unique(extras.pack_rgb(drawn.astype(np.uint8)))) > 600


def test_the_synthetic_set_is_pinned_as_a_file(tmp_path):
    call('prepare.py', '--source', 'synthetic', '--num_images', 50, '--size', 32, '--out_dir', tmp_path)
    made = digests(tmp_path)
    assert made['train.bin'] == 'a3e7c50cf23307d9ab42ef7c42e0b36e489f990511890558e98cc51ace88e9ee'
    assert made['val.bin'] == '1488f4754d01d259ffc37671941c2fdc0fa2255eede0cfdd20e9933dde07954d'


def test_formats(pictures, tmp_path):
    folder = tmp_path / 'a' / 'b'
    out = call('prepare.py', '--source', pictures, '--size', 24, '--out_dir', folder, '--val_fraction', 0.2)
    assert sorted(os.listdir(folder)) == ['.lock', 'meta.pkl', 'preview.png', 'train.bin', 'val.bin']
    assert pickle.loads((folder / 'meta.pkl').read_bytes()) == dict(
        vocab_size=4096, height=24, width=24, tokens_per_image=576, bits_per_channel=4, order='raster',
        train_images=24, val_images=6, source=str(pictures))
    assert (folder / 'train.bin').stat().st_size == 24 * 576 * 2 and (folder / 'val.bin').stat().st_size == 6 * 576 * 2
    assert '24 for training' in out and '6 for validation' in out and 'tokens from 0x' in out and '100%' in out
    train = rows(folder, 'train')
    with Image.open(folder / 'preview.png') as page:  # the first picture of the sheet is the first row of train.bin
        assert (extras.pack_rgb(np.asarray(page)[2:26, 2:26]).reshape(-1) == train[0]).all()
    # every picture of the source is there, once
    assert tokens_of(folder) == tokens_from(prepare.find_files(str(pictures)), 24)


def test_the_same_bytes_from_any_number_of_workers(pictures, tmp_path):
    made = []
    for workers in (0, 1, 3):
        out_dir = tmp_path / str(workers)
        call('prepare.py', '--source', pictures, '--size', 24, '--out_dir', out_dir, '--workers', workers)
        made.append(digests(out_dir))
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
    prepare.Synthetic(1, 0, 300).picture(0).save(jpeg, 'jpeg')
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
        assert f'skipped {folder}/{name} (' in out, name
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
    assert digests(tmp_path / 'out') == before and sorted(os.listdir(tmp_path / 'out')) == ['.lock', *sorted(before)]


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_the_old_data(pictures, tmp_path, how):
    call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path)
    before = digests(tmp_path)
    args = ['--source', 'synthetic', '--num_images', 5000, '--size', 64, '--out_dir', tmp_path, '--workers', 1]
    process = subprocess.Popen(command('prepare.py', *args), env=ENV, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_signals)
    scratch = tmp_path / '.partial' / 'rows'
    wait_until(lambda: scratch.exists() and scratch.stat().st_size or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(how)
    # communicate() also waits for the workers, who hold the same stderr: they must not outlive their parent
    assert 'Traceback' not in process.communicate(timeout=30)[1] and process.returncode != 0
    assert digests(tmp_path) == before
    # and nothing is left in the way
    call('prepare.py', '--source', 'synthetic', '--num_images', 20, '--size', 16, '--out_dir', tmp_path)
    assert len(rows(tmp_path, 'train')) == 18 and '.partial' not in os.listdir(tmp_path)


# -----------------------------------------------------------------------------
# tables: Hub and parquet

@pytest.fixture(scope='module')
def files(pictures):
    paths = prepare.find_files(str(pictures))
    return [(os.path.relpath(path, pictures), (pictures / path).read_bytes()) for path in paths]


def write_table(path, columns, features=None):
    import datasets
    features = datasets.Features(features) if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def save_parquet(path, files, kind, column='image'):
    import datasets
    text, binary = datasets.Value('string'), datasets.Value('binary')
    feature = {'image': datasets.Image(), 'bytes': binary, 'struct': {'bytes': binary, 'path': text}}[kind]
    cells = [{'bytes': data, 'path': name} if kind != 'bytes' else data for name, data in files]
    write_table(path, {'text': [name for name, _ in files], column: cells}, {'text': text, column: feature})


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
    for split, i, of in (('test', 0, 15), ('train', 14, 14)):
        table = prepare.Table(split, splits[split], 'image')
        assert len(table) == 15 and table.name(i) == f'row {i} of {split}'
        assert (extras.load_rgb(table.picture(i), 16) == extras.load_rgb(pictures / files[of][0], 16)).all()


@pytest.mark.parametrize('layout', ['imagefolder', 'parquet'])
def test_a_repository_in_the_very_shape_of_the_default_data_set(tmp_path, layout, monkeypatch):
    # Nature-Landscape: 512x512 PNG, the columns image and text, an image folder with metadata.jsonl;
    # through load_dataset, as from the Hub
    import datasets
    drawn, repo = prepare.Synthetic(4, 0, 64), tmp_path / 'ferrariedhgs' / 'Nature-Landscape'
    repo.mkdir(parents=True)
    for i in range(4):
        drawn.picture(i).resize((512, 512)).save(repo / f'image_{i}.png')
    lines = [json.dumps({'file_name': f'image_{i}.png', 'text': 'a landscape'}) + '\n' for i in range(4)]
    (repo / 'metadata.jsonl').write_text(''.join(lines))
    (repo / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# Nature-Landscape\n')
    splits = datasets.load_dataset(str(repo), cache_dir=str(tmp_path / 'cache'))
    if layout == 'parquet':  # as the Hub converts it
        splits['train'].to_parquet(str(tmp_path / 'converted' / 'default' / 'train' / '0000.parquet'))
        splits = datasets.load_dataset(str(tmp_path / 'converted' / 'default'), cache_dir=str(tmp_path / 'cache'))
    features = splits['train'].features
    assert list(splits) == ['train'] and list(features) == ['image', 'text']
    assert isinstance(features['image'], datasets.Image)
    # by its name, as from the Hub: load_dataset takes a folder of that name for it
    monkeypatch.chdir(tmp_path if layout == 'imagefolder' else tmp_path / 'converted')
    name = 'ferrariedhgs/Nature-Landscape' if layout == 'imagefolder' else 'default'
    args = argparse.Namespace(column=None, config=None)
    (table,) = prepare.open_tables(name, args, cache_dir=str(tmp_path / 'cache'))
    assert table.name(3) == 'row 3 of train'
    assert len(table) == 4
    for i in range(4):
        with Image.open(repo / f'image_{i}.png') as picture:
            expected = np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS))
        assert (extras.load_rgb(table.picture(i), 64) == expected).all()


def test_bad_cells_of_a_table_are_named(files, tmp_path):
    save_parquet(tmp_path / 'a.parquet', [*files[:4], ('bad', b'no picture'), ('empty', None)], 'bytes')
    out = call('prepare.py', '--source', tmp_path / 'a.parquet', '--size', 16, '--out_dir', tmp_path / 'out')
    assert 'skipped row 4 of rows (UnidentifiedImageError' in out
    assert 'skipped row 5 of rows (ValueError: empty cell)' in out


def test_a_table_without_pictures(tmp_path):
    urls = [f'https://example.invalid/{i}.png' for i in range(3)]
    write_table(tmp_path / 'a.parquet', {'url': urls, 'text': list('abc')})
    out = call('prepare.py', '--source', tmp_path / 'a.parquet', '--out_dir', tmp_path / 'out', code=1)
    assert "no column of images among ['text', 'url']" in out and 'addresses has to be fetched' in out


def tokens_of(folder, split=None):
    """All images of a data set, or those of one split -> sorted list of their tokens as bytes."""
    return sorted(row.tobytes() for name in ([split] if split else ['train', 'val']) for row in rows(folder, name))


def tokens_from(pictures, size=16):
    """The same of picture files."""
    tokens = (extras.pack_rgb(extras.load_rgb(picture, size)).astype('<u2') for picture in pictures)
    return sorted(image.tobytes() for image in tokens)


def tokens_in(files):
    """The same of (name, bytes of a picture file)."""
    return tokens_from(io.BytesIO(data) for _, data in files)


def flat_png(level):
    file = io.BytesIO()
    Image.new('L', (40, 30), level).save(file, 'png')
    return file.getvalue()


@pytest.mark.parametrize('first', ['mask', 'md5', 'chosen'])
def test_the_column_is_chosen_by_what_is_in_it(pictures, files, tmp_path, first):
    import datasets
    images = [{'bytes': data, 'path': None} for _, data in files[:8]]
    before = {
        'mask': [{'bytes': flat_png(i % 4 * 80), 'path': None} for i in range(8)],
        'md5': [hashlib.md5(data).digest() for _, data in files[:8]],
        'chosen': [{'bytes': data, 'path': None} for _, data in files[8:16]],
    }[first]
    kind = datasets.Value('binary') if first == 'md5' else datasets.Image()
    write_table(tmp_path / 'a.parquet', {first: before, 'image': images}, {first: kind, 'image': datasets.Image()})
    out = call('prepare.py', '--source', tmp_path / 'a.parquet', '--size', 16, '--out_dir', tmp_path / 'out')
    expected = files[8:16] if first == 'chosen' else files[:8]  # of two columns of photographs, the first one
    assert tokens_of(tmp_path / 'out') == tokens_in(expected)
    assert ('pictures of the column' in out) == (first != 'md5')
    if first == 'chosen':
        assert 'for others  --column image' in out
        call('prepare.py', '--source', tmp_path / 'a.parquet', '--size', 16, '--out_dir', tmp_path / 'out',
             '--column', 'image')
        assert tokens_of(tmp_path / 'out') == tokens_in(files[:8])
    out = call('prepare.py', '--source', tmp_path / 'a.parquet', '--out_dir', tmp_path / 'out', '--column', 'photo',
               code=1)
    assert f'--column=photo: there is {", ".join(sorted([first, "image"]))}' in out


@pytest.mark.parametrize('kind', ['list of images', 'list of bytes', 'pixels', 'pixels, colours first', 'Array3D',
                                  'Array3D, one colour'])
def test_lists_of_images_and_lists_of_pixels(files, tmp_path, kind):
    import datasets
    small = [np.asarray(Image.open(io.BytesIO(data)).convert('RGB').resize((16, 16))) for _, data in files[:6]]
    images = [{'bytes': data, 'path': None} for _, data in files[:5]]
    cells, feature = {
        'list of images': ([images[:3], [], images[3:]], datasets.Sequence(datasets.Image())),
        'list of bytes': ([[data] for _, data in files[:5]], datasets.Sequence(datasets.Value('binary'))),
        'pixels': ([image.tolist() for image in small], None),
        'pixels, colours first': ([image.transpose(2, 0, 1).tolist() for image in small], None),
        'Array3D': (small, datasets.Array3D((16, 16, 3), 'uint8')),
        'Array3D, one colour': ([image[None, ..., 0] for image in small], datasets.Array3D((1, 16, 16), 'uint8')),
    }[kind]
    columns = {'x': cells, 'label': list(range(len(cells)))}
    features = {'x': feature, 'label': datasets.Value('int64')} if feature else None
    write_table(tmp_path / 'a.parquet', columns, features)
    call('prepare.py', '--source', tmp_path / 'a.parquet', '--size', 16, '--out_dir', tmp_path / 'out')
    small = [image[..., 0] if kind.endswith('one colour') else image for image in small]
    expected = tokens_in(files[:5]) if kind.startswith('list') else tokens_from(map(Image.fromarray, small))
    assert tokens_of(tmp_path / 'out') == expected


def test_a_clone_of_a_hub_repository(pictures, files, tmp_path):
    repo = tmp_path / 'repo'
    save_parquet(repo / 'data' / 'train-00000-of-00001.parquet', files[:10], 'image')
    save_parquet(repo / 'data' / 'test-00000-of-00001.parquet', files[10:15], 'image')
    (repo / 'README.md').write_text('---\nlicense: mit\n---\n# photographs\n')
    (repo / 'assets').mkdir()
    for name, data in files[20:22]:
        (repo / 'assets' / os.path.basename(name)).write_bytes(data)
    out = call('prepare.py', '--source', repo, '--size', 16, '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out') == tokens_in(files[:15])
    assert 'not used: 2 files (beside parquet files)' in out and f"--source '{repo}/assets/*." in out
    # its splits have the names that the Hub gives them
    call('prepare.py', '--source', repo, '--val_source', 'test', '--size', 16, '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out', 'val') == tokens_in(files[10:15])
    out = call('prepare.py', '--source', repo, '--val_source', 'tset', '--out_dir', tmp_path / 'out', code=1)
    assert '--val_source tset is no file, no folder and none of the splits test, train' in out
    call('prepare.py', '--source', repo, '--val_source', 'synthetic', '--num_images', 3, '--size', 16,
         '--out_dir', tmp_path / 'out')
    assert len(tokens_of(tmp_path / 'out', 'val')) == 3
    # the layout of the Hub's own conversions
    for split in ('train', 'test'):
        folder = tmp_path / 'default' / split
        folder.mkdir(parents=True)
        table = repo / 'data' / f'{split}-00000-of-00001.parquet'
        (folder / '0000.parquet').write_bytes(table.read_bytes())
    call('prepare.py', '--source', tmp_path / 'default', '--val_source', 'test', '--size', 16,
         '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out', 'val') == tokens_in(files[10:15])
    # several configurations, as its card says
    save_parquet(repo / 'more' / 'train.parquet', files[15:20], 'image')
    configs = [f'- config_name: {name}\n  data_files: {folder}/*.parquet\n'
               for name, folder in (('main', 'data'), ('more', 'more'))]
    (repo / 'README.md').write_text('---\nconfigs:\n' + ''.join(configs) + '---\n')
    out = call('prepare.py', '--source', repo, '--out_dir', tmp_path / 'out', code=1)
    assert f'{repo}: choose one of its configurations, --config main, more' in out
    call('prepare.py', '--source', repo, '--config', 'more', '--size', 16, '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out') == tokens_in(files[15:20])
    (repo / 'README.md').write_text('---\nlicense: mit\n---\nA card that explains cards:\nconfigs:\n')
    assert not prepare.has_configurations(repo)


def test_parquet_files_that_are_hard_to_name(files, tmp_path):
    hard = os.path.join(os.fsencode(tmp_path), b'my [photos] {2024}', b'gr\xfcn :: a*b.PARQUET')
    os.mkdir(os.path.dirname(hard))
    save_parquet(tmp_path / 'a.parquet', files[:9], 'image')
    os.rename(tmp_path / 'a.parquet', hard)
    for source in (tmp_path, os.path.join(tmp_path, '*', '*.PARQUET')):
        call('prepare.py', '--source', source, '--size', 16, '--out_dir', tmp_path / 'out')
        assert tokens_of(tmp_path / 'out') == tokens_in(files[:9])
    os.truncate(hard, 3000)  # a broken download is never half used
    out = call('prepare.py', '--source', tmp_path, '--size', 16, '--out_dir', tmp_path / 'out', code=1)
    assert 'is no whole parquet file' in out


def test_parquet_files_that_are_empty_or_do_not_belong_together(files, tmp_path):
    (tmp_path / 'in').mkdir()
    save_parquet(tmp_path / 'in' / 'a.parquet', [], 'bytes')
    out = call('prepare.py', '--source', tmp_path / 'in', '--size', 16, '--out_dir', tmp_path / 'out', code=1)
    assert f'error: no rows in {tmp_path}/in/a.parquet' in out
    save_parquet(tmp_path / 'in' / 'b.parquet', files[:9], 'bytes')
    call('prepare.py', '--source', tmp_path / 'in', '--size', 16, '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out') == tokens_in(files[:9])
    save_parquet(tmp_path / 'in' / 'c.parquet', files[9:12], 'bytes', column='photo')
    out = call('prepare.py', '--source', tmp_path / 'in', '--size', 16, '--out_dir', tmp_path / 'out', code=1)
    assert "Couldn't cast" in out and 'files of other columns, or that are damaged, have to go' in out


# -----------------------------------------------------------------------------
# several sources, what lies in folders, oblong pictures

def test_files_are_pictures_by_content_whatever_their_names(files, tmp_path):
    folder = tmp_path / 'in' / 'a [b] c'
    folder.mkdir(parents=True)
    formats = {
        'a.jfif': 'JPEG', 'b.JPE': 'JPEG', 'c.avif': 'AVIF', 'd.jp2': 'JPEG2000', 'e.ppm': 'PPM',
        'f.tga': 'TGA', 'g.apng': 'PNG', 'h.mpo': 'MPO', 'noending': 'JPEG', 'i.ico': 'ICO', 'wrong.txt': 'PNG',
    }
    for (_, data), (name, kind) in zip(files, formats.items()):
        Image.open(io.BytesIO(data)).convert('RGB').save(folder / name, kind)
    os.rename(folder / 'a.jfif', os.fsencode(folder) + b'/caf\xe9.jfif')
    open(os.fsencode(folder) + b'/caf\xe9.png', 'w').write('no picture')
    (folder / 'notes.md').write_text('words')
    (folder / 'paper.pdf').write_bytes(b'%PDF-1.4')
    (folder / 'noise').write_bytes(bytes(1000))
    os.mkfifo(folder / 'pipe.png')
    out = call('prepare.py', '--source', tmp_path / 'in', '--size', 16, '--out_dir', tmp_path / 'out')
    assert '11 images' in out and '1 unreadable' in out and 'skipped' in out
    assert 'not used: 4 files (no pictures)' in out
    assert len(set(tokens_of(tmp_path / 'out'))) == 11


def test_linked_folders_are_followed_once(pictures, files, tmp_path):
    above = tmp_path / 'up'
    source = above / 'in'
    (source / 'deep').mkdir(parents=True)
    (above / 'secret.png').write_bytes(files[0][1])
    (source / 'photos').symlink_to(pictures)
    (source / 'deep' / 'photos').symlink_to(pictures)
    (source / 'deep' / 'loop').symlink_to(source)
    (source / 'deep' / 'above').symlink_to(above)
    found, once = prepare.find_files(str(source)), prepare.find_files(str(pictures))
    assert len(found) == 30 and set(map(os.path.realpath, found)) == set(map(os.path.realpath, once))


def test_output_inside_the_source_is_no_source(files, tmp_path):
    for name, data in files[:6]:
        (tmp_path / os.path.basename(name)).write_bytes(data)
    for out_dir in (tmp_path / 'data', tmp_path):
        for _ in range(2):
            assert '6 images' in call('prepare.py', '--source', tmp_path, '--size', 16, '--out_dir', out_dir)


def test_num_images_are_picked_at_random_over_all_folders(tmp_path):
    for colour, folder in enumerate('abc'):
        (tmp_path / 'in' / folder).mkdir(parents=True)
        for i in range(20):
            rgb = [0, 0, 0]
            rgb[colour] = 100 + 16 * (i % 8)
            Image.new('RGB', (8, 8), tuple(rgb)).save(tmp_path / 'in' / folder / f'{i}.png')
    out = call('prepare.py', '--source', tmp_path / 'in', '--size', 8, '--num_images', 20,
               '--out_dir', tmp_path / 'out')
    assert '20 of 60 images, picked at random by --seed' in out
    tokens = np.concatenate([rows(tmp_path / 'out', split)[:, 0] for split in ('train', 'val')])
    assert len(tokens) == 20 and all((tokens & channel).any() for channel in (0xF00, 0x0F0, 0x00F))


def test_several_sources_and_validation_images_of_ones_own(files, tmp_path):
    a, b, c = (tmp_path / name for name in 'abc')
    for folder, part in ((a, files[:8]), (b, files[8:16]), (c, files[14:20])):  # c repeats two pictures of b
        folder.mkdir()
        for name, data in part:
            (folder / os.path.basename(name)).write_bytes(data)
    table = tmp_path / 't.parquet'
    save_parquet(table, files[20:25], 'image')

    def both_splits(name):
        return [tokens_of(tmp_path / name, split) for split in ('train', 'val')]

    call('prepare.py', '--source', a, b, table, '--size', 16, '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out') == tokens_in(files[:16] + files[20:25])
    out = call('prepare.py', '--source', a, b, '--val_source', c, '--size', 16, '--out_dir', tmp_path / 'out')
    assert both_splits('out') == [tokens_in(files[:14]), tokens_in(files[14:20])]
    assert '2 images of --source are in --val_source too' in out
    (a / 'held out').mkdir()  # a folder of the source
    (c / os.path.basename(files[19][0])).rename(a / 'held out' / 'x.png')
    call('prepare.py', '--source', a, '--val_source', 'held out', '--size', 16, '--out_dir', tmp_path / 'out2')
    assert both_splits('out2') == [tokens_in(files[:8]), tokens_in(files[19:20])]
    (a / 'held out' / 'x.png').rename(c / 'x.png')
    # what prepare.py has made is a source too; its validation images stay what they were
    out = call('prepare.py', '--source', table, tmp_path / 'out', '--val_source', *sorted(c.iterdir()),
               '--size', 16, '--out_dir', tmp_path / 'out2')
    assert both_splits('out2') == [tokens_in(files[:14] + files[20:25]), tokens_in(files[14:20])]
    assert 'no usable image in --val_source' not in out
    for val_source in (tmp_path / 'out', 'val'):
        call('prepare.py', '--source', table, tmp_path / 'out', '--val_source', val_source, '--size', 16,
             '--out_dir', tmp_path / 'out3')
        assert both_splits('out3') == both_splits('out2')
    out = call('prepare.py', '--source', a, '--val_source', a, '--out_dir', tmp_path / 'x', code=1)
    assert 'not in --val_source too' in out


def test_oblong_pictures(files, tmp_path):
    (tmp_path / 'in').mkdir()
    for i, (_, data) in enumerate(files[:6]):
        Image.open(io.BytesIO(data)).convert('RGB').resize((90, 40)).save(tmp_path / 'in' / f'{i}.png')
    call('prepare.py', '--source', tmp_path / 'in', '--size', '24x16', '--out_dir', tmp_path / 'out')
    assert tokens_of(tmp_path / 'out') == tokens_from((tmp_path / 'in').iterdir(), (24, 16))
    with Image.open(tmp_path / 'in' / '3.png') as image:  # 60 of the 90 columns, from the middle
        cropped = image.resize((24, 16), Image.Resampling.LANCZOS, box=(15, 0, 75, 40))
    assert extras.pack_rgb(np.asarray(cropped)).astype('<u2').tobytes() in tokens_of(tmp_path / 'out')
    meta = extras.load_meta(str(tmp_path / 'out'))
    assert (meta['width'], meta['height'], meta['tokens_per_image']) == (24, 16, 384)
    call('prepare.py', '--source', 'synthetic', '--num_images', 4, '--size', '24x16', '--out_dir', tmp_path / 'drawn')
    square = extras.pack_rgb(np.asarray(prepare.Synthetic(4, 1337, 24).picture(2)))[4:20]
    assert square.astype('<u2').tobytes() in tokens_of(tmp_path / 'drawn')


def test_a_full_disk_is_one_line_and_leaves_the_old_data(pictures, tmp_path):
    call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path)
    before = digests(tmp_path)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # a disk with room for 200 kB
    args = ['--source', 'synthetic', '--num_images', 100, '--size', 64, '--out_dir', tmp_path]
    made = subprocess.run(command('prepare.py', *args), **PIPED, preexec_fn=small)
    assert made.returncode == 1 and 'Traceback' not in made.stdout
    assert made.stdout.splitlines()[-1].startswith(f'error: no room in {tmp_path} (')
    assert digests(tmp_path) == before and '.partial' not in os.listdir(tmp_path)


def test_two_that_prepare_one_folder(pictures, tmp_path):
    lock = extras.lock(str(tmp_path))
    out = call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path, code=1)
    lock.release()
    assert f'another process is writing to {tmp_path}' in out
    call('prepare.py', '--source', pictures, '--size', 16, '--out_dir', tmp_path)


@needs_photos
def test_photographs_of_many_kinds(tmp_path):
    out = call('prepare.py', '--source', PHOTOS, '--out_dir', tmp_path)
    assert '9 images of 64x64' in out and '0 unreadable' in out
