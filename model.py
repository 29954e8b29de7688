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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# cuDNN's attention, PyTorch's first choice on Hopper, gives NaN gradients with some masks (pytorch issue 196678) and plans for
# half a second at every new shape; the flash and memory-efficient kernels do neither
torch.backends.cuda.enable_cudnn_sdp(False)

LEVELS = 16  # of a channel: a colour is red * 256 + green * 16 + blue
# known pixels around the one to be predicted as (row, column) from it, the nearest first
NEIGHBOURS = sorted(((row, column) for row in range(-3, 1) for column in range(-3, 4) if (row, column) < (0, 0)),
                    key=lambda at: (at[0] ** 2 + at[1] ** 2, -at[0], abs(at[1]), at[1]))
AHEAD = 6  # pixels a pass of paint_ahead, at most
NOISE = 32  # pixels that the noise is made for in one go: 4,096 numbers each, which stay in the cache of a CPU


@dataclass
class GPTConfig:
    """What a model is, as in nanoGPT, and its switches. Raises ValueError if they describe none."""
    block_size: int = 4096  # positions: pixels of an image with the start embedding, one less without it
    vocab_size: int = 4096  # 12-bit colours
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False  # in the linear and norm layers; without them it is a little better and faster
    start_embedding: bool = True  # False: the first pixel is given and never predicted, as in nanoGPT
    # two dimensions; everything but factorised_colours needs the start embedding
    width: int = 64  # pixels of a row
    row_column_positions: bool = False  # an embedding of the row plus one of the column, not one of each position
    neighbours: int = 0  # so many known pixels around the predicted one go through a small MLP into the first block
    factorised_colours: bool = False  # a colour's vector is its own plus one for each of its red, green and blue levels
    relative_colours: bool = False  # logits also depend on how much each channel differs from the pixels to the left and above
    attention: str = 'full'  # of the layers, in turn: full, local (its row and the one above) or column, as in 'local column'
    reach: int = 0  # local attention sees the row above up to so many columns to the right, and rows begin with the start embedding; 0: all of it
    alibi: bool = False  # local and column attention fade with distance, at another rate for each head

    @property
    def tokens_per_image(self):
        return self.block_size + (not self.start_embedding)

    @property
    def multiple(self):
        """What the pixels come in: whole rows if it sees in two dimensions."""
        return self.width if self.row_column_positions or self.neighbours or self.relative_colours or set(self.attention.split()) != {'full'} else 1

    def __post_init__(self):
        kinds = self.attention.split()
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} cannot be shared by n_head={self.n_head} heads: make it a multiple')
        if not kinds or set(kinds) - {'full', 'local', 'column'}:
            raise ValueError(f"attention={self.attention!r}: name the layers' kinds, full, local or column, as in 'local column'")
        if not 0 <= self.neighbours <= len(NEIGHBOURS):
            raise ValueError(f'neighbours={self.neighbours}: give a number from 0 to {len(NEIGHBOURS)}')
        if self.multiple > 1 and not self.start_embedding:
            raise ValueError('row_column_positions, neighbours, relative_colours and attention other than full need start_embedding=True')
        if self.reach < 0 or self.reach and 'full' in kinds:
            raise ValueError(f'reach={self.reach}: give 0, or how many columns to the right local attention sees; full attention sees everything')
        if self.reach and (wide := next((i for i, (row, column) in enumerate(NEIGHBOURS[:self.neighbours]) if column > -row * self.reach), None)) is not None:
            raise ValueError(f'neighbours={self.neighbours}: of these, only {wide} lie within reach={self.reach}; raise it or take fewer')
        if self.block_size % self.multiple:
            raise ValueError(f'{self.block_size} pixels have to be whole rows of {self.width}')


def recomputed(function, x):
    """function(x), on a CPU computed again in the backward pass instead of keeping its intermediate results."""
    return checkpoint(function, x, use_reentrant=False) if torch.is_grad_enabled() and not x.is_cuda else function(x)


