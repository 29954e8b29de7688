"""The GPT that paints: nanoGPT's transformer over the pixels of an image in raster order.

The architecture and its names are GPT-2's, as in Andrej Karpathy's nanoGPT (github.com/karpathy/nanoGPT), with one
addition: a learned start embedding stands before the first pixel, so that every pixel of an image is predicted, the
first one too, and a whole image has a likelihood.

    position      0       1       2     ...   4095
    input       start  pixel 0 pixel 1  ... pixel 4094
    predicts   pixel 0 pixel 1 pixel 2  ... pixel 4095

Shapes: B images, T positions, C = n_embd, nh = n_head, hs = C / nh, V = vocab_size.
"""
import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 4096  # positions: pixels of an image with the start embedding, one less without it
    vocab_size: int = 4096  # 12-bit colours
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False  # in the linear and norm layers; without them it is a little better and faster
    start_embedding: bool = True  # False: the first pixel is given and never predicted, as in nanoGPT

    @property
    def tokens_per_image(self):
        return self.block_size + (not self.start_embedding)


class LayerNorm(nn.Module):
    """nn.LayerNorm with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, kv=None):
        """(B, T, C) -> (B, T, C). kv: a list that receives the keys and values, each (B, nh, T, hs)."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if kv is not None:
            kv.append((k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, kv=None):
        x = x + self.attn(self.ln_1(x), kv)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd={config.n_embd} cannot be shared by n_head={config.n_head} heads: make it a multiple')
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
        if config.start_embedding:
            self.transformer['wse'] = nn.Embedding(1, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: a colour has one vector, read and written

        # GPT-2's initialisation: layers that add to the residual stream start smaller, the more of them there are
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def num_params(self):
        """Number of parameters without the positions, as nanoGPT counts."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def embed(self, tokens):
        """Pixels from the first one on, (B, T) -> their input embeddings (B, T, C), or (B, T + 1, C) with the start before them."""
        x = self.transformer.wte(tokens)
        if self.config.start_embedding:
            x = torch.cat((self.transformer.wse.weight.expand(len(x), 1, -1), x), dim=1)
        return x

    def trunk(self, x, kv=None):
        """Input embeddings of the first T positions, (B, T, C) -> what the head reads there, (B, T, C). kv as in CausalSelfAttention."""
        x = self.transformer.drop(x + self.transformer.wpe.weight[:x.size(1)])
        for block in self.transformer.h:
            x = block(x, kv)
        return self.transformer.ln_f(x)

    def forward(self, tokens):
        """Whole images, or their first T pixels, (B, T) -> logits (B, P, V) and mean cross-entropy in nats (a scalar).

        logits[:, -P:] belong to tokens[:, -P:]: P is T with the start embedding and T - 1 without, where nothing
        predicts the first pixel. logits at a pixel depend on the pixels before it only.
        """
        logits = self.lm_head(self.trunk(self.embed(tokens[:, :-1])))
        targets = tokens[:, -logits.size(1):]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizer(self, weight_decay, learning_rate, betas):
        """AdamW as in nanoGPT: matrices and embeddings decay, gains and biases do not; fused on CUDA."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        fused = params[0].is_cuda and 'fused' in inspect.signature(torch.optim.AdamW).parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **({'fused': True} if fused else {}))

    def generate(self, tokens, max_new_tokens=None, *, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True, progress=None):
        """Continue images pixel by pixel: prompts (B, T) -> (B, T + max_new_tokens), the prompts included.

        T may be 0 with the start embedding. max_new_tokens: the rest of the image if None. temperature 0 takes the
        likeliest colour; top_k and top_p as in logits_to_probs. generator draws a seed for every image, which decides all
        its noise, so that it gives the same images, up to rounding, with the cache and without it, in a batch of any
        size and on any device. More images than images_at_once are painted in batches.
        use_cache=False is the plain loop, everything again for every pixel: slow, and what the sampler must equal.
        progress, if given, is called with numbers of new pixels. Raises ValueError.
        """
        config, device = self.config, self.lm_head.weight.device
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=device)
        B, T = tokens.shape
        new = config.tokens_per_image - T if max_new_tokens is None else max_new_tokens
        if not 0 <= new <= config.tokens_per_image - T:
            raise ValueError(f'{T} given + {new} new pixels do not fit into an image of {config.tokens_per_image}')
        if T == 0 and not config.start_embedding:
            raise ValueError('a model without start embedding cannot draw the first pixel: give one')

        seeds = torch.randint(2 ** 62, (B,), generator=generator, device=generator.device if generator else 'cpu').to(device)
        images = torch.cat((tokens, tokens.new_zeros(B, new)), dim=1)
        draw = lambda logits, noise: choose(logits_to_probs(logits, temperature, top_k, top_p), noise)
        batch = min(B, images_at_once(config, self.lm_head.weight))
        with torch.inference_mode(), torch.autocast(device.type, enabled=False), cpu_settings(batch):
            for part, part_seeds in zip(images.split(batch), seeds.split(batch)) if new else ():  # views: what is drawn stands in images
                paint = paint_plainly if not use_cache else paint_on_cuda if device.type == 'cuda' else paint_cached
                for pixels in paint(self, part, part_seeds, draw, T):
                    if progress:
                        progress(len(part) * pixels)
        return images


# -----------------------------------------------------------------------------
# the sampler: a loop fills images (B, N) from pixel `first` on, each from its seed (B,), with draw(logits (B, V), noise (B, V)) ->
# tokens (B,), and yields how many pixels of each image it has just drawn

def paint_plainly(model, images, seeds, draw, first):
    """The whole image so far through the whole model, for every pixel."""
    for i in range(first, images.size(1)):
        logits = model.lm_head(model.trunk(model.embed(images[:, :i]))[:, -1])
        images[:, i] = draw(logits, exponential_noise(seeds, i, 1, logits.size(-1))[0])
        yield 1


def paint_cached(model, images, seeds, draw, first, ahead=16):
    """The prompt at once, then one pixel at a time."""
    decoder = Decoder(model, len(images))
    logits = decoder.prefill(images[:, :first])
    for begin in range(first, images.size(1), ahead):  # noise for a few pixels at a time
        for i, noise in enumerate(exponential_noise(seeds, begin, min(ahead, images.size(1) - begin), logits.size(-1)), begin):
            if i > first:
                pos = decoder.position(i - 1)
                logits = decoder.decode_one_token(token, slice(pos, pos + 1), pos + 1)
            images[:, i] = token = draw(logits, noise)
            yield 1


def paint_on_cuda(model, images, seeds, draw, first, stretch=512, steps=32):
    """The same where launching a kernel takes longer than running it: CUDA graphs of so many steps each.

    A graph only repeats itself: where it stands is a number in memory, and it looks at all positions up to the end of a
    stretch of pixels, those to come masked. On a CPU the steps run one by one, which tests all but the capture.
    """
    decoder = Decoder(model, len(images))
    logits = decoder.prefill(images[:, :first])
    images[:, first] = draw(logits, exponential_noise(seeds, first, 1, logits.size(-1))[0])
    yield 1
    pixel = torch.tensor([first], device=images.device)  # the last that stands
    positions = torch.arange(model.config.block_size, device=images.device)

    def paint(noises, length):  # a pixel for each of them
        for noise in noises:
            pos = decoder.position(pixel)
            mask = torch.zeros_like(positions[:length], dtype=logits.dtype).masked_fill(positions[:length] > pos, -math.inf)
            token = draw(decoder.decode_one_token(images.index_select(1, pixel)[:, 0], pos, length, mask), noise)
            pixel.add_(1)
            images.index_copy_(1, pixel, token[:, None])

    for begin in range(first + 1, images.size(1), stretch):
        end = min(begin + stretch, images.size(1))
        length, graph = decoder.position(end - 2) + 1, None
        for i in range(begin, end, steps):
            fresh = exponential_noise(seeds, i, min(steps, end - i), logits.size(-1))
            if not images.is_cuda or len(fresh) < steps:
                paint(fresh, length)
            elif i == begin:  # libraries set themselves up in the first steps, which are therefore not captured
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    paint(fresh, length)
                torch.cuda.current_stream().wait_stream(side)
            else:
                if not graph:
                    graph, noises = torch.cuda.CUDAGraph(), fresh
                    with torch.cuda.graph(graph):
                        paint(noises, length)
                noises.copy_(fresh)
                graph.replay()
            yield len(fresh)


class Decoder:
    """What the sampler keeps for B images: the weights, laid out once for single pixels, and the keys and values so far."""

    def __init__(self, model, B):
        c, h, weight = model.config, model.transformer, model.lm_head.weight
        hs = c.n_embd // c.n_head
        queries = torch.ones_like(weight[0]).repeat(3)
        queries[:c.n_embd] = hs ** -0.5  # the scaling of the scores
        self.model, self.n_head, self.offset = model, c.n_head, int(c.start_embedding)
        self.wte, self.wpe, self.ln_f, self.head = h.wte.weight, h.wpe.weight, norm(h.ln_f), linear(model.lm_head)
        self.blocks = [(norm(b.ln_1), linear(b.attn.c_attn, queries), linear(b.attn.c_proj),
                        norm(b.ln_2), linear(b.mlp.c_fc), linear(b.mlp.c_proj)) for b in h.h]
        # keys with one dimension a row: the scores of all positions are then read in one go
        self.keys = weight.new_zeros(c.n_layer, B * c.n_head, hs, c.block_size)
        self.values = weight.new_zeros(c.n_layer, B * c.n_head, c.block_size, hs)

    def position(self, pixel):
        """Where the model reads this pixel, to predict the next."""
        return pixel + self.offset

    def prefill(self, tokens):
        """Prompts (B, T) -> logits of the pixel after them, (B, V); keys and values of all of it are kept."""
        kv = []
        x = self.model.trunk(self.model.embed(tokens), kv)  # (B, P, C)
        for (k, v), keys, values in zip(kv, self.keys, self.values):
            keys[:, :, :x.size(1)] = k.flatten(0, 1).mT
            values[:, :x.size(1)] = v.flatten(0, 1)
        return self.model.lm_head(x[:, -1])

    def decode_one_token(self, tokens, pos, length, mask=None):
        """The pixels (B,) at position pos -> logits of the next ones, (B, V).

        pos is slice(i, i + 1) or tensor([i]); attention goes over the first length positions, to which mask (length,) is added.
        """
        B, nh = len(tokens), self.n_head
        x = torch.embedding(self.wte, tokens) + self.wpe[pos]  # (B, C)
        for (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), keys, values in zip(self.blocks, self.keys, self.values):
            q, k, v = c_attn(ln_1(x)).view(B, 3, nh, -1).unbind(1)  # each (B, nh, hs)
            keys[:, :, pos] = k.reshape(B * nh, -1, 1)
            values[:, pos] = v.reshape(B * nh, 1, -1)
            scores = torch.bmm(q.reshape(B * nh, 1, -1), keys[:, :, :length])  # (B * nh, 1, length)
            if mask is not None:
                scores = scores + mask
            y = torch.bmm(scores.softmax(-1), values[:, :length]).view(B, -1)  # (B, C), the heads side by side
            x = x + attn_proj(y)
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x))))
        return self.head(self.ln_f(x))


