"""What several test modules use: a training run and what it leaves, nanoGPT's checkpoints, photographs."""
import csv

import pytest
import torch

from conftest import SHARED, TINY, call

PHOTOS = SHARED / 'photos_mixed'
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason='no photographs here')


def run(data, out, *args, code=0):
    return call('train.py', *TINY, f'--data_dir={data}', f'--out_dir={out}', *args, code=code)


def load(path):
    return torch.load(path, weights_only=True)


def log(out):
    with open(out / 'log.csv') as f:
        return list(csv.DictReader(f))


def same(a, b):
    """Equal to the last bit, whatever the nesting."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def nanogpt_checkpoint(side, bias=False, prefix='', n_layer=2, n_embd=32):
    """A checkpoint as nanoGPT's train.py writes it: no start embedding, no image shape, names of a compiled model."""
    torch.manual_seed(1)
    block_size = side * side - 1
    shapes = {'transformer.wte.weight': (4096, n_embd), 'transformer.wpe.weight': (block_size, n_embd)}
    layer = {'ln_1': (n_embd,), 'attn.c_attn': (3 * n_embd, n_embd), 'attn.c_proj': (n_embd, n_embd),
             'ln_2': (n_embd,), 'mlp.c_fc': (4 * n_embd, n_embd), 'mlp.c_proj': (n_embd, 4 * n_embd)}
    for i in range(n_layer):
        for name, shape in layer.items():
            shapes[f'transformer.h.{i}.{name}.weight'] = shape
            if bias:
                shapes[f'transformer.h.{i}.{name}.bias'] = shape[:1]
    shapes['transformer.ln_f.weight'] = (n_embd,)
    if bias:
        shapes['transformer.ln_f.bias'] = (n_embd,)
    weights = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return {
        'model': {prefix + name: tensor for name, tensor in weights.items()},
        'optimizer': {'state': {}, 'param_groups': []},
        'model_args': dict(n_layer=n_layer, n_head=2, n_embd=n_embd, block_size=block_size,
                           bias=bias, vocab_size=4096, dropout=0.0),
        'iter_num': 6000,
        'best_val_loss': torch.tensor(3.0),
        'config': {'dataset': 'landscape'},
    }
