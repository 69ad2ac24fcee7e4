import argparse
from types import SimpleNamespace

import pytest
import timm
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_poolattn.training import recipes
from timm_poolattn.training.timm_script import load_train_script

#: Arguments of timm's train.py that recipes use, for where it is not at hand; the test below compares them with it.
ARGUMENTS = {
    *('model', 'pretrained', 'num_classes', 'img_size', 'crop_pct', 'mean', 'std', 'channels_last'),
    *('batch_size', 'epochs', 'opt', 'opt_kwargs', 'lr', 'momentum', 'weight_decay'),
    *('sched', 'sched_on_updates', 'decay_epochs', 'decay_milestones', 'decay_rate', 'warmup_epochs', 'min_lr'),
    *('smoothing', 'reprob', 'remode', 'model_ema', 'model_ema_decay', 'model_ema_warmup', 'checkpoint_hist'),
}


def recipe(name):
    return yaml.safe_load(recipes()[name].read_text())


def test_names():
    papers = {'spem-cifar10', 'spem-cifar100', 'saam-cifar10', 'saam-cifar100', 'fa-cifar10', 'fa-cifar100'}
    ours = {'modern-cifar', 'finetune', 'cpu', 'cpu-short'}
    assert recipes().keys() == papers | {'fa-tiny-imagenet', 'fa-imagenet5'} | ours


@pytest.mark.parametrize('name', recipes())
def test_every_key_is_an_argument_of_train_py(name):
    assert recipe(name).keys() <= ARGUMENTS


def test_arguments_are_train_pys(train_script):
    parser = load_train_script(train_script).parser
    assert {a.dest for a in parser._actions} >= ARGUMENTS
    assert set().union(*(recipe(name) for name in recipes())) == ARGUMENTS  # no more than recipes use


@pytest.mark.parametrize('name', recipes())
def test_parses_to_what_it_says(name, train_script, monkeypatch):
    """timm's real parser: every value as typed on the command line is the value in the file."""
    module = load_train_script(train_script)
    monkeypatch.setattr('sys.argv', ['train.py', '--config', str(recipes()[name])])
    args, _ = module._parse_args()
    actions = {a.dest: a for a in module.parser._actions}
    for key, value in recipe(name).items():
        parsed = getattr(args, key)
        assert parsed == value
        kind, values = actions[key].type, value if isinstance(value, list) else [value]
        if isinstance(actions[key], argparse._StoreAction) and kind is not None:
            assert [kind(str(v)) for v in values] == values
        if actions[key].choices:
            assert value in actions[key].choices


@pytest.mark.parametrize('name', recipes())
def test_model_is_registered(name):
    model = recipe(name).get('model')
    assert model is None or model in timm.list_models(model.split('.')[0], include_tags=True)


@pytest.mark.parametrize('paper', ['spem', 'saam', 'fa'])
def test_cifar100_differs_in_its_model_alone(paper):
    first, second = recipe(f'{paper}-cifar10'), recipe(f'{paper}-cifar100')
    assert second == {**first, 'model': first['model'].replace('.cifar10', '.cifar100')}


@pytest.mark.parametrize(
    'name, epochs, decay, drops, batch_size',
    [
        ('saam-cifar10', 182, 2e-4, [90, 135], 128),
        ('spem-cifar10', 164, 1e-4, [81, 122], 128),
        ('fa-cifar10', 240, 5e-4, [60, 120, 180], 128),
        ('fa-tiny-imagenet', 240, 5e-4, [60, 120, 180], 128),
        ('fa-imagenet5', 240, 5e-4, [60, 120, 180], 32),
    ],
)
def test_the_papers_optimizer_and_schedule(name, epochs, decay, drops, batch_size):
    """Built by timm from the recipe: plain momentum, all decays, lr 0.1 divided by 10 before these epochs, from 0."""
    args = recipe(name)
    assert args['batch_size'] == batch_size and args['smoothing'] == 0
    assert args.get('std') == ([1, 1, 1] if name.startswith('fa') else None)
    defaults = dict(decay_milestones=[], decay_epochs=0, decay_rate=0.1, min_lr=0, warmup_lr=0, cooldown_epochs=0)
    namespace = SimpleNamespace(**{**defaults, **args, 'lr_noise': None, 'patience_epochs': 0, 'warmup_prefix': False})
    model = timm.create_model(args['model'].replace('164', '83'))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(namespace), **args['opt_kwargs'])
    assert not optimizer.defaults['nesterov'] and optimizer.defaults['momentum'] == 0.9
    undecayed = sum(len(g['params']) for g in optimizer.param_groups if g['weight_decay'] == 0)
    assert undecayed == (3 * 27 if name.startswith('saam') else 0)  # three of each of 27 attention modules
    assert {g['weight_decay'] for g in optimizer.param_groups} - {0} == {decay}
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(namespace))
    assert num_epochs == epochs
    lrs = [optimizer.param_groups[0]['lr']]
    for epoch in range(1, epochs):
        scheduler.step(epoch)
        lrs.append(optimizer.param_groups[0]['lr'])
    assert [i for i in range(1, epochs) if lrs[i] != lrs[i - 1]] == drops
    assert lrs[0] == 0.1 and lrs[-1] == pytest.approx(0.1 * 0.1 ** len(drops))
