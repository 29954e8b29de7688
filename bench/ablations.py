"""Measure what each ingredient is worth: added to the plain model, and removed from the recommended one.

    python prepare.py --source PHOTOS --size 32 --out_dir data/photos32
    python bench/ablations.py --data_dir data/photos32      # 19 models, two seeds

Every model sees the same images in the same order, two at a time, with the schedule and the learning rates of
config/landscape.py, without reach; the score is bits per pixel on all validation images. --adamw_lr is the learning
rate of the models without Muon, for embeddings and matrices alike. Complete runs are not repeated, so take another
--out_dir after a change of the code. Leave the machine idle.
"""
from pathlib import Path

from common import ROOT, argument_parser, read_log, run_script, table_head, table_row

# name: (option that switches it on, option that switches it off)
INGREDIENTS = {
    'row + column positions': ('--row_column_positions=True', '--row_column_positions=False'),
    '12 neighbours': ('--neighbours=12', '--neighbours=0'),
    'relative neighbours': ('--relative_neighbours=True', '--relative_neighbours=False'),
    'small colours': ('--n_colour=32', '--n_colour=0'),
    'relative colours': ('--relative_colours=True', '--relative_colours=False'),
    'relative chroma': ('--relative_chroma=True', '--relative_chroma=False'),
    'local and column attention': ('--attention=local column', '--attention=full'),
    'ALiBi': ('--alibi=True', '--alibi=False'),
    'exclusive attention': ('--exclusive=True', '--exclusive=False'),
    'Muon': ('--muon_lr=0.02', '--muon_lr=0'),
}


def models(adamw_lr):
    """Return {name of a model: its options}."""
    def options(ingredients):
        for needed, name in (('relative colours', 'relative chroma'), ('12 neighbours', 'relative neighbours'),
                             ('local and column attention', 'ALiBi')):
            if needed not in ingredients:
                ingredients = ingredients - {name}
        chosen = [on if name in ingredients else off for name, (on, off) in INGREDIENTS.items()]
        return chosen if 'Muon' in ingredients else [*chosen, f'--learning_rate={adamw_lr}']

    everything = set(INGREDIENTS)
    return {
        'plain (nanoGPT)': options(set()),
        **{f'plain + {name}': options({name}) for name in INGREDIENTS
           if name not in ('ALiBi', 'relative chroma', 'relative neighbours')},
        'recommended': options(everything),
        **{f'recommended - {name}': options(everything - {name}) for name in INGREDIENTS},
    }


def train(out_dir, options):
    """Train a model unless its run is complete. Return its bits per pixel and the images per second."""
    if not any(out_dir.glob('ckpt[0-9]*.pt')):
        config = ROOT / 'config' / 'landscape.py'
        run_script('train.py', config, f'--out_dir={out_dir}', '--overwrite=True', '--reach=0', *options, quiet=True)
    rows = read_log(out_dir)
    steps = [row for row in rows if row['train_loss']]
    first, last = steps[0], steps[-1]  # the first window is a warm-up
    images = int(last['images']) - int(first['images'])
    seconds = float(last['seconds']) - float(first['seconds'])
    return float(rows[-1]['bits_per_pixel']), images / seconds


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('--data_dir', default='data/photos32')
    parser.add_argument('--out_dir', default='out/ablations', type=Path)
    parser.add_argument('--images', type=int, default=1200, help='200 or more')
    parser.add_argument('--seeds', type=int, nargs='*', default=[1, 2])
    parser.add_argument('--adamw_lr', type=float, default=2e-3)
    parser.add_argument('--only', nargs='*', help='names of models')
    args = parser.parse_args()
    seed_names = [f'seed {seed}' for seed in args.seeds]
    print(table_head('model', *seed_names, 'mean', 'difference', 'images/s'))
    shared_options = [f'--data_dir={args.data_dir}', '--batch_size=2', f'--max_iters={args.images // 2}',
                      '--eval_at=()', '--num_samples=1']
    base = None
    for name, options in models(args.adamw_lr).items():
        if args.only and name not in args.only:
            continue
        runs = []
        for seed in args.seeds:
            folder = f'{name}-{Path(args.data_dir).name}-{args.images}-{args.adamw_lr}-{seed}'.replace(' ', '_')
            runs.append(train((args.out_dir / folder).resolve(), [*shared_options, *options, f'--seed={seed}']))
        scores, speeds = zip(*runs)
        mean = sum(scores) / len(scores)
        base = mean if base is None or name == 'recommended' else base
        cells = [f'{score:.3f}' for score in scores]
        print(table_row(name, *cells, f'{mean:.3f}', f'{mean - base:+.3f}', f'{max(speeds):.1f}'), flush=True)


if __name__ == '__main__':
    main()
