"""The model and the sampler: what is predicted from what, and that the cache changes nothing."""
import copy
import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import extras
import prepare
from conftest import ROOT
from helpers import nanogpt_checkpoint
from model import NEIGHBOURS, GPT, CausalSelfAttention, GPTConfig, attention, orthogonalise
from sample import GREY, Decoder, adapt_threads, filter_logits, graph_loop, gumbel_noise, sample, wave_loop

SIDE = 12
TOKENS = SIDE * SIDE
TWO_DIMENSIONAL = dict(row_column_positions=True, neighbours=12, relative_colours=True)
KINDS = {
    'plain': {},
    'ancestor': dict(start_embedding=False),
    'full': TWO_DIMENSIONAL,
    'local': {**TWO_DIMENSIONAL, 'attention': 'local local local column'},  # the fourth of three layers
    'column': {**TWO_DIMENSIONAL, 'attention': 'column', 'neighbours': 24},
    'local column': {**TWO_DIMENSIONAL, 'attention': 'local column full', 'alibi': True},
    'reach': {**TWO_DIMENSIONAL, 'attention': 'local column', 'alibi': True, 'reach': 2},
    'small colours': {**TWO_DIMENSIONAL, 'attention': 'local column', 'reach': 3, 'n_colour': 8},
    'relative': dict(relative_colours=True),
    'chroma': {**TWO_DIMENSIONAL, 'attention': 'local column', 'reach': 3, 'n_colour': 8, 'relative_chroma': True,
               'relative_neighbours': True, 'exclusive': True},
    'exclusive': dict(exclusive=True, attention='local full column'),
    'biased': dict(bias=True, attention='column'),
}
kinds = pytest.mark.parametrize('kind', KINDS)


def small(kind='plain', tokens=TOKENS, seed=0, std=None, **kwargs):
    """A small model; with std its weights are large enough that what it draws depends on what it sees."""
    torch.manual_seed(seed)
    args = {**dict(n_layer=3, n_head=2, n_embd=32, width=round(tokens ** 0.5)), **KINDS[kind], **kwargs}
    model = GPT(GPTConfig(block_size=tokens - (not args.get('start_embedding', True)), **args))
    if std:
        for p in model.parameters():
            if p.dim() >= 2:
                torch.nn.init.normal_(p, std=std)
    return model.eval()


def images(count, side=SIDE, seed=0):
    source = prepare.Synthetic(count, seed, side)
    tokens = [extras.pack_rgb(source.picture(i)).reshape(-1) for i in range(count)]
    return torch.from_numpy(np.stack(tokens).astype(np.int64))


def generator(seed):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# training

@kinds
def test_loss_before_training_is_that_of_a_guess(kind):
    tokens = torch.randint(4096, (4, 256), generator=generator(0))
    for seed in range(2):
        loss = small(kind, tokens=256, seed=seed, n_layer=4, n_head=4, n_embd=128)(tokens)
        assert abs(loss.item() - math.log(4096)) < 0.1


@pytest.mark.parametrize('kind', ['plain', 'ancestor', 'local column'])
def test_a_single_batch_can_be_learnt_by_heart(kind):
    model, tokens = small(kind).train(), images(2)
    (optimizer,) = model.configure_optimizers(0.0, 6e-3, (0.9, 0.95))
    for _ in range(80):
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5


