"""The record track: two CPU cores, one hour, 64x64 synthetic landscapes; the score is bits per pixel on their validation images.

    python bench/record.py config/landscape.py [--key=value ...]       # config/seed.py is the first row of the table

Draws the data if they are not there yet (10,000 images from seed 1337, 1,000 of them for validation; the same bytes on every machine),
measures a few iterations, and trains for as many as fit into the hour, validation not counted. Leave the machine idle.
"""
import csv
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA, HOUR = ROOT / 'data' / 'track', 3600


def train(out_dir, options):
    """A training run -> the rows of its log."""
    subprocess.run([sys.executable, str(ROOT / 'train.py'), *options, f'--data_dir={DATA}', f'--out_dir={out_dir}', '--num_samples=16', '--overwrite=True'], check=True)
    with open(out_dir / 'log.csv', newline='') as f:
        return list(csv.DictReader(f))


def main():
    options = sys.argv[1:]
    if not options or not options[0].endswith('.py'):
        sys.exit(__doc__)
    out_dir = ROOT / 'out' / 'record' / '_'.join([Path(options[0]).stem, *(o.strip('-').replace('/', '') for o in options[1:])])
    if not (DATA / 'meta.pkl').exists():
        subprocess.run([sys.executable, str(ROOT / 'prepare.py'), '--source', 'synthetic', '--num_images', '10000', '--seed', '1337', '--out_dir', str(DATA)], check=True)
    # a trial run tells the seconds of an iteration
    times = [float(row['seconds']) for row in train(out_dir / 'trial', [*options, '--max_iters=10', '--log_interval=1', '--eval_at=()', '--eval_interval=0']) if row['train_loss']]
    iterations = int(HOUR / statistics.median(after - before for before, after in zip(times, times[1:])))
    rows = train(out_dir, [*options, f'--max_iters={iterations}', '--eval_at=()', '--eval_interval=0'])
    last = [row for row in rows if row['val_loss']][-1]
    print(f"\n{' '.join(options)}: {float(last['bits_per_pixel']):.3f} bits per pixel after {int(last['images']):,} images in {float(last['seconds']) / 60:.0f} min, "
          f"{int(last['images']) / float(last['seconds']):.2f} images/s")


if __name__ == '__main__':
    main()
