"""Paint pictures with a trained model.

    python sample.py --ckpt out/ckpt6000.pt                              # 16 landscapes, each from its own first pixel
    python sample.py --ckpt out/ckpt6000.pt --first_pixel FEC --seed 7   # all from a pale yellow one
    python sample.py --ckpt out/ckpt6000.pt --image photo.png --rows 32  # finish a picture from its upper half
    python sample.py --ckpt out/ckpt6000.pt --num_samples 4 --gif --scale 4  # and watch it being painted
"""
import itertools
import math
import os
import time
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import extras
from extras import UserError
from model import LEVELS, NEIGHBOURS

GREY = 0x666  # of what is not painted yet

# -----------------------------------------------------------------------------
# the sampler

def generate(model, tokens, max_new_tokens=None, *, temperature=1.0, top_k=None, top_p=None, generator=None,
             use_cache=True, progress=None):
    """Continue images pixel by pixel: prompts (B, T) -> (B, T + max_new_tokens), the prompts included.

    T may be 0 with the start embedding. max_new_tokens: the rest of the image if None. temperature 0 takes the
    likeliest colour; top_k and top_p as in filter_logits. generator draws a seed for every image, which decides all
    its noise, so that it gives the same images, up to rounding, with the cache and without it, in a batch of any
    size and on any device. More images than images_at_once are painted in batches.
    use_cache=False is the plain loop, everything again for every pixel: slow, and what the sampler must equal.
    progress, if given, is called with numbers of new pixels. Raises ValueError.
    """
    config, device = model.config, model.lm_head.weight.device
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=device)
    B, T = tokens.shape
    new = config.tokens_per_image - T if max_new_tokens is None else max_new_tokens
    if not 0 <= new <= config.tokens_per_image - T:
        raise ValueError(f'{T} given + {new} new pixels do not fit into an image of {config.tokens_per_image}')
    if T == 0 and not config.start_embedding:
        raise ValueError('a model without start embedding cannot draw the first pixel: give one')

    where = generator.device if generator else 'cpu'
    seeds = torch.randint(2 ** 62, (B,), generator=generator, device=where).to(device)
    images = torch.cat((tokens, tokens.new_zeros(B, new)), dim=1)
    draw = lambda logits, noise: sample(filter_logits(logits, temperature, top_k, top_p), noise)
    batch = min(B, images_at_once(model))
    paint = paint_plainly if not use_cache else paint_graphs if device.type == 'cuda' else paint_waves
    with painting(model):
        # views: painting a part writes into images
        for part, part_seeds in zip(images.split(batch), seeds.split(batch)) if new else ():
            for pixels in paint(model, part, part_seeds, draw, T):
                if progress:
                    progress(len(part) * pixels)
    return images


def paint_plainly(model, images, seeds, draw, first):
    """Fill images (B, N) from pixel first on, each from its seed (B,).

    Yields how many pixels of each have just been drawn. The whole image so far goes through the whole model, for every
    pixel.
    """
    for i in range(first, images.size(1)):
        x, weight = model.features(images[:, :i + 1])  # the pixel itself is not looked at
        logits = x[:, -1] @ weight.t()
        images[:, i] = draw(logits, gumbel_noise(seeds, torch.tensor([i], device=images.device), logits.size(-1))[0])
        yield 1


def paint_waves(model, images, seeds, draw, first):
    """The same image, all pixels of a wave at a time, on a CPU."""
    decoder = Decoder(model, *images.shape)
    decoder.prefill(images[:, :first])
    for wave, pixels in adapt_threads(decoder.waves(first), min(torch.get_num_threads(), 2 * len(images))):
        decoder.paint(wave, seeds, draw)
        yield pixels
    images.copy_(decoder.painted())


