import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors import safe_open
from safetensors.torch import load_file
from timm.utils import CheckpointSaver

import timm_poolattn
from timm_poolattn.data import load_images
from timm_poolattn.hub import model_card, release, verify
from timm_poolattn.hub.card import GATE_NOTES
from timm_poolattn.inference import evaluate
from timm_poolattn.models import FAMILIES, multiply_adds, paper_top1
from timm_poolattn.report.model_list import list_models
from timm_poolattn.training.timm_script import load_train_script
from timm_poolattn.utils import UserError, released, replacing

from .conftest import KILL_POINTS

FILES = ['.eval_results/cifar10.yaml', 'README.md', 'config.json', 'model.safetensors', 'results.json']


@pytest.fixture
def run_dir(tmp_path, cifar10_few):
    """What `poolattn train` leaves, the checkpoint written by timm's own saver."""
    folder = tmp_path / 'run'
    folder.mkdir()
    args = dict(model='resnet20_saam', num_classes=10, model_kwargs={}, mean=None, std=None, dataset='')
    args.update(data_dir=str(cifar10_few), val_split='test')
    run = dict(
        recipe='saam',
        arguments=dict(model='resnet20_saam', lr=0.1, opt_kwargs=dict(ns_steps=3)),
        seed=7,
        options=dict(resident=True, crop_padding=2, penalty_weight=0.0),
        versions=dict(timm='x'),
        hardware='a CPU',
        wall_time_s=120,
    )
    (folder / 'run.json').write_text(json.dumps(run))
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    model = timm.create_model('resnet20_saam', num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(model, optimizer, Namespace(**args), checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, 50.0)
    for p in model.parameters():
        p.data.add_(0.01)
    saver.save_checkpoint(1, 40.0)
    rows = [dict(epoch=0, train_loss=0.7, eval_top1=50.0), dict(epoch=1, train_loss=0.6, eval_top1=40.0)]
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder, model


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def test_release_folder(run_dir, tmp_path, cifar10_few):
    run_dir, model = run_dir
    out = tmp_path / 'hub_configs'
    folder = release(run_dir, 'cifar10', out=out)
    assert folder == out / 'resnet20_saam.cifar10' and files(folder) == FILES
    weights = load_file(folder / 'model.safetensors')
    assert weights.keys() == model.state_dict().keys()
    assert all(w.equal(weights[k]) for k, w in model.state_dict().items())  # the last epoch's, not the best's

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert loaded.pretrained_cfg['label_names'][3:6] == ['cat', 'deer', 'dog'] and loaded.num_classes == 10
    results = json.loads((folder / 'results.json').read_text())
    assert results['test'] == evaluate(loaded, load_images(cifar10_few, 'test'))
    assert results['test'].keys() == {'top1', 'top5', 'loss', 'ece', 'images'}
    assert (results['last_epoch_top1'], results['best_top1'], results['best_epoch']) == (40, 50, 0)
    assert results['checkpoint'] == dict(which='last', epoch=1, ema=False)
    assert (results['epochs'], results['seed'], results['hardware'], results['recipe']) == (2, 7, 'a CPU', 'saam')
    assert results['parameters'] == sum(p.numel() for p in model.parameters())
    assert results['multiply_adds'] == multiply_adds(model) and results['gate'] == 'saam'
    assert [row['train_loss'] for row in results['curve']] == [0.7, 0.6]
    text = ''.join((folder / name).read_text() for name in FILES if not name.endswith('.safetensors'))
    assert str(tmp_path) not in text


def test_an_installed_package_keeps_its_weights(run_dir, tmp_path, monkeypatch):
    run_dir, _ = run_dir
    (tmp_path / 'site' / 'hub_configs').mkdir(parents=True)
    (tmp_path / 'site' / '__init__.py').touch()
    monkeypatch.setattr('timm_poolattn.hub.releases.hub_configs_dir', lambda: tmp_path / 'site' / 'hub_configs')
    with pytest.raises(UserError, match=r'no checkout here, .*: --out names a folder'):
        release(run_dir, 'cifar10')
    assert not [*(tmp_path / 'site' / 'hub_configs').iterdir()]


def test_what_gets_no_gradient_is_said(run_dir, tmp_path, caplog):
    run_dir, _ = run_dir
    trained = load_file(released()['resnet20_saam.cifar10'] / 'model.safetensors')
    checkpoint = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    gate = 'stages.2.blocks.0.gate'
    dead = {**trained, f'{gate}.fc1.weight': trained[f'{gate}.fc1.weight'] * 0}  # g is 0, and the gate 1/2
    for state, names in ((trained, []), (dead, [f'{gate}.{key}.weight' for key in ('conv', 'fc1', 'fc2')])):
        torch.save({**checkpoint, 'state_dict': state}, run_dir / 'last.pth.tar')
        folder = release(run_dir, 'cifar10', out=tmp_path, replace=True)
        assert json.loads((folder / 'results.json').read_text())['without_gradient'] == names
        said = '\nNone of these images gives a gradient to\n' + ',\n'.join(f'`{name}`' for name in names) + '.\n'
        assert (said in (folder / 'README.md').read_text()) == bool(names)
        assert (f'none of 20 images gives a gradient to {", ".join(names)};' in caplog.text) == bool(names)
        assert all(check.ok for check in verify(folder))


def test_metadata_and_hashes(run_dir, tmp_path):
    folder = release(run_dir[0], 'cifar10', out=tmp_path / 'hub_configs')
    results = json.loads((folder / 'results.json').read_text())
    file = (folder / 'model.safetensors').read_bytes()
    data = file[8 + int.from_bytes(file[:8], 'little') :]
    assert results['weights']['sha256'] == hashlib.sha256(file).hexdigest()
    with safe_open(folder / 'model.safetensors', 'pt') as f:
        metadata = f.metadata()
    root = Path(__file__).parents[2]
    head = subprocess.run(['git', '-C', root, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    assert metadata.pop('git_commit').removesuffix('-dirty') == head  # '' outside a checkout
    assert metadata == dict(
        format='pt',
        architecture='resnet20_saam',
        tag='cifar10',
        data_sha256=hashlib.sha256(data).hexdigest(),
        timm_poolattn=timm_poolattn.__version__,
    )
    assert metadata['data_sha256'] == results['weights']['data_sha256']
    release(run_dir[0], 'cifar10', out=tmp_path / 'again')
    assert (tmp_path / 'again' / folder.name / 'model.safetensors').read_bytes() == file


def test_best_checkpoint_and_moving_average(run_dir, tmp_path):
    run_dir, model = run_dir
    folder = release(run_dir, 'cifar10', checkpoint='best', out=tmp_path / 'best')
    best = load_file(folder / 'model.safetensors')
    torch.testing.assert_close(best['conv1.weight'], model.conv1.weight.data - 0.01)
    results = json.loads((folder / 'results.json').read_text())
    assert results['checkpoint'] == dict(which='best', epoch=0, ema=False)
    assert 'did best on these images, which flatters the accuracy' in (folder / 'README.md').read_text()

    checkpoint = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict_ema'] = {f'_orig_mod.{k}': torch.zeros_like(w) for k, w in checkpoint['state_dict'].items()}
    torch.save(checkpoint, run_dir / 'last.pth.tar')
    folder = release(run_dir, 'cifar10', out=tmp_path / 'ema')
    assert all((w == 0).all() for w in load_file(folder / 'model.safetensors').values())
    assert json.loads((folder / 'results.json').read_text())['checkpoint']['ema'] is True
    assert '(the exponential moving average)' in (folder / 'README.md').read_text()


class TestCard:
    @pytest.fixture
    def folder(self, run_dir, tmp_path):
        return release(run_dir[0], 'cifar10', out=tmp_path / 'hub_configs')

    def test_results_for_the_page(self, folder):
        results = json.loads((folder / 'results.json').read_text())
        card = ModelCard.load(folder / 'README.md')
        assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
        (result,) = card.data.eval_results  # the model-index
        assert result.metric_value == results['test']['top1']
        assert (result.dataset_name, result.dataset_type) == ('CIFAR-10', 'uoft-cs/cifar10')
        (entry,) = parse_eval_result_entries(yaml.safe_load((folder / '.eval_results' / 'cifar10.yaml').read_text()))
        assert entry.value == results['test']['top1'] and entry.dataset_id == 'uoft-cs/cifar10'
        row = next(line for line in card.text.splitlines() if line.startswith('| ') and '92.60' in line)
        test = results['test']
        assert [cell.strip() for cell in row.strip('|').split('|')] == [
            f'{test["top1"]:.2f}',
            '92.60',
            f'{test["top5"]:.2f}',
            f'{test["loss"]:.4f}',
            f'{test["ece"]:.2f}',
            f'{results["parameters"]:,}',
            f'{results["multiply_adds"]:,}',
        ]

    def test_recipe_is_what_train_takes(self, folder, tmp_path, train_script, monkeypatch):
        """Saved and passed as the card says, timm's own parser reads the run's arguments again."""
        text = (folder / 'README.md').read_text()
        recipe, command = text.split('```yaml\n')[1].split('```')[0], text.split('```bash\n')[2].split('\n')[0]
        assert command == (
            'poolattn train --config recipe.yaml --resident --crop-padding 2 --penalty-weight 0.0 --data-dir DIR'
        )
        (tmp_path / 'recipe.yaml').write_text(recipe)
        module = load_train_script(train_script)
        monkeypatch.setattr('sys.argv', ['train.py', '--config', str(tmp_path / 'recipe.yaml'), '--data-dir', 'DIR'])
        args, _ = module._parse_args()
        assert (args.model, args.lr, args.opt_kwargs) == ('resnet20_saam', 0.1, dict(ns_steps=3))

    def test_first_weights_are_named(self, folder):
        results = json.loads((folder / 'results.json').read_text())
        assert 'first weights' not in model_card(results).text
        results['arguments']['initial_checkpoint'] = 'start.safetensors'
        results['warm_start'] = 'resnet20_saam.cifar10 resnet56_saam'
        assert (
            'The first weights are those of `start.safetensors`, made by'
            ' `poolattn warm-start resnet20_saam.cifar10 resnet56_saam -o start.safetensors`.'
        ) in model_card(results).text

    def test_citation_and_use(self, folder):
        text = (folder / 'README.md').read_text()
        assert '@article{saam,' in text and 'Lee, Changwoo and Chung, Ki-Seok' in text
        assert "timm.create_model('hf-hub:timm-poolattn/resnet20_saam.cifar10', pretrained=True)" in text

    def test_says_bfloat16_and_teachers_where_they_were(self, folder):
        results = json.loads((folder / 'results.json').read_text())
        for amp in (False, True):
            arguments = dict(results['arguments'], amp=amp, amp_dtype='bfloat16', kd_model_name='resnet56.cifar10')
            text = model_card({**results, 'arguments': arguments}).text
            assert (' with bfloat16' in text) == amp and 'Taught by `resnet56.cifar10`: ' in text
        assert 'Taught by' not in model_card(results).text

    def test_every_gate_has_its_two_sentences(self, folder):
        results = json.loads((folder / 'results.json').read_text())
        gates = set()
        for name in timm.list_models(module=FAMILIES):
            with torch.device('meta'):
                gates.add(timm.create_model(name).gate) if '20' in name or '29' in name else None
        assert gates - {None} == GATE_NOTES.keys()
        for gate, note in GATE_NOTES.items():
            assert note.count('. ') == 1 and note.endswith('.')
            assert note in model_card({**results, 'gate': gate}).text
        assert 'no gate' in model_card({**results, 'gate': None}).text


def test_release_again_replaces_whole(run_dir, tmp_path):
    run_dir, _ = run_dir
    out = tmp_path / 'hub_configs'
    folder = release(run_dir, 'cifar10', out=out)
    (folder / 'stale.txt').write_text('')
    release(run_dir, 'cifar10', out=out)
    assert not (folder / 'stale.txt').exists() and [p.name for p in out.iterdir()] == [folder.name]


def test_other_weights_are_kept(run_dir, tmp_path):
    run_dir, _ = run_dir
    folder = release(run_dir, 'cifar10', out=tmp_path / 'out')
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    top1 = json.loads(before['results.json'])['test']['top1']
    with pytest.raises(UserError, match=rf'other weights \({top1:.2f}% top-1, \d+ epochs, seed \d+\); --replace puts'):
        release(run_dir, 'cifar10', checkpoint='best', out=tmp_path / 'out')
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    release(run_dir, 'cifar10', checkpoint='best', out=tmp_path / 'out', replace=True)
    assert (folder / 'model.safetensors').read_bytes() != before['model.safetensors']


def test_a_failed_release_leaves_nothing(run_dir, tmp_path):
    run_dir, _ = run_dir
    out = tmp_path / 'hub_configs'
    folder = release(run_dir, 'cifar10', out=out)
    before = {name: (folder / name).read_bytes() for name in FILES}
    (run_dir / 'summary.csv').write_text('epoch\n0\n')
    with pytest.raises(UserError, match='no evaluated epoch'):
        release(run_dir, 'cifar10', out=out)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before and len(list(out.iterdir())) == 1


def test_mistakes(run_dir, tmp_path):
    run_dir, _ = run_dir
    with pytest.raises(ValueError, match=r"tag 'Cifar\.10': small letters"):
        release(run_dir, 'Cifar.10', out=tmp_path)
    with pytest.raises(UserError, match=r'its 10 classes .* are not those of cifar100'):
        release(run_dir, 'cifar100', out=tmp_path)
    with pytest.raises(FileNotFoundError, match=r'no args\.yaml; is it the output folder'):
        release(tmp_path, 'cifar10', out=tmp_path)
    with pytest.raises(ValueError, match="unknown checkpoint 'first'"):
        release(run_dir, 'cifar10', checkpoint='first', out=tmp_path)
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    (run_dir / 'args.yaml').write_text(yaml.safe_dump({**args, 'model_kwargs': dict(flavour='fa')}))
    with pytest.raises(ValueError, match=r'trained with --model-kwargs .* another network than resnet20_saam'):
        release(run_dir, 'cifar10', out=tmp_path)
    (run_dir / 'args.yaml').write_text(yaml.safe_dump({**args, 'val_split': 'train'}))
    with pytest.raises(UserError, match='evaluated on train, which is for training; train with --val-split test'):
        release(run_dir, 'cifar10', out=tmp_path)
    (run_dir / 'args.yaml').write_text(yaml.safe_dump(args))
    shutil.copy(run_dir / 'last.pth.tar', run_dir / 'model_best.pth.tar')
    with pytest.raises(UserError, match=r'model_best.pth.tar is of epoch 1, and epoch 0 did best: a resume lost it'):
        release(run_dir, 'cifar10', checkpoint='best', out=tmp_path)
    (run_dir / 'model_best.pth.tar').unlink()
    with pytest.raises(FileNotFoundError, match=r'no model_best\.pth\.tar'):
        release(run_dir, 'cifar10', checkpoint='best', out=tmp_path)


def test_a_curve_that_is_not_finite_and_data_by_their_old_name(run_dir, tmp_path, caplog):
    """`train DIR` is --data of train.py. A figure that is not the run's is said."""
    run_dir, _ = run_dir
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    (run_dir / 'args.yaml').write_text(yaml.safe_dump({**args, 'data': args['data_dir'], 'data_dir': None}))
    (run_dir / 'summary.csv').write_text('epoch,train_loss,eval_top1\nnan,1,90\n0,inf,nan\n1,0.6,40.0\n')
    folder = release(run_dir, 'cifar10', out=tmp_path / 'hub_configs')
    results = json.loads((folder / 'results.json').read_text(), parse_constant=pytest.fail)
    assert results['curve'] == [dict(epoch=0), dict(epoch=1, train_loss=0.6, eval_top1=40)]
    assert results['best_top1'] == 40 and all(check.ok for check in verify(folder))
    assert f'the run says 40.00% of epoch 1, and {results["test"]["top1"]:.2f}% is measured and released' in caplog.text


@pytest.mark.parametrize('name, sound', [('mine', True), ('a\tb', False), (' ', False), ('👩\u200d🌾', True)])
def test_a_label_that_verify_refuses_is_not_released(run_dir, tmp_path, name, sound):
    (run_dir, _), config = run_dir, json.loads((run_dir[0] / 'run.json').read_text())
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    classes = sorted(path.name for path in Path(args['data_dir'], 'test').iterdir())
    data = shutil.copytree(args['data_dir'], tmp_path / 'data')
    (data / 'test' / classes[-1]).rename(data / 'test' / name)
    (run_dir / 'args.yaml').write_text(yaml.safe_dump({**args, 'data_dir': str(data)}))
    (run_dir / 'run.json').write_text(json.dumps({**config, 'classes': [*classes[:-1], name]}))
    if sound:
        checks = verify(release(run_dir, 'photos', out=tmp_path / 'hub_configs'))
        assert all(check.ok for check in checks), checks
    else:
        with pytest.raises(UserError, match=r'run: label name .* holds control characters; rename the class'):
            release(run_dir, 'photos', out=tmp_path / 'hub_configs')


def test_of_three_splits_the_runs_is_verified(run_dir, tmp_path, cifar10_few):
    """train/, val/ and test/: a run evaluates on val/, which is what its release claims."""
    run_dir, _ = run_dir
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    data = shutil.copytree(cifar10_few, tmp_path / 'data')
    shutil.copytree(data / 'train', data / 'val')
    (run_dir / 'args.yaml').write_text(yaml.safe_dump({**args, 'data_dir': str(data), 'val_split': 'validation'}))
    folder = release(run_dir, 'photos', out=tmp_path / 'hub_configs')
    assert json.loads((folder / 'results.json').read_text())['test']['images'] == 40
    assert [check.name for check in verify(folder, data_dir=data) if check.ok][-1] == 'accuracy'
    assert 'this data has 20' in verify(folder, data_dir=data, split='test')[-1].detail


def test_no_pickle_is_loaded(run_dir, tmp_path):
    run_dir, _ = run_dir

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'evil'), 'w'))

    torch.save({'state_dict': Evil()}, run_dir / 'last.pth.tar')
    with pytest.raises(Exception, match='no checkpoint of'):
        release(run_dir, 'cifar10', out=tmp_path / 'hub_configs')
    assert not (tmp_path / 'evil').exists()


