"""What a user can do wrong: every mistake ends with one line that says what is wrong and what to do, and exit code 1.

Each line of MISTAKES is a command as it is typed and words of the answer.
"""
import importlib.util
import os
import pickle
import shutil
import subprocess

import pytest
import torch

from conftest import ENV, PIPED, TINY, call, command


class Evil:
    """A pickle that would run a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


MISTAKES = {
    # prepare.py
    'no such folder': ('prepare.py --source ./nowhere --out_dir {new}', 'there is no file or folder ./nowhere'),
    'a name without owner': ('prepare.py --source Picturez --out_dir {new}', 'there is no file or folder Picturez'),
    'not a Hub id': ('prepare.py --source a/b/c --out_dir {new}', 'there is no file or folder a/b/c'),
    'no such data set, or no network': ('prepare.py --source nobody/nothing-here --out_dir {new}',
                                        'cannot load nobody/nothing-here'),
    'the default source without network': ('prepare.py --out_dir {new}', 'try --source synthetic'),
    'a file for a folder': ('prepare.py --source {file} --out_dir {new}', 'it holds no pictures'),
    'no such parquet file': ('prepare.py --source {new}/x.parquet --out_dir {new}', 'there is no file'),
    'a parquet file that is none': ('prepare.py --source {bad_parquet} --out_dir {new}',
                                    '{bad_parquet} is no whole parquet file'),
    'an empty folder': ('prepare.py --source {empty} --out_dir {new}', 'no usable image'),
    'output into a file': ('prepare.py --source synthetic --out_dir {file}', 'cannot write to the folder'),
    'output below a file': ('prepare.py --source synthetic --out_dir {file}/data', 'cannot write to the folder'),
    'a size that is no number': ('prepare.py --source synthetic --size big --out_dir {new}',
                                 'write one number for squares, or width x height'),
    'a size of nothing': ('prepare.py --source synthetic --size 0 --out_dir {new}', 'argument --size: 0: write'),
    'all for validation': ('prepare.py --source synthetic --val_fraction 1 --out_dir {new}',
                           '--val_fraction=1.0: it has to be between 0 and 1'),
    'a negative seed': ('prepare.py --source synthetic --seed -1 --out_dir {new}', '--seed=-1'),
    'a seed beyond 64 bits': ('sample.py --ckpt {ckpt} --seed 9223372036854775808', 'from 0 to 2 ** 63 - 1'),
    'one picture alone': ('prepare.py --source synthetic --num_images 1 --out_dir {new}', 'at least two different'),
    'a misspelt option': ('prepare.py --sorce synthetic', 'unknown key --sorce: did you mean --source?'),
    'an option without value': ('prepare.py --source', 'expected at least one argument'),
    # train.py
    'no data': ('train.py --data_dir={new} --out_dir={new}', 'python prepare.py --out_dir'),
    'no config file': ('train.py config/landscap.py', 'no config file'),
    'a misspelt key': ('train.py --bach_size=8', 'unknown key --bach_size: did you mean --batch_size?'),
    'a misspelt key in a file': ('train.py {typo}', 'unknown key learning_rat, line 2 of'),
    'code in a config file': ('train.py {code}', 'holds only assignments'),
    'a call in a config file': ('train.py {callfile}', 'holds only assignments'),
    'a wrong type in a file': ('train.py {wrong}', "batch_size, line 1 of {wrong} takes int, not 'many'"),
    'a number without end': ('train.py {tiny} --learning_rate=1e999', 'has to be a finite number'),
    'a number without end in a file': ('train.py {endless}',
                                       'learning_rate, line 1 of {endless} has to be a finite number'),
    'a power that nobody waits for': ('train.py {tower}', 'holds only assignments'),
    'a key that the data decide': ('train.py {tiny} --block_size=1024', 'given by the data'),
    'a config file in UTF-16': ('train.py {utf16}', 'is no config file'),
    'a config that is no Python': ('train.py {file}', 'is no config file'),
    'a wrong type': ('train.py --max_iters=1e4', '--max_iters takes int, not 10000.0'),
    'a word for a number': ('train.py --learning_rate=fast', "--learning_rate takes float, not 'fast'"),
    'a number for a switch': ('train.py --flip=2', '--flip takes bool, not 2'),
    'a bad list': ('train.py --eval_at=(1.5,)', '--eval_at takes tuple of whole numbers'),
    'key and value apart': ('train.py batch_size=8', 'overrides are written --key=value'),
    'a batch of nothing': ('train.py {tiny} --batch_size=0', '--batch_size=0'),
    'a batch that cannot be shared': ('train.py {tiny} --gradient_accumulation_steps=3', 'a multiple of 3'),
    'an attention there is none of': ('train.py {tiny} --attention=rows', "name the layers' kinds"),
    'more neighbours than there are': ('train.py {tiny} --neighbours=99', 'from 0 to 24'),
    'distances that nothing sees': ('train.py {tiny} --alibi=True', 'alibi needs local or column attention'),
    'two dimensions without a start': ('train.py {tiny} --neighbours=3 --start_embedding=False',
                                       'need start_embedding=True'),
    'heads that do not fit': ('train.py {tiny} --n_head=5', 'cannot be shared by n_head=5 heads'),
    'a memory that never fades': ('train.py {tiny} --beta1=1.5', '--beta1=1.5: it has to be 0 or more and less than 1'),
    'a negative decay': ('train.py {tiny} --weight_decay=-1', '--weight_decay=-1.0: it has to be 0 or more'),
    'a model larger than the memory': ('train.py {tiny} --n_embd=200000000', 'out of memory'),
    'dropout of everything': ('train.py {tiny} --dropout=1.0', '--dropout=1.0'),
    'an unknown precision': ('train.py {tiny} --dtype=float8', 'choose auto'),
    'float16 on a CPU': ('train.py {tiny} --dtype=float16', 'does not work on cpu'),
    'CUDA where there is none': ('train.py {tiny} --device=cuda', 'use --device=auto'),
    'a device that holds nothing': ('train.py {tiny} --device=meta', 'use --device=auto'),
    'an unknown device': ('train.py {tiny} --device=gpu', 'use --device=auto'),
    'a word for compile': ('train.py {tiny} --compile=maybe', 'choose True, False or auto'),
    'a truncated train.bin': ('train.py {tiny} --data_dir={short}', 'whole images'),
    'a train.bin of half an image': ('train.py {tiny} --data_dir={half}', 'whole images'),
    'tokens that are no colours': ('train.py {tiny} --data_dir={words}', 'no 12-bit colour'),
    'tokens that are none, compiled': ('train.py {tiny} --compile=True --out_dir={new}out --data_dir={words}',
                                       'no 12-bit colour'),
    'tokens to validate with that are none': ('train.py {tiny} --max_iters=1 --out_dir={new}out --data_dir={valwords}',
                                              'no 12-bit colour'),
    'no val.bin': ('train.py {tiny} --data_dir={noval}', 'val.bin is missing'),
    'a damaged meta.pkl': ('train.py {tiny} --data_dir={badmeta}', 'is damaged'),
    'a meta.pkl that runs code': ('train.py {tiny} --data_dir={evilmeta}', 'is damaged or no plain dictionary'),
    'a meta.pkl of another vocabulary': ('train.py {tiny} --data_dir={vocabmeta}', '256 colours'),
    'a meta.pkl without its keys': ('train.py {tiny} --data_dir={emptymeta}', 'is damaged'),
    'output into a file when training': ('train.py {tiny} --out_dir={file}', 'cannot write to the folder'),
    'nothing to resume': ('train.py {tiny} --init_from=resume', 'nothing to resume'),
    'a log without a checkpoint': ('train.py {tiny} --out_dir={logonly}',
                                   'holds a run (log.csv): choose another --out_dir'),
    'a step too long': ('train.py {tiny} --out_dir={new}nan --muon_lr=1e30 --learning_rate=1e30 --log_interval=1',
                        'or --muon_lr (now 1e+30)'),
    'resuming from nowhere': ('train.py {tiny} --init_from={new}/ckpt1.pt', 'no checkpoint'),
    'resuming another model': ('train.py {tiny} --init_from={ckpt} --n_layer=3', 'has n_layer=2, this run n_layer=3'),
    'resuming with other batches': ('train.py {tiny} --init_from={ckpt} --batch_size=4',
                                    'has batch_size=8, this run batch_size=4'),
    'resuming what does not fit': ('train.py {tiny} --init_from={strange}', 'does not fit the model'),
    'resuming weights alone': ('train.py {tiny} --out_dir={weights} --init_from=resume',
                               'holds weights alone; --init_from='),
    'resuming what is done': ('train.py {tiny} --init_from={ckpt} --max_iters=20', 'raise --max_iters'),
    'resuming half a checkpoint': ('train.py {tiny} --init_from={halfckpt}', 'no readable checkpoint'),
    'wandb not installed': ('train.py {tiny} --wandb_log=True', 'pip install wandb'),
    # sample.py
    'no checkpoint named': ('sample.py', 'the following arguments are required: --ckpt'),
    'no such checkpoint': ('sample.py --ckpt {folder}/ckpt7.pt', 'there is {folder}/ckpt10.pt, {folder}/ckpt20.pt'),
    'no checkpoint at all': ('sample.py --ckpt {new}/ckpt7.pt', 'train one with'),
    'half a checkpoint': ('sample.py --ckpt {halfckpt}', 'no readable checkpoint'),
    'an empty checkpoint': ('sample.py --ckpt {emptyckpt}', 'no readable checkpoint'),
    'a checkpoint that runs code': ('sample.py --ckpt {evilckpt}', 'no readable checkpoint'),
    'a picture for a checkpoint': ('sample.py --ckpt {folder}/loss.png', 'no readable checkpoint'),
    'a checkpoint of another vocabulary': ('sample.py --ckpt {textckpt}', 'vocabulary of 50304'),
    'a checkpoint whose weights do not fit': ('sample.py --ckpt {misfit}', 'does not fit'),
    'a checkpoint without its shape': ('sample.py --ckpt {shapeless}', 'no readable checkpoint'),
    'a model that paints no square': ('sample.py --ckpt {oblong}', 'make no picture'),
    'no colour': ('sample.py --ckpt {ckpt} --first_pixel bluish --out {new}/a.png', 'three hex digits'),
    'drawing a pixel the model cannot draw': ('sample.py --ckpt {ancestor} --first_pixel sample --out {new}/a.png',
                                              'no start embedding'),
    'a negative temperature': ('sample.py --ckpt {ckpt} --temperature -1', '--temperature=-1.0'),
    'top_k of none': ('sample.py --ckpt {ckpt} --top_k 0', '--top_k=0'),
    'top_p above all': ('sample.py --ckpt {ckpt} --top_p 1.5', '--top_p=1.5'),
    'no samples': ('sample.py --ckpt {ckpt} --num_samples 0', '--num_samples=0'),
    'no such picture': ('sample.py --ckpt {ckpt} --image {new}/a.jpg --out {new}/a.png', 'no picture'),
    'a picture that is none': ('sample.py --ckpt {ckpt} --image {file} --out {new}/a.png',
                               'cannot be read as a picture'),
    'all rows kept': ('sample.py --ckpt {ckpt} --image {picture} --rows 16 --out {new}/a.png', '--rows=16'),
    'rows of no picture': ('sample.py --ckpt {ckpt} --rows 8', 'name the picture with --image'),
    'a page for an address elsewhere': ('sample.py --ckpt {ckpt} --web --host 192.0.2.1', 'an address of this machine'),
    'an option that the page asks for': ('sample.py --ckpt {ckpt} --web --first_pixel F85', 'no use for --first_pixel'),
    'a picture and a first pixel': ('sample.py --ckpt {ckpt} --image {picture} --first_pixel FEC',
                                    'leave out --first_pixel'),
    'an animation over its sheet': ('sample.py --ckpt {ckpt} --gif --out {new}/a.gif',
                                    'end the name of the sheet, --out, in .png'),
    'an unknown picture format': ('sample.py --ckpt {ckpt} --out {new}/a.xyz', 'end the name in .png'),
    'a format that is only read': ('sample.py --ckpt {ckpt} --out {new}/a.blp', 'end the name in .png'),
    'a folder for a sheet': ('sample.py --ckpt {ckpt} --out {pngfolder}', 'is a folder: give the name of a picture'),
    'a folder for a checkpoint': ('sample.py --ckpt {folder}', 'there is {folder}/ckpt10.pt, {folder}/ckpt20.pt'),
    'a whole model for a checkpoint': ('sample.py --ckpt {wholemodel}', 'no readable checkpoint'),
    'a checkpoint with no heads': ('sample.py --ckpt {headless}', 'does not fit the model'),
    'a sheet into a file as a folder': ('sample.py --ckpt {ckpt} --out {file}/a.png', 'cannot write to the folder'),
    'CUDA for sampling where there is none': ('sample.py --ckpt {ckpt} --device cuda --out {new}/a.png',
                                              'use --device=auto'),
    # bench/
    'quality beside no data': ('bench/quality.py --ckpt {ckpt} --data {new}', 'no data set in'),
    'speed of no checkpoint': ('bench/sampling.py --ckpt {new}/ckpt7.pt', 'no checkpoint'),
    'a misspelt option of sample.py': ('sample.py --ckpt {ckpt} --temprature 1', 'did you mean --temperature?'),
}
if torch.cuda.is_available():
    MISTAKES = {name: case for name, case in MISTAKES.items() if 'CUDA' not in name}
if importlib.util.find_spec('wandb'):
    del MISTAKES['wandb not installed']


@pytest.fixture(scope='module')
def places(data, trained, tmp_path_factory):
    """The broken files that the commands speak of."""
    here = tmp_path_factory.mktemp('mistakes')
    places = dict(new=here / 'new', file=here / 'file.txt', empty=here / 'empty', mark=here / 'mark', folder=trained,
                  ckpt=trained / 'ckpt20.pt', picture=trained / 'images' / 'output20.png')
    places['file'].write_text('words, no code')
    places['empty'].mkdir()
    configs = dict(
        typo='# a comment\nlearning_rat = 1e-3\n',
        code='import os\n',
        callfile="out_dir = open('x')\n",
        wrong="batch_size = 'many'\n",
        endless='learning_rate = 1e999\n',
        tower='max_iters = 9 ** 9 ** 9\n',
    )
    for name, text in configs.items():
        places[name] = here / f'{name}.py'
        places[name].write_text(text)
    places['utf16'] = here / 'utf16.py'
    places['utf16'].write_text('batch_size = 8\n', encoding='utf-16')
    places['bad_parquet'] = here / 'bad.parquet'
    places['bad_parquet'].write_bytes(b'PAR1 no')

    def broken_data(name, file, content):
        places[name] = here / name
        shutil.copytree(data, places[name])
        if content is None:
            (places[name] / file).unlink()
        else:
            (places[name] / file).write_bytes(content)

    train_bin, meta = (data / 'train.bin').read_bytes(), pickle.loads((data / 'meta.pkl').read_bytes())
    broken_data('short', 'train.bin', train_bin[:len(train_bin) // 2])
    broken_data('half', 'train.bin', train_bin[:-100])
    broken_data('words', 'train.bin', b'\xff' * len(train_bin))
    broken_data('valwords', 'val.bin', b'\xff' * (data / 'val.bin').stat().st_size)
    broken_data('noval', 'val.bin', None)
    broken_data('badmeta', 'meta.pkl', (data / 'meta.pkl').read_bytes()[:20])
    broken_data('evilmeta', 'meta.pkl', pickle.dumps({**meta, 'source': Evil(places['mark'])}))
    broken_data('vocabmeta', 'meta.pkl', pickle.dumps({**meta, 'vocab_size': 256}))
    broken_data('emptymeta', 'meta.pkl', pickle.dumps({}))

    good = torch.load(places['ckpt'], weights_only=True)

    def broken_checkpoint(name, **changes):
        places[name] = here / f'{name}.pt'
        torch.save({**good, **changes}, places[name])

    broken_checkpoint('evilckpt', config=Evil(places['mark']))
    broken_checkpoint('textckpt', model_args={**good['model_args'], 'vocab_size': 50304})
    broken_checkpoint('misfit', model_args={**good['model_args'], 'n_embd': 64})
    broken_checkpoint('oblong', height=7)
    broken_checkpoint('shapeless', model_args={'vocab_size': 4096})
    broken_checkpoint('strange', model={})
    broken_checkpoint('headless', model_args={**good['model_args'], 'n_head': 0})
    places['wholemodel'] = here / 'model.pt'
    torch.save(torch.nn.Linear(2, 2), places['wholemodel'])
    for name in ('pngfolder', 'logonly'):
        places[name] = here / f'{name}.png'
        places[name].mkdir()
    (places['logonly'] / 'log.csv').write_text('iteration,images\n5,40\n')
    places['weights'] = here / 'weights'
    places['weights'].mkdir()
    weights = {name: good[name] for name in ('model', 'model_args', 'height', 'width')}
    torch.save(weights, places['weights'] / 'ckpt20.pt')
    places['ancestor'] = here / 'ancestor.pt'
    args = {name: value for name, value in good['model_args'].items() if name != 'start_embedding'}
    model = {name: tensor[:255] if 'wpe' in name else tensor
             for name, tensor in good['model'].items() if 'wse' not in name}
    torch.save(dict(model_args={**args, 'block_size': 255}, model=model), places['ancestor'])
    places['halfckpt'], places['emptyckpt'] = here / 'half.pt', here / 'empty.pt'
    places['halfckpt'].write_bytes(places['ckpt'].read_bytes()[:100_000])
    places['emptyckpt'].write_bytes(b'')
    places['tiny'] = ' '.join([*TINY, f'--data_dir={data}', f'--out_dir={here}/out'])
    return places


@pytest.mark.parametrize('name', MISTAKES)
def test_one_line_and_a_non_zero_exit(name, places):
    line, words = (text.format(**places) for text in MISTAKES[name])
    printed = call(*line.split(' '), code=1)
    *before, message = printed.splitlines()
    for said in filter(None, before):  # no traceback, no warning
        assert (said.startswith(('reading:', 'not used:', 'iter ', 'compiling'))
                or ' parameters (' in said or ' training and ' in said)
    assert message.startswith('error: ') and words in message and message.isprintable()
    assert not places['mark'].exists()  # no file has run code


@pytest.mark.parametrize('name', ['a size of nothing', 'a checkpoint that runs code'])
def test_so_does_a_command_typed_at_a_prompt(name, places):
    line, words = (text.format(**places) for text in MISTAKES[name])
    done = subprocess.run(command(*line.split(' ')), **PIPED)
    assert done.returncode == 1 and done.stdout.startswith('error: ') and words in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not places['mark'].exists()


def test_the_pickles_are_live(places):
    pickle.loads((places['evilmeta'] / 'meta.pkl').read_bytes())  # the standard loader runs what the scripts did not
    assert places['mark'].exists()
    places['mark'].unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_without_permission(data, tmp_path):
    (tmp_path / 'locked').mkdir(mode=0o500)
    out = call('train.py', *TINY, f'--data_dir={data}', f'--out_dir={tmp_path}/locked', code=1)
    assert 'cannot write to the folder' in out


def test_commands_run_from_any_folder(data, tmp_path):
    def typed(*line):
        subprocess.run(command(*line), env=ENV, cwd=tmp_path, check=True)
    typed('train.py', 'config/demo.py', *TINY, f'--data_dir={data}', '--out_dir=mine', '--max_iters=1')
    assert (tmp_path / 'mine' / 'ckpt1.pt').exists()
    typed('sample.py', '--ckpt', 'mine/ckpt1.pt', '--num_samples', 1, '--out', 'picture.png')
    assert (tmp_path / 'picture.png').exists()
