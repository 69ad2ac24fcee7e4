"""The wheel: what it carries, and that an installed one, a checkout and an editable install behave the same."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import timm

from timm_poolattn.training import recipes
from timm_poolattn.utils import released

ROOT = Path(__file__).parents[1]
#: Opens no connection, and tells what the import alone loads of that which takes seconds.
USE = """
import json, socket, sys, timm
def refuse(*args, **kwargs): raise AssertionError('a connection')
socket.socket.connect = refuse
import timm_poolattn
heavy = [m for m in sys.modules if m.startswith(('timm_poolattn.training', 'timm_poolattn.cli', 'matplotlib'))]
from timm_poolattn.utils import released
from timm_poolattn.training import recipes
model = timm.create_model('resnet20_saam', pretrained=True)
total = float(sum(p.sum() for p in model.parameters()))
print(json.dumps([timm_poolattn.__file__, heavy, sorted(released()), list(recipes()), total]))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    build = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob('*.whl')
    return path


def use(pythonpath, cwd):
    env = {**os.environ, 'PYTHONPATH': str(pythonpath), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, '-c', USE], capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wheel_carries_what_pretrained_needs(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    for name in released():
        for file in ('config.json', 'results.json', 'README.md'):
            assert f'timm_poolattn/hub_configs/{name}/{file}' in names
    embedded = {n.split('/')[2] for n in names if n.endswith('.safetensors')}
    assert embedded == {name for name in released() if re.match('resnet20[._]', name)}
    assert 'timm_poolattn/CITATION.cff' in names  # the model card quotes it
    for path in recipes().values():
        assert f'timm_poolattn/recipes/{path.name}' in names
    for file in (
        'py.typed',
        'papers/tables.yaml',
        'report/page.html.jinja',
        'report/demo.html.jinja',
        'hub/card.md.jinja',
    ):
        assert f'timm_poolattn/{file}' in names
    assert {n.split('/')[0] for n in names} == {'timm_poolattn', wheel.name.rsplit('-', 3)[0] + '.dist-info'}
    assert wheel.stat().st_size < 25e6


def test_links_of_its_page_lead_to_the_repository(wheel):
    with zipfile.ZipFile(wheel) as z:
        (metadata,) = (name for name in z.namelist() if name.endswith('.dist-info/METADATA'))
        page = z.read(metadata).decode()
    ours = re.findall(r'\]\((\S+)\)', (ROOT / 'README.md').read_text(encoding='utf-8'))
    theirs = re.findall(r'\]\((\S+)\)', page)
    assert len(ours) == len(theirs) > 8 and 'Description-Content-Type: text/markdown' in page
    for link, absolute in zip(ours, theirs, strict=True):
        assert absolute.startswith('https://') and absolute.endswith(link)
        assert link == absolute or ('raw.githubusercontent' if link.endswith('.png') else '/blob/main/') in absolute


def test_wheel_and_checkout_behave_the_same(wheel, tmp_path):
    site = tmp_path / 'site'
    install = [
        sys.executable,
        '-m',
        'pip',
        'install',
        '-q',
        '--no-deps',
        '--no-index',
        '--target',
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    (tmp_path / 'work').mkdir()
    file, heavy, *installed = use(site, tmp_path / 'work')
    assert file.startswith(str(site)) and not heavy and not any((tmp_path / 'work').iterdir())
    total = sum(p.detach().sum() for p in timm.create_model('resnet20_saam', pretrained=True).parameters()).item()
    assert installed == [sorted(released()), list(recipes()), total]
    env = {**os.environ, 'PYTHONPATH': str(site)}
    listed = subprocess.run(
        [sys.executable, site / 'bin' / 'poolattn', 'list', '--trained'],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    ).stdout
    lines = {line.split()[0]: line for line in listed.splitlines()[1:]}
    for name in released():
        arch, _, tag = name.partition('.')
        marked = re.search(rf'{tag} [\d.]+ \(download\)', lines[arch])
        assert bool(marked) != bool(re.match('resnet20(_|$)', arch)), lines[arch]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_in_an_empty_environment(wheel, tmp_path):
    """`pip install` of the wheel and nothing else; then the embedded models, with every connection refused."""
    subprocess.run([sys.executable, '-m', 'venv', str(tmp_path / 'venv')], check=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'HF_HUB_OFFLINE')}
    env['HF_HOME'] = str(tmp_path / 'home')
    subprocess.run([python, '-m', 'pip', 'install', '-q', str(wheel)], check=True, env=env, cwd=tmp_path)
    code = (
        'import socket, timm\n'
        "def refuse(*a, **k): raise AssertionError('a connection')\n"
        'socket.socket.connect = socket.getaddrinfo = refuse\n'
        'import timm_poolattn\n'
        'from timm_poolattn.hub import verify\n'
        'from timm_poolattn.models import FAMILIES\n'
        'names = [n for n in timm.list_models(module=FAMILIES, pretrained=True) if timm.get_pretrained_cfg(n).file]\n'
        'for name in names:\n'
        '    timm.create_model(name, pretrained=True)\n'
        '    assert all(check.ok for check in verify(name)), name\n'
        "timm.create_model('resnet20_saam', pretrained=True)\n"
        'print(timm_poolattn.__file__, *names)'
    )
    done = subprocess.run([python, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, *names = done.stdout.split()
    assert file.startswith(str(tmp_path / 'venv'))
    assert names == sorted(name for name in released() if re.match('resnet20[._]', name))


def test_the_command_loads_what_it_needs(tmp_path):
    """`poolattn list` and `-h` do without torch and timm; what needs the models finds them registered."""
    command = tmp_path / 'bin' / 'poolattn'
    command.parent.mkdir()
    command.write_text(
        'import sys\nfrom timm_poolattn.cli import main\n'
        'try:\n    main()\nfinally:\n    print(sorted({"torch", "timm"} & sys.modules.keys()), file=sys.stderr)\n'
    )

    def run(*args):
        env = {**os.environ, 'PYTHONPATH': str(ROOT)}
        return subprocess.run([sys.executable, command, *map(str, args)], capture_output=True, text=True, env=env)

    for args in (['list'], ['list', '--json', '--trained'], ['-h'], ['hub', 'publish', '-h'], ['train', '-h']):
        assert run(*args).stderr.strip().splitlines()[-1] == '[]', args
    *_, message, loaded = run('bench', 'models', '--model', 'resnet20_spam').stderr.strip().splitlines()
    assert "unknown model 'resnet20_spam'; nearest: resnet20_spem" in message + loaded
    assert "['timm', 'torch']" in (message, loaded)


def imported(*folders):
    """The libraries that the code in `folders` imports, by name of their distribution."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition('.')[0])
    names -= {'timm_poolattn', *sys.stdlib_module_names}
    distributions = packages_distributions()
    return {normal(distributions.get(name, [name])[0]) for name in names}


def normal(requirement):
    return re.match(r'[\w.-]+', requirement)[0].replace('_', '-').lower()


def test_imports_are_declared():
    tomllib = pytest.importorskip('tomllib')  # since Python 3.11
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    needed = set(map(normal, project['dependencies']))
    extras = {name: set(map(normal, of_extra)) for name, of_extra in project['optional-dependencies'].items()}
    used = imported('timm_poolattn', 'train_scripts')
    assert used <= needed | extras['explain'] | extras['onnx'] | extras['app'], 'a library that is imported is declared'
    assert needed <= used, 'a library that is declared is imported'
    everywhere = imported('tests') - {'tests', 'ours', 'pytest-timeout'}
    assert everywhere <= needed.union(*extras.values())
    assert extras['demo'] | extras['explain'] | extras['onnx'] <= extras['test']