def test_paper_top1():
    assert paper_top1('resnet20_saam', 'cifar10') == 92.6
    assert paper_top1('resnet20_fa', 'cifar10') == 92.68  # printed as an error of 7.32
    assert paper_top1('cifar_vgg19', 'cifar10') == 92.66  # the paper's VGG-19: timm owns the plain name
    assert paper_top1('resnet20_spem', 'cifar10') is None


def test_a_card_for_another_organisation(monkeypatch):
    """CIFAR's test images are that whoever publishes; the bare name is ours alone."""
    monkeypatch.setenv('TIMM_POOLATTN_HUB_ORG', 'theirs')
    card = model_card(json.loads((released()['resnet20_saam.cifar10'] / 'results.json').read_text())).text
    assert "'hf-hub:theirs/resnet20_saam.cifar10'" in card and "create_model('resnet20_saam.cifar10'" not in card
    assert '10,000 test images' in card


def test_own_data_under_a_tag_of_their_own(run_dir, tmp_path):
    """With its pooling and grey images; its accuracy is that of `verify`."""
    run_dir, _ = run_dir
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    args.update(gp='max', in_chans=1, img_size=48, mean=[0.5], std=[0.25])
    (run_dir / 'args.yaml').write_text(yaml.safe_dump(args))
    model = timm.create_model('resnet20_saam', in_chans=1, global_pool='max')
    torch.save(dict(epoch=1, state_dict=model.state_dict()), run_dir / 'last.pth.tar')
    with pytest.raises(UserError, match='choose a tag of your own'):
        release(run_dir, 'cifar10', out=tmp_path)
    folder = release(run_dir, 'my_photos-2', out=tmp_path / 'out')
    checks = verify(folder, data_dir=args['data_dir'])
    assert all(check.ok for check in checks) and checks[-1].name == 'accuracy', checks[-1]
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(loaded(images), model.eval()(images))
    assert loaded.pretrained_cfg['input_size'] == (1, 48, 48) or loaded.pretrained_cfg['input_size'] == [1, 48, 48]


