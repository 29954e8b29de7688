"""Colours, pictures, and reading any picture file upright and in its right colours."""
import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

import extras
from helpers import PHOTOS, needs_photos


def test_every_colour_survives_the_round_trip():
    tokens = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    rgb = extras.unpack_rgb(tokens)
    assert (extras.pack_rgb(rgb) == tokens).all()
    assert rgb.dtype == np.uint8 and extras.pack_rgb(rgb).dtype == np.uint16


def test_packing_keeps_the_red_channel():
    # in NumPy 2 np.uint8(255) << 8 is 0: packed without widening, every picture loses its red
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 239, 207]], np.uint8)
    assert extras.pack_rgb(rgb).tolist() == [0xF00, 0x0F0, 0x00F, 0xFEC]
    assert extras.unpack_rgb(0xFEC).tolist() == [255, 238, 204]


def test_all_levels_of_a_channel_fall_into_sixteen():
    ramp = np.arange(256, dtype=np.uint8)
    for channel, shift in enumerate((8, 4, 0)):
        rgb = np.zeros((256, 3), np.uint8)
        rgb[:, channel] = ramp
        assert (extras.pack_rgb(rgb) == (ramp.astype(np.uint16) >> 4) << shift).all()
        assert np.abs(extras.unpack_rgb(extras.pack_rgb(rgb))[:, channel].astype(int) - ramp).max() <= 15


@pytest.mark.parametrize('text, token', [
    ('FEC', 0xFEC), ('fec', 0xFEC), ('0xFEC', 0xFEC), ('000', 0), ('#f0e0c0', 0xFEC), ('#fff', 0xFFF),
    ('skyblue', 0x8CE), ('rgb(300, 0, 0)', 0xF00), ('rgba(49.8, 105.87, 134.61, 1)', 0x368),
])
def test_first_pixel_forms(text, token):
    assert extras.parse_pixel(text) == token


@pytest.mark.parametrize('text', ['', 'FECF', 'GGG', '#12', '4095', 'nocolour'])
def test_first_pixel_mistakes(text):
    with pytest.raises(extras.UserError, match='three hex digits'):
        extras.parse_pixel(text)


@pytest.mark.parametrize('ending', ['bmp', 'png', 'tiff', 'webp'])
def test_saved_pictures_hold_the_tokens(tmp_path, ending):
    tokens = torch.arange(4096).reshape(64, 64)
    path = str(tmp_path / f'new folder/picture.{ending}')
    if ending == 'webp':
        extras.save_picture(extras.to_image(tokens), path, lossless=True)
    else:
        extras.save_bmp(tokens, path)
    with Image.open(path) as image:
        assert (extras.pack_rgb(np.asarray(image.convert('RGB'))) == tokens.numpy()).all()


def test_a_picture_too_large_for_its_format(tmp_path):
    for ending in ('webp', 'jpg'):
        with pytest.raises(extras.UserError, match=f'a.{ending} cannot be written .*make it smaller, or a .png'):
            extras.save_picture(Image.new('RGB', (66_000, 1)), str(tmp_path / f'a.{ending}'))
    assert not list(tmp_path.iterdir())


def test_enlarging_repeats_pixels_and_a_sheet_keeps_them():
    tokens = [np.full((2, 3), 0x111 * i) for i in range(5)]
    image = extras.to_image(tokens[3], scale=4)
    assert image.size == (12, 8) and (np.asarray(image) == 51).all()
    page = np.asarray(extras.sheet([extras.to_image(t) for t in tokens]))
    assert page.shape == (2 * 4 + 2, 3 * 5 + 2, 3)
    for i in range(5):
        y, x = i // 3 * 4 + 2, i % 3 * 5 + 2
        assert (page[y:y + 2, x:x + 3] == 17 * i).all()
    assert (page[6:, 12:] == 255).all()


# -----------------------------------------------------------------------------
# reading pictures

def solid(mode, colour, size=(40, 30)):
    return Image.new(mode, size, colour)


