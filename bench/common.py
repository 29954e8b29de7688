"""Share what several scripts of bench/ need. Importing it first makes the modules of the repository importable."""
import argparse
import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def argument_parser(description):
    """Return a parser that shows the docstring of a script as it is."""
    return argparse.ArgumentParser(description=description, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def command(script, *args):
    """Return the command line that runs a Python script of the repository."""
    return [sys.executable, str(ROOT / script), *map(str, args)]


def run_script(script, *args, quiet=False):
    """Run a Python script of the repository. Raises CalledProcessError if it fails."""
    output = subprocess.DEVNULL if quiet else None
    subprocess.run(command(script, *args), check=True, stdout=output, stderr=output)


def read_log(out_dir):
    """Return the rows of the log.csv that train.py writes, as dictionaries of strings."""
    with open(out_dir / 'log.csv', newline='') as f:
        return list(csv.DictReader(f))


def device_name(device):
    """Return the name of a CUDA device, otherwise the number of CPU threads."""
    import torch  # here, because two of the scripts do without it
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else f'{torch.get_num_threads()} threads'


def table_row(*cells):
    """Return a row of a Markdown table."""
    return f'| {" | ".join(map(str, cells))} |'


def table_head(*names):
    """Return the first two lines of a Markdown table."""
    return table_row(*names) + '\n|' + '---|' * len(names)