def test_a_checkpoint_of_another_run_is_refused(run_dir, tmp_path):
    run_dir, _ = run_dir
    saved = torch.load(run_dir / 'last.pth.tar', weights_only=False)
    torch.save({**saved, 'epoch': 0}, run_dir / 'last.pth.tar')
    with pytest.raises(UserError, match=r'is of epoch 0, summary\.csv ends with 1: two runs share the folder'):
        release(run_dir, 'cifar10', out=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('point', KILL_POINTS)
def test_killed(run_dir, tmp_path, point):
    """Killed at the n-th access to the place that it writes to; the same call again gives the same bytes."""
    run_dir, _ = run_dir
    out = tmp_path / 'out'
    (out / 'neighbour.cifar10').mkdir(parents=True)
    (out / 'neighbour.cifar10' / 'config.json').write_text('{}')
    folder = release(run_dir, 'cifar10', out=out)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    pid = os.fork()
    if not pid:
        count = 0

        def kill(event, args):
            nonlocal count
            if event in ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir') and str(out) in str(args[0]):
                count += 1
                if count > 2 * point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            release(run_dir, 'cifar10', out=out)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), 'it ended before it was killed'
    release(run_dir, 'cifar10', out=out)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert sorted(p.name for p in out.iterdir()) == ['neighbour.cifar10', folder.name]