class CausalSelfAttention(nn.Module):
    """Attention over all earlier positions (full), over those of the same row and all of the row above (local), or of the same column (column).

    Strided attention as in the Sparse Transformer (Child et al. 2019, arXiv 1904.10509), by reshaping into lanes of positions:
    rows or columns. With ALiBi (Press et al. 2021, arXiv 2108.12409) a score is less by slope * (rows + columns in between).
    """

    def __init__(self, config, kind):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.kind, self.width = kind, config.width
        if kind == 'full':
            self.mask = None  # causal
        else:  # (1, 1 or nh, length, keys), added to the scores; with fewer dimensions attention would take a slow path on a CPU
            length = self.width if kind == 'local' else config.block_size // self.width
            away = torch.arange(length)[:, None] - torch.arange(length)  # (length, length), below 0 what comes later
            distance, seen = away.abs(), away >= 0
            if kind == 'local':  # the row above comes before the row itself
                above = away >= -config.reach if config.reach else torch.ones_like(seen)
                distance, seen = torch.cat((distance + 1, distance), dim=1), torch.cat((above, seen), dim=1)
            slopes = 8 * 0.5 ** (8 / config.n_head * torch.arange(1, config.n_head + 1)) if config.alibi else torch.zeros(1)
            self.register_buffer('mask', torch.where(seen, -slopes[None, :, None, None] * distance, -math.inf), persistent=False)

    def forward(self, x, kv=None):
        """(B, P, C) -> (B, P, C). kv: a list that receives queries, keys and values, (3, B * lanes, nh, length, hs)."""
        B, P, C = x.size()
        if self.kind == 'column':
            x = x.view(B, -1, self.width, C).transpose(1, 2)  # (B, width, height, C)
        length = {'full': P, 'local': self.width, 'column': P // self.width}[self.kind]
        qkv = self.c_attn(x).reshape(-1, length, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B * lanes, nh, length, hs)
        if kv is not None:
            kv.append(qkv)
        # on a CPU in float32, where the gradient is five times slower in bfloat16
        with nullcontext() if x.is_cuda else torch.autocast('cpu', enabled=False):
            q, k, v = qkv if x.is_cuda else qkv.to(x.dtype)
            if self.kind == 'local':  # zeros above the first row
                k, v = (torch.cat((F.pad(t.unflatten(0, (B, -1)), (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1), t), dim=2) for t in (k, v))
            mask = None if self.mask is None else self.mask[..., :length, :k.size(2)].to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0, is_causal=mask is None)
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
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, kind)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, kv=None):
        attend = lambda x: self.attn(self.ln_1(x), kv)
        x = x + (attend(x) if self.attn.kind == 'full' else recomputed(attend, x))  # full attention takes too long for that
        x = x + recomputed(lambda x: self.mlp(self.ln_2(x)), x)
        return x


