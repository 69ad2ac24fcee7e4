"""From trained weights to a folder of one's own classes, by `poolattn finetune`, with timm's real train.py."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_poolattn.cli import main
from timm_poolattn.data import View, list_classes, load_images
from timm_poolattn.inference import evaluate, load_pretrained
from timm_poolattn.training import finetune, read_run, train
from timm_poolattn.training.finetuning import draw_confusion
from timm_poolattn.utils import UserError

CLASSES = {'bear': (200, 20, 20), 'cat': (20, 200, 20), 'dog': (20, 20, 200), 'emu': (200, 200, 20), 'fox': (9, 9, 9)}


@pytest.fixture
def photos(tmp_path):
    """Thirteen images of five classes, of as many sizes: coloured, so that a few epochs tell them apart."""
    root, random = tmp_path / 'photos', np.random.default_rng(0)
    for number, (name, color) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        for i in range(3 if number < 3 else 2):
            size = (40 + 13 * i, 90 - 11 * number)
            noise = random.integers(0, 256, (*size[::-1], 3), np.uint8)  # Pillow's own differs from run to run
            Image.blend(Image.fromarray(noise), Image.new('RGB', size, color), 0.9).save(root / name / f'{i}.jpg')
    return root


def run(train_script, *args, code=0):
    result = CliRunner().invoke(main, ['finetune', *map(str, args), '--timm-script', str(train_script)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_folder_of_classes(train_script, photos, tmp_path):
    out = run(train_script, photos, '--epochs', 24, '--output', tmp_path, '--experiment', 'run', '--workers', 0)
    table = out[out.index('class  images') :].splitlines()
    assert [line.split()[:2] for line in table[1:6]] == [[name, '1'] for name in CLASSES]
    top1 = float(re.search(r'top-1 ([\d.]+)% with the best epoch, \d+', table[-1])[1])
    assert sum(int(line.split()[2]) for line in table[1:6]) == round(top1 / 20)
    assert Image.open(tmp_path / 'run' / 'confusion.png').size[0] > 300
    # the weights that were kept are the best epoch's, and know their classes
    model = load_pretrained(f'local-dir:{tmp_path / "run" / "model"}')
    assert model.pretrained_cfg['label_names'] == list(CLASSES)
    assert evaluate(model, load_images(photos, 'test', view=View((3, 32, 32))))['top1'] == pytest.approx(top1)
    args = [
        'validate',
        '--model',
        f'local-dir:{tmp_path / "run" / "model"}',
        '--data-dir',
        str(photos),
        '--hold-out',
        '--json',
    ]
    assert json.loads(CliRunner().invoke(main, args).stdout)['top1'] == pytest.approx(top1)
    assert top1 >= 60  # of five plain colours, one image each
    image = photos / 'bear' / '0.jpg'
    args = ['predict', str(image), '--model', f'local-dir:{tmp_path / "run" / "model"}', '--json']
    (result,) = json.loads(CliRunner().invoke(main, args).stdout)
    assert {p['label'] for p in result['predictions']} == set(CLASSES)


def test_without_matplotlib(train_script, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    args = ['--epochs', 1, '--output', tmp_path, '--experiment', 'run', '--model', 'resnet20_spem.cifar10']
    out = run(train_script, photos, *args)
    assert "confusion matrix: not drawn: pip install 'timm_poolattn[explain]'" in out
    config = json.loads((tmp_path / 'run' / 'model' / 'config.json').read_text())
    assert config['architecture'] == 'resnet20_spem' and config['num_classes'] == 5


def test_splits_of_other_names(train_script, photos, tmp_path):
    for split in ('mine', 'other'):
        shutil.copytree(photos, tmp_path / 'data' / split)
    args = ['--epochs', 1, '--output', tmp_path, '--experiment', 'run', '--model', 'resnet20_spem.cifar10']
    out = run(train_script, tmp_path / 'data', *args, '--train-split', 'mine', '--val-split', 'other')
    assert 'top-1 ' in out and (tmp_path / 'run' / 'model' / 'config.json').is_file()


def test_hold_out(photos):
    names = {split: load_images(photos, split, view=View((3, 8, 8))) for split in ('train', 'validation', 'test')}
    assert len(names['train']) == 8 and len(names['test']) == 5
    assert names['test'].images.equal(names['validation'].images)
    assert list_classes(photos) == list(CLASSES)
    for path in list((photos / 'emu').iterdir())[1:]:
        os.unlink(path)
    with pytest.raises(ValueError, match='emu has one image'):
        load_images(photos, 'train', view=View((3, 8, 8)))


def test_mistakes(train_script, photos, tmp_path):
    result = CliRunner().invoke(main, ['finetune', str(tmp_path / 'nowhere')])
    assert result.exit_code == 2 and result.output.endswith('nowhere: no such folder or tar file\n')


def test_model_is_a_timm_model(train_script, photos, tmp_path):
    """A model of timm's own, without weights: its size, not 32x32."""
    args = ['--model', 'test_resnet', '--img-size', 48, '--output', tmp_path, '--experiment', 'run', '--epochs', 1]
    (tmp_path / 'weights.pth').write_bytes(b'')
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    run(train_script, photos, *args, '--pretrained-path', tmp_path / 'weights.pth')
    config = json.loads((tmp_path / 'run' / 'model' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 48, 48]


@pytest.mark.parametrize('n', [2, 30, 31, 400, 1000])
def test_confusion_matrices_of_any_size(tmp_path, n):
    """Class names are text, not formulas; the picture and the memory are bounded."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = [f'US${i}_$5 \\frac{{ ^_' + 'x' * (200 if i == 1 else 0) for i in range(n)]
    path = draw_confusion(torch.eye(n, dtype=torch.long) * 3, names, tmp_path / 'confusion.png')
    with Image.open(path) as image:
        assert 400 < image.width <= 2400 and image.height <= 2400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_odd_class_names(train_script, photos, tmp_path):
    (photos / 'bear').rename(photos / 'US$1_$5')
    (photos / 'cat').rename(photos / 'a\tb%s{x}')
    args = ['--epochs', 1, '--output', tmp_path, '--experiment', 'run', '--workers', 0]
    out = run(train_script, photos, *args)
    assert 'US$1_$5  ' in out and 'a?b%s{x}' in out
    config = json.loads((tmp_path / 'run' / 'model' / 'config.json').read_text())
    assert config['label_names'] == list_classes(photos) and 'US$1_$5' in config['label_names']


@pytest.mark.parametrize(
    'options', [['--input-size', '1', '32', '32', '--mean', '0.48'], ['--in-chans', '1']], ids=['sized', 'in-chans']
)
def test_the_saved_model_is_the_runs(train_script, photos, tmp_path, options):
    """--gp max and grey images: the accuracy of the best epoch, of the saved model and of the table are one number.

    So it is where the saved model is trained on, as any that is a folder or a repository.
    """
    model = 'resnet20_saam.cifar10'
    for name, epochs in (('first', 3), ('second', 1)):
        argv = ['--model', model, *options, '--gp', 'max', '--epochs', str(epochs), '--workers', '0']
        result = finetune(photos, [*argv, '--output', str(tmp_path), '--experiment', name], timm_script=train_script)
        best = max(row['eval_top1'] for row in read_run(tmp_path / name).curve)
        model = load_pretrained(f'local-dir:{result.model_dir}')
        assert result.top1 == pytest.approx(best)
        assert evaluate(model, load_images(photos, 'test', view=View((1, 32, 32))))['top1'] == pytest.approx(best)
        config = json.loads((result.model_dir / 'config.json').read_text())
        assert config['global_pool'] == 'max' and config['pretrained_cfg']['input_size'] == [1, 32, 32]
        model, options = f'local-dir:{result.model_dir}', []


def test_class_map(train_script, photos, tmp_path, caplog):
    """Its order is that of the model, of the table and of the confusion matrix."""
    names = ['fox', 'dog', 'cat', 'emu', 'bear']
    (tmp_path / 'map.txt').write_text('\n'.join(names))
    argv = [
        '--class-map',
        str(tmp_path / 'map.txt'),
        '-b',
        '4',
        '--epochs',
        '1',
        '--workers',
        '0',
        '--output',
        str(tmp_path),
    ]
    result = finetune(photos, [*argv, '--experiment', 'run'], timm_script=train_script)
    config = json.loads((result.model_dir / 'config.json').read_text())
    assert result.classes == config['label_names'] == names
    model = load_pretrained(f'local-dir:{result.model_dir}')
    data = load_images(photos, 'test', view=View((3, 32, 32)), classes=names)
    assert evaluate(model, data)['top1'] == pytest.approx(result.top1)
    for text, said in (('\n'.join([*names[1:], 'fxo']), None), ('fox\n\ndog\ncat', 'line 2 is empty')):
        (tmp_path / 'map.txt').write_text(text)
        options = ['--model', 'resnet20', '--num-classes', '5', '--data-dir', str(photos), '--val-split', 'test', *argv]
        if said:
            with pytest.raises(UserError, match=said):
                train(options, timm_script=train_script)
        else:
            train([*options, '--experiment', 'misspelt'], timm_script=train_script)
            assert 'fox: it does not name, so that their images are left out' in caplog.text
            assert 'fxo: it names, and no images are of them' in caplog.text
    (tmp_path / 'map.txt').write_text('\n'.join(names[1:]))
    with pytest.raises(UserError, match='may order the classes, not leave out or add some'):
        finetune(photos, argv, timm_script=train_script)
    with pytest.raises(UserError, match="--val-split '' leaves nothing"):
        finetune(photos, [*argv[2:], '--val-split', ''], timm_script=train_script)


@pytest.mark.parametrize('option', ['--num-classes', '--data-dir'])
def test_what_follows_from_the_images(photos, option):
    with pytest.raises(UserError, match='the images given say --data-dir and --num-classes; leave them out'):
        finetune(photos, [option, '7'])


def test_a_model_without_weights(train_script, photos, tmp_path):
    result = CliRunner().invoke(main, ['finetune', str(photos), '--model', 'resnet110_fa', '--output', str(tmp_path)])
    assert result.exit_code == 2 and 'resnet110_fa has no weights yet; near models have' in result.output