def test_what_a_kill_left_is_ignored(tmp_path):
    """`list`, `report` and the cards, in a checkout where a release was killed while it wrote."""
    root = Path(__file__).parents[2]
    for name in ('timm_poolattn', 'hub_configs', 'train_scripts'):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns('*.safetensors', '__pycache__'))
    shutil.copy(root / 'CITATION.cff', tmp_path)
    folder = tmp_path / 'hub_configs' / 'resnet20_saam.photos'
    pid = os.fork()
    if not pid:
        with replacing(folder) as temp:
            temp.mkdir()
            for file in ('config.json', 'results.json'):
                (temp / file).write_text('{"model": "resnet20_')
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list(folder.parent.glob('.resnet20_saam.photos*/resnet20_saam.photos/config.json'))
    code = (
        'import json, runpy, timm_poolattn\n'
        'from timm_poolattn.utils import released\n'
        'from timm_poolattn.report.model_list import list_models\n'
        'from timm_poolattn.report.page import write_report\n'
        "runpy.run_module('timm_poolattn.hub', run_name='__main__')\n"
        "text = write_report('report.html').read_text()\n"
        'print(json.dumps([[*released()], [[r["model"], r["top1"]] for r in list_models(trained=True)], text]))'
    )
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, rows, page = json.loads(done.stdout.splitlines()[-1])  # after the cards that were written
    assert names == [*released()] and 'photos' not in page and 'resnet20_saam' in page
    assert rows == [[row['model'], row['top1']] for row in list_models(trained=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx(run_dir, tmp_path):
    """Both files, as ONNX Runtime runs them, say what results.json says of them; any other file is refused."""
    onnx = pytest.importorskip('onnx')
    run_dir, _ = run_dir
    trained = timm.create_model('resnet20_saam.cifar10', pretrained=True)
    torch.save(dict(epoch=1, state_dict=trained.state_dict()), run_dir / 'last.pth.tar')
    folder = release(run_dir, 'cifar10', out=tmp_path / 'out', onnx=True)
    results = json.loads((folder / 'results.json').read_text())
    assert 'onnx/model.onnx' in results['onnx'] and '`onnx/model.onnx`' in (folder / 'README.md').read_text()
    assert results['onnx']['onnx/model.onnx']['top1'] == results['test']['top1']
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    checks = verify(folder, data_dir=args['data_dir'])
    assert [c.name for c in checks[-3:]] == ['forward', 'onnx', 'accuracy'] and checks[-1].ok, checks[-1]
    path = folder / 'onnx' / 'model.onnx'
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    facts = {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props}
    assert facts['size'] == [3, 32, 32] and facts['labels'][3] == 'cat' and len(facts['mean']) == len(facts['std']) == 3

    def fails(message):
        check = verify(folder)[-1]
        assert check.name == 'onnx' and not check.ok and message in check.detail, check

    def write(data):
        path.write_bytes(data)
        results['onnx']['onnx/model.onnx']['sha256'] = hashlib.sha256(data).hexdigest()
        (folder / 'results.json').write_text(json.dumps(results))

    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fails('not the file that results.json has the SHA-256 of')
    write(b'nothing')
    fails('onnx/model.onnx: ')
    proto = onnx.load_from_string(good)
    onnx.helper.set_model_props(proto, dict(labels='[]'))
    write(proto.SerializeToString())
    fails('labels in its metadata is not that of config.json')
    proto = onnx.load_from_string(good)
    proto.graph.node[0].domain = 'evil'
    write(proto.SerializeToString())
    fails('has operators of evil')
    proto = onnx.load_from_string(good)
    inner = onnx.helper.make_graph([onnx.helper.make_node('X', [], ['y'], domain='evil')], 'inner', [], [])
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute('branch', inner))
    write(proto.SerializeToString())
    fails('has operators of evil')
    proto = onnx.load_from_string(good)
    tensor = onnx.helper.make_tensor('t', 1, [1], [1.0])
    tensor.external_data.add(key='location', value='/etc/passwd')
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute('value', tensor))
    write(proto.SerializeToString())
    fails('keeps weights in another file')
    proto = onnx.load_from_string(good)
    proto.graph.initializer[0].external_data.add(key='location', value='/etc/passwd')
    write(proto.SerializeToString())
    fails('keeps weights in another file')
    proto = onnx.load_from_string(good)
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    weight.raw_data = bytes(len(weight.raw_data))
    write(proto.SerializeToString())
    fails('its outputs differ')
    path.unlink()
    assert 'onnx' in verify(folder)[-1].detail
