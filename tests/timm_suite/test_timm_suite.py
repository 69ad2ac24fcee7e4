"""timm's own test_models.py, from the source distribution of the installed timm, on our models."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

from timm_poolattn.models import FAMILIES

ROOT = Path(__file__).parents[2]
MARKERS = 'base', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward'  # that it declares
ALL = timm.list_models(module=FAMILIES)
#: Every gate, and every family but the largest at least once.
DEFAULT = [n for n in ALL if n.startswith('resnet20')] + [
    'resnet50_fa',
    'resnet83_spem',
    'resnext29_fa',
    'vgg19_fase',
]


@pytest.fixture(scope='module')
def suite(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('timm')
    download = ['download', '-q', '--no-deps', '--no-binary', 'timm', f'timm=={timm.__version__}', '-d', str(folder)]
    done = subprocess.run([sys.executable, '-m', 'pip', *download], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'no source distribution of timm {timm.__version__} from the package index: {done.stderr[-300:]}')
    (archive,) = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        member = tar.getmember(f'timm-{timm.__version__}/tests/test_models.py')
        (folder / 'test_models.py').write_bytes(tar.extractfile(member).read())
    return folder / 'test_models.py'


def run(suite, names, timeout, *options):
    (suite.parent / 'pytest.ini').write_text('[pytest]\nmarkers =' + ''.join(f'\n    {m}:' for m in MARKERS))
    env = {
        **os.environ,
        'PYTHONPATH': f'{ROOT}{os.pathsep}{Path(__file__).parent}',
        'TIMM_POOLATTN_NAMES': ' '.join(names),
    }
    # without timm's limits of seconds a test, which are for its own machines; `timeout` is for all of them
    plugins = ['-p', 'ours', '-p', 'no:cacheprovider', '-p', 'no:timeout']
    command = [sys.executable, '-m', 'pytest', '-q', *plugins, *options, suite.name]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=suite.parent, timeout=timeout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = int(re.search(r'(\d+) passed', done.stdout)[1])
    assert 'failed' not in done.stdout and passed >= 11 * len(names), done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_small_and_middle_sized(suite):
    """What `.ci/run` calls."""
    run(suite, DEFAULT, 1200, '-n', '2')


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_all(suite):
    """About half an hour on two cores."""
    run(suite, ALL, 14400, '-n', str(os.cpu_count()))
