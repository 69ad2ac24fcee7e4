"""Options of timm's train.py with the resident loader: its real main() in this process, on real images."""

import argparse
import json
import shutil

import pytest
import timm
import torch
import torchvision
import yaml
from timm.models import register_model
from timm.task.distillation import DistillationTeacher
from timm.utils import NativeScaler

from timm_poolattn.inference import evaluate
from timm_poolattn.training import PenaltyTask, read_curve, read_run, recipes, train
from timm_poolattn.utils import UserError

HELD = '40 images of 32x32 held on cpu'


def checkpoint(run, name='last'):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(run / f'{name}.pth.tar', weights_only=True)


def run_train(train_script, data, output, *options, **kwargs):
    argv = ['--data-dir', data, '--output', output, '--experiment', 'run', '--model', 'resnet20_spem.cifar10', '-b', 16]
    argv += ['--epochs', 1, '--warmup-epochs', 0, '--lr', 0.05, '--opt', 'momentum', '--log-interval', 1, *options]
    return train(list(map(str, argv)), timm_script=train_script, **kwargs)


@pytest.fixture
def run(train_script, cifar10_few, tmp_path, caplog):
    """Train for an epoch of two updates; returns the output folder."""
    caplog.set_level('INFO')
    return lambda *options, **kwargs: run_train(train_script, cifar10_few, tmp_path, *options, **kwargs)


@pytest.mark.parametrize(
    'options',
    [
        '--amp --amp-dtype bfloat16 --channels-last --clip-grad 1',
        '--model-ema --model-ema-decay 0.5 --grad-accum-steps 2 --sched-on-updates',
        '--mixup 0.2 --cutmix 1.0 --smoothing 0.1 --reprob 0.5 --mixup-off-epoch 1 --epochs 2',
        '--mixup 0.2 --no-prefetcher --reprob 0.5 --remode rand --recount 2',
        '--bce-loss --smoothing 0.1 --drop 0.1 --no-aug --scale 0.5 1',
        '--color-jitter 0',
        '--bce-loss --cutmix 1.0 --mixup-mode elem --bce-target-thresh 0.2',
        '--kd-model-name resnet20_saam.cifar10 --distill-loss-weight 0.5',
        '--sched wsd --decay-epochs 0.5 --epochs 2 --start-epoch 1',
        '--kd-model-name resnet20_saam.cifar10 --kd-distill-type feature --model-ema',
        '--model-dtype bfloat16 --remode pixel --reprob 1.0',
        '--grad-checkpointing --opt adamw --layer-decay 0.9 --lr 0.001',
        pytest.param('--torchcompile inductor --model-ema', marks=pytest.mark.slow),
        pytest.param('--torchcompile eager --kd-model-name resnet20_fa.cifar10', marks=pytest.mark.slow),
    ],
)
def test_options(run, caplog, options):
    folder = run(*options.split())
    assert HELD in caplog.text and "timm's own loader" not in caplog.text
    *_, last = read_curve(folder)
    assert all(torch.isfinite(torch.tensor(v)) for v in last.values()) and last['train_penalty'] < 9 * 0.5
    state = checkpoint(folder)
    assert ('state_dict_ema' in state) == ('--model-ema' in options)
    p = state['state_dict']['stages.0.blocks.0.gate.p']
    assert ((p < 0.5).all() or 'adamw' in options) and p.dtype == (
        torch.bfloat16 if '--model-dtype' in options else torch.float32
    )


def test_a_distillations_teacher_sees_its_own_colours(train_script, cifar10_few, tmp_path, monkeypatch):
    """Whatever --mean and --std the model to train sees them by."""
    seen = []
    monkeypatch.setattr(DistillationTeacher, 'forward', lambda self, x, **_: (seen.append(x), self.model(x))[1])
    options = ['-b', 40, '--no-aug', '--kd-model-name', 'resnet20.cifar10']
    for colours in ([], ['--mean', 0.5, 0.4, 0.3, '--std', 1, 1, 1]):
        run_train(train_script, cifar10_few, tmp_path, *options, *colours, '--experiment', f'{len(seen)}')
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize('options', [[], ['--color-jitter', 0.4]])
def test_a_runs_own_arguments_repeat_it(run, options):
    """args.yaml holds all of train.py's defaults, which are not options that were given."""
    first = run(*options)
    second = run('--config', first / 'args.yaml', '--experiment', 'second')
    assert read_run(first).record['options'] == read_run(second).record['options']
    assert read_run(first).record['options']['resident'] is not bool(options)


def test_padding_is_the_resident_loaders(run):
    for options in (dict(resident=False), {}):
        with pytest.raises(UserError, match="--crop-padding is the resident loader's"):
            run(*([] if options else ['--vflip', 0.5]), crop_padding=2, **options)