def test_muon_makes_orthogonal_what_adamw_leaves_to_it():
    for matrix in orthogonalise([torch.randn(32, 96), torch.randn(32, 128), torch.randn(32, 40) * 1e-6]):
        singular = torch.linalg.svdvals(matrix)
        assert singular.min() > 0.6 and singular.max() < 1.3
    model, tokens = small('local column').train(), images(2)
    optimizers = model.configure_optimizers(0.0, 6e-3, (0.9, 0.95), muon_lr=0.04)
    held = [{id(p) for group in optimizer.param_groups for p in group['params']} for optimizer in optimizers]
    assert not held[0] & held[1] and held[0] | held[1] == {id(p) for p in model.parameters()}
    assert id(model.transformer.wte.weight) in held[0] and id(model.transformer.h[0].mlp.c_fc.weight) in held[1]
    for _ in range(40):
        loss = model(tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.5  # by heart in half the steps


@kinds
def test_what_is_predicted_and_that_the_loss_is_its_mean(kind):
    model, tokens = small(kind, std=0.2), images(3)
    logits, loss = model.logits(tokens), model(tokens)
    predicted = TOKENS - (kind == 'ancestor')
    assert logits.shape == (3, predicted, 4096)
    by_hand = -logits.log_softmax(-1).gather(-1, tokens[:, -predicted:, None]).mean()
    assert torch.allclose(loss, by_hand, atol=1e-5)


@pytest.mark.parametrize('chroma', [False, True])
def test_relative_scores_are_those_of_differences_to_the_left_and_the_upper_pixel(chroma):
    model, tokens = small('relative', relative_chroma=chroma, std=0.2), images(1)
    scores = []
    model.rel_head.register_forward_hook(lambda module, args, output: scores.append(output[0]))
    with torch.no_grad():
        logits = model.logits(tokens)[0]
        model.rel_head.weight.zero_(), model.rel_head.bias.zero_()
        logits -= model.logits(tokens)[0]

    def components(token):
        red, green, blue = token // 256, token // 16 % 16, token % 16
        return (red, green, blue, red - green, blue - green) if chroma else (red, green, blue)

    limits = (15, 15, 15, 30, 30) if chroma else (15, 15, 15)  # of the differences
    for pixel in (SIDE + 1, 5 * SIDE + 7):
        beside_left, beside_upper = scores[0][pixel].view(2, -1).tolist()
        for colour in (0, 0x123, 0xFA0, 0xFFF):
            expected = 0
            for beside, neighbour in ((beside_left, tokens[0, pixel - 1]), (beside_upper, tokens[0, pixel - SIDE])):
                first = 0
                for limit, mine, other in zip(limits, components(colour), components(int(neighbour))):
                    expected += beside[first + limit + mine - other]
                    first += 2 * limit + 1
                assert first == len(beside)
            assert math.isclose(logits[pixel, colour], expected, abs_tol=1e-4)


def test_neighbours_that_touch_are_compared_as_numbers():
    stem = small(**TWO_DIMENSIONAL, relative_neighbours=True).transformer.stem
    tokens = torch.full((12,), 0x333)
    tokens[:3] = torch.tensor([0x345, 0x333, 4096])  # left, upper, and an upper left outside the image
    pairs = [(NEIGHBOURS[i], NEIGHBOURS[j]) for i, j in stem.touching.t().tolist()]
    assert len(set(pairs)) == 16 and all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in pairs)
    numbers = dict(zip(pairs, stem.differences(tokens).view(16, 5, 5)))

    def by_hand(*differences):
        return torch.tensor([[d / 4, abs(d) / 4, math.tanh(d / 1.5), math.tanh(d / 5), d == 0] for d in differences])

    # red, green, blue, red - green and blue - green of the left pixel and of the one left of it
    assert torch.allclose(numbers[(0, -1), (0, -2)], by_hand(0, 1, 2, -1, 1))
    assert torch.equal(numbers[(-1, 0), (-1, 1)], by_hand(0, 0, 0, 0, 0))
    assert all((numbers[pair] == 0).all() for pair in pairs if (-1, -1) in pair)


