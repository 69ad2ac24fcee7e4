"""Every command with every mistake that it can be given: one line that says what to do, and exit code 2."""

import os
import shlex
import socket
import subprocess

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image

from timm_poolattn.cli import main

MODEL, UNTRAINED = 'resnet20_saam', 'resnet326_srm'
LONG = 'x' * 300  # which no disk has, and asking for it is an OSError, as where a user may not look
TRAIN = f'train --model {MODEL} --epochs 1'

MISTAKES = {
    'misspelt name': [
        'lst',
        'hub relase .',
        'plot curvs .',
        'bench gats',
        'list resnt20_saam',
        'predict photo.png --model resnet20_sam',
        'predict photo.png --model hf-hub:',
        'predict photo.png --model hf-hub:a/b/c',
        'predict photo.png --model hf-hb:a/b',
        'predict photo.png --model folder',
        'warm-start folder resnet20_saam -o out.safetensors',
        'validate --model resnet20_sam --data-dir pets',
        'export resnet20_sam out.pt2 --format pt2',
        'export resnet20_sam out.pt2 --format pt2 --untrained',
        'export resnet20_saam out.pt3 --format pt3',
        'explain photo.png --model resnet20_sam -o out',
        f'explain photo.png --model {MODEL} --compare resnet20_spen -o out',
        'demo --model resnet20_sam',
        'train --model resnet20_sam --data-dir pets',
        'train --recipe saam-cifar --data-dir pets',
        f'{TRAIN} --data-dir pets --dataset torch/cifr10',
        f'{TRAIN} --data-dir pets --val-split tset',
        'finetune pets --model resnet20_sam',
        'finetune --epochs 3 pets',
        f'{TRAIN} --data-dir pets --lerning-rate 3',
        f'warm-start resnet20_sam {MODEL} -o out.safetensors',
        f'warm-start {MODEL} resnet20_sam -o out.safetensors',
        'hub verify resnet20_sam',
        'hub publish resnet20_sam --org org --dry-run',
        'plot lambda resnet20_spen -o out.png',
        'plot ablation pats -o out.png',
        'bench gates --gate saan',
        'bench gates --model resnet2',
        'bench models --model resnet20_sam',
        'bench train resnet20_sam',
        'bench train resnet20_saam --mode eagr',
        'bench skip --model resnet20_f --data-dir pets',
        f'validate --model {MODEL} --data-dir pets --split tset',
        f'validate --model {MODEL} --data-dir pets --dataset torch/cifr10',
    ],
    'missing file': [
        'predict nowhere',
        'explain nowhere --model resnet20_saam -o out',
        f'validate --model {MODEL} --data-dir nowhere',
        'validate --model local-dir:nowhere --data-dir pets',
        'predict photo.png --model local-dir:nowhere',
        'demo --model local-dir:nowhere',
        'export local-dir:nowhere out.pt2 --format pt2',
        f'{TRAIN} --data-dir nowhere',
        f'{TRAIN} --data-dir pets --config nowhere.yaml',
        f'{TRAIN} --data-dir pets --resume nowhere.pth.tar',
        f'{TRAIN} --data-dir pets --initial-checkpoint nowhere.safetensors',
        f'{TRAIN} --data-dir pets --timm-script nowhere.py',
        f'{TRAIN} --data-dir nowhere --dataset torch/cifar10',
        'finetune nowhere',
        f'warm-start nowhere.safetensors {MODEL} -o out.safetensors',
        'run nowhere.py',
        'hub release nowhere --tag cifar10',
        'hub verify ./nowhere',
        'hub publish ./nowhere --org org --dry-run',
        'plot curves nowhere -o out.png',
        'plot lambda local-dir:nowhere -o out.png',
        'plot ablation paths nowhere -o out.png',
        'report -o out.html --benchmark nowhere',
        'bench loader --data-dir nowhere',
        'bench loader --data-dir pets --airbench nowhere',
        'bench models --spem-authors nowhere',
        'bench skip --model resnet20_fa --data-dir nowhere',
    ],
    'unreadable file': [
        'predict broken.png',
        'predict folder',
        f'explain broken.png --model {MODEL} -o out',
        f'explain folder --model {MODEL} -o out',
        f'validate --model {MODEL} --data-dir broken.tar',
        f'validate --model {MODEL} --data-dir folder',
        'validate --model local-dir:folder --data-dir pets',
        'predict photo.png --model local-dir:folder',
        'predict photo.png --model local-dir:broken',
        f'{TRAIN} --data-dir broken.tar',
        f'{TRAIN} --data-dir folder',
        f'{TRAIN} --data-dir pets --config broken.yaml',
        f'{TRAIN} --data-dir pets --config folder',
        f'{TRAIN} --data-dir pets --resume broken.pth.tar',
        f'{TRAIN} --data-dir pets --initial-checkpoint broken.safetensors',
        f'{TRAIN} --data-dir pets --initial-checkpoint folder',
        'finetune broken.tar',
        'finetune folder',
        f'warm-start broken.safetensors {MODEL} -o out.safetensors',
        'run folder',
        'hub release folder --tag cifar10',
        'hub release broken --tag cifar10',
        'plot curves broken.json -o out.png',
        'plot curves folder -o out.png',
        'plot ablation paths broken.json -o out.png',
        'report -o out.html --benchmark broken.json',
        'report -o out.html --benchmark folder',
        'bench loader --data-dir broken.tar',
        'bench skip --model resnet20_fa --data-dir broken.tar',
    ],
    'path that cannot be': [
        f'predict {LONG}',
        f'predict photo.png --model local-dir:{LONG}',
        f'validate --model {MODEL} --data-dir {LONG}',
        f'{TRAIN} --data-dir pets --resume {LONG}',
        f'{TRAIN} --data-dir pets --initial-checkpoint {LONG}',
        f'{TRAIN} --data-dir pets --config {LONG}',
        f'{TRAIN} --data-dir pets --timm-script {LONG}',
        f'{TRAIN} --data-dir pets --num-classes 2 --output {LONG}',
        f'finetune {LONG}',
        f'warm-start {LONG}.safetensors {MODEL} -o out.safetensors',
        f'warm-start {MODEL} resnet32_saam -o {LONG}.safetensors',
        f'export {MODEL} {LONG} --format pt2',
        f'explain photo.png --model {MODEL} -o {LONG}',
        f'run {LONG}',
        f'hub release {LONG} --tag t',
        f'hub verify ./{LONG}',
        f'plot curves {LONG} -o out.png',
        f'plot curves run -o {LONG}.png',
        f'report -o {LONG}.html',
    ],
    'unwritable output': [
        f'export {MODEL} photo.png/out.pt2 --format pt2',
        f'export {MODEL} folder --format pt2',
        f'explain photo.png --model {MODEL} -o photo.png',
        f'explain photo.png --model {MODEL} -o photo.png/out',
        f'{TRAIN} --data-dir pets --num-classes 2 --output photo.png',
        'finetune pets --epochs 1 --output photo.png/out',
        f'warm-start {MODEL} resnet32_saam -o photo.png/out.safetensors',
        f'warm-start {MODEL} resnet32_saam -o folder',
        f'warm-start {MODEL} resnet32_saam -o /proc/out.safetensors',
        f'explain photo.png --model {MODEL} -o /proc/out',
        'plot curves run -o photo.png/out.png',
        'plot curves run -o out.docx',
        'plot lambda resnet20_spem -o photo.png/out.png',
        'report -o photo.png/out.html',
        'report -o folder',
        'report -o out.docx',
    ],
    'full disk': [
        f'export {MODEL} full/out.pt2 --format pt2',
        f'export {MODEL} full/out.pt --format torchscript',
        f'export {MODEL} full/out.onnx --format onnx',
        f'explain photo.png --model {MODEL} -o full/out',
        f'{TRAIN} --data-dir pets --num-classes 2 --output full',
        'finetune pets --epochs 1 --output full',
        f'warm-start {MODEL} resnet32_saam -o full/out.safetensors',
        'plot curves run -o full/out.png',
        'plot lambda resnet20_spem -o full/out.svg',
        'report -o full/out.html',
    ],
    'no weights': [
        f'predict photo.png --model {UNTRAINED}',
        f'validate --model {UNTRAINED} --data-dir pets',
        f'export {UNTRAINED} out.pt2 --format pt2',
        f'explain photo.png --model {UNTRAINED} -o out',
        f'demo --model {UNTRAINED}',
        f'finetune pets --model {UNTRAINED}',
        f'{TRAIN.replace(MODEL, UNTRAINED)} --data-dir pets --pretrained',
        f'warm-start {UNTRAINED} {MODEL} -o out.safetensors',
        f'hub verify {UNTRAINED}',
        f'hub publish {UNTRAINED} --org org --dry-run',
        'plot lambda resnet326_spem -o out.png',
        'bench skip --model resnet110_fa --data-dir pets',
    ],
    'no GPU': [
        f'{command} --device {device}'
        for device in ('cuda:99', 'gpu')
        for command in (
            f'validate --model {MODEL} --data-dir pets',
            f'{TRAIN} --data-dir pets',
            'finetune pets',
            'bench gates',
            'bench models',
            f'bench train {MODEL}',
            'bench loader --data-dir pets',
            'bench skip --model resnet20_fa --data-dir pets',
        )
    ],
    'offline': [
        'predict photo.png --model hf-hub:org/model',
        'validate --model hf-hub:org/model --data-dir pets',
        'export hf-hub:org/model out.pt2 --format pt2',
        'explain photo.png --model hf-hub:org/model -o out',
        'demo --model hf-hub:org/model',
        'finetune pets --model hf-hub:org/model',
        f'{TRAIN} --data-dir data --dataset torch/cifar10 --dataset-download',
        f'warm-start hf-hub:org/model {MODEL} -o out.safetensors',
        'hub verify hf-hub:org/model',
        'plot lambda hf-hub:org/model -o out.png',
        'bench skip --model hf-hub:org/model --data-dir pets',
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch, image_folder):
    """A working folder with a photo, data, a run's curve, and things that are not what they are named."""
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 30), 'orange').save('photo.png')
    for name in ('folder', 'run', 'broken', 'full'):
        (tmp_path / name).mkdir()
    (tmp_path / 'run' / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,lr\n0,2,2,30,0.1\n')
    for name in ('png', 'tar', 'json', 'yaml', 'pth.tar', 'safetensors'):
        (tmp_path / f'broken.{name}').write_bytes(b'[\x00{ this is none')
    for name in ('config.json', 'args.yaml', 'run.json', 'summary.csv', 'last.pth.tar', 'model.safetensors'):
        (tmp_path / 'broken' / name).write_bytes(b'[\x00{ this is none')

    def refuse(*args, **kwargs):
        raise OSError('Network is unreachable')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # else huggingface_hub tries again for half a minute
    monkeypatch.setenv('HF_TOKEN', 'hf_token')
    return tmp_path


@pytest.fixture
def full_disk(place):
    """`full` is a disk of 8 KB."""
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=8k', 'tmpfs', str(place / 'full')]
    if os.name != 'posix' or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    yield
    subprocess.run(['umount', '-l', str(place / 'full')], check=True)


def cases():
    """Those that write an ONNX file first, which takes seconds, are slow ones."""
    for mistake, commands in MISTAKES.items():
        for command in commands:
            slow = mistake == 'full disk' and command.endswith('onnx')
            yield pytest.param(mistake, command, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize('mistake, command', cases())
def test_one_line(mistake, command, place, request, monkeypatch):
    if mistake == 'full disk':
        request.getfixturevalue('full_disk')
    if command.startswith(('train', 'finetune')):
        monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(request.getfixturevalue('train_script')))
    if mistake == 'no GPU' and torch.cuda.device_count() > 99:
        pytest.skip('a machine of a hundred GPUs')
    before = set(place.rglob('*'))
    result = CliRunner().invoke(main, shlex.split(command))
    assert result.exit_code == 2, f'{result.exception!r}\n{result.output}'
    errors = [line for line in result.stderr.splitlines() if 'Error' in line]  # train.py logs lines before
    assert result.stderr.splitlines()[-1:] == errors and errors[0].startswith('Error: '), result.stderr
    if not command.startswith(('train', 'finetune')) and mistake != 'full disk':
        written = {path for path in place.rglob('*') if 'cache' not in path.parts} - before
        assert not written, 'something was written'