def paint_graphs(model, images, seeds, draw, first, together=8):
    """The same as a CUDA graph of so many waves together, for GPUs that take longer to launch a kernel than to run it.

    A graph repeats the very same work. So all waves are as long as the longest, with pixels that nobody looks at, and
    where they lie is told by tables that the graph reads, at the number of the wave. On a CPU the waves come one by
    one, which tests all but the capture.
    """
    decoder = Decoder(model, *images.shape)
    decoder.prefill(images[:, :first])
    waves, pixels = zip(*decoder.waves(first))
    waves += waves[-1:] * (-len(waves) % together)  # painting the last one again changes nothing
    lengths = pixels + pixels[-1:] * together
    table = {name: torch.tensor([[*wave[name]] + [unseen] * (max(pixels) - n) for wave, n in zip(waves, lengths)],
                                device=images.device) for name, unseen in decoder.unseen.items()}
    number = torch.zeros(1, dtype=torch.long, device=images.device)

    def paint():
        for _ in range(together):
            decoder.paint({name: rows.index_select(0, number)[0] for name, rows in table.items()}, seeds, draw)
            number.add_(1)

    graph = None
    for begin in range(0, len(waves), together):
        if not images.is_cuda:
            paint()
        elif begin == 0:  # libraries set themselves up in the first steps, which are therefore not captured
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                paint()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if not graph:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    paint()
            graph.replay()
        yield sum(pixels[begin:begin + together])
    images.copy_(decoder.painted())


def wave_stride(config):
    """The pixels with the same x + stride * y are a wave: with reach a diagonal, else one pixel."""
    return min(config.reach + 1, config.width) if config.reach else config.width