def test_penalty_is_in_a_distillations_loss(run):
    """p moves by Eq. 8's gradient alone while gamma is 0: the first update is lr * 2 eta p in every task."""
    options = ['-b', 40, '--weight-decay', 0, '--kd-model-name', 'resnet20_saam.cifar10']
    for kind in ('logit', 'feature'):
        state = checkpoint(run(*options, '--kd-distill-type', kind, '--experiment', kind))
        for name, weight in state['state_dict'].items():
            if name.endswith('gate.p'):
                torch.testing.assert_close(weight, torch.full((2,), 0.5 - 0.05 * 0.1), rtol=1e-5, atol=0)


def test_float16_loss_scaler():
    """timm's scaler and our task, on the CPU: one step is the unscaled one's, an overflow skips the step."""
    import timm

    input, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    steps = []
    for scaled in (False, True):
        torch.manual_seed(0)
        task = PenaltyTask(timm.create_model('resnet20_spem'), torch.nn.CrossEntropyLoss()).train()
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.1)
        with torch.autocast('cpu', dtype=torch.float16):
            loss = task(input, target)['loss']
        if scaled:
            NativeScaler(device='cpu')(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        steps.append([p.detach().clone() for p in task.trainable_module.parameters()])
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-4)
    NativeScaler(device='cpu')(task(input, target)['loss'] * float('inf'), optimizer)
    torch.testing.assert_close([p.detach() for p in task.trainable_module.parameters()], steps[1], rtol=0, atol=0)


def test_pretrained_with_another_head(run, cifar10_few):
    """--pretrained --num-classes: all weights but the head's start from the trained ones."""
    import timm

    folder = run('--model', 'resnet20_saam.cifar10', '--pretrained', '--num-classes', 12, '--lr', 1e-9)
    state = checkpoint(folder)['state_dict']
    assert state['head.fc.weight'].shape == (12, 64)
    for name, weight in timm.create_model('resnet20_saam.cifar10', pretrained=True).named_parameters():
        if not name.startswith('head'):
            torch.testing.assert_close(state[name], weight.data, rtol=0, atol=1e-6)


def test_initial_checkpoint(run, tmp_path):
    first = checkpoint(run())['state_dict']
    start = tmp_path / 'start.pth.tar'
    (tmp_path / 'run' / 'last.pth.tar').rename(start)
    folder = run('--initial-checkpoint', start, '--lr', 1e-9, '--experiment', 'other')
    assert json.loads((folder / 'run.json').read_text())['arguments']['initial_checkpoint'] == 'start.pth.tar'
    state = checkpoint(folder)['state_dict']
    torch.testing.assert_close(state['conv1.weight'], first['conv1.weight'], rtol=0, atol=1e-6)


def test_val_interval(run):
    """Epochs that are not evaluated are not in the summary, nor counted as its rows are."""
    folder = run('--epochs', 3, '--val-interval', 2)
    assert [row['epoch'] for row in read_curve(folder)] == [1, 2]
    assert json.loads((folder / 'run.json').read_text())['arguments']['epochs'] == 3


def test_no_validation(run):
    (row,) = read_curve(run('--val-split', ''))
    assert row.keys() == {'epoch', 'train_loss', 'train_penalty', 'train_mean_lambda', 'lr'}


@pytest.mark.parametrize(
    'options, needs',
    [
        (['--aug-splits', 3, '--jsd-loss'], '--aug-splits'),
        (['--aa', 'rand-m9-mstd0.5'], '--aa'),
        (['--aug-splits', 2, '--aa', 'rand-m9', '--split-bn'], '--aa, --aug-splits'),
        (['--train-crop-mode', 'rkrc', '--vflip', 0.5], '--train-crop-mode, --vflip'),
        (['--train-img-sizes', 24, 32], '--train-img-sizes'),
        (['--color-jitter', 0.9, '--scale', 0.5, 1], '--scale, --color-jitter'),
        (['--color-jitter', 0.4, '--scale', 0.08, 1], '--scale, --color-jitter'),  # train.py's own
        (
            ['--color-jitter-prob', 0.9, '--train-interpolation', 'bilinear'],
            '--color-jitter-prob, --train-interpolation',
        ),
    ],
    ids=[
        'augmix',
        'randaugment',
        'split norms',
        'crops',
        'scheduled resolutions',
        'random crops',
        'defaults',
        'colours',
    ],
)
def test_falls_back_to_timms_loader(run, caplog, train_script, options, needs):
    if f"'{options[0]}'" not in train_script.read_text():
        pytest.skip(f'this train.py has no {options[0]}')
    folder = run(*options, '--workers', 0)
    assert f"training with timm's own loader, which {needs} needs" in caplog.text and HELD not in caplog.text
    (row,), model = read_curve(folder), read_run(folder).build_model()
    data = read_run(folder).load_data(model)
    assert row['eval_top1'] == pytest.approx(evaluate(model, data)['top1']) and len(data) == 20


