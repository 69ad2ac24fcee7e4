"""What `train` refuses before anything long is begun, and whose folder is whose; timm's real train.py throughout."""

import json
import os
import shutil
import signal
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from timm_poolattn.models.cifar_resnet import CifarResNet
from timm_poolattn.training import finetune, read_curve, read_run, train
from timm_poolattn.training.arguments import check_arguments, parse_arguments
from timm_poolattn.training.records import new_folder, own_folder
from timm_poolattn.training.runner import _create_dataset
from timm_poolattn.training.timm_script import load_train_script
from timm_poolattn.utils import MissingFileError, UserError

from .test_options import run_train
from .test_recovery import signal_after, start


@pytest.fixture(scope='module')
def trained(train_script, cifar10_few, tmp_path_factory) -> Path:
    """The folder of a run of two epochs, which the tests only read."""
    output = tmp_path_factory.mktemp('trained')
    return run_train(train_script, cifar10_few, output, '--model', 'resnet20.cifar10', '--epochs', 2, '-b', 40)


def refused(train_script, data, output, *options, match, kind=UserError, **kwargs):
    """`train` ends in one line before its folder is made."""
    with pytest.raises(kind, match=match) as e:
        run_train(train_script, data, output, *options, **kwargs)
    assert '\n' not in str(e.value) and not (output / 'run').exists()