class Decoder:
    """What the sampler keeps for B images of N pixels: weights, pixels so far, and their keys and values.

    The weights are laid out for few pixels at a time. Where the parts of a wave lie is told by ranges: all that it
    reads or writes has equal distances in memory, so that it is a view and nothing is copied.
    """

    def __init__(self, model, B, N):
        c, h, device = model.config, model.transformer, model.lm_head.weight.device
        W, H, V = c.width, -(-c.tokens_per_image // c.width), c.vocab_size
        self.model, self.B, self.N, self.width, self.height, self.n_head = model, B, N, W, H, c.n_head
        self.stride = wave_stride(c)
        self.diagonals = -(-W // self.stride)  # columns of a wave, at most
        self.columns = self.lane_of_column(torch.arange(W, device=device))  # where each of them lies, (W,)
        self.shift = int(not c.start_embedding)  # from a pixel back to the position that predicts it

        # the weights
        colours = model.colours()
        wide = h.up(colours)
        # the edge of the canvas reads as the start
        self.wte = torch.cat((wide, h.wse.weight if c.start_embedding else torch.zeros_like(wide[:1])))
        self.positions, self.ln_f = model.positions(), norm(h.ln_f)
        self.down = sum_of_blocks(model.down, c.n_head) if c.n_colour else None
        self.head = colours.view(LEVELS, -1, colours.size(1)).mT.contiguous()  # (16, D, V / 16), blocks as the others
        self.layers = [(b.attn.kind, norm(b.ln_1), linear(b.attn.c_attn, 3), sum_of_blocks(b.attn.c_proj, c.n_head),
                        norm(b.ln_2), linear(b.mlp.c_fc, 4), sum_of_blocks(b.mlp.c_proj, 4)) for b in h.h]
        if c.neighbours:  # what the stem's hidden layer gets from each colour as each neighbour; bias: from the first
            self.stem, self.stem_proj = h.stem.table(F.pad(colours, (0, 0, 0, 1))), sum_of_blocks(h.stem.c_proj, 2)
            self.stem[::c.neighbours] += h.stem.c_fc.bias
            self.kth = torch.arange(c.neighbours, device=device)
        if c.relative_colours:
            self.rel_head = linear(model.rel_head, 2)  # beside the left and the upper pixel

        # the pixels so far lie on a canvas, with V around the image and where none is yet
        row = W + 6
        self.pixels = torch.arange(H * W, device=device)
        self.cells = (self.pixels // W + 3) * row + self.pixels % W + 3  # of each pixel
        self.canvas = torch.full((B, (H + 3) * row + 1), V, device=device)
        self.before = F.pad(self.cells[:-1], (1, 0))  # the cell of the pixel before
        if c.reach:
            self.before[::W] = 0  # the edge
        around = [y * row + x for y, x in NEIGHBOURS[:max(c.neighbours, 2)]]
        self.around = self.cells[:, None] + torch.tensor(around, device=device)  # cells, (H * W, K)

        # keys and values (2, lanes, B * nh, keys, hs). A lane is what a pixel may attend to: all pixels (full), the row
        # above and its own (local), or its column, where the columns of a wave lie side by side
        lanes = {'full': 1, 'local': H + 1, 'column': self.stride * self.diagonals}
        keys, heads, hs = {'full': c.block_size, 'local': 2 * W, 'column': H}, B * c.n_head, c.n_embd // c.n_head
        self.kv = [colours.new_zeros(2, lanes[kind] + 1, heads, keys[kind], hs) for kind, *_ in self.layers]
        # what attention adds to scores: local by column, column by row, (lanes, B * nh, 1, keys)
        self.masks = {}
        for attn in (b.attn for b in h.h if b.attn.kind != 'full'):
            mask = attn.mask[0].expand(c.n_head, -1, -1).repeat(B, 1, 1).transpose(0, 1)[:, :, None]
            other, where = ('column', self.columns) if attn.kind == 'local' else ('local', slice(H))
            self.masks[attn.kind] = mask.new_zeros(1 + lanes[other], *mask.shape[1:])
            self.masks[attn.kind][where] = mask
        # where a graph reads and writes what nobody looks at
        self.unseen = {'pixel': 0, 'position': 0, 'cell': self.canvas.size(1) - 1, 'x': 0, 'y': 0, 'own': 0,
                       'row': lanes['local'], 'below': lanes['local'], 'column': lanes['column']}

    def lane_of_column(self, x):
        """Where column x lies: those that are stride apart follow each other from right to left, as in a wave."""
        return (x % self.stride + 1) * self.diagonals - 1 - x // self.stride

    def waves(self, first):
        """-> for every wave, without the pixels before first: ranges where its parts lie, and its number of pixels."""
        W, stride = self.width, self.stride
        for t in range(W + stride * (self.height - 1)):
            (top, left), (bottom, right) = divmod(first, W), divmod(self.N - 1, W)
            top = max(top + (t - stride * top < left), -(-(t - W + 1) // stride))
            bottom = min(bottom - (t - stride * bottom > right), t // stride)
            n, x = bottom - top + 1, t - stride * top  # (top, x) is its uppermost pixel
            if n > 0:
                pixel, column = top * W + x, self.lane_of_column(x)
                parts = {'pixel': (pixel, W - stride), 'position': (pixel - self.shift, W - stride),
                         'cell': ((top + 3) * (W + 6) + x + 3, W + 6 - stride), 'row': (top, 1), 'below': (top + 1, 1),
                         'y': (top, 1), 'column': (column, 1), 'x': (x, -stride), 'own': (W + x, -stride)}
                yield {name: range(start, start + n * (step or 1), step or 1)
                       for name, (start, step) in parts.items()}, n

    def prefill(self, tokens):
        """Keep prompts (B, T), and their keys and values."""
        B, T = tokens.shape
        if T:
            self.canvas[:, self.cells[:T]] = tokens
            new = []
            self.model.features(F.pad(tokens, (0, 1)) if T < self.N else tokens, new)
            for (kind, *_), qkv, kv in zip(self.layers, new, self.kv):
                fresh = qkv[1:].unflatten(1, (B, -1)).transpose(1, 2).flatten(2, 3)  # (2, lanes, B * nh, length, hs)
                count, length = fresh.size(1), fresh.size(3)
                if kind == 'local':
                    kv[:, :count, :, length:], kv[:, 1:count + 1, :, :length] = fresh, fresh
                else:
                    kv[:, self.columns if kind == 'column' else slice(1), :, :length] = fresh

    def paint(self, wave, seeds, draw):
        """Draw the pixels of a wave, with seeds (B,) and draw(logits, noise), both (n * B, V), -> tokens (n * B,)."""
        logits = self.decode(wave)
        noise = gumbel_noise(seeds, self.pixels[pick(wave['pixel'])], logits.size(-1)).flatten(0, 1)
        self.canvas[:, pick(wave['cell'])] = draw(logits, noise).view(-1, self.B).t()

    def painted(self):
        """The images so far, (B, N)."""
        return self.canvas[:, self.cells[:self.N]]

    def decode(self, wave):
        """A wave -> logits of its pixels, (n * B, V), those of an image next to those of the others."""
        c, B, pixel = self.model.config, self.B, pick(wave['pixel'])
        tokens = self.canvas.index_select(1, self.before[pixel])  # (B, n)
        x = torch.embedding(self.wte, tokens.t()) + self.positions[pick(wave['position'])][:, None]
        n = len(x)
        x = x.view(1, n * B, -1)
        if c.neighbours or c.relative_colours:
            around = self.canvas.index_select(1, self.around[pixel].flatten()).view(B, n, -1)
            around = around.transpose(0, 1).reshape(n * B, -1)
        if c.neighbours:
            rows = torch.add(self.kth, around[:, :c.neighbours], alpha=c.neighbours)
            x = self.stem_proj(split(F.gelu(torch.embedding(self.stem, rows).sum(1)), 2), x)
        for (kind, ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), kv in zip(self.layers, self.kv):
            qkv = c_attn(ln_1(x)).view(3, n, B * self.n_head, -1)
            x = attn_proj(split(self.attend(kind, qkv, kv, wave).view(n * B, -1), self.n_head), x)
            x = mlp_proj(F.gelu(c_fc(ln_2(x))), x)
        x = self.ln_f(x)
        low = self.down(split(x, self.n_head)) if c.n_colour else x
        logits = torch.bmm(low.expand(LEVELS, -1, -1), self.head).transpose(0, 1)  # (n * B, 16, V / 16)
        if c.relative_colours:
            scores = self.rel_head(x).transpose(0, 1).reshape(n * B, -1)
            return every_colour(self.model.relative_scores(scores, around)).add_(logits).flatten(1)
        return logits.reshape(n * B, -1)

    def attend(self, kind, qkv, kv, wave):
        """Queries, keys and values of a wave (3, n, B * nh, hs) -> what attention gives, (n * B * nh, 1, hs).

        Keys and values are kept.
        """
        if kind == 'local':
            store(kv, qkv[1:], wave['row'], wave['own'])
            store(kv, qkv[1:], wave['below'], wave['x'])
            lanes, mask = wave['row'], self.masks[kind][pick(wave['column'])].flatten(0, 1)
        elif kind == 'column':
            store(kv, qkv[1:], wave['column'], wave['y'])
            lanes, mask = wave['column'], self.masks[kind][pick(wave['row'])].flatten(0, 1)
        else:  # one pixel, and all positions so far
            lanes, mask = range(1), self.head.new_zeros(1, 1, 1)
            position = wave['position']
            store(kv, qkv[1:], lanes if isinstance(position, range) else torch.zeros_like(position), position)
        k, v = kv[:, pick(lanes)].flatten(1, 2)  # (n * B * nh, keys, hs)
        if kind == 'full' and isinstance(position, range):
            k, v = k[:, :position.stop], v[:, :position.stop]
        elif kind == 'full':  # a graph looks at all of them
            mask = torch.where(torch.arange(k.size(1), device=k.device) > position, -math.inf, 0.0).to(k.dtype)
        q = qkv[0].reshape(len(k), 1, -1)
        scores = torch.baddbmm(mask, q, k.mT, alpha=q.size(2) ** -0.5)  # (n * B * nh, 1, keys)
        return torch.bmm(scores.softmax(-1), v)


def store(kv, new, lanes, slots):
    """Keys and values of a wave, (2, n, B * nh, hs), into those of a layer: one slot of each of n lanes."""
    if isinstance(lanes, range):
        both, lane, head, slot, one = kv.stride()
        first = lanes.start * lane + slots.start * slot
        kv.as_strided(new.shape, (both, lane + slots.step * slot, head, one), first).copy_(new)
    else:
        kv[:, lanes, :, slots] = new.transpose(0, 1)


def pick(where):
    """A range as a slice, for a view; the numbers of a graph, a tensor, as they are."""
    return slice(where.start, where.stop, where.step) if isinstance(where, range) else where


def every_colour(levels):
    """A number for each red, green and blue level, (n, 48) -> the sum of three for each colour, (n, 16, 256)."""
    red, green, blue = levels.view(-1, 3, LEVELS).unbind(1)
    return red[:, :, None] + (green[:, :, None] + blue[:, None]).flatten(1)[:, None]


def norm(module):
    """A LayerNorm as a plain function: for one pixel, what a module adds to a call would be half of its time."""
    weight, bias = module.weight, module.bias
    return lambda x: torch.layer_norm(x, weight.shape, weight, bias)


def linear(module, blocks):
    """An nn.Linear as a plain function of (1, n, in) to (blocks, n, out / blocks).

    A CPU is faster at few rows in blocks side by side; an H200 takes 52 us for eight rows times one matrix of 128 x 128
    and 6.5 us for four blocks of it, their sum included.
    """
    weight = module.weight.view(blocks, -1, module.in_features).mT.contiguous()  # (blocks, in, out / blocks)
    bias = None if module.bias is None else module.bias.view(blocks, 1, -1)

    def apply(x):
        x = x.expand(blocks, -1, -1)
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
    return apply


def sum_of_blocks(module, blocks):
    """An nn.Linear as a function of (blocks, n, in / blocks), plus a residual, to (1, n, out)."""
    weight, bias = module.weight.t().reshape(blocks, -1, module.out_features), module.bias

    def apply(x, residual=0):
        x = torch.bmm(x, weight).sum(0, keepdim=True).add_(residual)
        return x if bias is None else x.add_(bias)
    return apply


def split(x, blocks):
    """(n, C) or (1, n, C) -> (blocks, n, C / blocks), a view."""
    return x.view(x.size(-2), blocks, -1).transpose(0, 1)


def images_at_once(model):
    """How many images are painted side by side: on CUDA as many as half of the free memory holds, else eight.

    What does not fit into the caches of a CPU is read from main memory for every wave, and larger batches gain nothing.
    """
    config, weight = model.config, model.lm_head.weight
    if weight.device.type != 'cuda':
        return 8
    # keys and values, twice for local attention; noise and logits of a wave
    cache = 4 * config.n_layer * config.block_size * config.n_embd * weight.itemsize
    image = cache + 48 * config.vocab_size * -(-config.width // wave_stride(config))
    # attention takes up to 65,535 sequences, and prompts are made of rows and columns
    return max(1, min(torch.cuda.mem_get_info(weight.device)[0] // 2 // image, 65_535 // config.width))


def adapt_threads(waves, threads, few=8):
    """Yield waves, and go through them with so many threads; with one from where a few take longer than with one.

    On a busy machine threads wait for each other, and two take up to twenty times as long as one.
    """
    waves, times = iter(waves), []
    if threads > 1:
        torch.set_num_threads(1)
        yield from itertools.islice(waves, 5 * few)  # the first ones are short
        for wave in itertools.islice(waves, few):
            times.append(time.perf_counter())
            yield wave
        torch.set_num_threads(threads)
        began = time.perf_counter()
        for i, wave in enumerate(waves, 1):
            yield wave
            if time.perf_counter() - began > 1.1 * (times[-1] - times[0]):
                break
            if i % few == 0:
                began = time.perf_counter()
        torch.set_num_threads(1)
    yield from waves


@contextmanager
def painting(model):
    """No gradients, dropout, autocast or TF32: the same picture on every device, up to rounding.

    No oneDNN either, which takes five times as long for so few numbers.
    """
    training, threads, precision = model.training, torch.get_num_threads(), torch.get_float32_matmul_precision()
    mkldnn = torch.backends.mkldnn.enabled
    model.eval()
    torch.set_float32_matmul_precision('highest')
    torch.backends.mkldnn.enabled = False
    try:
        with torch.inference_mode(), torch.autocast(model.lm_head.weight.device.type, enabled=False):
            yield
    finally:
        model.train(training)
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = mkldnn
        torch.set_float32_matmul_precision(precision)


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    """(B, V) logits -> those to draw from, in float32, -inf where a colour is left out.

    temperature divides the logits; 0 leaves the likeliest colour alone. top_k keeps the k likeliest colours; top_p
    (nucleus sampling, arXiv 1904.09751) then the fewest likeliest ones that together reach the probability top_p.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        probs = logits.softmax(-1)
        ranked = probs.sort(-1, descending=True).values
        kept = ranked.cumsum(-1) - ranked < top_p  # the probability of all likelier ones falls short of top_p
        least = ranked.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(probs < least, -math.inf)
    return logits


def sample(logits, noise):
    """Logits and Gumbel noise (B, V) -> (B,) tokens, each colour with its softmax probability (the Gumbel-max trick).

    Nothing is summed up over the colours, so that logits that differ in their last bits draw another colour in one of a
    million pixels.
    """
    return (logits + noise).max(-1).indices


def gumbel_noise(seeds, pixels, V):
    """Noise of some pixels (n,) of images, each with its seed (B,) -> (n, B, V), Gumbel distributed.

    Stateless: a number is a function of seed, pixel and colour alone, on any device. SplitMix64 (Steele et al. 2014).
    """
    step = -0x61C8864680B583EB  # all of this modulo 2 ** 64
    x = (pixels[:, None] * V * step + seeds)[:, :, None] + torch.arange(V, device=seeds.device) * step  # (n, B, V)
    x.bitwise_xor_((x >> 30).bitwise_and_(2 ** 34 - 1)).mul_(-0x40A7B892E31B1A47)  # >> copies the sign: & takes it away
    x.bitwise_xor_((x >> 27).bitwise_and_(2 ** 37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    # 23 bits and a half: 24 would round up to 1, the noise of which is infinite
    uniform = x.bitwise_right_shift_(41).bitwise_and_(2 ** 23 - 1).float().add_(0.5).mul_(2 ** -23)
    return uniform.log_().neg_().log_().neg_()

# -----------------------------------------------------------------------------
# the command


def read_picture(path, size):
    """The picture at path -> its tokens (height * width,); size is (width, height). Raises UserError."""
    try:
        return extras.pack_rgb(extras.load_rgb(path, size)).reshape(-1).astype(np.int64)
    except FileNotFoundError:
        raise UserError(f'no picture {path}') from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise UserError(f'{path} cannot be read as a picture ({extras.brief(e)})') from None


def first_pixel(text, model):
    """--first_pixel -> prompt (T,), empty if the model is to draw the first pixel itself. Raises UserError."""
    starts = model.config.start_embedding
    text = text or ('sample' if starts else 'FEC')
    if text != 'sample':
        return np.array([extras.parse_pixel(text)])
    if not starts:
        raise UserError('this model has no start embedding and cannot draw the first pixel: '
                        'give one, as in --first_pixel FEC')
    return np.zeros(0, np.int64)


def paint(model, prompt, args):
    """Paint args.num_samples images from one prompt (T,), one after the other: tokens (tokens_per_image,)."""
    generator, batch = torch.Generator().manual_seed(args.seed), images_at_once(model)
    total = args.num_samples * (model.config.tokens_per_image - len(prompt))
    # on a CPU one picture is there in a second, the others are faster side by side
    first = 0 if model.lm_head.weight.is_cuda else 1
    with tqdm(total=total, unit='px', unit_scale=True, desc='painting') as bar:
        for begin, end in itertools.pairwise(sorted({0, *range(first, args.num_samples, batch), args.num_samples})):
            yield from model.generate(np.tile(prompt, (end - begin, 1)), temperature=args.temperature, top_k=args.top_k,
                                      top_p=args.top_p, generator=generator, progress=bar.update).cpu().numpy()


def page(images, painted, shape, scale, whole=None):
    """Images and which pixels are painted, each (tokens_per_image,), the rest grey -> a sheet as PIL image.

    A completion is shown in one row, between its context and the whole original (tokens, with their number in context).
    """
    shown = [np.where(painted, image, GREY) for image in images]
    if whole is not None:
        original, context = whole
        shown = [np.where(np.arange(len(original)) < context, original, GREY), *shown, original]
    columns = len(shown) if whole is not None else None
    return extras.sheet([extras.to_image(tokens.reshape(shape), scale) for tokens in shown], columns)


def main(argv=None):
    parser = extras.Parser(description='Paint pictures with a trained model.')
    parser.add_argument('--ckpt', required=True, help='checkpoint of train.py, as in out/ckpt6000.pt')
    parser.add_argument('--first_pixel', help="three hex digits (FEC), a web colour ('#f0e0c0'), or sample: "
                                              'drawn by the model (the default if it can)')
    parser.add_argument('--num_samples', type=int, default=16, help='how many pictures (16)')
    parser.add_argument('--temperature', type=float, default=1.0,
                        help='below 1: calmer, above: wilder, 0: always the likeliest colour (1.0)')
    parser.add_argument('--top_k', type=int, help='draw from the k likeliest colours only')
    parser.add_argument('--top_p', type=float,
                        help='draw from the likeliest colours that together have this probability')
    parser.add_argument('--seed', type=int, default=1337, help='the same seed, the same pictures (1337)')
    parser.add_argument('--image', help='complete this picture ...')
    parser.add_argument('--rows', type=int, help='... from so many of its upper rows (half of them)')
    parser.add_argument('--out', default=os.path.join(extras.ROOT, 'out', 'images', 'sample.png'),
                        help='the sheet; single pictures get _0, _1, ... (out/images/sample.png)')
    parser.add_argument('--scale', type=int, default=1, help='enlarge every pixel to a square of this side (1)')
    parser.add_argument('--gif', action='store_true', help='also write the painting in progress, a frame a row')
    parser.add_argument('--device', default='auto', help='auto, cuda, cuda:1, mps or cpu (auto)')
    args = parser.parse_args(argv)
    extras.check_values(
        args, num_samples=('1 or more', args.num_samples > 0), temperature=('0 or more', args.temperature >= 0),
        top_k=('1 or more', args.top_k is None or args.top_k > 0),
        top_p=('more than 0, up to 1', args.top_p is None or 0 < args.top_p <= 1),
        scale=('from 1 to 64', 1 <= args.scale <= 64), seed=('from 0 to 2 ** 63 - 1', 0 <= args.seed < 2 ** 63))
    if args.rows is not None and args.image is None:
        raise UserError('--rows says how much of a picture to keep: name the picture with --image')
    if args.image and args.first_pixel:
        raise UserError('--image brings its first pixel along: leave out --first_pixel')
    stem, ending = os.path.splitext(args.out)
    extras.picture_format(args.out)
    if args.gif and ending.lower() == '.gif':
        raise UserError(f'--gif writes {stem}.gif: end the name of the sheet, --out, in .png')
    extras.make_folder(os.path.dirname(args.out) or '.')

    device = extras.pick_device(args.device)
    checkpoint = extras.load_checkpoint(args.ckpt, device)
    model = extras.build_model(checkpoint, args.ckpt, device)
    shape = height, width = checkpoint['height'], checkpoint['width']
    if args.image:
        rows = height // 2 if args.rows is None else args.rows
        meaning = f'from 1 to {height - 1}: how many of the {height} rows to keep'
        extras.check_values(args, rows=(meaning, 0 < rows < height))
        original = read_picture(args.image, (width, height))
        prompt = original[:rows * width]
        whole = original, len(prompt)
    else:
        prompt, whole = first_pixel(args.first_pixel, model), None

    images = []
    for i, tokens in enumerate(paint(model, prompt, args)):
        path = args.out if args.num_samples == 1 and not whole else f'{stem}_{i}{ending}'
        extras.save_bmp(tokens.reshape(shape), path, args.scale)
        images.append(tokens)
        if i == 0:
            tqdm.write(f'wrote {path}')
    if path != args.out:
        extras.save_picture(page(images, True, shape, args.scale, whole), args.out)
        print(f'wrote {path}, the last of {len(images)}, and {args.out}')
    if args.gif:
        pixels = np.arange(height * width)
        waves = pixels % width + wave_stride(model.config) * (pixels // width)
        times = np.linspace(waves[len(prompt):].min(), waves.max() + 1, height + 1)
        frames = [page(images, (waves < time) | (pixels < len(prompt)), shape, args.scale, whole) for time in times]
        extras.save_picture(frames[0], stem + '.gif', save_all=True, append_images=frames[1:], loop=0,
                            duration=[60] * (len(frames) - 1) + [2000])
        print(f'wrote {stem}.gif')


if __name__ == '__main__':
    extras.run(main)
