"""The GPT that paints: nanoGPT's transformer over the pixels of an image in raster order.

The architecture and its names are GPT-2's, as in Andrej Karpathy's nanoGPT (github.com/karpathy/nanoGPT). A learned
start embedding stands before the first pixel, so that every pixel is predicted, and a whole image has a likelihood.

    position      0       1       2     ...   4095
    input       start  pixel 0 pixel 1  ... pixel 4094
    predicts   pixel 0 pixel 1 pixel 2  ... pixel 4095

What lets it see in two dimensions are switches of GPTConfig, all off by default: then it is nanoGPT's model with that
embedding. The model comes first, then its loss and Muon. sample.py paints with the same layers, a few pixels at a time.

Shapes: B images, T pixels, P positions (T with the start embedding, else T - 1; in the layers padded to whole rows),
C = n_embd, nh = n_head, hs = C / nh, V = vocab_size, K = neighbours, D = n_colour or C, L = 48 levels of red, green and
blue, or 110 with those of red - green and blue - green.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

# cuDNN's attention, PyTorch's first choice on Hopper, gives NaN gradients with some masks (pytorch issue 196678) and
# plans for half a second at every new shape; the flash and memory-efficient kernels do neither
torch.backends.cuda.enable_cudnn_sdp(False)

LEVELS = 16  # of a channel: a colour is red * 256 + green * 16 + blue
red, green, blue = torch.cartesian_prod(*[torch.arange(LEVELS)] * 3).unbind(1)  # the levels of each colour, (V,)
# red, green, blue, red - green, blue - green. The channels of a photograph rise and fall together, so that their
# differences change little
VALUES = torch.stack((red, green, blue, red - green, blue - green), dim=1)  # (V, 5)
# known pixels around the predicted one as (row, column) from it, the nearest first: left, above, ...
NEIGHBOURS = sorted(((row, column) for row in range(-3, 1) for column in range(-3, 4) if (row, column) < (0, 0)),
                    key=lambda at: (at[0] ** 2 + at[1] ** 2, -at[0], at[1]))


@dataclass
class GPTConfig:
    """The size of a model, as in nanoGPT, and its switches. Raises ValueError if they do not fit together."""
    block_size: int = 4096  # positions, each predicting a pixel: all of an image, without start embedding all but one
    vocab_size: int = 4096  # 12-bit colours
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False  # in the linear and norm layers of the blocks; without them it is a little better and faster
    start_embedding: bool = True  # False: the first pixel is given and never predicted, as in nanoGPT
    # two dimensions; all but n_colour and exclusive need the start embedding
    width: int = 64  # pixels of a row
    row_column_positions: bool = False  # an embedding of the row plus one of the column, not one of each position
    neighbours: int = 0  # how many known pixels around the predicted one go through a small MLP into the first block
    relative_neighbours: bool = False  # the MLP also reads by how much those of them that touch differ, as numbers
    n_colour: int = 0  # dimension of a colour's embedding, projected to n_embd and back for the head (0: n_embd)
    relative_colours: bool = False  # logits also depend on how much each channel differs from the left and upper pixel
    relative_chroma: bool = False  # ... and on how much red - green and blue - green do
    attention: str = 'full'  # of the layers, in turn: full, local (its row and the one above) or column: 'local column'
    # if > 0, local attention sees the row above only up to so many columns to the right, and every row begins with the
    # start embedding instead of the last pixel above: then sample.py can paint a diagonal at once. 0: all of the row
    reach: int = 0
    alibi: bool = False  # local and column attention fade with distance, each head at its own rate
    exclusive: bool = False  # attention adds only what is orthogonal to a position's own value

    @property
    def tokens_per_image(self):
        return self.block_size + (not self.start_embedding)

    @property
    def pad_to(self):
        """Pixels are padded to a multiple of this: to whole rows, if anything is two-dimensional."""
        flat = not (self.row_column_positions or self.neighbours or self.relative_colours)
        return 1 if flat and set(self.attention.split()) == {'full'} else self.width

    def __post_init__(self):
        kinds = self.attention.split()
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} cannot be shared by n_head={self.n_head} heads: make it a multiple')
        if not kinds or set(kinds) - {'full', 'local', 'column'}:
            raise ValueError(f"attention={self.attention!r}: name the layers' kinds, full, local or column, "
                             "as in 'local column'")
        if not 0 <= self.neighbours <= len(NEIGHBOURS):
            raise ValueError(f'neighbours={self.neighbours}: give a number from 0 to {len(NEIGHBOURS)}')
        if self.pad_to > 1 and not self.start_embedding:
            raise ValueError('row_column_positions, neighbours, relative_colours and attention other than full '
                             'need start_embedding=True')
        if self.reach < 0 or self.reach and 'full' in kinds:
            raise ValueError(f'reach={self.reach}: give 0, or how many columns to the right local attention sees; '
                             'full attention sees everything')
        outside = [i for i, (row, column) in enumerate(NEIGHBOURS[:self.neighbours]) if column > -row * self.reach]
        if self.reach and outside:
            raise ValueError(f'neighbours={self.neighbours}: only the first {outside[0]} lie within '
                             f'reach={self.reach}; raise it or take fewer')
        if self.relative_neighbours and 0 < self.neighbours < 3:
            raise ValueError(f'neighbours={self.neighbours}: relative_neighbours needs some that touch, give 3 or more')
        if self.relative_chroma and not self.relative_colours:
            raise ValueError('relative_chroma needs relative_colours=True')
        if self.alibi and set(kinds) == {'full'}:
            raise ValueError('alibi needs local or column attention: without them give alibi=False')
        if self.block_size % self.pad_to:
            raise ValueError(f'{self.block_size} pixels have to be whole rows of {self.width}')


class CausalSelfAttention(nn.Module):
    """Attention over all earlier positions (full), those of its row and the one above (local), or those of its column.

    Strided attention as in the Sparse Transformer (Child et al. 2019, arXiv 1904.10509), by reshaping an image into a
    sequence for each row or column. ALiBi (Press et al. 2021, arXiv 2108.12409) subtracts slope * Manhattan distance
    from a score, with slopes eight times the paper's: distances here are rows and columns, not thousands of tokens.
    Exclusive attention (Zhai 2026, arXiv 2603.09078) leaves out the part of the output along a position's own value.
    """

    def __init__(self, config, kind):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.exclusive = config.n_head, config.dropout, config.exclusive
        self.kind, self.width = kind, config.width
        mask = None  # full attention is causal without one
        if kind != 'full':  # (1, nh, length, keys), added to the scores; with fewer dimensions a CPU takes a slow path
            length = self.width if kind == 'local' else config.block_size // self.width
            query, key = torch.arange(length)[:, None], torch.arange(length)
            distance, seen = (query - key).abs(), key <= query  # (length, length)
            if kind == 'local':  # the row above comes before the row itself
                above = key <= query + (config.reach or length)
                distance, seen = torch.cat((distance + 1, distance), dim=1), torch.cat((above, seen), dim=1)
            slopes = 8 * 0.5 ** (8 / config.n_head * torch.arange(1, config.n_head + 1)) * config.alibi  # 0 without
            mask = torch.where(seen, -slopes[None, :, None, None] * distance, -math.inf)
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, x, kv=None):
        """(B, P, C) -> (B, P, C). kv: a list that gets keys and values, (2, B * sequences, nh, length, hs)."""
        B, P, C = x.size()
        if self.kind == 'column':
            x = x.view(B, -1, self.width, C).transpose(1, 2)  # (B, width, height, C)
        length = {'full': P, 'local': self.width, 'column': P // self.width}[self.kind]
        qkv = self.c_attn(x).reshape(-1, length, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B * sequences, nh, length, hs)
        if kv is not None:
            kv.append(qkv[1:])
        q, k, v = qkv if x.is_cuda else qkv.contiguous()  # the products on a CPU would copy them one by one
        own = v  # before the values of the row above come in front of them
        if self.kind == 'local':  # the row above before the row itself; the first row attends to zeros above it
            row_above = lambda t: F.pad(t.unflatten(0, (B, -1)), (0, 0, 0, 0, 0, 0, 1, -1)).flatten(0, 1)
            k, v = (torch.cat((row_above(t), t), dim=2) for t in (k, v))
        mask = None if self.mask is None else self.mask[..., :length, :k.size(2)]
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = without(y, own) if self.exclusive else y
        y = self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B * sequences, length, C)
        if self.kind == 'column':
            y = y.view(B, self.width, -1, C).transpose(1, 2)
        return y.reshape(B, P, C)


def attention(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(hs) + mask) v: queries (..., length, hs) -> (..., length, hs), causal if mask is None."""
    given = q.dtype
    if given == torch.bfloat16 and not q.is_cuda:
        if mask is not None and k.size(-2) <= 256:  # many short sequences: in half the time of what follows
            scores = (q * q.size(-1) ** -0.5) @ k.mT
            scores += mask.to(given)
            return F.dropout(scores.softmax(-1), dropout) @ v
        q, k, v = q.float(), k.float(), v.float()  # PyTorch's backward pass takes five times as long in bfloat16
    mask = None if mask is None else mask.to(q.dtype)
    with nullcontext() if q.is_cuda else torch.autocast('cpu', enabled=False):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None).to(given)