@pytest.mark.parametrize(
    'options, match',
    [
        (['--model', 'resnet20_samm.cifar10'], "unknown model 'resnet20_samm.cifar10'; nearest: resnet20_saam.cifar10"),
        (['--model', 'resnet20_saam.cifar1'], 'nearest: resnet20_saam.cifar100?, '),
        (['--kd-model-name', 'resnet20_samm'], "unknown model 'resnet20_samm'; nearest: resnet20_saam"),
        (['--device', 'foo'], "no device 'foo' here; choose from cpu"),
        (['--device', 'cuda:99'], "no device 'cuda:99' here"),
        (['--opt', 'sdg'], "unknown optimizer 'sdg'; nearest: .*for --opt"),
        (['--sched', 'cosin'], "unknown schedule 'cosin'; choose from cosine, "),
        (['--model', 'resnet110_fa', '--pretrained'], 'resnet110_fa has no weights yet; near models have: resnet'),
        (['--model-kwargs', 'colour=red'], '--model resnet20_spem.cifar10 with these arguments cannot be: .*colour'),
        (['--model-kwargs', 'drop_rate=0.1'], '--model-kwargs: .*: drop_rate is --drop'),
        (['--model', 'resnet20.cifar100'], r'10 classes, and the model has 100; give --num-classes 10'),
        (['--num-classes', 9], '10 classes, and the model has 9; give --num-classes 10'),
        (['--epochs', 0], '--epochs is 0, and must be at least 1'),
        (['-b', -4], '--batch-size is -4, and must be at least 1'),
        (['--input-size', 3, 0, 0], '--input-size is 0, and must be at least 1'),
        (['--img-size', 40_000], 'images would be resized to 40000x40000; 67,108,864 pixels are the most'),
        (['--in-chans', 1, '--input-size', 3, 32, 32], '--in-chans 1 and --input-size of 3 channels: give one'),
        (['--in-chans', 4], 'images are read as 1 .grey. or 3'),
        (['--gp', ''], '--model resnet20_spem.cifar10 with these arguments cannot be: RuntimeError: mat1 and mat2'),
        (['--input-img-mode', 'L'], '--input-img-mode L: images of 3 channels are RGB'),
        (['--mean', 0.5, 0.5], '--mean: 2 numbers for 3 channels'),
        (['--std', 0, 0, 0], '--std is 0, and must be 0.001 to 1'),
        (['--crop-pct', 0], '--crop-pct is 0, and must be 0.001 to 1'),
        (['--smoothing', 5], '--smoothing is 5, and must be 0 to 1'),
        (['--lr', 'nan'], '--lr is nan, and must be at least 1e-12'),
        (['--interpolation', 'evil'], "unknown interpolation 'evil'; choose from nearest, "),
        (['--num-classes', 0], '--num-classes is 0, and must be at least 1'),
        (['--lr', 0], '--lr is 0, and must be at least 1e-12'),
        (['--mixup-mode', 'elm'], "unknown mode 'elm'; choose from batch, pair, elem, half; for --mixup-mode"),
        (['--lr-base-scale', 'sqr'], "unknown scaling 'sqr'; choose from linear, sqrt; for --lr-base-scale"),
        (['--dist-bn', 'x'], "unknown way 'x'; choose from reduce, broadcast; for --dist-bn"),
        (['--bce-loss', '--smoothing', 0], '--bce-loss: train.py has it for smoothed or mixed classes alone'),
        (['photos'], 'photos and --data-dir .*: train.py reads one folder; leave one out'),
        (['--sched', 'step', '--cooldown-epochs', 5, '--start-epoch', 1], '--start-epoch 1: counted from 0'),
        (['--kd-model-name', 'resnet20.cifar100'], '--kd-model-name .*: of 100 classes, and the model has 10'),
        (['--worker-seeding', 'evil'], "unknown seeding 'evil'; choose from all, part; for --worker-seeding"),
        (['--wieght-decay', 5], "^unknown argument '--wieght-decay'; nearest: --weight-decay"),
        (['--epochs', 3, '--start-epoch', 3], '--start-epoch 3: counted from 0, the last of --epochs 3 is 2'),
        (['--epohcs=3'], "^unknown argument '--epohcs'; nearest: --epochs"),
        (['--epochs', 'x'], "train.py: argument --epochs: invalid int value: 'x'; `python train.py -h` describes"),
        (['--kd-distill-type', 'x'], 'train.py: argument --kd-distill-type: invalid choice'),
        (['--tta', 2], '--tta: train.py evaluates something else'),
        (['--momentum', 5], '--momentum is 5, and must be 0 to 1'),
        (['--sched', 'step', '--decay-epochs', 0], '--decay-epochs is 0, and must be at least 1'),
        (['--model-ema', '--model-ema-decay', 5], '--model-ema-decay is 5, and must be 0 to 1'),
        (
            ['--clip-grad', 1, '--clip-mode', 'evil'],
            "unknown mode 'evil'; choose from norm, value, agc; for --clip-mode",
        ),
        (['--eval-metric', 'accuracy'], "unknown metric 'accuracy'; choose from top1, "),
        (['--model-kwargs', 'red'], 'an argument cannot be read .*--model-kwargs and its like take name=value'),
        (['--amp', '--amp-dtype', 'int4'], 'train.py takes no such arguments: .*AssertionError: assert .*amp_dtype'),
        (['--split-bn'], 'train.py takes no such arguments: .*AssertionError: assert .*num_aug_splits > 1'),
        (['--mixup', 0.2, '-b', 15], '--batch-size 15: mixup and cutmix pair images; give an even number'),
        (['--cutmix', 1, '-b', 1, '--no-prefetcher'], '--batch-size 1: mixup and cutmix pair images'),
        (['--cutmix-minmax', 0.8, 0.2], '--cutmix-minmax 0.8 0.2: give two numbers, the lesser first'),
        (['--cutmix-minmax', 0.2], '--cutmix-minmax 0.2: give two numbers'),
        (['--epoch-repeats', 2], '--epoch-repeats: train.py has no use for it but with data that are read as a stream'),
        (['--train-num-samples', 20], r'--train-num-samples: .*--dataset hfids/, tfds/, wds/.; leave it out'),
        (['--dataset', 'torch/image_folder'], '--dataset torch/image_folder: leave it out; --data-dir alone names'),
        (['--aa', 'evil'], 'train.py takes no such arguments: .*Unknown'),
        (['--dataset', 'tfds/x'], 'train.py takes no such arguments: .*tensorflow'),
        (['--experiment', 'x' * 300], 'x: cannot be made .File name too long'),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, list) else '',
)
def test_names_and_classes(train_script, cifar10_few, tmp_path, options, match):
    refused(train_script, cifar10_few, tmp_path, *options, match=match)


@pytest.mark.parametrize(
    'options', ['--sched wsd --decay-epochs 0.5 --cooldown-epochs 1', '--warmup-epochs 1 --warmup-prefix']
)
def test_the_last_epoch_that_one_can_start_at(train_script, options):
    argv = ['--model', 'resnet20.cifar10', '--epochs', '2', *options.split(), '--start-epoch']
    check_arguments(parse_arguments(load_train_script(train_script), [*argv, '2'], None).args)
    with pytest.raises(UserError, match='--start-epoch 3: counted from 0'):
        check_arguments(parse_arguments(load_train_script(train_script), [*argv, '3'], None).args)