class Stem(nn.Module):
    """A small MLP over the embeddings of the neighbours: what a convolution would see of the image so far."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.neighbours * config.n_embd, 2 * config.n_embd)
        self.c_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)

    def table(self, colours):
        """(V + 1, C) -> ((V + 1) * K, 2C): what each colour adds to the hidden layer as each neighbour."""
        weight = self.c_fc.weight.view(2 * colours.size(1), -1, colours.size(1))  # (2C, K, C)
        return (colours @ weight.permute(2, 1, 0).flatten(1)).view(-1, len(weight))

    def forward(self, around, colours):
        """Neighbours (B, P, K) and the vectors of the colours -> (B, P, C)."""
        B, P, K = around.shape
        if B * P > 2 * len(colours) and not around.is_cuda:  # there are fewer colours than pixels; a GPU is faster at the product
            rows = around * K + torch.arange(K, device=around.device)
            h = F.embedding_bag(rows.flatten(0, 1), self.table(colours).float(), mode='sum').to(colours.dtype).view(B, P, -1) + self.c_fc.bias
        else:
            h = self.c_fc(F.embedding(around, colours).flatten(2))
        return self.c_proj(F.gelu(h))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T, x (n, C) and weight (V, C), against targets (n,), without ever holding (n, V) logits.

    Chunks of rows go through the head, the softmax and the gradients of both while they are in the cache of a CPU: three products
    as in the usual way, a fraction of the memory.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        rows = 512
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        for x_, dx_, targets_ in zip(x.split(rows), dx.split(rows), targets[:, None].split(rows)):
            logits = (x_ @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
            logits -= logits.amax(-1, keepdim=True)
            loss -= logits.gather(1, targets_).sum()
            probs = logits.exp_()
            total = probs.sum(-1, keepdim=True)
            loss += total.log().sum()
            if ctx.needs_input_grad[0]:
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


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: every direction of a matrix learns equally fast (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group['params']
            for p in params:
                if 'momentum' not in self.state[p]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
            gradients, momenta = [p.grad for p in params], [self.state[p]['momentum'] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
            updates = torch._foreach_lerp(gradients, momenta, group['momentum'])  # Nesterov's
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            # matrices with as many rows go together, laid on their side and made equally wide with zeros, which
            # change nothing: telling a GPU of each product takes longer than the product
            together = {}
            for p, update in zip(params, updates):
                together.setdefault(min(p.shape), []).append((p, update if p.size(0) <= p.size(1) else update.t()))
            for pairs in together.values():
                widest = max(update.size(1) for _, update in pairs)
                orthogonal = orthogonalise(torch.stack([F.pad(update, (0, widest - update.size(1))) for _, update in pairs]))
                for (p, update), o in zip(pairs, orthogonal):
                    o = o[:, :update.size(1)]
                    p.add_(o if p.size(0) <= p.size(1) else o.t(), alpha=-group['lr'] * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalise(x):
    """Matrices (..., n, m), n <= m -> nearly the orthogonal ones next to them: a quintic Newton-Schulz iteration brings all singular values to 0.7 .. 1.2."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        kinds = c.attention.split()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            drop=nn.Dropout(c.dropout),
            h=nn.ModuleList([Block(c, kinds[i % len(kinds)]) for i in range(c.n_layer)]),
            ln_f=nn.LayerNorm(c.n_embd, bias=c.bias),
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
        level = torch.arange(LEVELS)
        levels = torch.cartesian_prod(level, level, level)  # red, green and blue of each colour, (V, 3)
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
        return scores.view(*scores.shape[:-1], 2, -1).gather(-1, torch.embedding(self.differences, around[..., :2])).sum(-2)  # the left and the upper one

    def features(self, tokens, kv=None):
        """Pixels from the first one on, (B, T) -> what the head reads, (B, P, C'), and its weights, (V, C').

        The last P of the T pixels are predicted, each from those before it: P is T with the start embedding and T - 1
        without. kv as in CausalSelfAttention.
        """
        c, h, T = self.config, self.transformer, tokens.size(1)
        tokens = F.pad(tokens, (0, -T % c.multiple))  # what is added comes after everything else
        colours = self.colours()
        x = F.embedding(tokens, colours)
        if c.start_embedding:  # before the image; with reach before each row
            x = x.unflatten(1, (-1, c.width)) if c.reach else x[:, None]
            x = torch.cat((h.wse.weight.expand(*x.shape[:2], 1, -1), x[:, :, :-1]), dim=2).flatten(1, 2)
        else:
            x = x[:, :-1]
        x = x + self.positions()[:x.size(1)]
        if c.neighbours or c.relative_colours:
            around = self.around(tokens)
        if c.neighbours:
            x = x + h.stem(around[..., :c.neighbours], F.pad(colours, (0, 0, 0, 1)))  # zeros where there is none
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
        x, targets = x.flatten(0, 1), tokens[:, -x.size(1):].flatten()
        if x.is_cuda:  # has memory to spare, and torch.compile makes one kernel of softmax and gradient
            return F.cross_entropy(x @ weight.t(), targets)
        return HeadLoss.apply(x, weight, targets)

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0):
        """-> [AdamW] as in nanoGPT: matrices and embeddings decay, gains and biases do not; fused on CUDA.

        With muon_lr -> [AdamW, Muon]: the matrices of blocks and stem go to Muon, embeddings and the rest stay with AdamW.
        """
        matrices = [p for name, p in self.named_parameters() if muon_lr and p.dim() == 2 and name.startswith(('transformer.h.', 'transformer.stem.'))]
        rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=rest[0].is_cuda or None)
        return [adamw, Muon(matrices, muon_lr, weight_decay)] if matrices else [adamw]

    def generate(self, tokens, max_new_tokens=None, *, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True, progress=None):
        """Continue images pixel by pixel: prompts (B, T) -> (B, T + max_new_tokens), the prompts included.

        T may be 0 with the start embedding. max_new_tokens: the rest of the image if None. temperature 0 takes the
        likeliest colour; top_k and top_p as in restrict. generator draws a seed for every image, which decides all
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
        draw = lambda logits, noise: choose(restrict(logits, temperature, top_k, top_p), noise)
        batch = min(B, images_at_once(self))
        with painting(self, batch):
            for part, part_seeds in zip(images.split(batch), seeds.split(batch)) if new else ():  # views: painting a part writes into images
                paint = (paint_plainly if not use_cache else paint_on_cuda if device.type == 'cuda'
                         else paint_ahead if device.type == 'cpu' and len(part) == 1 else paint_cached)
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
        images[:, i] = draw(logits, gumbel_noise(seeds, i, 1, logits.size(-1))[0])
        yield 1


def paint_cached(model, images, seeds, draw, first):
    """The prompt at once, then one pixel at a time."""
    decoder = Decoder(model, len(images))
    logits = decoder.prefill(images[:, :first])
    ahead = max(1, NOISE // len(images))
    for begin in range(first, images.size(1), ahead):
        for i, noise in enumerate(gumbel_noise(seeds, begin, min(ahead, images.size(1) - begin), logits.size(-1)), begin):
            if i > first:
                logits = decoder.decode(images[:, i - 1:i], i)[:, 0]
            images[:, i] = draw(logits, noise)
            yield 1


def paint_ahead(model, images, seeds, draw, first, window=AHEAD):
    """The same for one image, several pixels a pass.

    The noise of a pixel mostly picks the same colour from the distribution of an earlier pixel as from its own: that is a guess.
    A pass takes the newest pixel and guesses of those after it, and draws all of them; what it draws stands as far as the
    guesses before it were right. So it is the image of paint_cached, in some 40 passes for 100 pixels.
    Speculative decoding (Leviathan et al. 2022, arXiv 2211.17192), without a second model.
    """
    decoder, pixels, width, V = Decoder(model, 1, window), images[0], model.config.width, model.config.vocab_size
    logits = decoder.prefill(images[:, :first])  # (1, V), of the newest pixel
    i = end = first  # decided so far; those that there is noise for
    while i < len(pixels):
        if i == end:  # no pass goes beyond the end of a row
            begin, end = i, min(i + NOISE, (i // width + 1) * width, len(pixels))
            noise = gumbel_noise(seeds, begin, end - begin, V)[:, 0]  # (end - begin, V)
        last = min(i + window, end) if i > first + 1 else i + 1  # there are no guesses before the first pass
        if i > first:
            guesses, ahead = pixels[i:last - 1], noise[i - begin:last - 1 - begin]
            if len(guesses):
                guesses.copy_(draw(logits.expand(len(guesses), V), ahead))
                if model.config.relative_colours:  # again, now that each has a colour to its left
                    guesses.copy_(draw(decoder.moved(logits, accepted - 1, images[:, i - 1:last - 2], i), ahead))
            logits = decoder.decode(images[:, i - 1:last - 1], i)[0]  # (W, V)
        drawn = draw(logits, noise[i - begin:last - begin])
        accepted = 1 + int((drawn[:-1] == pixels[i:last - 1]).cumprod(0).sum())  # one more than guesses that were right
        pixels[i:last] = drawn
        logits, i = logits[accepted - 1:accepted], i + accepted
        yield accepted


def paint_on_cuda(model, images, seeds, draw, first):
    """paint_cached as a CUDA graph of NOISE steps, for GPUs that take longer to launch a kernel than to run it.

    A graph repeats the very same work, so the pixel is a number in a tensor, and attention always covers whole lanes, the
    pixels to come masked. On a CPU the steps run one by one, which tests all but the capture.
    """
    decoder = Decoder(model, len(images))
    logits = decoder.prefill(images[:, :first])
    images[:, first] = draw(logits, gumbel_noise(seeds, first, 1, logits.size(-1))[0])
    yield 1
    pixel = torch.tensor([first], device=images.device)  # the newest that is painted

    def paint(noises):  # a pixel for each of them
        for noise in noises:
            token = images.index_select(1, pixel)  # (B, 1)
            pixel.add_(1)
            images.index_copy_(1, pixel, draw(decoder.decode(token, pixel)[:, 0], noise)[:, None])

    graph = None
    for begin in range(first + 1, images.size(1), NOISE):
        fresh = gumbel_noise(seeds, begin, min(NOISE, images.size(1) - begin), logits.size(-1))
        if not images.is_cuda or len(fresh) < NOISE:
            paint(fresh)
        elif begin == first + 1:  # libraries set themselves up in the first steps, which are therefore not captured
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                paint(fresh)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if not graph:
                graph, noises = torch.cuda.CUDAGraph(), fresh
                with torch.cuda.graph(graph):
                    paint(noises)
            noises.copy_(fresh)
            graph.replay()
        yield len(fresh)


class Decoder:
    """What the sampler keeps for B images: the weights, laid out once for single pixels, and the keys and values so far.

    Keys and values lie in lanes: one of all positions (full), a ring of two rows (local), or the columns.
    """

    def __init__(self, model, B, ahead=1):  # ahead: pixels a pass, at most
        c, h, weight = model.config, model.transformer, model.lm_head.weight
        self.model, self.n_head, self.width, self.height = model, c.n_head, c.width, c.block_size // c.width
        colours = model.colours()
        self.colours, self.positions, self.ln_f = colours, model.positions(), norm(h.ln_f)
        self.head = colours.view(LEVELS, -1, c.n_embd).transpose(1, 2).contiguous()  # (16, C, V / 16): a CPU takes twice as long for one product with all of it
        self.blocks = [(b.attn.kind, norm(b.ln_1), linear(b.attn.c_attn), linear(b.attn.c_proj),
                        norm(b.ln_2), linear(b.mlp.c_fc), linear(b.mlp.c_proj)) for b in h.h]
        lanes = {'full': (1, c.block_size), 'local': (1, 2 * c.width), 'column': (c.width, self.height)}  # how many, how long
        self.lanes = {kind: lanes[kind] for kind, *_ in self.blocks}
        # (2, B, lanes, nh, length, hs)
        self.kv = [weight.new_zeros(2, B, n, c.n_head, length, c.n_embd // c.n_head) for n, length in (lanes[kind] for kind, *_ in self.blocks)]
        self.span = torch.arange(c.block_size, device=weight.device)
        self.later = F.pad(weight.new_full((ahead, ahead), -math.inf).triu(1), (c.block_size, 0))  # what the positions of a pass may not see
        self.masks = {b.attn.kind: b.attn.mask for b in h.h}  # (1, 1 or nh, slots, length)
        if 'local' in self.masks:  # in every other row the one above comes last
            self.masks['local'] = torch.cat((self.masks['local'].roll(c.width, -1), self.masks['local']), dim=2)
        if c.neighbours:  # what the hidden layer of the stem gets from each colour as each neighbour, and its bias from the first of them
            self.stem, self.stem_proj = h.stem.table(F.pad(colours, (0, 0, 0, 1))), linear(h.stem.c_proj)
            self.stem[::c.neighbours] += h.stem.c_fc.bias
            self.kth = torch.arange(c.neighbours, device=weight.device)
        if c.relative_colours:
            self.rel_head = linear(model.rel_head)
        if c.neighbours or c.relative_colours:  # the pixels so far with an edge around them, as in GPT.around
            stride = c.width + 6
            self.canvas = torch.full((B, (self.height + 3) * stride), c.vocab_size, device=weight.device)
            self.on_canvas = torch.arange(self.canvas.size(1), device=weight.device).view(-1, stride)[3:, 3:-3].flatten()  # (N,)
            self.neighbours = self.on_canvas[:, None] + torch.tensor([y * stride + x for y, x in NEIGHBOURS], device=weight.device)  # (N, 24)

    def prefill(self, tokens):
        """Prompts (B, T) -> logits of the pixel after them, (B, V); keys and values of all of it are kept."""
        B, T = tokens.shape
        new = []
        x, weight = self.model.features(F.pad(tokens, (0, 1)), new)  # (B, P, C')
        for (kind, *_), qkv, kv in zip(self.blocks, new, self.kv):
            qkv = qkv.unflatten(1, (B, -1))  # (3, B, lanes, nh, length, hs)
            if kind == 'local':  # the present row and the one above
                for row in range(max(0, T // self.width - 1), T // self.width + 1):
                    kv.unflatten(4, (2, -1))[:, :, 0, :, row % 2] = qkv[1:, :, row]
            else:
                kv[..., :qkv.size(4), :] = qkv[1:]
        if hasattr(self, 'canvas'):
            self.canvas[:, self.on_canvas[:T]] = tokens
        return x[:, -1] @ weight.t()

    def place(self, kind, position, W):
        """Where keys and values of a position go, how far W positions from it on look, and what is added to their scores: (lane, slot, length, mask or None)."""
        graph, (lanes, length) = isinstance(position, torch.Tensor), self.lanes[kind]
        lane, slot = (position % lanes, position // lanes) if kind == 'column' else (0 * position, position % length)
        if graph:
            return lane, slot, length, (torch.where(self.span[None] > slot, -math.inf, 0.0).to(self.head.dtype) if kind == 'full' else self.masks[kind].index_select(2, slot))
        if kind == 'local':
            return lane, slot, length, self.masks[kind].narrow(2, slot, W)
        if kind == 'column':
            return lane, slot, slot + 1, self.masks[kind].narrow(2, slot, 1).narrow(3, 0, slot + 1)
        return lane, slot, slot + W, None if W == 1 else self.later[:W, len(self.span) - slot:len(self.span) + W]

    def decode(self, tokens, pixel):
        """The pixels (B, W) from the one before pixel on -> logits of as many from pixel on, (B, W, V), all of them in one row.

        pixel is a number or, for a graph, tensor([number]), and W then 1.
        """
        (B, W), c, graph = tokens.shape, self.model.config, isinstance(pixel, torch.Tensor)
        position = pixel - int(not c.start_embedding)
        places = {kind: self.place(kind, position, W) for kind in self.lanes}
        x = torch.embedding(self.colours, tokens)
        if c.reach:  # a row begins with the start embedding
            begins = (self.span[:W] + pixel) % self.width == 0
            x = torch.where(begins[:, None], self.model.transformer.wse.weight, x)
        x = x + rows(self.positions, position, W)
        x = x.view(B * W, -1)  # (B * W, C)
        if c.neighbours or c.relative_colours:
            around = self.around(tokens, pixel)
        if c.neighbours:
            x = self.stem_proj(F.gelu(torch.embedding(self.stem, torch.add(self.kth, around[:, :c.neighbours], alpha=c.neighbours)).sum(1)), x)
        for (kind, ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), kv in zip(self.blocks, self.kv):
            lane, slot, length, mask = places[kind]
            L, S = (W, 1) if kind == 'column' else (1, W)  # lanes and slots that the W positions take
            qkv = c_attn(ln_1(x)).view(B, L, S, 3, self.n_head, -1).permute(3, 0, 1, 4, 2, 5)  # (3, B, L, nh, S, hs)
            if graph:
                kv[:, :, lane, :, slot] = qkv[1:, :, 0, :, 0]
                kv = kv.index_select(2, lane) if kind == 'column' else kv
            else:
                kv = kv.narrow(2, lane, L)
                kv.narrow(4, slot, S).copy_(qkv[1:])
                kv = kv.narrow(4, 0, length)
            k, v = kv.flatten(1, 2).unbind()  # each (B * L, nh, positions, hs)
            y = F.scaled_dot_product_attention(qkv[0].flatten(0, 1), k, v, mask)  # (B * L, nh, S, hs)
            x = attn_proj(y.transpose(1, 2).reshape(B * W, -1), x)  # the heads side by side
            x = mlp_proj(F.gelu(c_fc(ln_2(x))), x)
        x = self.ln_f(x)
        logits = torch.bmm(x.expand(LEVELS, -1, -1), self.head).transpose(0, 1)  # (B * W, 16, V / 16)
        if c.relative_colours:
            self.scores = self.rel_head(x)  # (B * W, 186)
            self.levels = self.model.relative_scores(self.scores, around)  # (B * W, 48)
            return every_colour(self.levels).add_(logits).view(B, W, -1)
        return logits.reshape(B, W, -1)

    def around(self, tokens, pixel):
        """Tokens as in decode -> the known pixels around as many from pixel on, (B * W, 24)."""
        B, W = tokens.shape
        self.canvas.index_copy_(1, rows(self.on_canvas, pixel - 1, W), tokens)
        return self.canvas.index_select(1, rows(self.neighbours, pixel, W).view(-1)).view(B * W, -1)

    def moved(self, logits, i, tokens, pixel):
        """Logits (1, V), of the i-th pixel that decode has just been called for, as they would be with the neighbours of other pixels -> (W, V); tokens and pixel as in decode."""
        change = self.model.relative_scores(self.scores[i:i + 1].expand(tokens.size(1), -1), self.around(tokens, pixel)) - self.levels[i]
        return logits + every_colour(change).flatten(1)


def every_colour(levels):
    """A number for each red, green and blue level, (n, 48) -> the sum of three for each colour, (n, 16, 256)."""
    red, green, blue = levels.view(-1, 3, LEVELS).unbind(1)
    return red[:, :, None] + (green[:, :, None] + blue[:, None]).flatten(1)[:, None]


def rows(table, i, count):
    """Rows i, i + 1, ... of a table; i is a number or, for a graph, tensor([number]), and count then 1."""
    return table.index_select(0, i) if isinstance(i, torch.Tensor) else table.narrow(0, i, count)


def norm(module):
    """A LayerNorm as a plain function: for one pixel, what a module adds to a call would be half of its time."""
    weight, bias = module.weight, module.bias
    return lambda x: torch.layer_norm(x, weight.shape, weight, bias)


def linear(module):
    """An nn.Linear as a plain function of (B, in), plus a residual (B, out); its weights as (in, out), which a few rows are multiplied with faster."""
    weight, bias = module.weight.t().contiguous(), module.bias

    def apply(x, residual=None):
        add = bias if residual is None else residual if bias is None else residual + bias
        return torch.mm(x, weight) if add is None else torch.addmm(add, x, weight)
    return apply


def images_at_once(model):
    """How many images are painted side by side: on CUDA as many as half of the free memory holds, else 8 with full attention and 32 without.

    With full attention, keys and values of a 64x64 image are 16.8 MB in float32 (4 layers of width 128). What does not fit into
    the caches of a CPU is read from main memory for every pixel, and larger batches gain nothing. Of rows and columns a layer reads 131 kB a pixel, at most.
    """
    config, weight = model.config, model.lm_head.weight
    if weight.device.type != 'cuda':
        return 8 if 'full' in config.attention else 32
    image = 2 * config.n_layer * config.block_size * config.n_embd * weight.itemsize  # at most: local attention keeps two rows
    # attention takes up to 65,535 sequences, and prompts are made of rows and columns
    return max(1, min(torch.cuda.mem_get_info(weight.device)[0] // 2 // image, 65_535 // config.width))


@contextmanager
def painting(model, batch):
    """No gradients, no dropout, no autocast, no TF32: the same picture on every device, up to rounding. On a CPU few threads, for one pixel is little work to share: two for one image, else at
    most one an image; and no oneDNN, which takes five times as long for so few numbers."""
    training, threads, mkldnn, precision = model.training, torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision('highest')
    torch.set_num_threads(min(threads, max(batch, 2)))
    torch.backends.mkldnn.enabled = False
    try:
        with torch.inference_mode(), torch.autocast(model.lm_head.weight.device.type, enabled=False):
            yield
    finally:
        model.train(training)
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = mkldnn
        torch.set_float32_matmul_precision(precision)


def restrict(logits, temperature=1.0, top_k=None, top_p=None):
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


def choose(logits, noise):
    """(B, V) logits and Gumbel noise (B, V) -> (B,) tokens, each colour with its softmax probability (the Gumbel-max trick).

    Nothing is summed up over the colours, so that logits that differ in their last bits draw another colour in one of a
    million pixels.
    """
    return (logits + noise).max(-1).indices


def gumbel_noise(seeds, first, count, V):
    """Noise of the pixels first .. first + count - 1 of images, each with its seed (B,) -> (count, B, V), Gumbel distributed.

    Stateless: a number is a function of seed, pixel and colour alone, on any device. SplitMix64 (Steele et al. 2014).
    """
    pixels = torch.arange(first, first + count, device=seeds.device)[:, None, None]
    x = (pixels * V + torch.arange(V, device=seeds.device)) * -0x61C8864680B583EB + seeds[:, None]  # (count, B, V), modulo 2 ** 64
    x.bitwise_xor_((x >> 30).bitwise_and_(2 ** 34 - 1)).mul_(-0x40A7B892E31B1A47)  # >> copies the sign: & takes it away
    x.bitwise_xor_((x >> 27).bitwise_and_(2 ** 37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    # 23 bits and a half: 24 would round up to 1, the noise of which is infinite
    uniform = x.bitwise_right_shift_(41).bitwise_and_(2 ** 23 - 1).float().add_(0.5).mul_(2 ** -23)
    return uniform.log_().neg_().log_().neg_()