def without(y, own):
    """Return vectors y (..., hs) without their parts along the vectors own (..., hs)."""
    share = (y * own).sum(-1, keepdim=True) / (own.square().sum(-1, keepdim=True) + 1e-12)
    return y - share * own


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
        x = x + self.attn(self.ln_1(x), kv)
        return x + self.mlp(self.ln_2(x))


class Stem(nn.Module):
    """A small MLP over the embeddings of the neighbours: what a convolution sees of the image so far."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.neighbours * (config.n_colour or config.n_embd), 2 * config.n_embd)
        self.c_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.relative = config.relative_neighbours
        if self.relative:
            at = torch.tensor(NEIGHBOURS[:config.neighbours])
            touch = (at[:, None] - at).abs().sum(-1).triu() == 1
            self.register_buffer('touching', touch.nonzero().t().contiguous(), persistent=False)  # (2, pairs)
            # values of colours are -15 to 15, so two colours differ by at most 30; outside the image every value is
            # 46, which differs from a colour's by 31 to 61
            self.register_buffer('values', F.pad(VALUES, (0, 0, 0, 1), value=46), persistent=False)  # (V + 1, 5)
            # a difference d as five numbers, in row 61 + d: itself, its size, on two curved scales, and whether it is 0
            d = torch.arange(-61.0, 62)[:, None]
            numbers = torch.cat((d / 4, d.abs() / 4, (d / 1.5).tanh(), (d / 5).tanh(), (d == 0).float()), dim=1)
            numbers *= d.abs() <= 30  # zeros between a colour and the outside
            self.register_buffer('numbers', numbers, persistent=False)
            self.c_diff = nn.Linear(int(touch.sum()) * 5 * 5, 2 * config.n_embd, bias=False)

    def differences(self, neighbours):
        """Tokens of the neighbours (..., K) -> how far apart those are that touch, (..., pairs * 5 * 5)."""
        first, second = (F.embedding(neighbours.index_select(-1, i), self.values) for i in self.touching)
        return F.embedding(first - second + 61, self.numbers).flatten(-3)  # from (..., pairs, 5, 5)

    def forward(self, neighbours, colours):
        """Tokens of the neighbours (B, P, K) and embeddings of the colours (V + 1, D) -> (B, P, C)."""
        h = self.c_fc(F.embedding(neighbours, colours).flatten(2))
        if self.relative:
            h = h + self.c_diff(self.differences(neighbours))
        return self.c_proj(F.gelu(h))


class GPT(nn.Module):
    """The model: forward gives the loss of images, as training wants it, logits the scores, generate paints."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        kinds, D = c.attention.split(), c.n_colour or c.n_embd
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, D),
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
        self.lm_head = nn.Linear(D, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: a colour has one vector, read and written
        self.transformer['up'] = nn.Linear(D, c.n_embd, bias=False) if c.n_colour else nn.Identity()
        self.down = nn.Linear(c.n_embd, D, bias=False) if c.n_colour else nn.Identity()
        if c.relative_colours:
            score_index, pairs, n_scores = relative_tables(c.relative_chroma)
            self.rel_head = nn.Linear(c.n_embd, 2 * n_scores)  # beside the left and beside the upper pixel
            self.register_buffer('score_index', score_index, persistent=False)
            self.register_buffer('pairs', pairs, persistent=False)

        # GPT-2's initialisation: the more layers add to the residual stream, the smaller they start
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        if c.n_colour:  # keeps the variance
            for layer in (self.transformer.up, self.down):
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
        if c.relative_colours:
            nn.init.zeros_(self.rel_head.weight)

    def num_params(self):
        """Return the number of parameters without the positions, as nanoGPT counts."""
        positions = ('transformer.wpe', 'transformer.wre', 'transformer.wce')
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(positions))

    def positions(self):
        """Return the embedding of each position, (block_size, C)."""
        h = self.transformer
        if self.config.row_column_positions:
            return (h.wre.weight[:, None] + h.wce.weight).flatten(0, 1)
        return h.wpe.weight

    def neighbours(self, tokens):
        """Whole rows of pixels (B, T) -> the tokens of each one's neighbours, (B, T, K or 2), V outside the image."""
        height, width = tokens.size(1) // self.config.width, self.config.width
        canvas = F.pad(tokens.view(-1, height, width), (3, 3, 3, 0), value=self.config.vocab_size)
        at = NEIGHBOURS[:max(self.config.neighbours, 2)]  # relative colours need two
        shifted = [canvas[:, 3 + y:3 + y + height, 3 + x:3 + x + width] for y, x in at]
        return torch.stack(shifted, dim=-1).flatten(1, 2)

    def pair_scores(self, scores, neighbours):
        """Scores of rel_head, neighbours (..., 2 or more) -> scores of pairs of levels, (..., 512)."""
        index = F.embedding(neighbours[..., :2], self.score_index)  # (..., 2, L)
        return F.linear(scores.unflatten(-1, (2, -1)).gather(-1, index).sum(-2), self.pairs)  # left plus upper pixel

    def features(self, tokens, kv=None):
        """The first T pixels of images (B, T) -> inputs of head_logits for the last P of them, (B, P, D or D + 512).

        Each comes from the pixels before it. kv as in CausalSelfAttention.
        """
        c, h, T = self.config, self.transformer, tokens.size(1)
        tokens = F.pad(tokens, (0, -T % c.pad_to))  # with zeros after the real pixels, which do not see them
        x = h.up(h.wte(tokens))
        if c.start_embedding:  # the input is the pixel before, and the start before the first of the image, or of a row
            x = x.unflatten(1, (-1, c.width if c.reach else x.size(1)))  # (B, rows or 1, pixels, C)
            start = h.wse.weight.expand(*x.shape[:2], 1, -1)
            x = torch.cat((start, x[:, :, :-1]), dim=2).flatten(1, 2)
        else:
            x = x[:, :-1]
        x = x + self.positions()[:x.size(1)]
        neighbours = self.neighbours(tokens) if c.neighbours or c.relative_colours else None
        if c.neighbours:
            x = x + h.stem(neighbours[..., :c.neighbours], F.pad(h.wte.weight, (0, 0, 0, 1)))  # zeros outside
        x = h.drop(x)
        for block in h.h:
            x = block(x, kv)
        x = h.ln_f(x)
        inputs = self.down(x)
        if c.relative_colours:
            inputs = torch.cat((inputs, self.pair_scores(self.rel_head(x), neighbours)), dim=-1)
        return inputs[:, :T - 1 + c.start_embedding]  # without the padding

    def logits(self, tokens):
        """The first T pixels of images (B, T) -> logits (B, P, V) of the last P, each from earlier pixels only."""
        return head_logits(self.features(tokens), self.lm_head.weight)

    def forward(self, tokens):
        """The first T pixels of images (B, T) -> the loss alone: mean cross-entropy of the last P in nats."""
        x, weight = self.features(tokens), self.lm_head.weight
        x, targets = x.flatten(0, 1), tokens[:, -x.size(1):].flatten()
        if x.is_cuda:  # has memory to spare, and torch.compile makes one kernel of softmax and gradient
            return F.cross_entropy(head_logits(x, weight), targets)
        return HeadLoss.apply(x, weight, targets)

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0):
        """Return [AdamW] as in nanoGPT, without weight decay of gains and biases; with muon_lr [AdamW, Muon]."""
        # Muon takes all matrices but the embeddings: wte, which is the head's, too, wse, wpe, wre and wce
        matrices = [p for name, p in self.named_parameters()
                    if muon_lr and p.dim() == 2 and not name.startswith('transformer.w')]
        rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=rest[0].is_cuda or None)
        return [adamw, Muon(matrices, muon_lr, weight_decay)] if matrices else [adamw]

    def generate(self, tokens, max_new_tokens=None, **options):
        """Continue images pixel by pixel: prompts (B, T) -> (B, T + max_new_tokens). Options as in sample.generate."""
        import sample  # which imports this file
        return sample.generate(self, tokens, max_new_tokens, **options)