def test_a_folder_that_is_typed_goes_before_the_configs(train_script, tmp_path):
    (tmp_path / 'args.yaml').write_text('data: photos\nmodel: resnet20.cifar10')
    argv = ['--config', str(tmp_path / 'args.yaml')]
    for typed, data, data_dir in (([], 'photos', None), (['a'], 'a', None), (['--data-dir', 'a'], None, 'a')):
        parsed = parse_arguments(load_train_script(train_script), [*argv, *typed], None)
        assert (parsed.args.data, parsed.args.data_dir) == (data, data_dir)
        assert yaml.safe_load(parsed.text)['data_dir'] == data_dir


def test_options_of_ours(train_script, cifar10_few, tmp_path):
    for weight in (-1, float('nan'), float('inf')):
        refused(train_script, cifar10_few, tmp_path, match='--penalty-weight is .* at least 0', penalty_weight=weight)
    argv = ['--model', 'resnet20.cifar10', '--data-dir', str(cifar10_few), '--output', str(tmp_path)]
    with pytest.raises(UserError, match='--resume auto: give --experiment too'):
        train([*argv, '--resume', 'auto'], timm_script=train_script)


def test_no_model(train_script, cifar10_few, tmp_path):
    with pytest.raises(UserError, match=r'no model: give --model, .*or a --recipe that names one'):
        train(['--data-dir', str(cifar10_few), '--output', str(tmp_path)], timm_script=train_script)
    assert not list(tmp_path.glob('*-*'))


def test_no_data(train_script, cifar10_few, tmp_path):
    refused(train_script, '', tmp_path, match='where are the images')
    refused(train_script, tmp_path / 'nowhere', tmp_path, match='nowhere: no such', kind=FileNotFoundError)
    options = ['--val-split', 'nosuch']
    refused(train_script, cifar10_few, tmp_path, *options, match="no split 'nosuch'", kind=FileNotFoundError)


@pytest.mark.parametrize(
    'text, match',
    [
        ('- 1', 'not a mapping of arguments to values'),
        ('', 'not a mapping of arguments to values'),
        ('a: [', 'no YAML'),
        ('epohcs: 3', "unknown argument 'epohcs'; nearest: epochs; --config .*"),
    ],
)
def test_a_recipe_that_is_none(train_script, cifar10_few, tmp_path, text, match):
    (tmp_path / 'x.yaml').write_text(text)
    refused(train_script, cifar10_few, tmp_path, '--config', tmp_path / 'x.yaml', match=match)
    refused(
        train_script, cifar10_few, tmp_path, '--config', tmp_path / 'y.yaml', match='no file', kind=MissingFileError
    )
    both = ['--config', tmp_path / 'x.yaml']
    refused(
        train_script, cifar10_few, tmp_path, *both, match='take one .*`poolattn train` takes either', recipe='finetune'
    )


@pytest.mark.parametrize('option', ['--initial-checkpoint', '--resume'])
@pytest.mark.parametrize('kind', ['missing', 'text', 'foreign', 'another'])
def test_foreign_checkpoints(train_script, cifar10_few, tmp_path, option, kind):
    path = tmp_path / ('x.safetensors' if option == '--initial-checkpoint' and kind != 'another' else 'x.pth.tar')
    if kind == 'text':
        path.write_text('weights')
    elif kind == 'foreign':
        save_file({'a': torch.zeros(2)}, path)
        if option == '--resume':
            torch.save({'a': torch.zeros(2)}, path)
    elif kind == 'another':
        torch.save(dict(epoch=1, state_dict=timm.create_model('resnet20_saam').state_dict()), path)
    expected = MissingFileError if kind == 'missing' else UserError
    refused(train_script, cifar10_few, tmp_path, option, path, match=f'{option}.*{path}|{path}', kind=expected)


def test_a_broken_image_in_timms_loader(train_script, image_folder, tmp_path):
    path = image_folder / 'train' / 'dog' / '3.png'
    path.write_bytes(path.read_bytes()[:200])
    options = ['--num-classes', 2, '--workers', 1]
    match = 'dog/3.png cannot be decoded as an image .*; repair or remove it$'
    refused(train_script, image_folder, tmp_path, *options, match=f'^{image_folder}: {match}', resident=False)