MODES = {
    'rgb.png': (solid('RGB', (200, 100, 50)), (200, 100, 50)),
    'rgb.jpg': (solid('RGB', (200, 100, 50)), (200, 100, 50)),
    'rgb.bmp': (solid('RGB', (200, 100, 50)), (200, 100, 50)),
    'rgb.webp': (solid('RGB', (200, 100, 50)), (200, 100, 50)),
    'grey.jpg': (solid('L', 77), (77, 77, 77)),
    'one bit.png': (solid('1', 1), (255, 255, 255)),
    'transparent.png': (solid('RGBA', (255, 0, 0, 0)), (255, 255, 255)),
    'half.png': (solid('RGBA', (200, 0, 0, 128)), (227, 127, 127)),
    'half.webp': (solid('RGBA', (200, 0, 0, 128)), (227, 127, 127)),
    'grey alpha.png': (solid('LA', (0, 128)), (127, 127, 127)),
    '16 bit.png': (Image.fromarray(np.full((30, 40), 0x8000, np.uint16)), (128, 128, 128)),
    '16 bit.tiff': (Image.fromarray(np.full((30, 40), 0x4000, np.uint16)), (64, 64, 64)),
    '32 bit.tiff': (Image.fromarray(np.full((30, 40), 0xC000, np.int32)), (191, 191, 191)),
    'float.tiff': (Image.fromarray(np.full((30, 40), 0.5, np.float32)), (128, 128, 128)),
    'float 255.tiff': (Image.fromarray(np.full((30, 40), 100, np.float32)), (100, 100, 100)),
    'cmyk.jpg': (solid('CMYK', (0, 255, 255, 0)), (255, 0, 0)),
    'cmyk.tiff': (solid('CMYK', (255, 0, 255, 0)), (0, 255, 0)),
    'ycbcr.jpg': (solid('YCbCr', (100, 128, 128)), (100, 100, 100)),
    'lab.tiff': (solid('LAB', (255, 128, 128)), (255, 255, 255)),
    'palette.png': (solid('RGB', (0, 120, 240)).quantize(4), (0, 120, 240)),
    'palette.gif': (solid('RGB', (0, 120, 240)).quantize(4), (0, 120, 240)),
}


@pytest.mark.parametrize('name', MODES)
def test_every_mode_keeps_its_colour(tmp_path, name):
    image, colour = MODES[name]
    image.save(tmp_path / name, **(dict(lossless=True) if name.endswith('webp') else {}))
    rgb = extras.load_rgb(tmp_path / name, 16)
    assert rgb.shape == (16, 16, 3) and rgb.dtype == np.uint8
    assert np.abs(rgb.reshape(-1, 3).astype(int) - colour).max() <= 2


def test_transparent_colour_of_a_palette_and_of_rgb(tmp_path):
    image = solid('RGB', (9, 9, 9)).quantize(2)
    image.save(tmp_path / 'p.gif', transparency=image.getpixel((0, 0)))
    solid('RGB', (9, 9, 9)).save(tmp_path / 'rgb.png', transparency=(9, 9, 9))
    for name in ('p.gif', 'rgb.png'):
        assert (extras.load_rgb(tmp_path / name, 8) == 255).all()


@pytest.mark.parametrize('ending', ['gif', 'webp', 'png', 'tiff'])
def test_of_an_animation_the_first_frame(tmp_path, ending):
    red, blue = solid('RGB', (255, 0, 0)), solid('RGB', (0, 0, 255))
    options = dict(lossless=True) if ending == 'webp' else {}
    red.save(tmp_path / f'a.{ending}', save_all=True, append_images=[blue], **options)
    assert extras.load_rgb(tmp_path / f'a.{ending}', 8)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tiff'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(tmp_path, ending, orientation):
    # four corners of different colours, stored so that the orientation flag puts them right again
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:] = (255, 0, 0), (0, 255, 0)
    upright[32:, :48], upright[32:, 48:] = (0, 0, 255), (255, 255, 0)
    turn = Image.Transpose
    undo = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM,
            turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270][orientation - 1]
    image = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'o.{ending}'
    options = dict(jpg=dict(quality=95, subsampling=0), webp=dict(lossless=True))
    image.save(path, exif=exif, **options.get(ending, {}))
    rgb = extras.load_rgb(path, 16).astype(int)
    for y, x, colour in ((2, 2, (255, 0, 0)), (2, 13, (0, 255, 0)), (13, 2, (0, 0, 255)), (13, 13, (255, 255, 0))):
        assert np.abs(rgb[y, x] - colour).max() < 24, (y, x, rgb[y, x])