def relative_tables(chroma):
    """Return what turns relative scores into scores of pairs of levels: two tables, and how many scores there are.

    A colour has three values, red, green and blue; with chroma also red - green and blue - green. Each has a score for
    every difference between the predicted pixel and a neighbour: a value with n levels (16; 31 for chroma) has 2 n - 1.
    That makes 3 * 31 = 93 scores, with chroma 93 + 2 * 61 = 215; L is the sum of the n. Red and red - green depend on
    (red, green) alone, the other values on (green, blue). So what the scores add to 4,096 logits is one number for each
    of 256 pairs (red, green) plus one for each of 256 pairs (green, blue), 512 in all.
        score_index (V + 1, L): row t tells which score each of the n gets beside colour t. Outside the image, t = V,
            all n get the same one, which softmax ignores
        pairs (512, L): 1 where a pair of red and green (for red, red - green) or green and blue (others) has that value
    """
    values = VALUES[:, :5 if chroma else 3]
    score_index, pairs, n_scores = [], [], 0
    for i, value in enumerate((values - values.amin(0)).unbind(1)):
        n = int(value.max()) + 1
        difference = torch.arange(n) - value[:, None]  # (V, n)
        score_index.append(n_scores + F.pad(difference + n - 1, (0, 0, 0, 1)))
        n_scores += 2 * n - 1
        one_hot = F.one_hot(value).view(LEVELS, LEVELS, LEVELS, n).float()  # (red, green, blue, n)
        none = torch.zeros(LEVELS, LEVELS, n)
        if i in (0, 3):  # red, red - green
            pairs.append(torch.stack((one_hot[:, :, 0], none)))  # (2, 16, 16, n)
        else:  # green, blue, blue - green
            pairs.append(torch.stack((none, one_hot[0])))
    return torch.cat(score_index, dim=1), torch.cat(pairs, dim=-1).flatten(0, 2), n_scores