@pytest.mark.parametrize(
    'kind, raised, match',
    [
        (torch.OutOfMemoryError, UserError, '^--batch-size 16: cpu has not the memory; give less$'),
        (RuntimeError, RuntimeError, '^in the first batch$'),  # no argument's fault: it keeps its traceback
    ],
)
def test_what_ends_the_first_batch(train_script, cifar10_few, tmp_path, monkeypatch, kind, raised, match):
    def forward(self, x):
        if self.training:
            raise kind('in the first batch')
        return plain(self, x)

    plain = CifarResNet.forward
    monkeypatch.setattr(CifarResNet, 'forward', forward)
    with pytest.raises(raised, match=match):
        run_train(train_script, cifar10_few, tmp_path)
    assert not [*tmp_path.glob('run'), *tmp_path.glob('20*')]


def test_a_refused_run_without_a_name_leaves_nothing(train_script, cifar10_few, tmp_path):
    argv = ['--model', 'resnet20', '--num-classes', '9', '--data-dir', str(cifar10_few), '--output', str(tmp_path)]
    with pytest.raises(UserError, match='give --num-classes 10'):
        train(argv, timm_script=train_script)
    assert not [*tmp_path.glob('run'), *tmp_path.glob('20*')]


def test_less_than_a_batch_in_timms_loader(train_script, image_folder, tmp_path):
    """It would train on nothing, without a word."""
    options = ['--num-classes', 2, '--workers', 0, '-b', 17]
    match = '--batch-size 17: 16 images to train on are not one batch; give at most 16'
    refused(train_script, image_folder, tmp_path, *options, match=match, resident=False)