def test_naflex_falls_back(run, caplog):
    """timm's NaFlex loader needs a model of its own; ours refuses its batches."""
    options = ['--model', 'test_vit4', '--naflex-loader', '--model-kwargs', 'use_naflex=True', '--img-size', 32]
    options += ['--naflex-train-seq-lens', 4, '--naflex-max-seq-len', 4, '--num-classes', 10]
    options += ['--mixup', 0.2, '-b', 15]  # of an odd batch too, which other loaders' mixup refuses
    run(*options, '--workers', 0, '--val-split', 'test')
    assert "training with timm's own loader, which --naflex-loader needs" in caplog.text and HELD not in caplog.text


def test_photos_of_any_size(train_script, image_folder, tmp_path, caplog):
    """Twelve images of four sizes, a batch that is larger than the data, timm's margin around the crop."""
    from PIL import Image

    caplog.set_level('INFO')
    for i, path in enumerate(sorted((image_folder / 'train').glob('*/*.png'))):
        Image.open(path).resize((30 + 20 * (i % 4), 50)).save(path)
        if i % 8 >= 6:
            path.unlink()
    options = ['--num-classes', 2, '-b', 128]
    run_train(train_script, image_folder, tmp_path / 'a', *options)
    assert '12 images of 32x32 held on cpu: random crop with padding 4' in caplog.text
    run_train(train_script, image_folder, tmp_path / 'b', *options, '--crop-pct', 0.875)
    assert '12 images of 36x36 held on cpu: random crop with padding 0' in caplog.text


def own_network(pretrained=False, **kwargs):
    """A user's, without a cfg in timm's registry."""
    model = timm.create_model('resnet20', **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 48, 40), 'interpolation': 'bilinear'}
    return model


def test_an_entrypoint_of_the_users_own(run, caplog):
    """Only the model knows its size."""
    register_model(own_network)
    folder = run('--model', 'own_network')
    assert HELD.replace('32x32', '40x48') in caplog.text
    saved = read_run(folder)
    config = saved.data_config(saved.build_model())
    assert (config['input_size'], config['interpolation']) == ((3, 48, 40), 'bilinear')
    with pytest.raises(UserError, match='--in-chans 1: own_network has no cfg that says its size; give --input-size'):
        run('--model', 'own_network', '--in-chans', 1, '--experiment', 'grey')
    run('--model', 'own_network', '--input-size', 1, 32, 32, '--experiment', 'grey')


def test_classes_of_torchvisions_data(run, cifar10_few, monkeypatch):
    """With timm's loader too, where they have no reader to ask."""
    data = torchvision.datasets.ImageFolder(cifar10_few / 'train')
    by_name = data.class_to_idx
    monkeypatch.setattr('timm.data.dataset_factory._TORCH_BASIC_DS', {'cifar10': lambda **kwargs: data})
    options = ['--dataset', 'torch/cifar10', '--val-split', 'test']
    with pytest.raises(UserError, match='10 classes, and the model has 100; give --num-classes 10'):
        run(*options, '--model', 'resnet20.cifar100', resident=False)
    assert read_run(run(*options, '--workers', 0, resident=False)).record['classes'] == data.classes
    data.class_to_idx = {**by_name, 'moggy': by_name['cat']}  # as ImageNet's have synonyms
    assert 'classes' not in read_run(run(*options, '--workers', 0, '--experiment', 'b', resident=False)).record


def test_classes(train_script, image_folder, tmp_path):
    """The evaluation split may lack a class, and not have another; the model must have as many."""
    options = ['--model', 'resnet20', '--num-classes', 2]
    shutil.rmtree(image_folder / 'test' / 'cat')
    run_train(train_script, image_folder, tmp_path / 'a', *options)
    with pytest.raises(UserError, match='2 classes, and the model has 1; give --num-classes 2'):
        run_train(train_script, image_folder, tmp_path / 'c', *options, '--num-classes', 1)
    (image_folder / 'test' / 'dog').rename(image_folder / 'test' / 'horse')
    with pytest.raises(UserError, match='validation has classes that are not trained on: horse'):
        run_train(train_script, image_folder, tmp_path / 'b', *options)


class TestRecipe:
    def test_is_overridden(self, run):
        folder = run('--batch-size', 20, recipe='spem-cifar10')
        record = json.loads((folder / 'run.json').read_text())
        assert record['arguments']['batch_size'] == 20 and record['recipe'] == 'spem-cifar10'
        recipe = yaml.safe_load(recipes()['spem-cifar10'].read_text())
        assert record['arguments']['weight_decay'] == recipe['weight_decay'] and record['arguments']['epochs'] == 1

    def test_unknown(self, run):
        with pytest.raises(ValueError, match=r"unknown recipe 'x'; choose from .*cpu-short, "):
            run(recipe='x')


@pytest.mark.parametrize('resident', [True, False])
def test_a_misspelt_split_of_torchvision(run, resident):
    """timm's create_dataset takes the test images for it, to train on too."""
    with pytest.raises(UserError, match="unknown split 'trian'"):
        run('--dataset', 'torch/cifar10', '--train-split', 'trian', resident=resident)