def head_logits(x, weight):
    """Inputs of the head (..., D or D + 512) and its weights (V, D) -> logits (..., V), in float32 at least.

    After D inputs for the product come scores of pairs of levels: of red and green, then of green and blue.
    """
    D = weight.size(1)
    logits = x[..., :D] @ weight.t()
    precision = torch.promote_types(logits.dtype, torch.float32)
    return add_pair_scores(logits, x[..., D:].to(precision)) if x.size(-1) > D else logits.to(precision)


def add_pair_scores(logits, pairs):
    """Return logits (..., V) plus scores of pairs (..., 512)."""
    red_green, green_blue = pairs.unflatten(-1, (2, LEVELS, LEVELS)).unbind(-3)
    cube = logits.unflatten(-1, (LEVELS, LEVELS, LEVELS)) + red_green[..., None]  # (..., red, green, blue)
    cube += green_blue[..., None, :, :]
    return cube.flatten(-3)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of head_logits(x, weight) against targets (n,), without (n, V) logits.

    x is (n, D or D + 512), weight (V, D). Chunks of rows go through the head, the softmax and the gradients of both
    while they are in the cache of a CPU: as many matrix products as usual, in a fraction of the memory. Either both
    gradients are wanted or none.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        rows, D = 128, weight.size(1)
        loss, needs_grad = x.new_zeros((), dtype=torch.float32), ctx.needs_input_grad[0]
        dx, dweight = torch.empty_like(x), weight.new_zeros(D, len(weight))  # transposed, which is faster
        for x_, dx_, targets_ in zip(x.split(rows), dx.split(rows), targets[:, None].split(rows)):
            logits = head_logits(x_, weight)
            probs = logits.softmax(-1)
            # log(sum(exp(logits))) is the largest logit less the log of its probability
            loss += (logits.amax(-1) - probs.amax(-1).log()).sum() - logits.gather(1, targets_).sum()
            if needs_grad:
                # softmax less one-hot, in place
                dlogits = probs.scatter_add_(1, targets_, -torch.ones_like(targets_, dtype=probs.dtype))
                low = dlogits.to(x.dtype)
                dx_[:, :D] = low @ weight
                if dx.size(1) > D:  # the score of a pair went into 16 logits, from which its gradient comes back
                    cube = dlogits.view(-1, LEVELS, LEVELS, LEVELS)  # (rows, red, green, blue)
                    dx_[:, D:] = torch.cat((cube.sum(3), cube.sum(1)), dim=1).flatten(1)
                dweight += x_[:, :D].t() @ low
        if needs_grad:
            ctx.save_for_backward(dx / len(x), dweight.t() / len(x))
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose updates are made orthogonal, so that every direction of a matrix learns equally fast.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in params:
            self.state[p]['momentum'] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group['params']
            gradients, momenta = [p.grad for p in params], [self.state[p]['momentum'] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
            updates = torch._foreach_lerp(gradients, momenta, group['momentum'])  # Nesterov's
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            # matrices of one height, after transposing tall ones, together: fewer kernels to launch on a GPU
            together = {}
            for p, update in zip(params, updates):
                rate = group['lr'] * max(1, p.size(0) / p.size(1)) ** 0.5
                if p.size(0) > p.size(1):
                    p, update = p.t(), update.t()  # views: what is added to them is added to the weights
                together.setdefault(p.size(0), []).append((p, update, rate))
            for members in together.values():
                for (p, _, rate), o in zip(members, orthogonalise([update for _, update, _ in members])):
                    p.add_(o, alpha=-rate)


def orthogonalise(matrices):
    """Return, for matrices (n, m) of one n <= m, nearly the nearest orthogonal ones: singular values of 0.7 to 1.2.

    Five Newton-Schulz steps x <- (a + b S + c S^2) x, where S = x x^T. Each multiplies x by a polynomial in S from the
    left: so the loop keeps S alone, which is (n, n) however wide x is, and the product of the polynomials, by which x
    is multiplied once. In float32: with products of less precision (TF32) small singular values end up at 5.
    """
    square = torch.stack([x @ x.t() for x in matrices])
    norm = square.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].sqrt() + 1e-7  # of x
    square, factor = square / norm ** 2, torch.eye(square.size(-1), device=square.device) / norm
    for _ in range(5):
        p = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        p.diagonal(dim1=1, dim2=2).add_(3.4445)
        factor, square = p @ factor, p @ square @ p
    return [f @ x for f, x in zip(factor, matrices)]