@kinds
def test_no_pixel_sees_itself_or_the_future(kind):
    model, tokens = small(kind, std=0.2), images(1)
    before = model.logits(tokens)
    predicted = before.size(1)
    first = TOKENS - predicted  # the pixel that logits[:, 0] belong to
    for pixel in (0, 1, SIDE - 1, SIDE, TOKENS // 2, TOKENS - 2):
        changed = tokens.clone()
        changed[0, pixel] = (changed[0, pixel] + 1234) % 4096
        difference = (model.logits(changed) - before).abs().amax((0, 2))
        assert (difference[:max(pixel + 1 - first, 0)] == 0).all()  # pixels up to this one: to the last bit
        if 'full' in model.config.attention:  # every later pixel sees it
            assert (difference[pixel + 1 - first:] > 0).all()
        elif (pixel + 1) % SIDE:  # the next one in its row sees it
            assert difference[pixel + 1 - first] > 0


@pytest.mark.parametrize('reach, neighbours', [(1, 4), (2, 12), (3, 24)])
def test_with_reach_a_pixel_sees_the_cone_above_it_and_nothing_else(reach, neighbours):
    # eight layers, every other one local: each of these looks a row further into the cone
    args = {**TWO_DIMENSIONAL, 'neighbours': neighbours, 'attention': 'local column', 'reach': reach}
    model = small(**args, n_layer=8, std=0.2).double()
    tokens = images(1)
    before = model.logits(tokens)
    y, x = torch.arange(TOKENS) // SIDE, torch.arange(TOKENS) % SIDE
    for pixel in (0, 3, SIDE - 1, SIDE + 5, 4 * SIDE + 9):
        changed = tokens.clone()
        changed[0, pixel] = (changed[0, pixel] + 1234) % 4096
        difference = (model.logits(changed) - before).abs().amax((0, 2))
        below, right = y - y[pixel], x - x[pixel]
        # pixels that come after it on a wave along the diagonal
        cone = (below == 0) & (right > 0) | (below > 0) & (right >= -reach * below)
        near = cone & (below <= 3)
        assert (difference[~cone] == 0).all() and (difference[near] > 0).all()


@kinds
def test_the_chunked_loss_has_the_gradients_of_the_usual_one(kind):
    model, tokens = small(kind, std=0.2), images(4)  # 576 rows: chunks and a part of one
    logits, gradients = model.logits(tokens), []
    usual = F.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.size(1):].flatten())
    for loss in (model(tokens), usual):
        model.zero_grad()
        (2 * loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_neighbours_end_where_the_image_ends():
    model = small('full', neighbours=24)
    picture = torch.arange(TOKENS).view(1, SIDE, SIDE)
    around = model.neighbours(picture.flatten(1)).view(SIDE, SIDE, len(NEIGHBOURS))
    for y in range(SIDE):
        for x in range(SIDE):
            for (dy, dx), token in zip(NEIGHBOURS, around[y, x]):
                inside = 0 <= y + dy < SIDE and 0 <= x + dx < SIDE  # no wrap-around from one row to the next
                assert token == (picture[0, y + dy, x + dx] if inside else 4096)
    assert len(set(NEIGHBOURS)) == 24
    assert all((dy, dx) < (0, 0) for dy, dx in NEIGHBOURS)  # none of them is the pixel itself or comes later
    assert NEIGHBOURS[:4] == [(0, -1), (-1, 0), (-1, -1), (-1, 1)]


@pytest.mark.parametrize('attention, seen', [
    ('full', lambda y, x, v, u: True),
    ('local', lambda y, x, v, u: v in (y, y - 1)),
    ('column', lambda y, x, v, u: x == u),
])
def test_what_a_layer_attends_to(attention, seen):
    # in a single layer, position (y, x), which reads the pixel before it, sees the positions (v, u) that it should
    model = small(attention=attention, n_layer=1, std=0.2)
    x = torch.randn(1, TOKENS, 32, requires_grad=True)
    for position in (0, SIDE - 1, SIDE + 3, TOKENS - 1):
        x.grad = None
        model.transformer.h[0].attn(x)[0, position].sum().backward()
        reached = x.grad[0].abs().sum(-1) > 0
        here = divmod(position, SIDE)
        assert reached.tolist() == [i <= position and seen(*here, *divmod(i, SIDE)) for i in range(TOKENS)]


@pytest.mark.parametrize('kind', ['local', 'column'])
def test_attention_fades_with_distance(kind):
    # of equal scores, those of a pixel so many rows and columns away count exp(-slope * distance)
    attn = small(attention=kind, n_layer=1, alibi=True).transformer.h[0].attn
    torch.nn.init.zeros_(attn.c_attn.weight[:64])  # queries and keys
    torch.nn.init.eye_(attn.c_attn.weight[64:])
    torch.nn.init.eye_(attn.c_proj.weight)
    x = torch.randn(1, TOKENS, 32)
    y, here = attn(x)[0], 5 * SIDE + 7
    seen = [i for i in range(here + 1) if (i % SIDE == 7 if kind == 'column' else i >= 4 * SIDE)]
    away = {i: abs(i // SIDE - 5) + abs(i % SIDE - 7) for i in seen}
    for head, slope in enumerate((1 / 2, 1 / 32)):
        weights = torch.tensor([-slope * distance for distance in away.values()]).softmax(0)
        expected = (weights[:, None] * x[0, list(away)]).sum(0)
        assert torch.allclose(y[here].view(2, 16)[head], expected.view(2, 16)[head], atol=1e-5)


@pytest.mark.parametrize('kind', ['full', 'local', 'column'])
def test_exclusive_attention_adds_only_what_is_orthogonal_to_the_own_value(kind):
    attn = small(attention=kind, n_layer=1, std=0.5).transformer.h[0].attn
    torch.nn.init.eye_(attn.c_proj.weight)
    x = torch.randn(2, TOKENS, 32)
    plain, own = (y.view(2, TOKENS, 2, 16) for y in (attn(x), attn.c_attn(x)[..., 64:]))
    attn.exclusive = True
    exclusive = attn(x).view(2, TOKENS, 2, 16)
    assert (exclusive * own).sum(-1).abs().max() < 1e-4
    along = (plain - exclusive) / own  # what is left out is a multiple of the own value
    assert torch.allclose(plain - exclusive, along.median(-1, keepdim=True).values * own, atol=1e-4)
    assert (plain - exclusive).abs().mean() > 0.1


@pytest.mark.parametrize('kind', ['ancestor', 'local column', 'reach'])
def test_attention_never_leaves_the_fast_kernel_of_a_cpu(kind):
    model = small(kind)
    with torch.profiler.profile() as profile:
        model(images(2)).backward()
        model.generate(images(1)[:, :1], 2 * SIDE)
    called = {event.key for event in profile.key_averages()}
    assert 'aten::_scaled_dot_product_flash_attention_for_cpu' in called
    assert 'aten::_scaled_dot_product_attention_math' not in called


def rows(length):
    """Queries, keys and values of rows of so many pixels in bfloat16, and the mask of local attention."""
    config = GPTConfig(n_head=2, width=length, block_size=4 * length, attention='local', alibi=True, reach=3)
    q, k, v = (torch.randn(5, 2, n, 16).bfloat16().requires_grad_() for n in (length, 2 * length, 2 * length))
    return q, k, v, CausalSelfAttention(config, 'local').mask


@pytest.mark.parametrize('length', [SIDE, 150])  # plain products, and too many keys for them
def test_rows_attend_in_bfloat16_as_in_float32(length):
    q, k, v, mask = rows(length)
    ours = attention(q, k, v, mask, 0.0)
    theirs = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.float(), theirs, atol=2e-2)
    weights = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (ours, theirs))):
        assert (a - b).float().norm() < 2e-2 * b.float().norm()