def test_less_than_a_batch_for_each_process(image_folder, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    args = Namespace(batch_size=9, train_split='train', model='resnet20', crop_pct=None)
    match = '--batch-size 9: 8 images to train on for each of 2 processes are not one batch; give at most 8'
    with pytest.raises(UserError, match=match):
        _create_dataset(args, None, None, None, '', image_folder, 'train', is_training=True)
    args.batch_size, args.aug_repeats = 1, 3  # of which timm takes multiples of 256 images
    with pytest.raises(UserError, match='--batch-size 1: 0 images to train on for each of 2 processes'):
        _create_dataset(args, None, None, None, '', image_folder, 'train', is_training=True)
    with pytest.raises(UserError, match='finetune: is one process'):
        finetune(image_folder, [])


def test_fewer_classes_than_the_model_if_the_user_says_so(train_script, cifar10_few, tmp_path):
    run = read_run(run_train(train_script, cifar10_few, tmp_path, '--num-classes', 12, '--model', 'resnet20', '-b', 40))
    assert len(run.classes) == 10 and run.build_model().num_classes == 12


@pytest.mark.parametrize('resident', [True, False])
def test_the_classes_are_recorded(train_script, image_folder, tmp_path, resident):
    options = ['--model', 'resnet20', '--workers', 0, '--num-classes', 2, '--val-split', 'test']
    folder = run_train(train_script, image_folder, tmp_path, *options, resident=resident)
    record = json.loads((folder / 'run.json').read_text())
    assert record['classes'] == read_run(folder).classes == ['cat', 'dog']
    assert record['options']['resident'] is resident


class TestFolder:
    def test_another_run_is_refused(self, train_script, cifar10_few, trained):
        before = {path: path.read_bytes() for path in trained.iterdir()}
        match = r'run: holds another run \(2 epochs\); --experiment names another folder, or --resume .*last\.pth\.tar'
        with pytest.raises(UserError, match=match):
            run_train(train_script, cifar10_few, trained.parent, '--model', 'resnet20.cifar10', '--epochs', 1)
        assert {path: path.read_bytes() for path in trained.iterdir()} == before

    def test_a_checkpoint_of_another_folder_does_not_mix_two_runs(self, train_script, cifar10_few, trained, tmp_path):
        shutil.copytree(trained, tmp_path / 'run')
        with pytest.raises(UserError, match='holds another run'):
            options = ['--model', 'resnet20.cifar10', '--epochs', 3, '--resume', trained / 'last.pth.tar']
            run_train(train_script, cifar10_few, tmp_path, *options)

    def test_two_in_one_second_get_two(self, train_script, tmp_path):
        folders = [new_folder(tmp_path, 'x') for _ in range(5)]
        assert len(set(folders)) == 5 and all(folder.is_dir() for folder in folders)

    def test_two_processes_do_not_train_into_one(self, tmp_path):
        with own_folder(tmp_path / 'run', '', is_new=True):
            pid = os.fork()
            if not pid:
                with suppress(BaseException):
                    with pytest.raises(UserError, match='another process trains into it'):
                        own_folder(tmp_path / 'run', '', is_new=True).__enter__()
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
            assert (tmp_path / 'run').is_dir()  # both found it missing; the one that is refused removes nothing

    def test_a_run_without_an_epoch_gives_way(self, train_script, cifar10_few, tmp_path):
        """What a kill in the first epoch leaves."""
        (tmp_path / 'run').mkdir()
        (tmp_path / 'run' / 'run.json').write_text('{"arguments": {}, "wall_time_s": 1000}')
        (tmp_path / 'run' / 'summary.csv').write_text('epoch,tra')
        folder = run_train(train_script, cifar10_few, tmp_path, '-b', 40, '--model', 'resnet20')
        assert json.loads((folder / 'run.json').read_text())['wall_time_s'] < 1000
        assert [row['epoch'] for row in read_curve(folder)] == [0]


def test_resume_on_other_data(train_script, cifar10_few, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    shutil.copytree(cifar10_few, tmp_path / 'data')
    for split in ('train', 'test'):
        (tmp_path / 'data' / split / 'airplane').rename(tmp_path / 'data' / split / 'yak')
    options = ['--model', 'resnet20.cifar10', '--epochs', 3, '--resume', 'auto']
    match = r'its classes are 10 \(automobile, ...\), not the 10 \(airplane, ...\) that the run to resume is trained on'
    with pytest.raises(UserError, match=match):
        run_train(train_script, tmp_path / 'data', tmp_path, *options)


def test_resume_after_a_cut_row(train_script, cifar10_few, trained, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(trained, folder)
    summary = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text(summary[:-8])
    run_train(train_script, cifar10_few, tmp_path, '--model', 'resnet20.cifar10', '--epochs', 3, '--resume', 'auto')
    assert [row['epoch'] for row in read_curve(folder)] == [0, 2]
    assert json.loads((folder / 'run.json').read_text())['resumed'][0]['after_epochs'] == 2


def test_a_resumed_plateau_is_refused(train_script, cifar10_few, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    with pytest.raises(UserError, match='--sched plateau: no checkpoint holds where it is'):
        run_train(train_script, cifar10_few, tmp_path, '--sched', 'plateau', '--epochs', 3, '--resume', 'auto')
    with pytest.raises(UserError, match=r'holds another run \(2 epochs\); --experiment names another folder$'):
        run_train(train_script, cifar10_few, tmp_path, '--sched', 'plateau', '--epochs', 3)


def test_a_kill_keeps_time_and_history(train_script, cifar10_few, tmp_path):
    """run.json is there from the start; resumed after SIGKILL, it knows the time and the arguments of both parts."""
    options = ['-b', 8, '--warmup-epochs', 0, '--lr', 0.05, '--opt', 'momentum']
    process = start(train_script, cifar10_few, tmp_path, *options, '--epochs', 3)
    code, log = signal_after(process, epoch=1, update=2, number=signal.SIGKILL)
    assert code == -signal.SIGKILL, log
    path = tmp_path / 'run' / 'run.json'
    record = json.loads(path.read_text())
    assert record['arguments']['epochs'] == 3 and record['seed'] == 42 and record['classes'][3] == 'cat'
    path.write_text(json.dumps({**record, 'wall_time_s': 1000}))
    run_train(train_script, cifar10_few, tmp_path, *options, '--epochs', 2, '--resume', 'auto')
    after = json.loads(path.read_text())
    assert 1000 <= after['wall_time_s'] < 2000 and after['arguments']['epochs'] == 2
    (part,) = after['resumed']
    assert part['arguments']['epochs'] == 3 and part['after_epochs'] == 1
    assert os.listdir(tmp_path / 'run').count('run.json') == 1