def test_the_crop_is_the_centre(tmp_path):
    for shape, axis in (((40, 120, 3), 1), ((120, 40, 3), 0)):
        picture = np.full(shape, 255, np.uint8)
        middle = np.take(picture, range(40, 80), axis)
        picture[:] = 0
        (picture[:, 40:80] if axis == 1 else picture[40:80])[:] = middle
        Image.fromarray(picture).save(tmp_path / 'c.png')
        assert (extras.load_rgb(tmp_path / 'c.png', 40) == 255).all()


def test_draft_decoding_of_a_large_jpeg_changes_next_to_nothing(tmp_path):
    # 3001 is no multiple of 4: the last column of the draft is only partly real, and must not shift the crop
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).resize((3001, 2003), Image.Resampling.BICUBIC)
    blobs.save(tmp_path / 'large.jpg', quality=92)
    with Image.open(tmp_path / 'large.jpg') as image:
        full = np.asarray(ImageOps.fit(image.convert('RGB'), (64, 64), Image.Resampling.LANCZOS)).astype(int)
    difference = np.abs(extras.load_rgb(tmp_path / 'large.jpg', 64) - full)
    assert difference.mean() < 0.3 and difference.max() <= 3


def test_a_profile_is_followed_to_srgb(tmp_path):
    from PIL import ImageCms
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    # what it calls red is our green
    swapped = srgb.replace(b'rXYZ', b'____').replace(b'gXYZ', b'rXYZ').replace(b'____', b'gXYZ')
    for profile, colour in ((srgb, (200, 100, 50)), (b'no profile at all', (200, 100, 50)), (swapped, (100, 200, 50))):
        solid('RGB', (200, 100, 50)).save(tmp_path / 'profile.png', icc_profile=profile)
        assert np.abs(extras.load_rgb(tmp_path / 'profile.png', 8).astype(int) - colour).max() <= 1


@needs_photos
def test_photographs_of_many_kinds():
    load = lambda name: extras.load_rgb(PHOTOS / name, 64).astype(int)
    # the same scene stored upright and on its side: equal but for the digit painted into it
    a, b = load('exif_Landscape_1.jpg'), load('exif_Landscape_6.jpg')
    assert np.abs(a - b).mean() < 2
    # a figure in black stands in the lower middle, the bright sky is above
    portrait = load('exif_Portrait_5.jpg')
    assert portrait[49:55, 25:30].mean() < 60 < portrait[:16].mean()
    # CMYK: the lawn is green, the path is grey, nothing is inverted
    cmyk = load('sharp_Channel_digital_image_CMYK_color.jpg')
    lawn = cmyk[40:46, 4:16].mean((0, 1))
    assert lawn[1] > lawn[0] > lawn[2] and 90 < lawn[1] < 190
    # transparent surroundings of the heart are white
    assert (load('sharp_grey-8bit-alpha.png')[0, 0] == 255).all()
    for name in ('kde_ColdRipple_small.jpg', 'sharp_grey-8bit-alpha.png'):
        grey = load(name)
        assert (grey == grey[..., :1]).all()


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('exif', [
    b'Exif\0\0' + b'garbage!' * 4,
    b'Exif\0\0',
    b'Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0',
    b'Exif\0\0II*\0\xff\xff\xff\x7f',
])
def test_broken_exif_costs_no_pixels(tmp_path, ending, exif):
    Image.new('RGB', (40, 30), (255, 0, 0)).save(tmp_path / f'a.{ending}', exif=exif)
    assert extras.pack_rgb(extras.load_rgb(tmp_path / f'a.{ending}', 8))[4, 4] == 0xF00