def test_dropout_of_attention_leaves_the_mean():
    q, k, v, mask = rows(SIDE)
    with torch.no_grad():
        many = torch.stack([attention(q, k, v, mask, 0.5).float() for _ in range(2000)])
        assert torch.allclose(many.mean(0), attention(q, k, v, mask, 0.0).float(), atol=0.25)
    assert many.std(0).mean() > 0.1


def test_the_first_pixel_is_learnt_from_the_start_embedding():
    model, tokens = small().train(), images(1).repeat(4, 1)
    tokens[:, 0] = torch.tensor([0xFEC, 0xFEC, 0xFEC, 0x123])
    (optimizer,) = model.configure_optimizers(0.0, 6e-3, (0.9, 0.95))
    for _ in range(60):
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    first = model.logits(tokens)[0, 0].softmax(0).detach()
    assert first[0xFEC] == pytest.approx(0.75, abs=0.1) and first[0x123] == pytest.approx(0.25, abs=0.1)


# -----------------------------------------------------------------------------
# the ancestor

def nanogpt_logits(weights, tokens, n_head):
    """GPT-2's forward pass written out from its state dict, sharing no line with model.py."""
    x = weights['transformer.wte.weight'][tokens] + weights['transformer.wpe.weight'][:tokens.size(1)]
    B, T, C = x.shape
    norm = lambda x, name: F.layer_norm(x, (C,), weights[name + '.weight'], weights.get(name + '.bias'))
    linear = lambda x, name: F.linear(x, weights[name + '.weight'], weights.get(name + '.bias'))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(sum(name.endswith('ln_1.weight') for name in weights)):
        h = f'transformer.h.{i}.'
        qkv = linear(norm(x, h + 'ln_1'), h + 'attn.c_attn')
        q, k, v = (t.reshape(B, T, n_head, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(C // n_head)).masked_fill(future, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), h + 'attn.c_proj')
        x = x + linear(F.gelu(linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')), h + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ weights['lm_head.weight'].T


@pytest.mark.parametrize('bias, prefix', [(False, '_orig_mod.'), (True, '')])
def test_without_start_embedding_it_is_the_ancestor(tmp_path, bias, prefix):
    path = str(tmp_path / 'ckpt.pt')
    saved = nanogpt_checkpoint(SIDE, bias, prefix)
    torch.save(saved, path)
    checkpoint = extras.load_checkpoint(path)
    assert (checkpoint['height'], checkpoint['width']) == (SIDE, SIDE)
    model = extras.build_model(checkpoint, path, 'cpu')
    assert not model.config.start_embedding and model.config.tokens_per_image == TOKENS
    tokens = images(2)
    expected = nanogpt_logits(checkpoint['model'], tokens[:, :-1], n_head=2)
    assert torch.allclose(model.logits(tokens), expected, atol=1e-4)
    assert set(model.state_dict()) == {name.removeprefix(prefix) for name in saved['model']}


def test_the_ancestors_usage_keeps_working(tmp_path):
    model = small(tokens=4096)
    torch.save({'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config)}, tmp_path / 'ckpt6000.pt')

    checkpoint = torch.load(tmp_path / 'ckpt6000.pt', weights_only=True)
    model = GPT(GPTConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['model'])
    tokens = model.generate([[0xFEC]], max_new_tokens=4095, temperature=0.8)
    extras.save_bmp(tokens.reshape(64, 64), tmp_path / 'picture.bmp')

    assert tokens.shape == (1, 4096) and tokens[0, 0] == 0xFEC
    assert (tmp_path / 'picture.bmp').stat().st_size == 54 + 64 * 64 * 3


# -----------------------------------------------------------------------------
# sampling

OPTIONS = {
    'greedy': dict(temperature=0),
    'plain': {},
    'cold': dict(temperature=0.7),
    'top-k': dict(top_k=50),
    'top-p': dict(top_p=0.8),
    'all': dict(temperature=1.3, top_k=500, top_p=0.9),
}


def paints_as_the_plain_loop_does(kind, batch, given, options={}):
    model, prompt = small(kind, std=0.2), images(batch)[:, :given]
    paint = lambda use_cache: model.generate(prompt, use_cache=use_cache, generator=generator(3), **options)
    cached, plain = paint(True), paint(False)
    assert cached.shape == (batch, TOKENS) and (cached == plain).all()
    assert (cached[:, :given] == prompt).all()
    assert len(cached[:, given:].unique()) > 5  # it is not one colour for ever


@kinds
def test_the_cache_changes_no_token(kind):
    paints_as_the_plain_loop_does(kind, 1, given=int(kind == 'ancestor'))


@kinds
def test_the_cache_changes_no_token_of_several_pictures_that_are_given_five_rows(kind):
    paints_as_the_plain_loop_does(kind, 3, given=5 * SIDE)


@pytest.mark.parametrize('reach, neighbours', [(1, 0), (1, 4), (2, 12), (5, 24), (SIDE + 3, 12)])
def test_waves_paint_what_the_plain_loop_paints_whatever_is_given_and_asked_for(reach, neighbours):
    model = small('reach', reach=reach, neighbours=neighbours, std=0.2)
    paint = lambda *args, **options: model.generate(*args, generator=generator(3), **options)
    # given are nothing, parts of rows, rows, all but a pixel
    for given in (0, 1, 5, SIDE - 1, SIDE, SIDE + 5, 5 * SIDE, TOKENS - 1):
        prompt = images(2)[:, :given]
        for new in (3, 20, None) if given in (0, SIDE + 5, 5 * SIDE) else (1,):
            if new is None or given + new <= TOKENS:
                assert paint(prompt, new).equal(paint(prompt, new, use_cache=False)), (given, new)


def test_pixels_of_a_wave_lie_on_a_diagonal_and_every_pixel_in_one():
    for reach, stride, first, count in ((2, 3, 0, TOKENS), (2, 3, 17, 100), (5, 5, 3, TOKENS), (0, SIDE, 20, 50)):
        decoder = Decoder(small('reach', reach=reach), torch.zeros(1, count).long(), 0)
        painted = set(range(first))
        for wave in decoder.waves(first):
            pixels = set(wave.tolist())
            assert len(pixels) == len(wave) and not painted & pixels
            assert len({pixel % SIDE + stride * (pixel // SIDE) for pixel in pixels}) == 1
            for y, x in (divmod(pixel, SIDE) for pixel in pixels):  # whatever it may look at is there
                cone = [(v, u) for v in range(y) for u in range(SIDE) if u < x + stride * (y - v)]
                assert all(v * SIDE + u in painted for v, u in cone) or not reach
                assert all(y * SIDE + u in painted for u in range(x))
            painted |= pixels
        assert painted == set(range(count))


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_the_cache_changes_no_token_with_any_option(options):
    paints_as_the_plain_loop_does('plain', 2, 5 * SIDE, options)


@kinds
def test_cached_logits_are_those_of_whole_images(kind):
    model, tokens = small(kind, std=0.2), images(3)
    whole = model.logits(tokens)
    for first in (20, 5 * SIDE):  # a prompt at once, then wave after wave
        with torch.no_grad():
            decoder = Decoder(model, tokens, first)
            for pixels in decoder.waves(first):
                logits = decoder.decode(pixels).view(len(pixels), 3, -1).transpose(0, 1)
                assert (logits - whole[:, pixels - int(kind == 'ancestor')]).abs().max() < 1e-4
                decoder.canvas[decoder.cells[pixels]] = tokens[:, pixels].t()
        assert decoder.canvas[decoder.cells].t().equal(tokens)


@pytest.mark.parametrize('kind', ['ancestor', 'full', 'local column', 'reach', 'small colours'])
def test_the_steps_of_a_graph_paint_the_same(kind):
    # all of graph_loop but the capture
    model = small(kind, std=0.2)
    draw = lambda logits, noise: sample(filter_logits(logits, top_p=0.95), noise)
    seeds = torch.tensor([4, 5])
    for first in (int(kind == 'ancestor'), 50):
        painted = []
        for paint in (wave_loop, graph_loop):
            image = images(2)
            image[:, first:] = 0
            with torch.no_grad():
                assert sum(paint(model, image, seeds, draw, first)) == TOKENS - first
            painted.append(image)
        assert painted[0].equal(painted[1]) and len(painted[0].unique()) > 5


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')


@needs_a_gpu
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('kind', ['ancestor', 'full', 'reach', 'chroma'])
def test_gradients_on_a_gpu_are_those_of_a_cpu(kind, compiled):
    model, tokens, gradients = small(kind, tokens=1024, std=0.1).train(), images(4, 32), []
    for device in ('cpu', 'cuda'):
        model.to(device).zero_grad()
        forward = torch.compile(model, dynamic=False) if compiled and device == 'cuda' else model
        forward(tokens.to(device)).backward()
        gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() < 1e-3 * gradient.norm() + 1e-6, name


@needs_a_gpu
def test_muon_makes_on_a_gpu_what_it_makes_on_a_cpu():
    scales = torch.logspace(0, -4, 32)[:, None]  # so that singular values differ as much as those of a gradient
    matrices = [torch.randn(32, 96) * scales, torch.randn(32, 40) * scales]
    for a, b in zip(orthogonalise(matrices), orthogonalise([m.cuda() for m in matrices])):
        assert torch.allclose(a, b.cpu(), atol=1e-2)


@needs_a_gpu
def test_a_gpu_draws_at_every_pixel_what_a_cpu_would_draw():
    # where two colours are equal but for rounding, a GPU may draw the other one, and the images differ from there on:
    # so the CPU is asked about every pixel after those that the GPU has painted
    checkpoint = extras.load_checkpoint(str(ROOT / 'out' / 'ckpt6000.pt'))
    model = extras.build_model(checkpoint, '', 'cuda')
    painted = model.generate(torch.zeros(4, 0), generator=generator(3)).cpu()
    seeds, model = torch.randint(2 ** 62, (4,), generator=generator(3)), model.cpu()
    with torch.no_grad():
        for pixel, logits in enumerate(model.logits(painted).unbind(1)):
            scores = logits + gumbel_noise(seeds, torch.tensor([pixel]), 4096)[0]
            behind = scores.amax(-1) - scores.gather(1, painted[:, pixel:pixel + 1])[:, 0]
            assert behind.max() < 1e-3, (pixel, behind)


@needs_a_gpu
@kinds
def test_graphs_paint_what_the_plain_loop_paints(kind):
    model, prompt = small(kind, std=0.2).cuda(), images(3)[:, :SIDE]
    paint = lambda use_cache: model.generate(prompt, use_cache=use_cache, generator=generator(3))
    assert paint(True).equal(paint(False))


@pytest.mark.parametrize('slow', [1, 2])
def test_a_picture_is_painted_with_the_number_of_threads_that_is_faster(slow):
    threads, used = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        for most in (4, 1):
            for i, wave in enumerate(adapt_threads([[i] for i in range(200)], most)):
                assert wave == [i]
                # two threads are slow on a busy machine and fast on an idle one
                time.sleep(0.003 if torch.get_num_threads() == slow else 0.001)
                used.append(torch.get_num_threads())
        assert used[0] == 1 and 2 in used and used[199] == 3 - slow and used[:200].count(slow) < 100
        assert len(set(used[200:])) == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_same_seed_paints_the_same_in_batches_of_any_size():
    model, prompt = small(std=0.2), images(10)[:, :SIDE]  # 10: more than are painted side by side

    def paint(size):
        rng = generator(5)
        return torch.cat([model.generate(part, generator=rng) for part in prompt.split(size)])

    assert (paint(10) == paint(1)).all() and (paint(10) == paint(4)).all()
    assert (paint(6) != model.generate(prompt, generator=generator(6))).any()


def test_dropout_is_for_training_alone():
    model, prompt = small(std=0.2, dropout=0.5).train(), images(2)[:, :SIDE]
    paint = lambda **options: model.generate(prompt, generator=generator(3), **options)
    assert paint().equal(paint()) and paint().equal(paint(use_cache=False)) and model.training


@pytest.mark.parametrize('option', [dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0.0)])
def test_options_that_make_no_sense(option):
    with pytest.raises(ValueError, match='temperature has to be 0 or more, top_k 1 or more'):
        small().generate([[5]], 2, **option)


def test_a_model_in_bfloat16_learns():
    model, tokens = small('chroma', std=0.1).train(), images(2)
    exact = copy.deepcopy(model)
    loss, exact_loss = model.bfloat16()(tokens), exact(tokens)
    loss.backward(), exact_loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert (p.grad.float() - q.grad).norm() < 0.1 * q.grad.norm(), name


def test_a_model_in_half_precision_paints():
    model, prompt = small('local column', tokens=4096, std=0.2).bfloat16(), images(3, side=64)[:, :4000]
    painted = model.generate(prompt, 96, generator=generator(3))
    assert painted.shape == (3, 4096) and len(painted[:, 4000:].unique()) > 5


def test_greedy_takes_the_likeliest_colour_whatever_the_noise():
    model, prompt = small(std=0.2), images(2)[:, :SIDE]
    one, two = (model.generate(prompt, temperature=0, generator=generator(seed)) for seed in (1, 2))
    assert (one == two).all()
    assert (model.logits(one).argmax(-1)[:, SIDE:] == one[:, SIDE:]).all()
    assert model.generate(prompt, temperature=1e-40).equal(one)  # nothing can be divided by it


def test_part_of_an_image_and_what_does_not_fit():
    model = small()
    prompt = images(1)[:, :10]
    assert model.generate(prompt, 7).shape == (1, 17) and model.generate(prompt, 0).equal(prompt)
    steps = []
    model.generate(prompt.repeat(3, 1), 7, progress=lambda pixels, images: steps.append((pixels, images.tolist())))
    assert [pixels for pixels, _ in steps] == [3] * 7
    for i, (_, images_so_far) in enumerate(steps):
        assert all(image[:i + 11] == last[:i + 11] and image[i + 11:] == [GREY] * (6 - i)
                   for image, last in zip(images_so_far, steps[-1][1]))
    with pytest.raises(ValueError, match='do not fit'):
        model.generate(prompt, TOKENS)
    with pytest.raises(ValueError, match='cannot draw the first pixel'):
        small('ancestor').generate(torch.zeros(1, 0))
    with pytest.raises(ValueError, match='make it a multiple'):
        GPT(GPTConfig(n_embd=30, n_head=4))
    for args, message in (
        (dict(attention='locl'), 'name the layers'),
        (dict(neighbours=25), 'from 0 to 24'),
        (dict(neighbours=3, start_embedding=False), 'need start_embedding'),
        (dict(relative_chroma=True), 'needs relative_colours'),
        (dict(relative_neighbours=True, neighbours=2), 'give 3 or more'),
        (dict(attention='local', reach=-1), 'give 0, or how many'),
        (dict(attention='local full', reach=2), 'full attention sees everything'),
        (dict(attention='local', neighbours=12, reach=1), 'only the first 7 lie within reach=1'),
        (dict(attention='local', block_size=100), 'whole rows'),
        (dict(row_column_positions=True, block_size=100), 'whole rows'),
    ):
        with pytest.raises(ValueError, match=message):
            GPT(GPTConfig(**args))


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.05, 0.4, 0.25, 0.2, 0.1]]))
    kept = lambda **options: filter_logits(logits, **options)[0].isfinite().nonzero().flatten().tolist()
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [1] and kept(top_k=3) == [1, 2, 3] and kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39) == [1] and kept(top_p=0.41) == [1, 2]
    assert kept(top_p=0.7) == [1, 2, 3] and kept(top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(temperature=0) == [1]
    squared = 0.0025 + 0.16 + 0.0625 + 0.04 + 0.01
    assert filter_logits(logits, temperature=0.5)[0].softmax(-1)[1] == pytest.approx(0.16 / squared)


def test_colours_are_drawn_as_often_as_they_are_likely():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).expand(1000, 5)
    drawn = torch.cat([sample(probs.log(), noise) for noise in gumbel_noise(torch.arange(1000), torch.arange(100), 5)])
    share = torch.bincount(drawn, minlength=5) / 100_000
    assert share[1] == 0 and share[4] == 0 and (share - probs[0]).abs().max() < 0.006


def test_the_noise_is_gumbels_independent_and_stateless():
    seeds = torch.tensor([1, 2, 2 ** 62 - 1])
    noise = gumbel_noise(seeds, torch.arange(10, 30), 4096)  # (20, 3, 4096)
    assert noise.shape == (20, 3, 4096) and noise.isfinite().all()
    for at in (-1.0, 0.0, 1.0, 4.0):
        assert (noise < at).float().mean() == pytest.approx(math.exp(-math.exp(-at)), abs=0.004)
    # a bit each: it says nothing about that of another pixel, image or neighbouring colour
    level = (noise > -math.log(math.log(2))).float() - 0.5
    for other in (level.roll(1, 0), level.roll(1, 1), level.roll(1, 2), level.roll(7, 2)):
        assert (level * other).mean().abs() < 0.002
    assert gumbel_noise(seeds[1:], torch.arange(15, 17), 4096).equal(noise[5:7, 1:])
    # SplitMix64's published first number from state 1234567, which is its seed plus one step
    uniform = (-(-gumbel_noise(torch.tensor([1234567]), torch.tensor([0]), 4)[0, 0, 1].double()).exp()).exp()
    assert uniform.item() * 2 ** 64 == pytest.approx(6457827717110365317, rel=2 ** -20)


def test_no_number_of_an_image_is_without_bounds():
    # a uniform number that rounds up to 1 drew one pixel of most images at random, whatever the model thought of it
    for seed in (0, 1, 5):
        for first in range(0, 4096, 256):
            least, most = gumbel_noise(torch.tensor([seed]), torch.arange(first, first + 256), 4096).aminmax()
            assert -3 < least and most < 18
