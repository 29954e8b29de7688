"""What each ingredient is worth: alone on the plain model, and taken away from the recommended one.

    python prepare.py --source PHOTOS --size 32 --out_dir data/photos32
    python bench/ablations.py --data_dir data/photos32              # 15 models, two seeds: two hours on two slow cores

Every model sees the same images in the same order, two at a time, with the schedule and the learning rates of config/landscape.py; the
score is bits per pixel on all validation images. --adamw_lr is that of the models without Muon, for embeddings as for matrices. Runs
that are complete are not repeated. Leave the machine idle.
"""
import argparse
import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name: (switched on, switched off)
INGREDIENTS = {'row + column positions': ('--row_column_positions=True', '--row_column_positions=False'),
               '12 neighbours': ('--neighbours=12', '--neighbours=0'),
               'factorised colours': ('--factorised_colours=True', '--factorised_colours=False'),
               'relative colours': ('--relative_colours=True', '--relative_colours=False'),
               'local and column attention': ('--attention=local column', '--attention=full'),
               'ALiBi': ('--alibi=True', '--alibi=False'),
               'Muon': ('--muon_lr=0.02', '--muon_lr=0')}


def models(adamw_lr):
    """-> {name: options}"""
    def options(on):
        chosen = [switches[not name in on] for name, switches in INGREDIENTS.items()]
        return chosen if 'Muon' in on else [*chosen, f'--learning_rate={adamw_lr}']
    everything = set(INGREDIENTS)
    return {'plain (nanoGPT)': options(set()), **{f'plain + {name}': options({name}) for name in INGREDIENTS if name != 'ALiBi'},
            'recommended': options(everything), **{f'recommended - {name}': options(everything - {name}) for name in INGREDIENTS}}


def run(out_dir, options):
    """One training run, unless it is there already -> (bits per pixel, images a second)."""
    log = out_dir / 'log.csv'
    if not any(out_dir.glob('ckpt[0-9]*.pt')):
        subprocess.run([sys.executable, str(ROOT / 'train.py'), str(ROOT / 'config' / 'landscape.py'), f'--out_dir={out_dir}', '--overwrite=True', *options],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(log, newline='') as f:
        rows = list(csv.DictReader(f))
    steps = [row for row in rows if row['train_loss']]
    first, last = steps[0], steps[-1]  # the first window is a warm-up
    speed = (int(last['images']) - int(first['images'])) / (float(last['seconds']) - float(first['seconds']))
    return float(rows[-1]['bits_per_pixel']), speed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='data/photos32')
    parser.add_argument('--out_dir', default='out/ablations', type=Path)
    parser.add_argument('--images', type=int, default=1200, help='200 or more')
    parser.add_argument('--seeds', type=int, nargs='*', default=[1, 2])
    parser.add_argument('--adamw_lr', type=float, default=2e-3)
    parser.add_argument('--only', nargs='*', help='names of models')
    args = parser.parse_args()
    print(f'| model | {" | ".join(f"seed {seed}" for seed in args.seeds)} | mean | difference | images/s |\n|---|{"---|" * (len(args.seeds) + 3)}')
    base = None
    for name, options in models(args.adamw_lr).items():
        if args.only and name not in args.only:
            continue
        common = [f'--data_dir={args.data_dir}', '--batch_size=2', f'--max_iters={args.images // 2}', '--eval_at=()', '--num_samples=1', *options]
        scores, speeds = zip(*(run((args.out_dir / f'{name}-{Path(args.data_dir).name}-{args.images}-{args.adamw_lr}-{seed}'.replace(' ', '_')).resolve(), [*common, f'--seed={seed}']) for seed in args.seeds))
        mean = sum(scores) / len(scores)
        base = mean if base is None or name == 'recommended' else base
        print(f'| {name} | {" | ".join(f"{s:.3f}" for s in scores)} | {mean:.3f} | {mean - base:+.3f} | {max(speeds):.1f} |', flush=True)


if __name__ == '__main__':
    main()