@pytest.mark.parametrize('top, kind', [(1, np.float32), (4, np.float32), (4095, np.uint16)])
def test_a_ramp_is_a_ramp_whatever_its_range_and_holes(tmp_path, top, kind):
    ramp = np.linspace(0, top, 1200).reshape(30, 40).astype(kind)
    if kind is np.float32:
        ramp[0, 0] = np.nan
    Image.fromarray(ramp).save(tmp_path / 'a.tiff')
    grey = extras.load_rgb(tmp_path / 'a.tiff', 16)[..., 0]
    assert grey[0, 5] < 16 and grey[-1, -1] > 239


def test_long_texts_and_profiles_cost_no_pixels(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text('parameters', 'x' * 2_000_000, zip=True)
    solid('RGB', (255, 0, 0)).save(tmp_path / 'text.png', pnginfo=text)
    solid('RGB', (255, 0, 0)).save(tmp_path / 'profile.png', icc_profile=bytes(2_000_000))
    text = PngImagePlugin.PngInfo()
    text.add_text('Raw profile type exif', '\nexif\n      9\nzz not hexadecimal\n')
    solid('RGB', (255, 0, 0)).save(tmp_path / 'exif.png', pnginfo=text)
    for name in ('text', 'profile', 'exif'):
        assert (extras.load_rgb(tmp_path / f'{name}.png', 8) == (255, 0, 0)).all()


def test_a_photograph_of_200_megapixels_is_read_and_a_bomb_is_not(tmp_path):
    Image.new('L', (16320, 12240), 90).save(tmp_path / 'phone.jpg', quality=50)
    tracemalloc.start()
    assert np.abs(extras.load_rgb(tmp_path / 'phone.jpg', 64).astype(int) - 90).max() <= 1
    assert tracemalloc.get_traced_memory()[1] < 2 ** 26
    Image.new('1', (20000, 20000)).save(tmp_path / 'bomb.png')  # 50 kB that would be 400 MB
    with pytest.raises(Image.DecompressionBombError):
        extras.load_rgb(tmp_path / 'bomb.png', 64)


def test_the_transparent_value_of_16_bit_grey(tmp_path):
    values = np.full((30, 40), 0x4000, np.uint16)
    values[0] = 0xFFFF
    values[:, 20:] = 0x1234
    Image.fromarray(values).save(tmp_path / 'a.png', transparency=0x1234)
    with Image.open(tmp_path / 'a.png') as image:
        assert image.mode.startswith('I') and image.info['transparency'] == 0x1234
    grey = extras.load_rgb(tmp_path / 'a.png', 30)[..., 0]
    assert (grey[8:, 18:] == 255).all() and (np.abs(grey[8:, :12].astype(int) - 0x40) <= 1).all()


def test_a_grey_profile_is_followed(tmp_path):
    # the smallest profile there is: grey of gamma 1.0, whose 128 of 255 is 188 in sRGB
    white = struct.pack('>3i', 63190, 65536, 54061)
    gamma = struct.pack('>IHxx', 1, 256)
    tags = [(b'wtpt', b'XYZ \0\0\0\0' + white), (b'kTRC', b'curv\0\0\0\0' + gamma)]
    table, body = struct.pack('>I', len(tags)), b''
    for name, data in tags:
        table += name + struct.pack('>II', 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    header = bytearray(128)
    header[:4] = struct.pack('>I', 128 + len(table) + len(body))
    header[8:12], header[12:24], header[36:40], header[68:80] = b'\2\x10\0\0', b'mntrGRAYXYZ ', b'acsp', white
    solid('L', 128).save(tmp_path / 'a.png', icc_profile=bytes(header) + table + body)
    assert np.abs(extras.load_rgb(tmp_path / 'a.png', 8).astype(int) - 188).max() <= 1


def test_libtiff_does_not_talk(tmp_path, capfd):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    noise.save(tmp_path / 'a.tiff', compression='tiff_lzw')
    data = bytearray((tmp_path / 'a.tiff').read_bytes())
    data[2000:2400] = bytes(400)  # damaged strips
    (tmp_path / 'a.tiff').write_bytes(data)
    with Image.open(tmp_path / 'a.tiff') as image, contextlib.suppress(OSError):
        image.load()
    assert capfd.readouterr().err  # it does, left to itself
    with contextlib.suppress(OSError):
        extras.load_rgb(tmp_path / 'a.tiff', 8)
    assert not capfd.readouterr().err
