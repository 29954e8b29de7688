"""Paint pictures with a trained model.

    python sample.py --ckpt out/ckpt6000.pt                              # 16 landscapes, each from its own first pixel
    python sample.py --ckpt out/ckpt6000.pt --first_pixel FEC --seed 7   # all from a pale yellow one
    python sample.py --ckpt out/ckpt6000.pt --image photo.png --rows 32  # finish a picture from its upper half
    python sample.py --ckpt out/ckpt6000.pt --num_samples 4 --gif --scale 4  # and watch it being painted
    python sample.py --ckpt out/ckpt6000.pt --web                        # play with it on a local page

Shapes: B images of N pixels, H rows of W columns; n pixels of a wave; C, nh, hs, V, K as in model.py.
"""
import argparse
import collections
import functools
import logging
import math
import os
import random
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import extras
from extras import UserError
from model import NEIGHBOURS, add_pair_scores, head_logits, without

GREY = 0x666  # of pixels that are not painted yet

# -----------------------------------------------------------------------------
# the sampler

def generate(model, tokens, max_new_tokens=None, *, temperature=1.0, top_k=None, top_p=None, generator=None,
             use_cache=True, progress=None):
    """Continue images pixel by pixel: prompts (B, T) -> (B, T + max_new_tokens), the prompts included.

    tokens: the first T pixels of each image, 0 or more with the start embedding, else 1 or more.
    max_new_tokens: how many pixels to paint; the rest of the image if None.
    temperature, top_k, top_p: as in filter_logits; temperature 0 takes the most likely colour.
    generator: a torch.Generator, from which each image gets a seed for all of its noise. So a picture depends, up to
        rounding, neither on use_cache nor on the size of the batch nor on the model's device.
    use_cache: False runs the whole model again for every pixel: slow, and the reference for everything else here.
    progress: called with the number of pixels just painted and the images so far, GREY where nothing is painted yet.
    Raises ValueError.
    """
    config, device = model.config, model.lm_head.weight.device
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=device)
    B, T = tokens.shape
    new = config.tokens_per_image - T if max_new_tokens is None else max_new_tokens
    if not 0 <= new <= config.tokens_per_image - T:
        raise ValueError(f'{T} given + {new} new pixels do not fit into an image of {config.tokens_per_image}')
    if not (temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)):
        raise ValueError('temperature has to be 0 or more, top_k 1 or more, top_p more than 0 and up to 1')
    if T == 0 and not config.start_embedding:
        raise ValueError('a model without start embedding cannot draw the first pixel: give one')

    if B * new == 0:
        return tokens
    seeds = torch.randint(2 ** 62, (B,), generator=generator, device=generator.device if generator else 'cpu')
    images = F.pad(tokens, (0, new), value=GREY)
    draw = lambda logits, noise: sample(filter_logits(logits, temperature, top_k, top_p), noise)
    loop = plain_loop if not use_cache else graph_loop if device.type == 'cuda' else wave_loop
    batch_size = images_at_once(model)
    with inference_settings(model):
        # batches are views: what is painted into them is painted into images
        for batch, batch_seeds in zip(images.split(batch_size), seeds.to(device).split(batch_size)):
            for count in loop(model, batch, batch_seeds, draw, T):
                if progress:
                    progress(len(batch) * count, images)
    return images


def plain_loop(model, images, seeds, draw, first):
    """Paint images (B, N) from pixel first on, one pixel after the other. Yields the number of pixels just painted."""
    for i in range(first, images.size(1)):
        x = model.features(images[:, :i + 1])  # the model does not see pixel i itself, which it predicts
        logits = head_logits(x[:, -1], model.lm_head.weight)
        noise = gumbel_noise(seeds, torch.tensor([i], device=images.device), logits.size(-1))
        images[:, i] = draw(logits, noise[0])
        yield 1


def wave_loop(model, images, seeds, draw, first):
    """Paint the same images wave by wave, with a cache: on a CPU."""
    decoder = Decoder(model, images, first)
    most = 2 * len(images)  # threads: a wave of one image has work for two
    for pixels in adapt_threads(decoder.waves(first), most):
        images[:, pixels] = decoder.step(pixels, seeds, draw)
        yield len(pixels)


def graph_loop(model, images, seeds, draw, first, steps=8):
    """Paint the same images by CUDA graphs of several waves: launching their kernels takes longer than running them.

    A graph repeats the same kernels on the same memory. So every wave is made as long as the longest, and the graph
    reads its pixels from a table. On a CPU nothing is captured, and the rest can be tested.
    """
    decoder = Decoder(model, images, first, views=False)
    waves = decoder.waves(first)
    counts = [len(pixels) for pixels in waves]
    waves += waves[-1:] * (-len(waves) % steps)
    # waves are padded with their last pixel, and the last wave is repeated: to paint a pixel again changes nothing
    table = nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=-1)
    table = torch.where(table < 0, table.amax(1, keepdim=True), table)
    wave = torch.zeros(1, dtype=torch.long, device=images.device)  # row of the table

    def run():
        for _ in range(steps):
            decoder.step(table.index_select(0, wave)[0], seeds, draw)
            wave.add_(1)

    graph = None
    for begin in range(0, len(waves), steps):
        if not images.is_cuda:
            run()
        elif begin == 0:  # the first kernels set up their libraries, which cannot be captured
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode='thread_local'):  # others may load a checkpoint
                    run()
            graph.replay()
        pixels = table[begin:begin + steps].flatten()
        images[:, pixels] = decoder.canvas[decoder.cells[pixels]].t()
        yield sum(counts[begin:begin + steps])


