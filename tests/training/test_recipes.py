from pathlib import Path

import pytest
import yaml

from timm_poolattn.training.timm_script import load_train_script

RECIPES = sorted((Path(__file__).parents[2] / 'train_scripts' / 'recipes').glob('*.yaml'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_every_key_is_an_argument_of_train_py(path, train_script):
    parser = load_train_script(train_script).parser
    assert yaml.safe_load(path.read_text()).keys() <= {a.dest for a in parser._actions}


@pytest.mark.parametrize(
    'name, epochs, decay, drops',
    [('saam', 182, 2e-4, [90, 135]), ('spem', 164, 1e-4, [81, 122]), ('fa', 240, 5e-4, [60, 120, 180])],
)
def test_the_papers_optimizer_and_schedule(name, epochs, decay, drops):
    """Built by timm from the recipe: plain momentum, all decays, lr 0.1 divided by 10 before these epochs, from 0."""
    from types import SimpleNamespace

    import timm
    from timm.optim import create_optimizer_v2, optimizer_kwargs
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    recipe = yaml.safe_load((RECIPES[0].parent / f'{name}.yaml').read_text())
    assert recipe['batch_size'] == 128 and recipe['smoothing'] == 0
    defaults = dict(decay_milestones=[], decay_epochs=0, decay_rate=0.1, min_lr=0, warmup_lr=0, cooldown_epochs=0)
    args = SimpleNamespace(**{**defaults, **recipe, 'lr_noise': None, 'patience_epochs': 0, 'warmup_prefix': False})
    model = timm.create_model(f'resnet20_{name}')
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **recipe['opt_kwargs'])
    assert not optimizer.defaults['nesterov'] and optimizer.defaults['momentum'] == 0.9
    undecayed = sum(len(g['params']) for g in optimizer.param_groups if g['weight_decay'] == 0)
    assert undecayed == (27 if name == 'saam' else 0)
    assert {g['weight_decay'] for g in optimizer.param_groups} - {0} == {decay}
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    assert num_epochs == epochs
    lrs = [optimizer.param_groups[0]['lr']]
    for epoch in range(1, epochs):
        scheduler.step(epoch)
        lrs.append(optimizer.param_groups[0]['lr'])
    assert [i for i in range(1, epochs) if lrs[i] != lrs[i - 1]] == drops
    assert lrs[0] == 0.1 and lrs[-1] == pytest.approx(0.1 * 0.1 ** len(drops))