def norm(module):
    """A LayerNorm as a plain function: for one pixel, what a module adds to a call would be half of its time."""
    weight, bias = module.weight, module.bias
    return lambda x: torch.layer_norm(x, weight.shape, weight, bias)


def linear(module, scale=1):
    """An nn.Linear as a plain function of (B, in), its weights as (in, out), which a few rows are multiplied with faster."""
    weight = (module.weight.t() * scale).contiguous()
    if module.bias is None:
        return lambda x: torch.mm(x, weight)
    bias = module.bias * scale
    return lambda x: torch.addmm(bias, x, weight)


def images_at_once(config, weight):
    """How many images are painted side by side: on CUDA as many as half of the free memory holds, else 8.

    Keys and values of a 64x64 image are 16.8 MB in float32 (4 layers of width 128), of 8 images 134 MB. More than
    the last cache of a CPU are read from main memory for every pixel, and nothing is gained.
    """
    if weight.device.type != 'cuda':
        return 8
    image = 2 * config.n_layer * config.block_size * config.n_embd * weight.itemsize
    return max(1, torch.cuda.mem_get_info(weight.device)[0] // 2 // image)


@contextmanager
def cpu_settings(batch):
    """Two threads for one image, as many as there are images for more: one pixel is little work to share. And none of
    oneDNN, which takes five times as long for so few numbers."""
    threads, mkldnn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(min(threads, max(batch, 2)))
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = mkldnn


def logits_to_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """(B, V) logits -> (B, V) probabilities to draw from.

    temperature divides the logits; 0 leaves the likeliest colour alone. top_k keeps the k likeliest colours; top_p
    (nucleus sampling, arXiv 1904.09751) then the fewest likeliest ones that together reach the probability top_p.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked = probs.sort(-1, descending=True).values
        kept = ranked.cumsum(-1) - ranked < top_p  # the probability of all likelier ones falls short of top_p
        least = ranked.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0)
    return probs


def choose(probs, noise):
    """(B, V) probabilities, not necessarily normalised, and exponential noise (B, V) -> (B,) tokens.

    A race: a colour of probability p arrives after the time noise / p, and is first with probability p. Nothing is summed
    up over the colours, so that logits that differ in their last bits draw another colour in one of a million pixels.
    """
    return (probs / noise).max(-1).indices


def exponential_noise(seeds, first, count, V):
    """Noise of the pixels first .. first + count - 1 of images, each with its seed (B,) -> (count, B, V), exponentially distributed.

    Stateless: a number is a function of seed, pixel and colour alone, on any device. SplitMix64 (Steele et al. 2014).
    """
    pixels = torch.arange(first, first + count, device=seeds.device)[:, None, None]
    x = (pixels * V + torch.arange(V, device=seeds.device)) * -0x61C8864680B583EB + seeds[:, None]  # (count, B, V), modulo 2 ** 64
    x.bitwise_xor_((x >> 30).bitwise_and_(2 ** 34 - 1)).mul_(-0x40A7B892E31B1A47)  # >> copies the sign: & takes it away
    x.bitwise_xor_((x >> 27).bitwise_and_(2 ** 37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    uniform = x.bitwise_right_shift_(40).bitwise_and_(2 ** 24 - 1).float().add_(0.5).mul_(2 ** -24)
    return uniform.log_().neg_()
