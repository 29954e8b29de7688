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

    def forward(self, x, cache=None, pos=0):
        """x: (B, T, C), the positions pos .. pos + T - 1 -> (B, T, C).

        cache: (2, B, nh, >= pos + T, hs), keys and values of the positions before pos; those of x are written into it.
        """
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k, v = qkv
        if cache is not None:
            cache[:, :, :, pos:pos + T] = qkv[1:]
            k, v = cache[:, :, :, :pos + T]  # (B, nh, pos + T, hs)
        # a single query may see every key there is; is_causal would show it the first one only
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1)
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

    def forward(self, x, cache=None, pos=0):
        x = x + self.attn(self.ln_1(x), cache, pos)
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

    def trunk(self, x, cache=None, pos=0):
        """Input embeddings of the positions pos .. pos + T - 1, (B, T, C) -> what the head reads there, (B, T, C).

        With a cache (see new_cache) the positions before pos are taken from it; without one, pos is 0.
        """
        x = self.transformer.drop(x + self.transformer.wpe.weight[pos:pos + x.size(1)])
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], pos)
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

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens=None, *, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True, progress=None):
        """Continue images pixel by pixel: prompts (B, T) -> (B, T + max_new_tokens), the prompts included.

        T may be 0 with the start embedding. max_new_tokens: the rest of the image if None. temperature 0 takes the
        likeliest colour; top_k and top_p as in logits_to_probs. generator draws all the noise before the first pixel,
        one uniform number a pixel, so that the same seed gives the same images, up to rounding, with the cache and
        without it, in a batch of any size and on any device. progress, if given, is called after every pixel. Raises ValueError.
        """
        config, device = self.config, self.lm_head.weight.device
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=device)
        B, T = tokens.shape
        new = config.tokens_per_image - T if max_new_tokens is None else max_new_tokens
        if not 0 <= new <= config.tokens_per_image - T:
            raise ValueError(f'{T} given + {new} new pixels do not fit into an image of {config.tokens_per_image}')
        if T == 0 and not config.start_embedding:
            raise ValueError('a model without start embedding cannot draw the first pixel: give one')

        noise = torch.rand(B, new, generator=generator, device=generator.device if generator else 'cpu').to(device)
        out = torch.cat((tokens, tokens.new_zeros(B, new)), dim=1)
        cache = self.new_cache(B) if use_cache else None
        x, pos = self.embed(tokens), 0
        for i in range(new):
            logits = self.lm_head(self.trunk(x, cache, pos)[:, -1])  # (B, V)
            out[:, T + i] = choose(logits_to_probs(logits, temperature, top_k, top_p), noise[:, i])
            if use_cache:
                pos += x.size(1)
                x = self.transformer.wte(out[:, T + i:T + i + 1])  # (B, 1, C)
            else:
                x = self.embed(out[:, :T + i + 1])  # (B, all so far, C)
            if progress:
                progress()
        return out

    def new_cache(self, batch_size):
        """Room for the keys and values of batch_size images: a tensor (n_layer, 2, B, nh, block_size, hs)."""
        c, weight = self.config, self.lm_head.weight
        return weight.new_empty(c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)


def logits_to_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """(B, V) logits -> (B, V) probabilities to draw from.

    temperature divides the logits; 0 leaves the likeliest colour alone. top_k keeps the k likeliest colours; top_p
    (nucleus sampling, arXiv 1904.09751) then the fewest likeliest ones that together reach the probability top_p.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
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
    """(B, V) probabilities, not necessarily normalised, and (B,) uniform numbers of [0, 1) -> (B,) tokens: the inverse CDF."""
    # 4,096 small steps add up: in float64 the edges between colours stay where they are when logits differ in the last
    # bit, as they do between batch sizes or with and without the cache (MPS has no float64)
    cdf = probs.cumsum(-1, dtype=None if probs.device.type == 'mps' else torch.float64)
    # a little below 1, so that rounding can never lead past the last colour that has a probability
    target = noise[:, None] * (1 - 2 ** -22) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0]
