"""The GPT that paints: nanoGPT's transformer over the pixels of an image in raster order.

The architecture and its names are GPT-2's, as in Andrej Karpathy's nanoGPT (github.com/karpathy/nanoGPT). A learned start
embedding stands before the first pixel, so that every pixel of an image is predicted, the first one too, and a whole image
has a likelihood.

    position      0       1       2     ...   4095
    input       start  pixel 0 pixel 1  ... pixel 4094
    predicts   pixel 0 pixel 1 pixel 2  ... pixel 4095

What lets it see in two dimensions are switches of GPTConfig, all off by default: then it is nanoGPT's model.

Shapes: B images, T pixels, P positions, C = n_embd, nh = n_head, hs = C / nh, V = vocab_size, K = neighbours.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

LEVELS = 16  # of a channel: a colour is red * 256 + green * 16 + blue
# known pixels around the one to be predicted as (row, column) from it, the nearest first
NEIGHBOURS = sorted(((row, column) for row in range(-3, 1) for column in range(-3, 4) if (row, column) < (0, 0)),
                    key=lambda at: (at[0] ** 2 + at[1] ** 2, -at[0], abs(at[1]), at[1]))


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
    # two dimensions; all of this but the colours needs the start embedding
    width: int = 64  # pixels of a row
    row_column_positions: bool = False  # an embedding of the row plus one of the column, not one of each position
    neighbours: int = 0  # so many known pixels around the predicted one go through a small MLP into the first block
    factorised_colours: bool = False  # a colour's vector is its own plus one for each of its red, green and blue levels
    relative_colours: bool = False  # logits also depend on how much each channel differs from the pixels to the left and above
    attention: str = 'full'  # of the layers, in turn: full, local (its band of two rows) or column, as in 'local column'

    @property
    def tokens_per_image(self):
        return self.block_size + (not self.start_embedding)

    def check(self):
        """Raises ValueError if it describes no model."""
        kinds = self.attention.split()
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} cannot be shared by n_head={self.n_head} heads: make it a multiple')
        if not kinds or set(kinds) - {'full', 'local', 'column'}:
            raise ValueError(f"attention={self.attention!r}: name the layers' kinds, full, local or column, as in 'local column'")
        if not 0 <= self.neighbours <= len(NEIGHBOURS):
            raise ValueError(f'neighbours={self.neighbours}: give a number from 0 to {len(NEIGHBOURS)}')
        if self.row_column_positions or self.neighbours or self.relative_colours or set(kinds) != {'full'}:
            if not self.start_embedding:
                raise ValueError('row_column_positions, neighbours, relative_colours and attention other than full need start_embedding=True')
            if self.block_size % self.width or 'local' in kinds and self.block_size % (2 * self.width):
                raise ValueError(f'{self.block_size} pixels are not whole rows of {self.width}, or an odd number of them under local attention')


class LayerNorm(nn.Module):
    """nn.LayerNorm with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Attention over all earlier positions (full), over those of the same two rows (local) or of the same column (column).

    Strided attention as in the Sparse Transformer (Child et al. 2019, arXiv 1904.10509), by reshaping: lanes of positions
    that see each other, so that nothing is computed that is then masked.
    """

    def __init__(self, config, kind):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.kind, self.width = kind, config.width

    def forward(self, x, kv=None):
        """(B, P, C) -> (B, P, C). kv: a list that receives the keys and values, each (B * lanes, nh, length, hs)."""
        B, P, C = x.size()
        if self.kind == 'column':
            x = x.view(B, -1, self.width, C).transpose(1, 2)  # (B, width, height, C)
        length = {'full': P, 'local': 2 * self.width, 'column': P // self.width}[self.kind]
        # (3, B * lanes, nh, length, hs)
        qkv = self.c_attn(x).reshape(-1, length, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if kv is not None:
            kv.append((k, v))
        with torch.autocast(x.device.type, enabled=x.is_cuda):  # on a CPU its gradient is five times slower in bfloat16
            if not x.is_cuda:
                q, k, v = qkv.to(x.dtype)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B * lanes, length, C), the heads side by side
        if self.kind == 'column':
            y = y.view(B, self.width, -1, C).transpose(1, 2)
        return y.reshape(B, P, C)


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

    def __init__(self, config, kind):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, kind)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, kv=None):
        x = x + self.attn(self.ln_1(x), kv)
        x = x + self.mlp(self.ln_2(x))
        return x


class Stem(nn.Module):
    """A small MLP over the embeddings of the neighbours: what a convolution would see of the image so far."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.neighbours * config.n_embd, 2 * config.n_embd)
        self.c_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T, x (n, C) and weight (V, C), against targets (n,), without ever holding (n, V) logits.

    Chunks of rows go through the head, the softmax and the gradients of both while they are in the cache (on a GPU, in chunks
    of 2 GB): three products as in the usual way, a fraction of the memory.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        rows = 2 ** 17 if x.is_cuda else 512
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        for x_, dx_, targets_ in zip(x.split(rows), dx.split(rows), targets[:, None].split(rows)):
            logits = (x_ @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
            logits -= logits.amax(-1, keepdim=True)
            loss -= logits.gather(1, targets_).sum()
            probs = logits.exp_()
            total = probs.sum(-1, keepdim=True)
            loss += total.log().sum()
            if any(ctx.needs_input_grad):
                probs /= total
                probs.scatter_add_(1, targets_, -torch.ones_like(total))  # d loss / d logits
                dx_.copy_(probs @ weight)
                dweight += probs.t() @ x_
        ctx.save_for_backward(dx / len(x), dweight / len(x))
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None


head_loss = torch.compiler.disable(HeadLoss.apply)  # its loop would be unrolled


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: every direction of a matrix learns equally fast (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                if 'momentum' not in self.state[p]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
                momentum = self.state[p]['momentum'].lerp_(p.grad, 1 - group['momentum'])
                update = orthogonalise(p.grad.lerp(momentum, group['momentum']))  # Nesterov's
                p.add_(update, alpha=-group['lr'] * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalise(x, steps=5):
    """A matrix -> nearly the orthogonal one next to it: a quintic Newton-Schulz iteration brings all singular values to 0.7 .. 1.2."""
    if x.size(0) > x.size(1):
        return orthogonalise(x.t(), steps).t()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.t()
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        config.check()
        c = self.config = config
        kinds = c.attention.split()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            drop=nn.Dropout(c.dropout),
            h=nn.ModuleList([Block(c, kinds[i % len(kinds)]) for i in range(c.n_layer)]),
            ln_f=LayerNorm(c.n_embd, bias=c.bias),
        ))
        if c.start_embedding:
            self.transformer['wse'] = nn.Embedding(1, c.n_embd)
        if c.row_column_positions:
            self.transformer['wre'] = nn.Embedding(c.block_size // c.width, c.n_embd)
            self.transformer['wce'] = nn.Embedding(c.width, c.n_embd)
        else:
            self.transformer['wpe'] = nn.Embedding(c.block_size, c.n_embd)
        if c.neighbours:
            self.transformer['stem'] = Stem(c)
        if c.factorised_colours:
            self.transformer['wle'] = nn.Embedding(3 * LEVELS, c.n_embd)  # red, green and blue levels
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: a colour has one vector, read and written
        if c.relative_colours:  # a score for each difference -15 .. 15, of 3 channels, to the left and upper pixel
            self.rel_head = nn.Linear(c.n_embd, 2 * 3 * (2 * LEVELS - 1))
        token, level = torch.arange(c.vocab_size), torch.arange(LEVELS)
        levels = torch.stack((token // LEVELS ** 2 % LEVELS, token // LEVELS % LEVELS, token % LEVELS), dim=1)  # (V, 3)
        self.register_buffer('one_hot', F.one_hot(levels, LEVELS).flatten(1).float(), persistent=False)  # (V, 48)
        # which of the 93 scores a level has beside a colour (V + 1, 48); where the image ends all have the same, which changes nothing
        differences = F.pad(level - levels[:, :, None] + LEVELS - 1, (0, 0, 0, 0, 0, 1))  # (V + 1, 3, 16)
        self.register_buffer('differences', (differences + torch.arange(3)[:, None] * (2 * LEVELS - 1)).flatten(1), persistent=False)

        # GPT-2's initialisation: layers that add to the residual stream start smaller, the more of them there are
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        if c.factorised_colours:  # four vectors add up to that of a colour
            nn.init.normal_(self.transformer.wte.weight, std=0.01)
            nn.init.normal_(self.transformer.wle.weight, std=0.01)
        if c.relative_colours:
            nn.init.zeros_(self.rel_head.weight)

    def num_params(self):
        """Number of parameters without the positions, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(('transformer.wpe', 'transformer.wre', 'transformer.wce')))

    def colours(self):
        """The vector of each colour, for embedding and head, (V, C)."""
        table = self.transformer.wte.weight
        return table + self.one_hot @ self.transformer.wle.weight if self.config.factorised_colours else table

    def positions(self):
        """The embedding of each position, (block_size, C)."""
        h = self.transformer
        return (h.wre.weight[:, None] + h.wce.weight).flatten(0, 1) if self.config.row_column_positions else h.wpe.weight

    def around(self, tokens):
        """Whole rows of pixels (B, T) -> the known ones around each of them, nearest first, (B, T, 24); V where the image ends."""
        canvas = F.pad(tokens.view(len(tokens), -1, self.config.width), (3, 3, 3, 0), value=self.config.vocab_size)
        height, width = canvas.size(1) - 3, self.config.width
        return torch.stack([canvas[:, 3 + y:3 + y + height, 3 + x:3 + x + width] for y, x in NEIGHBOURS], dim=-1).flatten(1, 2)

    def relative_scores(self, scores, around):
        """What rel_head gives (..., 186) and neighbours (..., 24) -> a score for each red, green and blue level, (..., 48)."""
        return scores.unflatten(-1, (2, -1)).gather(-1, self.differences[around[..., :2]]).sum(-2)  # the left and the upper one

    def features(self, tokens, kv=None):
        """Pixels from the first one on, (B, T) -> what the head reads, (B, P, C'), and its weights, (V, C').

        The last P of the T pixels are predicted, each from those before it: P is T with the start embedding and T - 1
        without. kv as in CausalSelfAttention.
        """
        c, h, T = self.config, self.transformer, tokens.size(1)
        if c.row_column_positions or c.neighbours or c.relative_colours or c.attention != 'full':  # whole rows, or bands of two:
            tokens = F.pad(tokens, (0, -T % (c.width * (1 + ('local' in c.attention)))))  # what is added comes after everything else
        colours = self.colours()
        x = F.embedding(tokens[:, :-1], colours)
        if c.start_embedding:
            x = torch.cat((h.wse.weight.expand(len(x), 1, -1), x), dim=1)
        x = x + self.positions()[:x.size(1)]
        if c.neighbours or c.relative_colours:
            around = self.around(tokens)
        if c.neighbours:
            x = x + h.stem(F.embedding(around[..., :c.neighbours], F.pad(colours, (0, 0, 0, 1))).flatten(2))  # zeros where there is none
        x = h.drop(x)
        for block in h.h:
            x = block(x, kv)
        x = h.ln_f(x)
        if c.relative_colours:  # one product for both kinds of logits
            x, colours = torch.cat((x, self.relative_scores(self.rel_head(x), around)), dim=-1), torch.cat((colours, self.one_hot), dim=1)
        return x[:, :T - 1 + c.start_embedding], colours

    def logits(self, tokens):
        """Images, or their first T pixels, (B, T) -> logits (B, P, V) of the last P pixels; each depends on earlier pixels only."""
        x, weight = self.features(tokens)
        return x @ weight.t()

    def forward(self, tokens):
        """Images, or their first T pixels, (B, T) -> mean cross-entropy of the last P pixels in nats."""
        x, weight = self.features(tokens)
        return head_loss(x.flatten(0, 1), weight, tokens[:, -x.size(1):].flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0):
        """-> [AdamW] as in nanoGPT: matrices and embeddings decay, gains and biases do not; fused on CUDA.

        With muon_lr -> [AdamW, Muon]: the matrices of blocks and stem go to Muon, embeddings and the rest stay with AdamW.
        """
        matrices = [p for name, p in self.named_parameters() if muon_lr and p.dim() == 2 and name.startswith(('transformer.h.', 'transformer.stem.'))]
        rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=rest[0].is_cuda or None)
        return [adamw, Muon(matrices, muon_lr)] if matrices else [adamw]

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
        x, weight = model.features(images[:, :i + 1])  # the pixel itself is not looked at
        logits = x[:, -1] @ weight.t()
        images[:, i] = draw(logits, exponential_noise(seeds, i, 1, logits.size(-1))[0])
        yield 1


def paint_cached(model, images, seeds, draw, first, ahead=16):
    """The prompt at once, then one pixel at a time."""
    decoder = Decoder(model, len(images))
    logits = decoder.prefill(images[:, :first])
    for begin in range(first, images.size(1), ahead):  # noise for a few pixels at a time
        for i, noise in enumerate(exponential_noise(seeds, begin, min(ahead, images.size(1) - begin), logits.size(-1)), begin):
            if i > first:
                logits = decoder.decode_one_token(token, i)
            images[:, i] = token = draw(logits, noise)
            yield 1


def paint_on_cuda(model, images, seeds, draw, first, stretch=512, steps=32):
    """The same where launching a kernel takes longer than running it: CUDA graphs of so many steps each.

    A graph only repeats itself: where it stands is a number in memory, and full attention goes up to the end of a stretch
    of pixels, those to come masked. On a CPU the steps run one by one, which tests all but the capture.
    """
    decoder = Decoder(model, len(images))
    logits = decoder.prefill(images[:, :first])
    images[:, first] = draw(logits, exponential_noise(seeds, first, 1, logits.size(-1))[0])
    yield 1
    pixel = torch.tensor([first], device=images.device)  # the last that stands

    def paint(noises, length):  # a pixel for each of them
        for noise in noises:
            token = images.index_select(1, pixel)[:, 0]
            pixel.add_(1)
            images.index_copy_(1, pixel, draw(decoder.decode_one_token(token, pixel, length), noise)[:, None])

    for begin in range(first + 1, images.size(1), stretch):
        end, graph = min(begin + stretch, images.size(1)), None
        for i in range(begin, end, steps):
            fresh = exponential_noise(seeds, i, min(steps, end - i), logits.size(-1))
            if not images.is_cuda or len(fresh) < steps:
                paint(fresh, end)
            elif i == begin:  # libraries set themselves up in the first steps, which are therefore not captured
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    paint(fresh, end)
                torch.cuda.current_stream().wait_stream(side)
            else:
                if not graph:
                    graph, noises = torch.cuda.CUDAGraph(), fresh
                    with torch.cuda.graph(graph):
                        paint(noises, end)
                noises.copy_(fresh)
                graph.replay()
            yield len(fresh)


class Decoder:
    """What the sampler keeps for B images: the weights, laid out once for single pixels, and the keys and values so far.

    Keys and values lie in slots: all positions (full), those of the present band (local), or column after column.
    """

    def __init__(self, model, B):
        c, h, weight = model.config, model.transformer, model.lm_head.weight
        hs = c.n_embd // c.n_head
        queries = torch.ones_like(weight[0]).repeat(3)
        queries[:c.n_embd] = hs ** -0.5  # the scaling of the scores
        self.model, self.n_head, self.width, self.height = model, c.n_head, c.width, c.block_size // c.width
        colours = model.colours()
        self.colours, self.positions, self.ln_f = F.pad(colours, (0, 0, 0, 1)), model.positions(), norm(h.ln_f)
        self.head = (torch.cat((colours, model.one_hot), dim=1) if c.relative_colours else colours).t().contiguous()
        self.blocks = [(b.attn.kind, norm(b.ln_1), linear(b.attn.c_attn, queries), linear(b.attn.c_proj),
                        norm(b.ln_2), linear(b.mlp.c_fc), linear(b.mlp.c_proj)) for b in h.h]
        self.lengths = {'full': c.block_size, 'local': 2 * c.width, 'column': self.height}  # most positions that see each other
        slots = [2 * c.width if b.attn.kind == 'local' else c.block_size for b in h.h]
        # keys with one dimension a row: the scores of all positions are then read in one go
        self.keys = [weight.new_zeros(B * c.n_head, hs, n) for n in slots]
        self.values = [weight.new_zeros(B * c.n_head, n, hs) for n in slots]
        if c.neighbours:
            self.stem = linear(h.stem.c_fc), linear(h.stem.c_proj)
        if c.relative_colours:
            self.rel_head = linear(model.rel_head)
        if c.neighbours or c.relative_colours:  # the pixels so far with an edge around them, as in GPT.around
            stride = c.width + 6
            self.canvas = torch.full((B, (self.height + 3) * stride), c.vocab_size, device=weight.device)
            self.place = torch.arange(self.canvas.size(1), device=weight.device).view(-1, stride)[3:, 3:-3].flatten()  # (N,)
            self.neighbours = self.place[:, None] + torch.tensor([y * stride + x for y, x in NEIGHBOURS], device=weight.device)  # (N, 24)

    def prefill(self, tokens):
        """Prompts (B, T) -> logits of the pixel after them, (B, V); keys and values of all of it are kept."""
        B, T = tokens.shape
        kv = []
        x, weight = self.model.features(F.pad(tokens, (0, 1)), kv)  # (B, P, C')
        for (kind, *_), (k, v), keys, values in zip(self.blocks, kv, self.keys, self.values):
            k, v = (t.unflatten(0, (B, -1)).permute(0, 2, 1, 3, 4) for t in (k, v))  # (B, nh, lanes, length, hs)
            if kind == 'local':  # of the present band
                band = T // (2 * self.width)
                k, v = k[:, :, band:band + 1], v[:, :, band:band + 1]
            lanes, length = k.shape[2:4]
            keys.unflatten(2, (lanes, -1))[..., :length] = k.permute(0, 1, 4, 2, 3).flatten(0, 1)
            values.unflatten(1, (lanes, -1))[:, :, :length] = v.flatten(0, 1)
        if hasattr(self, 'canvas'):
            self.canvas[:, self.place[:T]] = tokens
        return x[:, -1] @ weight.t()

    def where(self, kind, position, length):
        """-> the slot of a position, the slots it attends to, and a mask for these (or None). Numbers in, slices out; tensors, tensors."""
        first, slot = 0, position
        if kind == 'local':
            slot = position % (2 * self.width)
        elif kind == 'column':
            first = position % self.width * self.height
            slot = first + position // self.width
        if isinstance(position, int):
            return slice(slot, slot + 1), slice(first, slot + 1), None
        span = torch.arange(min(self.lengths[kind], length), device=position.device)
        mask = torch.zeros_like(span, dtype=self.head.dtype).masked_fill(span > slot - first, -math.inf)
        return slot, span + first if kind == 'column' else slice(0, len(span)), mask

    def decode_one_token(self, tokens, pixel, length=None):
        """The pixels (B,) before pixel -> logits of pixel, (B, V).

        pixel is a number or, for a graph, tensor([number]); then full attention goes over the first length positions.
        """
        B, nh, c = len(tokens), self.n_head, self.model.config
        at = lambda i: slice(i, i + 1) if isinstance(i, int) else i
        position = pixel - int(not c.start_embedding)
        where = {kind: self.where(kind, position, length) for kind in {block[0] for block in self.blocks}}
        x = torch.embedding(self.colours, tokens) + self.positions[at(position)]  # (B, C)
        if c.neighbours or c.relative_colours:
            self.canvas.index_copy_(1, self.place[at(pixel - 1)], tokens[:, None])
            around = self.canvas.index_select(1, self.neighbours[at(pixel)].view(-1))  # (B, 24)
        if c.neighbours:
            c_fc, c_proj = self.stem
            x = x + c_proj(F.gelu(c_fc(torch.embedding(self.colours, around[:, :c.neighbours]).view(B, -1))))
        for (kind, ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), keys, values in zip(self.blocks, self.keys, self.values):
            slot, seen, mask = where[kind]
            q, k, v = c_attn(ln_1(x)).view(B, 3, nh, -1).unbind(1)  # each (B, nh, hs)
            keys[:, :, slot] = k.reshape(B * nh, -1, 1)
            values[:, slot] = v.reshape(B * nh, 1, -1)
            scores = torch.bmm(q.reshape(B * nh, 1, -1), keys[:, :, seen])  # (B * nh, 1, positions)
            if mask is not None:
                scores = scores + mask
            y = torch.bmm(scores.softmax(-1), values[:, seen]).view(B, -1)  # (B, C), the heads side by side
            x = x + attn_proj(y)
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x))))
        x = self.ln_f(x)
        if c.relative_colours:
            x = torch.cat((x, self.model.relative_scores(self.rel_head(x), around)), dim=-1)
        return torch.mm(x, self.head)


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
    image = 2 * config.n_layer * config.block_size * config.n_embd * weight.itemsize  # at most: local attention keeps two rows
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
