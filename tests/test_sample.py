"""What sample.py writes."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import extras
from conftest import RECOMMENDED, ROOT, TINY, call
from helpers import PHOTOS, load, nanogpt_checkpoint, needs_photos, same
from model import GPT, GPTConfig


def tokens(path, scale=1):
    with Image.open(path) as image:
        return extras.pack_rgb(np.asarray(image.convert('RGB'))[::scale, ::scale])


@pytest.fixture(scope='module')
def ckpt(trained):
    return trained / 'ckpt20.pt'


def test_pictures_and_their_sheet(ckpt, tmp_path):
    out = call('sample.py', '--ckpt', ckpt, '--num_samples', 5, '--out', tmp_path / 'new' / 'a.png', '--scale', 3)
    folder = tmp_path / 'new'
    assert sorted(p.name for p in folder.iterdir()) == ['a.png', *(f'a_{i}.png' for i in range(5))]
    assert '1.28k/1.28k' in out  # the progress bar has counted 5 * 256 pixels
    assert f'wrote {folder}/a_0.png' in out
    assert f'wrote {folder}/a_4.png, the last of 5, and {folder}/a.png' in out
    sheet = tokens(folder / 'a.png')
    for i in range(5):
        picture = tokens(folder / f'a_{i}.png')
        assert picture.shape == (48, 48) and (picture == picture[::3, ::3].repeat(3, 0).repeat(3, 1)).all()
        y, x = i // 3 * 50 + 2, i % 3 * 50 + 2
        assert (sheet[y:y + 48, x:x + 48] == picture).all()
    assert len({tokens(folder / f'a_{i}.png').tobytes() for i in range(5)}) == 5


def test_one_picture_is_one_file(ckpt, tmp_path):
    call('sample.py', '--ckpt', ckpt, '--num_samples', 1, '--out', tmp_path / 'a.bmp')
    assert [p.name for p in tmp_path.iterdir()] == ['a.bmp'] and tokens(tmp_path / 'a.bmp').shape == (16, 16)


def test_the_seed_decides_and_the_number_of_pictures_does_not(ckpt, tmp_path):
    options = ['--temperature', 0.9, '--top_k', 200, '--top_p', 0.95]
    for name, args in (('a', (3,)), ('b', (12,)), ('c', (3, '--seed', 8))):  # alone, in one batch and in two
        call('sample.py', '--ckpt', ckpt, '--out', tmp_path / f'{name}.png', *options, '--num_samples', *args)
    a, b, c = ([tokens(tmp_path / f'{name}_{i}.png').tolist() for i in range(3)] for name in 'abc')
    assert a == b and a != c


def test_the_temperature_is_that_of_the_config_unless_another_is_given(data, ckpt, tmp_path):
    call('train.py', *TINY, f'--data_dir={data}', f'--out_dir={tmp_path}', '--max_iters=20', '--average=0.2',
         '--temperature=0.5')
    calm, pictures = tmp_path / 'ckpt20.pt', {}
    assert same(load(calm)['model'], load(ckpt)['model'])  # it changes nothing else
    for name, args in (('calm', [calm]), ('told', [ckpt, '--temperature', 0.5]), ('not', [calm, '--temperature', 1]),
                       ('usual', [ckpt])):
        call('sample.py', '--ckpt', *args, '--num_samples', 2, '--out', tmp_path / 'a.png')
        pictures[name] = tokens(tmp_path / 'a.png').tolist()
    assert pictures['calm'] == pictures['told'] != pictures['not'] == pictures['usual']
    sheets = [(path.parent / 'images' / 'output20.png').read_bytes() for path in (calm, ckpt)]
    assert sheets[0] != sheets[1]


@pytest.mark.parametrize('text', ['FEC', '0xfec', '#f0e0c0'])
def test_the_first_pixel_is_the_given_one(ckpt, tmp_path, text):
    call('sample.py', '--ckpt', ckpt, '--num_samples', 2, '--out', tmp_path / 'a.png', '--first_pixel', text)
    assert [tokens(tmp_path / f'a_{i}.png')[0, 0] for i in range(2)] == [0xFEC, 0xFEC]


def test_the_first_pixel_is_drawn(ckpt, tmp_path):
    call('sample.py', '--ckpt', ckpt, '--num_samples', 12, '--out', tmp_path / 'a.png', '--first_pixel', 'sample')
    assert len({int(tokens(tmp_path / f'a_{i}.png')[0, 0]) for i in range(12)}) > 3


def test_a_picture_is_completed(ckpt, data, tmp_path):
    meta = extras.load_meta(str(data))
    original = extras.load_tokens(str(data), 'val', meta)[0].reshape(16, 16)
    extras.save_bmp(original, tmp_path / 'photo.png')
    call('sample.py', '--ckpt', ckpt, '--image', tmp_path / 'photo.png', '--rows', 5, '--num_samples', 3,
         '--out', tmp_path / 'a.png')
    for i in range(3):
        picture = tokens(tmp_path / f'a_{i}.png')
        assert (picture[:5] == original[:5]).all() and (picture[5:] != original[5:]).any()
    sheet = tokens(tmp_path / 'a.png')
    assert sheet.shape == (20, 5 * 18 + 2)
    context, last = sheet[2:18, 2:18], sheet[2:18, 74:90]
    assert (context[:5] == original[:5]).all() and (context[5:] == 0x666).all() and (last == original).all()
    assert (sheet[2:18, 20:36] == tokens(tmp_path / 'a_0.png')).all()


@needs_photos
def test_a_photograph_on_its_side_is_completed_upright(ckpt, tmp_path):
    photo = PHOTOS / 'exif_Landscape_6.jpg'
    call('sample.py', '--ckpt', ckpt, '--image', photo, '--num_samples', 1, '--out', tmp_path / 'a.png')
    original = extras.pack_rgb(extras.load_rgb(photo, 16))
    assert (tokens(tmp_path / 'a.png')[2:10, 20:36] == original[:8]).all()


@pytest.mark.parametrize('model', [[], [*RECOMMENDED, '--reach=3']], ids=['plain', 'recommended'])
def test_oblong_pictures_are_learnt_painted_and_completed(tmp_path, model):
    call('prepare.py', '--source', 'synthetic', '--num_images', 40, '--size', '24x16', '--out_dir', tmp_path / 'data')
    call('train.py', *TINY, *model, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out', '--max_iters=2')
    assert tokens(tmp_path / 'out' / 'images' / 'output2.png', 2).shape == (16 + 2, 2 * (24 + 1) + 1)
    photo = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save(photo)
    call('sample.py', '--ckpt', tmp_path / 'out' / 'ckpt2.pt', '--image', photo, '--rows', 5, '--num_samples', 2,
         '--gif', '--out', tmp_path / 'a.png')
    original = extras.pack_rgb(extras.load_rgb(photo, (24, 16)))
    for i in range(2):
        picture = tokens(tmp_path / f'a_{i}.png')
        assert picture.shape == (16, 24)
        assert (picture[:5] == original[:5]).all() and (picture[5:] != original[5:]).any()
    assert (tokens(tmp_path / 'a.png')[2:18, -26:-2] == original).all()


@pytest.mark.parametrize('first_pixel', ['sample', 'FEC'])
def test_the_animation_paints_row_by_row(ckpt, tmp_path, first_pixel):
    call('sample.py', '--ckpt', ckpt, '--num_samples', 2, '--out', tmp_path / 'a.png', '--gif', '--scale', 2,
         '--first_pixel', first_pixel)
    with Image.open(tmp_path / 'a.gif') as animation:
        frames = []
        for i in range(animation.n_frames):
            animation.seek(i)
            frames.append(np.asarray(animation.convert('RGB')).astype(int))
    assert len(frames) == 17
    final = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(int)
    assert frames[0].shape == final.shape and np.abs(frames[-1] - final).mean() < 8  # 256 colours a frame
    for i, frame in enumerate(frames):
        grey = np.abs(frame - 102).max(-1) <= 12
        assert grey[2 + 2 * i + 2 * (first_pixel == 'FEC'):34, 2:34].all()  # below the rows that stand
    assert not (np.abs(frames[-1] - 102).max(-1) <= 12)[32:34, 4:34].all()  # in the end none is left


def test_the_ancestors_checkpoint_paints_without_a_data_folder(tmp_path):
    torch.save(nanogpt_checkpoint(side=16, prefix='_orig_mod.'), tmp_path / 'ckpt.pt')
    call('sample.py', '--ckpt', tmp_path / 'ckpt.pt', '--num_samples', 1, '--out', tmp_path / 'a.png', cwd=tmp_path)
    assert tokens(tmp_path / 'a.png').shape == (16, 16) and tokens(tmp_path / 'a.png')[0, 0] == 0xFEC
    torch.save(nanogpt_checkpoint(side=64, n_layer=1), tmp_path / 'ckpt64.pt')
    call('sample.py', '--ckpt', tmp_path / 'ckpt64.pt', '--num_samples', 1, '--out', tmp_path / 'b.png',
         '--first_pixel', '8AF')
    assert tokens(tmp_path / 'b.png').shape == (64, 64) and tokens(tmp_path / 'b.png')[0, 0] == 0x8AF


def test_weights_saved_as_a_library_saves_them_paint_oblong_pictures(tmp_path):
    model = GPT(GPTConfig(block_size=32 * 8, width=32, n_layer=2, n_head=2, n_embd=32, attention='local column'))
    torch.save({'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config)}, tmp_path / 'mine.pt')
    call('sample.py', '--ckpt', tmp_path / 'mine.pt', '--num_samples', 1, '--out', tmp_path / 'a.png')
    assert tokens(tmp_path / 'a.png').shape == (8, 32)


def test_the_shipped_checkpoint_paints(tmp_path):
    path = ROOT / 'out' / 'ckpt6000.pt'
    assert path.stat().st_size < 8_000_000
    checkpoint = extras.load_checkpoint(str(path))
    assert sum(p.numel() for p in extras.build_model(checkpoint, str(path), 'cpu').parameters()) < 2_000_000
    call('sample.py', '--ckpt', path, '--num_samples', 1, '--out', tmp_path / 'a.png', '--first_pixel', '8AF')
    assert len(np.unique(tokens(tmp_path / 'a.png'))) > 20 and tokens(tmp_path / 'a.png')[0, 0] == 0x8AF