def wave_stride(config):
    """Return how many columns a row is ahead of the one below it.

    Pixels with the same x + stride * y are a wave (a wavefront) and are painted together. With reach=3, in a picture 6
    wide:

        0  1  2  3  4  5
        3  4  5  6  7  8
        6  7  8  9 10 11

    No pixel of a wave depends on another one. In the row above, attention sees up to the position reach columns to the
    right, which knows the pixels before it, but not its own; and its keys are in the cache before anything attends to
    them. The neighbours of the stem have to be earlier, too. Without reach every wave is a single pixel.
    """
    if not config.reach:
        return config.width
    # a neighbour (row, column) is in an earlier wave if column + stride * row < 0
    furthest = max((column // -row for row, column in NEIGHBOURS[:config.neighbours] if row), default=0)
    return min(max(config.reach, furthest + 1), config.width)


class Decoder:
    """GPT.features for n pixels of B images at a time, with a cache of keys and values.

    The cache of a layer is (2, lanes, B * nh, slots, hs). A lane holds what one pixel attends to: full attention has
    one lane; column attention one for each column; local attention one for each row y, with the keys of row y - 1 in
    front of those of row y (zeros above the first row, as in the model), so that these keys are stored twice.
    """

    def __init__(self, model, images, first, views=True):
        """images (B, N) are painted from pixel first on. views: read lanes as slices, which a CUDA graph cannot do."""
        (B, N), c, h, device = images.shape, model.config, model.transformer, images.device
        W, H, V = c.width, -(-c.tokens_per_image // c.width), c.vocab_size
        self.model, self.B, self.N, self.width, self.views = model, B, N, W, views
        self.stride = wave_stride(c)
        # weights, as plain functions where that is faster: for few pixels, calling a module takes longer than its work
        colours = model.lm_head.weight
        wte = h.up(colours)
        self.wte = torch.cat((wte, h.wse.weight)) if c.start_embedding else wte  # (V + 1, C), the start last, or (V, C)
        self.positions, self.ln_f, self.head = model.positions(), layer_norm(h.ln_f), product(colours)
        self.down = linear(model.down) if c.n_colour else nn.Identity()
        self.layers = [(b.attn.kind, layer_norm(b.ln_1), linear(b.attn.c_attn), linear(b.attn.c_proj),
                        layer_norm(b.ln_2), linear(b.mlp.c_fc), linear(b.mlp.c_proj)) for b in h.h]
        if c.neighbours:
            self.colours = F.pad(colours, (0, 0, 0, 1))  # (V + 1, D), zeros outside
            self.stem_fc, self.stem_proj = linear(h.stem.c_fc), linear(h.stem.c_proj)
            if c.relative_neighbours:
                self.stem_diff = linear(h.stem.c_diff)
        if c.relative_colours:
            self.rel_head = linear(model.rel_head)

        # the canvas: pixels painted so far and a margin of 3, with V, for no pixel, in the margin and where nothing is
        # painted yet. Row V of self.wte is the start embedding, and of self.colours zeros
        pixels, row = torch.arange(H * W, device=device), W + 6
        x, y = pixels % W, pixels // W
        self.canvas = torch.full(((H + 3) * row, B), V, device=device)
        self.cells = (y + 3) * row + x + 3  # where each pixel lies on it, (H * W,)
        previous = F.pad(self.cells[:-1], (1, 0))  # where the one before it lies; cell 0 is in the margin
        if c.reach:
            previous[::W] = 0
        offsets = torch.tensor([y * row + x for y, x in NEIGHBOURS[:max(c.neighbours, 2)]], device=device)
        self.neighbours = self.cells[:, None] + offsets  # where the neighbours of each one lie, (H * W, K)
        # lanes of column attention: a wave's columns from the top down, x, x - stride, ..., follow each other, so that
        # they are a slice. In a picture 6 wide with stride 3: columns 3 0 4 1 5 2
        longest = -(-W // self.stride)  # columns of the longest wave
        lane = (x % self.stride + 1) * longest - 1 - x // self.stride
        self.shift = int(not c.start_embedding)  # from a pixel back to the position that predicts it
        self.places = torch.stack((x, y, lane, previous, pixels - self.shift), 1)  # what a step looks up, (H * W, 5)

        lanes = {'full': 1, 'local': H + 1, 'column': self.stride * longest}
        slots = {'full': c.block_size, 'local': 2 * W, 'column': H}
        self.cache = [colours.new_zeros(2, lanes[kind], B * c.n_head, slots[kind], c.n_embd // c.n_head)
                      for kind, *_ in self.layers]
        # added to the scores of each column (local) or row (column), (W or H, B * nh, 1, slots)
        self.masks = {b.attn.kind: b.attn.mask[0].repeat(B, 1, 1).transpose(0, 1)[:, :, None]
                      for b in h.h if b.attn.kind != 'full'}
        self.prefill(images[:, :first])

    def waves(self, first):
        """Return the pixels of every wave, each (n,) from the top down, without those before pixel first."""
        x, y = self.places[first:self.N, :2].unbind(1)
        waves, order = (x + self.stride * y).sort(stable=True)
        return list((first + order).split(waves.unique_consecutive(return_counts=True)[1].tolist()))

    def prefill(self, tokens):
        """Put prompts (B, T) on the canvas and their keys and values into the cache."""
        B, T = tokens.shape
        self.canvas[self.cells[:T]] = tokens.t()
        new = []
        if T > self.shift:
            self.model.features(tokens, new)
        for (kind, *_), kv, cache in zip(self.layers, new, self.cache):
            kv = kv.unflatten(1, (B, -1)).transpose(1, 2).flatten(2, 3)  # (2, lanes, B * nh, length, hs)
            count, length = kv.size(1), kv.size(3)
            if kind == 'local':
                cache[:, :count, :, length:], cache[:, 1:count + 1, :, :length] = kv, kv
            else:
                cache[:, self.places[:self.width, 2] if kind == 'column' else slice(1), :, :length] = kv

    def step(self, pixels, seeds, draw):
        """Paint the pixels (n,) of a wave: (B, n). seeds (B,); draw: logits, noise (n * B, V) -> tokens (n * B,)."""
        logits = self.decode(pixels)
        noise = gumbel_noise(seeds, pixels, logits.size(-1)).flatten(0, 1)
        colours = draw(logits, noise).view(-1, self.B)
        self.canvas[self.cells[pixels]] = colours
        return colours.t()

    def decode(self, pixels):
        """Return the logits (n * B, V) of the pixels (n,) of a wave, by the arithmetic of GPT.features."""
        c, n, B = self.model.config, len(pixels), self.B
        column, row, lane, previous, position = self.places[pixels].unbind(1)
        x = torch.embedding(self.wte, self.canvas[previous]) + self.positions[position][:, None]
        x = x.view(n * B, -1)
        if c.neighbours or c.relative_colours:
            neighbours = self.canvas[self.neighbours[pixels]].transpose(1, 2).reshape(n * B, -1)  # (n * B, K)
        if c.neighbours:
            hidden = self.stem_fc(torch.embedding(self.colours, neighbours[:, :c.neighbours]).flatten(1))
            if c.relative_neighbours:
                hidden += self.stem_diff(self.model.transformer.stem.differences(neighbours[:, :c.neighbours]))
            x = x + self.stem_proj(F.gelu(hidden))
        kinds = {kind for kind, *_ in self.layers}
        places = {kind: self.cache_places(kind, column, row, lane, position) for kind in kinds}
        for (kind, ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), cache in zip(self.layers, self.cache):
            qkv = c_attn(ln_1(x)).view(n, B, 3, c.n_head, -1).transpose(1, 2).flatten(2, 3)  # (n, 3, B * nh, hs)
            x = x + attn_proj(attend(qkv, cache, *places[kind], c.exclusive).view(n * B, -1))
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x))))
        x = self.ln_f(x)
        logits = self.head(self.down(x))
        if c.relative_colours:
            logits = add_pair_scores(logits, self.model.pair_scores(self.rel_head(x), neighbours))
        return logits

    def cache_places(self, kind, column, row, lane, position):
        """Return where the cache keeps n pixels, [(lane, slot), ...], an index of what they read, and its mask."""
        if kind == 'full':  # one pixel, the positions up to its own
            write = [(torch.zeros_like(position), position)]
            if self.views:
                return write, np.s_[:, :, :, :int(position) + 1], self.wte.new_zeros(1, 1, 1)
            seen = torch.arange(self.model.config.block_size, device=position.device) <= position
            return write, np.s_[:], torch.where(seen, 0.0, -math.inf)
        if kind == 'local':
            lane, write, mask = row, [(row, self.width + column), (row + 1, column)], self.masks[kind][column]
        else:
            write, mask = [(lane, row)], self.masks[kind][row]
        lanes = slice(int(lane[0]), int(lane[0]) + len(lane)) if self.views else lane
        return write, np.s_[:, lanes], mask.flatten(0, 1)


def attend(qkv, cache, write, read, mask, exclusive):
    """Put keys and values of a wave into the cache and attend to it: (n, 3, B * nh, hs) -> (n * B * nh, 1, hs)."""
    for lane, slot in write:
        cache[:, lane, :, slot] = qkv[:, 1:]
    k, v = cache[read].flatten(1, 2)  # (n * B * nh, slots, hs); lanes in a slice are not copied
    q, _, own = qkv.transpose(0, 1).reshape(3, len(k), 1, -1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=q.size(2) ** -0.5)  # (n * B * nh, 1, slots)
    y = torch.bmm(scores.softmax(-1), v)
    return without(y, own) if exclusive else y


def layer_norm(module):
    """Return an nn.LayerNorm as a plain function."""
    weight, bias = module.weight, module.bias
    return lambda x: torch.layer_norm(x, weight.shape, weight, bias)


def linear(module):
    """Return an nn.Linear as a plain function."""
    return product(module.weight, module.bias)


def product(weight, bias=None):
    """Return x (n, in) -> x @ weight.T + bias, (n, out), as a function.

    Outputs are computed in blocks: two cores share them, and cuBLAS has better kernels for them where there are few
    rows (on an H200 52 us for 8 rows times a matrix of 128 x 128, 7.8 us for it in four blocks).
    """
    blocks = 16 if len(weight) == 4096 else math.gcd(len(weight), 4)
    weight = weight.view(blocks, -1, weight.size(1)).mT.contiguous()  # (blocks, in, out / blocks)

    def multiply(x):
        x = torch.bmm(x.expand(blocks, -1, -1), weight).transpose(0, 1).reshape(len(x), -1)
        return x if bias is None else x.add_(bias)
    return multiply


def images_at_once(model):
    """Return how many images to paint side by side: as many as fit into half of a GPU's free memory, on a CPU eight.

    What does not fit into the caches of a CPU is read from main memory for every wave, and larger batches gain nothing.
    """
    config, weight = model.config, model.lm_head.weight
    if weight.device.type != 'cuda':
        return 8
    # bytes of an image: keys and values, twice for local attention; noise and logits of a wave
    cache = 4 * config.n_layer * config.block_size * config.n_embd * weight.itemsize
    image = cache + 48 * config.vocab_size * -(-config.width // wave_stride(config))
    unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)  # held by PyTorch
    free = torch.cuda.mem_get_info(weight.device)[0] + unused
    # attention takes at most 65,535 sequences, and prefill makes one of every row or column
    return max(1, min(free // 2 // image, 65_535 // max(config.width, config.tokens_per_image // config.width)))


def adapt_threads(waves, most, block=8):
    """Yield waves, and choose how many threads paint them: one, or more, up to most, while that is faster.

    On a busy machine threads wait for each other, and two take up to twenty times as long as one. So one thread paints
    the first six blocks of waves, and the sixth is timed, since the first waves are short; then more threads are tried.
    As soon as they take longer for a block than one would, one thread paints the rest.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = math.inf  # seconds that one thread takes for a pixel, once more threads are tried
    for begin in range(0, len(waves), block):
        began, pixels = time.perf_counter(), sum(map(len, waves[begin:begin + block]))
        for wave in waves[begin:begin + block]:
            yield wave
            if time.perf_counter() - began > 1.1 * alone * pixels:
                torch.set_num_threads(1)
                alone = math.inf
        if begin == 5 * block and min(before, most) > 1:
            alone = (time.perf_counter() - began) / pixels
            torch.set_num_threads(min(before, most))
    torch.set_num_threads(before)


@contextmanager
def inference_settings(model):
    """No gradients, dropout, autocast or TF32: the same picture on every device, up to rounding.

    No oneDNN either, which takes five times as long for so few numbers.
    """
    training, threads, precision = model.training, torch.get_num_threads(), torch.get_float32_matmul_precision()
    mkldnn = torch.backends.mkldnn.enabled
    model.eval()
    torch.set_float32_matmul_precision('highest')
    torch.backends.mkldnn.enabled = False
    try:
        with (torch.inference_mode(), torch.autocast(model.lm_head.weight.device.type, enabled=False),
              torch.cuda.device_of(model.lm_head.weight)):  # streams and graphs belong to the current GPU
            yield
    finally:
        model.train(training)
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = mkldnn
        torch.set_float32_matmul_precision(precision)


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    """Return logits (B, V) to draw from, in float32, -inf where a colour is left out.

    temperature divides the logits; 0 keeps only the most likely colour. top_k keeps the k most likely colours; top_p
    (nucleus sampling, arXiv 1904.09751) the fewest most likely ones that together reach the probability top_p.
    """
    logits = logits.float()
    if temperature < 1e-9:  # by which logits could not be divided
        return torch.full_like(logits, -math.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        probs = logits.softmax(-1)
        ranked = probs.sort(-1, descending=True).values
        kept = ranked.cumsum(-1) - ranked < top_p  # the more likely ones do not reach top_p yet
        least = ranked.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(probs < least, -math.inf)
    return logits


def sample(logits, noise):
    """Draw tokens (B,) by their softmax probabilities from logits and Gumbel noise (B, V): the Gumbel-max trick.

    It needs no sum over the colours, so that rounding of the logits changes only about one pixel in a million.
    """
    return (logits + noise).argmax(-1)


def gumbel_noise(seeds, pixels, V):
    """Return Gumbel noise of pixels (n,) of images with seeds (B,), (n, B, V), the same on every device.

    Each number is a hash of seed, pixel and colour by SplitMix64 (Steele et al. 2014), without its last xor-shift,
    which does not change the 23 bits that are used. Its constants are written as signed 64-bit numbers, which overflow.
    """
    gamma, m1, m2 = 0x9E3779B97F4A7C15 - 2 ** 64, 0xBF58476D1CE4E5B9 - 2 ** 64, 0x94D049BB133111EB - 2 ** 64
    x = (pixels[:, None] * V * gamma + seeds)[:, :, None] + torch.arange(V, device=seeds.device) * gamma  # (n, B, V)
    shifted = x >> 30  # which copies the sign bit; & clears the copies
    x.bitwise_xor_(shifted.bitwise_and_(2 ** 34 - 1)).mul_(m1)
    torch.bitwise_right_shift(x, 27, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(2 ** 37 - 1)).mul_(m2)
    # (23 bits + 1/2) / 2 ** 23; one bit more would round up to 1, whose noise is infinite
    uniform = x.bitwise_right_shift_(41).bitwise_and_(2 ** 23 - 1).float().add_(0.5).mul_(2 ** -23)
    return uniform.log_().neg_().log_().neg_()

# -----------------------------------------------------------------------------
# the command

@functools.lru_cache(maxsize=2)
def load_model(path, device):
    """Return the model of a checkpoint, the (height, width) of its pictures, its temperature. Raises UserError."""
    checkpoint = extras.load_checkpoint(path, device)
    model = extras.build_model(checkpoint, path, device)
    return model, (checkpoint['height'], checkpoint['width']), checkpoint['temperature']


def read_picture(path, size):
    """Return the tokens (height * width,) of a picture file, scaled to size = (width, height). Raises UserError."""
    try:
        return extras.pack_rgb(extras.load_rgb(path, size)).reshape(-1).astype(np.int64)
    except FileNotFoundError:
        raise UserError(f'no picture {path}') from None
    except UnidentifiedImageError:
        raise UserError(f'{path} cannot be read as a picture: try another one') from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise UserError(f'{path} cannot be read as a picture ({extras.brief(e)})') from None


def paint_samples(model, prompt, args, progress):
    """Yield args.num_samples images (tokens_per_image,) that go on from one prompt (T,). progress as in generate."""
    generator, done = torch.Generator().manual_seed(args.seed), 0
    while done < args.num_samples:
        # a CPU paints the first picture alone, to show it after a second; side by side the others are faster
        first_alone = done == 0 and not model.lm_head.weight.is_cuda
        n = min(1 if first_alone else images_at_once(model), args.num_samples - done)
        yield from generate(model, np.tile(prompt, (n, 1)), temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, generator=generator, progress=progress).cpu().numpy()
        done += n


def sheet(images, shape, scale, prompt, original, columns):
    """Return a picture of all images (tokens_per_image,), completions between their prompt and the original."""
    if original is not None:
        images = [np.where(np.arange(len(original)) < len(prompt), original, GREY), *images, original]
    pictures = [extras.to_image(tokens.reshape(shape), scale) for tokens in images]
    return extras.sheet(pictures, columns) if len(pictures) > 1 else pictures[0]


def save_gif(path, images, shape, given, stride, lay_out):
    """Save images (tokens_per_image,) being painted, a frame for each row and one before, from the given pixels on.

    stride: that of the waves, see wave_stride. lay_out: images -> the picture of a frame.
    """
    height, width = shape
    pixels = np.arange(height * width)
    waves = pixels % width + stride * (pixels // width)
    times = np.linspace(waves[given:].min(), waves.max() + 1, height + 1)
    frames = [lay_out([np.where((waves < time) | (pixels < given), image, GREY) for image in images])
              for time in times]
    palette = extras.sheet([frames[0], frames[-1]]).quantize(dither=0)  # one for all frames is faster, and calm
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    extras.save_picture(frames[0], path, save_all=True, append_images=frames[1:], loop=0,
                        duration=[60] * (len(frames) - 1) + [2000])

# -----------------------------------------------------------------------------
# the page

PAINTER = threading.Lock()  # paints alone: inference_settings are those of the whole process
ENDING = threading.Event()  # Ctrl-C has been pressed: Python waits at its end for every thread that still paints


def paint_live(model, prompts, args, device):
    """Paint as paint_samples does, from each prompt in turn, and yield all images so far, several times a second.

    In a thread of its own, since Gradio goes on with a generator in any thread, and some settings of torch are those of
    a thread. Gradio closes the generator when the visitor presses Stop or leaves.
    """
    painted, so_far, closed = [], collections.deque(maxlen=1), threading.Event()

    def progress(pixels, images):
        if closed.is_set() or ENDING.is_set():
            raise KeyboardInterrupt  # a thread can only be stopped from inside
        so_far.append([*painted, *images.cpu().numpy()])

    def paint():
        with PAINTER:
            for prompt in prompts:
                for image in paint_samples(model, prompt, args, progress):
                    painted.append(image)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(paint)
        try:
            while not job.done():
                wait([job], timeout=0.15)
                if so_far:
                    yield so_far.pop()
            job.result()  # or its error
        finally:
            closed.set()
    yield painted


def build_page(args, device):
    """Return a page (gradio.Blocks) to play on: its pictures are those of the command line. Raises UserError."""
    try:
        import gradio as gr
    except ImportError:
        raise UserError('--web needs gradio: pip install gradio') from None
    if int(gr.__version__.split('.')[0]) < 6:
        raise UserError(f'--web needs gradio 6, and this is {gr.__version__}: pip install -U gradio')
    model, shape, usual_temperature = load_model(args.ckpt, device)
    height, width = shape
    heads = extras.checkpoint_heads(os.path.dirname(args.ckpt) or '.')
    iterations = {os.path.normpath(path): head['iter_num'] for path, head in heads.items()}
    checkpoints = sorted({os.path.normpath(args.ckpt), *iterations}, key=lambda path: iterations.get(path, 0))

    @contextmanager
    def mistakes_shown():
        try:
            yield
        except (UserError, ValueError) as e:
            raise gr.Error(str(e), print_exception=False) from None

    no_gif = gr.DownloadButton('GIF of the painting', value=None, interactive=False)

    # what a painting begins with: prompts, and the picture that they are part of
    def nothing():
        return [[]], None

    def first_pixels(*colours):
        return [[extras.parse_pixel(colour)] for colour in colours], None

    def upper_rows(path, rows):
        if path is None:
            raise UserError('drop in a picture first')
        try:
            original = read_picture(path, (width, height))
        except UserError as e:
            raise UserError(str(e).replace(path, os.path.basename(path))) from None
        return [original[:rows * width]], original

    def lay_out(images, prompts, count, original):
        """Return the sheet, about 560 pixels wide, of the images so far and, as prompts on grey, of those to come."""
        to_come = [np.pad(np.array(prompt, np.int64), (0, height * width - len(prompt)), constant_values=GREY)
                   for prompt in prompts for _ in range(count)]
        images = [*images, *to_come[len(images):]]
        cells = len(images) + 2 * (original is not None)  # with the rows kept, the original
        columns = cells if cells <= 3 else math.ceil(cells ** 0.5)
        return sheet(images, shape, max(1, 560 // (columns * width)), prompts[0], original, columns)

    def paint(make_prompts, count, ckpt, seed, temperature, top_k, top_p, *inputs):
        """Paint: yields the sheet as it grows, a line to go below it and, in the end, a GIF of the painting."""
        with mistakes_shown(), tempfile.TemporaryDirectory() as folder:
            if not 0 <= (seed or 0) <= 2 ** 53:
                raise UserError('the seed has to be a whole number from 0 to 2 ** 53')
            prompts, original = make_prompts(*inputs)
            model, its_shape, _ = load_model(ckpt, device)
            if its_shape != shape:
                raise UserError(f'{ckpt} paints pictures of another size: start a page with it')
            count = count if len(prompts) == 1 else 1
            options = argparse.Namespace(num_samples=count, seed=int(seed or 0), temperature=temperature,
                                         top_k=top_k or None, top_p=top_p)
            grow = functools.partial(lay_out, prompts=prompts, count=count, original=original)
            png, gif = (os.path.join(folder, f'painting_{options.seed}.{ending}') for ending in ('png', 'gif'))
            began = time.monotonic()
            line = 'painting ...'
            for images in paint_live(model, prompts, options, device):
                # as a file: Gradio would write a PIL image again although a browser may be reading an equal one
                extras.save_picture(grow(images), png)
                yield png, line, no_gif
                line = gr.skip()  # not again: a picture that is on its way when Stop is pressed arrives after 'stopped'
            seconds, known = time.monotonic() - began, len(prompts[0])
            pixels = len(images) * (height * width - known)
            yield png, 'making the GIF ...', no_gif
            save_gif(gif, images, shape, known, wave_stride(model.config), grow)
            line = f'{pixels:,} pixels in {seconds:.1f} s, {pixels / seconds:,.0f} pixels/s'
            yield png, line, gr.DownloadButton(value=gif, interactive=True)

    def preview(path, rows):
        if path is None:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        with mistakes_shown(), tempfile.TemporaryDirectory() as folder:
            png = os.path.join(folder, 'preview.png')
            prompts, original = upper_rows(path, rows)
            extras.save_picture(lay_out([], prompts, 0, original), png)
            yield png, '', no_gif

    with gr.Blocks(title='A GPT that paints', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown('# pixelGPT\nA GPT that paints, pixel by pixel: it has read landscapes like texts, '
                    f'{height * width:,} pixels in rows, and says which colour comes next.')
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Row():  # above the picture, whose height changes: a button should not run away
                    stop = gr.Button('Stop', min_width=120)
                    gif = gr.DownloadButton('GIF of the painting', interactive=False, min_width=120)
                picture = gr.Image(show_label=False, interactive=False, buttons=['download', 'fullscreen'])
                status = gr.Markdown()
            with gr.Column(min_width=300):
                with gr.Tab('Paint'):
                    paint_button = gr.Button('Paint', variant='primary', interactive=model.config.start_embedding)
                    with gr.Row():  # an open picker is 250 pixels wide, and moves what is below it
                        from_pixel = gr.Button('Paint from this first pixel', min_width=250)
                        colour = gr.ColorPicker('#88aaff', label='first pixel', min_width=250)
                with gr.Tab('Complete'):
                    upload = gr.File(label='any picture', height=120)
                    rows = gr.Slider(1, height - 1, height // 2, step=1, precision=0, label='rows to keep')
                    complete = gr.Button('Complete', variant='primary')
                with gr.Tab('Compare'):
                    gr.Markdown('The same noise from four first pixels')
                    compare = gr.Button('Paint from each of these', variant='primary')
                    with gr.Row():
                        colours = [gr.ColorPicker(value, label=f'first pixel {i + 1}', min_width=250)
                                   for i, value in enumerate(('#88aaff', '#ff8855', '#447722', '#000022'))]
                count = gr.Radio([1, 4, 9], value=4, label='pictures to paint or to complete')
                with gr.Row():
                    seed = gr.Number(min(args.seed, 2 ** 53), label='seed', precision=0, min_width=120)
                    dice = gr.Button('Roll the dice', min_width=120)
                with gr.Accordion('Sampler and checkpoint', open=False):
                    ckpt = gr.Dropdown(checkpoints, value=os.path.normpath(args.ckpt), label='checkpoint')
                    warmth = usual_temperature if args.temperature is None else args.temperature
                    temperature = gr.Slider(0, max(2, warmth), warmth, step=0.01, label='temperature')
                    top_k = gr.Slider(0, extras.VOCAB_SIZE, min(args.top_k or 0, extras.VOCAB_SIZE), step=1,
                                      precision=0, label='top-k (0: all colours)')
                    top_p = gr.Slider(0.001, 1, args.top_p or 1, step=0.001, label='top-p')

        controls = [count, ckpt, seed, temperature, top_k, top_p]
        painters = [button.click(functools.partial(paint, make_prompts), [*controls, *inputs], [picture, status, gif],
                                 api_name=name, api_description=paint.__doc__, concurrency_id='painter',
                                 concurrency_limit=1, show_progress='minimal', show_progress_on=picture)
                    for button, name, make_prompts, inputs in ((paint_button, 'paint', nothing, []),
                                                               (from_pixel, 'from_pixel', first_pixels, [colour]),
                                                               (complete, 'complete', upper_rows, [upload, rows]),
                                                               (compare, 'compare', first_pixels, colours))]
        hidden = dict(api_visibility='private', show_progress='hidden')
        # a little later, after the last picture that was on its way
        stop.click(lambda: time.sleep(0.5) or 'stopped', None, status, cancels=painters, **hidden)
        dice.click(lambda: random.randrange(10 ** 6), None, seed, **hidden)
        ckpt.input(mistakes_shown()(lambda path: load_model(path, device)[2]), ckpt, temperature, **hidden)
        gr.on([upload.upload, rows.input], preview, [upload, rows], [picture, status, gif], show_progress='hidden',
              trigger_mode='always_last',  # while a number is typed, rows can be any or none
              js=f'(file, rows) => [file, Math.min(Math.max(rows, 1), {height - 1})]')
        for picker in (colour, *colours):  # shows the 12-bit colour that a colour becomes; in the browser, at once
            picker.change(None, picker, picker, js="c => c.replace(/^#(.).(.).(.).$/, '#$1$1$2$2$3$3')")
    return page


def serve_page(args, device):
    """Serve the page until Ctrl-C or SIGTERM; nothing of it stays behind. Raises UserError."""
    try:
        socket.create_server((args.host, 0)).close()
    except OSError as e:
        raise UserError(f'--host {args.host}: {e.strerror or e}: give an address of this machine, '
                        '127.0.0.1 or 0.0.0.0') from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # here Gradio keeps uploads and copies of pictures, and Matplotlib, which it imports, its settings and fonts
        tempfile.tempdir = folder
        os.environ.update(GRADIO_TEMP_DIR=os.path.join(folder, 'gradio'), MPLCONFIGDIR=folder, MPLBACKEND='agg',
                          GRADIO_RUN_HISTORY='False')  # it would keep pictures in the browser
        page = build_page(args, device)
        page.launch(server_name=args.host, share=False, show_error=True, quiet=True, prevent_thread_lock=True,
                    inbrowser=args.host == '127.0.0.1')
        print(f'the page is at http://{args.host}:{page.server_port} (Ctrl-C ends it)', flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            ENDING.set()
            page.server.force_exit = True  # without waiting for visitors, who may still listen
            logging.disable()  # the server would print a traceback for each of them
            page.close(verbose=False)


def main(argv=None):
    parser = extras.Parser(description='Paint pictures with a trained model.')
    parser.add_argument('--ckpt', required=True, help='checkpoint of train.py, as in out/ckpt6000.pt')
    parser.add_argument('--first_pixel', help="three hex digits (FEC), a web colour ('#f0e0c0'), or sample: "
                                              'drawn by the model (the default if it can)')
    parser.add_argument('--num_samples', type=int, default=16, help='how many pictures (16)')
    parser.add_argument('--temperature', type=float,
                        help='lower: calmer, higher: wilder, 0: always the likeliest colour (what the config of its '
                             'training says, or 1.0)')
    parser.add_argument('--top_k', type=int, help='draw from the k likeliest colours only')
    parser.add_argument('--top_p', type=float,
                        help='draw from the likeliest colours that together have this probability')
    parser.add_argument('--seed', type=int, default=1337, help='the same seed, the same pictures (1337)')
    parser.add_argument('--image', help='complete this picture ...')
    parser.add_argument('--rows', type=int, help='... from its upper rows, this many (half of them)')
    parser.add_argument('--out', default=os.path.join(extras.ROOT, 'out', 'images', 'sample.png'),
                        help='the sheet; single pictures get _0, _1, ... (out/images/sample.png)')
    parser.add_argument('--scale', type=int, default=1, help='enlarge every pixel to a square of this side (1)')
    parser.add_argument('--gif', action='store_true', help='also write the painting in progress, a frame a row')
    parser.add_argument('--web', action='store_true', help='open a page to play on instead')
    parser.add_argument('--host', default='127.0.0.1',
                        help='address of that page; 0.0.0.0 lets other machines in (127.0.0.1)')
    parser.add_argument('--device', default='auto', help='auto, cuda, cuda:1, mps or cpu (auto)')
    args = parser.parse_args(argv)
    extras.check_values(
        args, num_samples=('1 or more', args.num_samples > 0), temperature=('0 or more', (args.temperature or 0) >= 0),
        top_k=('1 or more', args.top_k is None or args.top_k > 0),
        top_p=('more than 0, up to 1', args.top_p is None or 0 < args.top_p <= 1),
        scale=('from 1 to 64', 1 <= args.scale <= 64), seed=('from 0 to 2 ** 63 - 1', 0 <= args.seed < 2 ** 63))
    if args.rows is not None and args.image is None:
        raise UserError('--rows says how much of a picture to keep: name the picture with --image')
    if args.image is not None and args.first_pixel is not None:
        raise UserError('--image gives the first pixel, too: leave out --first_pixel')
    device = extras.pick_device(args.device)
    if args.web:
        for name in ('first_pixel', 'num_samples', 'image', 'rows', 'out', 'scale', 'gif'):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f'--web has no use for --{name}: leave it out')
        serve_page(args, device)
        return
    stem, ending = os.path.splitext(args.out)
    extras.picture_format(args.out)
    if args.gif and ending.lower() == '.gif':
        raise UserError(f'--gif writes {stem}.gif: end the name of the sheet, --out, in .png')
    extras.make_folder(os.path.dirname(args.out) or '.')

    model, shape, usual_temperature = load_model(args.ckpt, device)
    height, width = shape
    if args.temperature is None:
        args.temperature = usual_temperature
    if args.image is not None:
        rows = height // 2 if args.rows is None else args.rows
        meaning = f'from 1 to {height - 1}: how many of the {height} rows to keep'
        extras.check_values(args, rows=(meaning, 0 < rows < height))
        original = read_picture(args.image, (width, height))
        prompt = original[:rows * width]
    else:
        text = args.first_pixel
        if text is None:
            text = 'sample' if model.config.start_embedding else 'FEC'
        if text == 'sample' and not model.config.start_embedding:
            raise UserError('this model has no start embedding and cannot draw the first pixel: '
                            'give one, as in --first_pixel FEC')
        original, prompt = None, np.array([] if text == 'sample' else [extras.parse_pixel(text)], np.int64)

    images, total = [], args.num_samples * (model.config.tokens_per_image - len(prompt))
    with tqdm(total=total, unit='px', unit_scale=True, desc='painting') as bar:
        for i, tokens in enumerate(paint_samples(model, prompt, args, lambda pixels, images: bar.update(pixels))):
            path = args.out if args.num_samples == 1 and original is None else f'{stem}_{i}{ending}'
            extras.save_bmp(tokens.reshape(shape), path, args.scale)
            images.append(tokens)
            if i == 0:
                tqdm.write(f'wrote {path}')
    columns = None if original is None else len(images) + 2
    lay_out = lambda images: sheet(images, shape, args.scale, prompt, original, columns)
    if path != args.out:
        extras.save_picture(lay_out(images), args.out)
        print(f'wrote {path}, the last of {len(images)}, and {args.out}')
    if args.gif:
        save_gif(stem + '.gif', images, shape, len(prompt), wave_stride(model.config), lay_out)
        print(f'wrote {stem}.gif')


if __name__ == '__main__':
    extras.run(main)
