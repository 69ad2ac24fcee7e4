"""What verification finds, above all in folders and repositories that mean harm."""

import json
import os
import pickle
import struct

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from timm_poolattn.cli import main
from timm_poolattn.data import load_images
from timm_poolattn.hub import verify, write_texts
from timm_poolattn.hub.releases import seal
from timm_poolattn.inference import evaluate, load_pretrained
from timm_poolattn.report.results import read_results
from timm_poolattn.utils import UserError, released

from .conftest import NAME

CHECKS = ['files', 'header', 'config', 'parameters', 'values', 'hashes', 'card', 'forward']


def fails(target, check):
    """The detail of the check that fails, which is the last."""
    checks = verify(target)
    assert [c.name for c in checks] == CHECKS[: CHECKS.index(check) + 1]
    assert [c.ok for c in checks] == [True] * (len(checks) - 1) + [False], checks
    return checks[-1].detail


def edit(folder, file, **changes):
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **changes}))


def change_weights(folder, change):
    """Change the tensors, and make all hashes agree again."""
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors')
    hashes = seal(folder / 'model.safetensors', dict(architecture='resnet20_saam', tag='cifar10'))
    edit(folder, 'results.json', weights=hashes)


class Evil:
    """Executed when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


@pytest.mark.parametrize('target', [NAME, 'resnet20_saam'])
def test_a_sound_release(target):
    checks = verify(target)
    assert [c.name for c in checks] == CHECKS and all(c.ok for c in checks)
    assert checks[3].detail == '281,051, as in the registry'


def test_command_line(other):
    result = CliRunner().invoke(main, ['hub', 'verify', str(other)])
    assert result.exit_code == 0 and [line.split()[:2] for line in result.output.splitlines()] == [
        ['ok', name] for name in CHECKS
    ]
    (other / 'pytorch_model.bin').touch()
    result = CliRunner().invoke(main, ['hub', 'verify', str(other), '--json'])
    assert result.exit_code == 1 and json.loads(result.output)[-1]['ok'] is False
    result = CliRunner().invoke(main, ['hub', 'verify', 'resnet20_sam'])
    assert result.exit_code == 2 and "unknown release 'resnet20_sam'; nearest: resnet20_saam" in result.output


def test_accuracy(other, image_folder):
    claimed = evaluate(load_pretrained(f'local-dir:{other}'), load_images(image_folder, 'test'))
    for change, message in (
        (dict(top1=claimed['top1'] + 0.05), 'claimed'),
        (dict(top1=claimed['top1'] + 0.1), 'more than 0.05 apart'),
        (dict(images=10000), 'claimed on 10,000 images, this data has 8'),
    ):
        edit(other, 'results.json', test={**claimed, **change})
        write_texts(other, json.loads((other / 'results.json').read_text()))
        *_, check = verify(other, data_dir=image_folder)
        assert check.name == 'accuracy' and check.ok == (message == 'claimed') and message in check.detail


class TestHostileFolder:
    @pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'extra.safetensors', 'weights.pkl', 'a.pth.tar'])
    def test_other_weights(self, other, tmp_path, name):
        (other / name).write_bytes(pickle.dumps(Evil(tmp_path / 'evil')))
        assert fails(other, 'files').startswith(f'{name}: weights other than model.safetensors')
        assert not (tmp_path / 'evil').exists()

    def test_pickle_under_the_name_of_safetensors(self, other, tmp_path):
        torch.save(Evil(tmp_path / 'evil'), other / 'model.safetensors')
        assert 'model.safetensors: ' in fails(other, 'header')
        assert not (tmp_path / 'evil').exists()

    def test_unexpected_missing_and_linked_files(self, other, tmp_path):
        (other / 'setup.py').touch()
        assert fails(other, 'files').startswith('setup.py: unexpected')
        (other / 'setup.py').unlink()
        (other / 'config.json').rename(tmp_path / 'config.json')
        assert fails(other, 'files') == 'lacks config.json'
        os.symlink(tmp_path / 'config.json', other / 'config.json')
        assert fails(other, 'files') == 'config.json: not a regular file'

    @pytest.mark.parametrize('size', [2**63, 200_000_000, 5_000_000])
    def test_oversized_header(self, other, size):
        file = (other / 'model.safetensors').read_bytes()
        (other / 'model.safetensors').write_bytes(struct.pack('<Q', size) + file[8:])
        assert 'header' in fails(other, 'header').lower()

    @pytest.mark.parametrize('offsets', [[0, 2**40], [0, 4], [-8, 0], [8, 0]])
    def test_lying_header(self, other, offsets):
        file = (other / 'model.safetensors').read_bytes()
        size = struct.unpack('<Q', file[:8])[0]
        header = json.loads(file[8 : 8 + size])
        header['conv1.weight']['data_offsets'] = offsets
        text = json.dumps(header).encode()
        (other / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + file[8 + size :])
        assert fails(other, 'header').startswith('model.safetensors: ')

    def test_truncated(self, other):
        file = (other / 'model.safetensors').read_bytes()
        (other / 'model.safetensors').write_bytes(file[:-100])
        assert fails(other, 'header').startswith('model.safetensors: ')

    def test_another_models_weights(self, other):
        seal(other / 'model.safetensors', dict(architecture='resnet20_fa', tag='cifar10'))
        assert (
            fails(other, 'header')
            == 'model.safetensors is of resnet20_fa.cifar10, results.json of resnet20_saam.cifar10'
        )

    @pytest.mark.parametrize('arch', ['resnet9000_saam', 'resnet50', '../../etc', 'os.system'])
    def test_unknown_architecture(self, other, arch):
        edit(other, 'config.json', architecture=arch)
        assert f'unknown architecture {arch!r}' in fails(other, 'config')

    def test_config_of_another_network(self, other):
        args = json.loads((other / 'config.json').read_text())['model_args']
        edit(other, 'config.json', model_args={**args, 'depth': 6 * 10**9 + 2})  # would take for ever to build
        assert 'model_args depth would build another network' in fails(other, 'config')
        edit(other, 'config.json', model_args=args, label_names=['cat'])
        assert fails(other, 'config') == 'config.json: 10 classes, 1 label names'
        edit(other, 'config.json', architecture='resnet20_fa')
        assert 'config.json is of resnet20_fa, results.json of resnet20_saam' in fails(other, 'config')
        (other / 'config.json').write_text('[' * 100_000)
        fails(other, 'config')

    def test_parameters(self, other):
        change_weights(other, lambda weights: weights.update({'conv1.weight': torch.zeros(16, 3, 5, 5)}))
        detail = fails(other, 'parameters')
        assert (
            '1 tensors are not those of resnet20_saam, conv1.weight' in detail and '[16, 3, 5, 5] in the file' in detail
        )
        change_weights(other, lambda weights: weights.pop('conv1.weight'))
        assert 'conv1.weight the first: absent in the file' in fails(other, 'parameters')

    def test_claimed_parameters(self, other):
        edit(other, 'results.json', parameters=281_050)
        assert fails(other, 'parameters') == 'results.json says 281,050, the registry 281,051'

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_values(self, other, value):
        change_weights(other, lambda weights: weights['conv1.weight'].view(-1)[7:8].fill_(value))
        assert fails(other, 'values') == 'conv1.weight holds NaN or infinity'

    def test_hashes(self, other):
        file = bytearray((other / 'model.safetensors').read_bytes())
        file[-1] ^= 1
        (other / 'model.safetensors').write_bytes(file)
        assert fails(other, 'hashes').startswith('model.safetensors is ')


def test_a_folder_with_the_name_of_a_release(other, folder, monkeypatch):
    monkeypatch.chdir(other.parent)
    with pytest.raises(UserError, match=f'{NAME} is a release of the package and a folder here'):
        verify(NAME)
    change_weights(other, lambda weights: weights['head.fc.bias'].fill_(torch.nan))
    assert not verify(f'local-dir:{NAME}')[-1].ok and not verify(f'./{NAME}')[-1].ok
    monkeypatch.chdir(folder.parent)
    assert verify(NAME)[-1].ok


class TestHostileRepository:
    def files(self, folder):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

    def test_sound(self, hub, folder):
        hub.add('org/x', {'.gitattributes': b'', **self.files(folder)})
        assert all(check.ok for check in verify('hf-hub:org/x')) and not hub.waits
        assert all(check.ok for check in verify('hf-hub:org/x@main', endpoint=hub.url))

    @pytest.mark.parametrize(
        'path', ['../evil', 'a/../../evil', '/tmp/evil', '..\\evil', 'C:evil', 'sub/../config.json']
    )
    def test_path_tricks(self, hub, folder, path):
        hub.add('org/x', {**self.files(folder), path: b'evil'})
        (check,) = verify('hf-hub:org/x')
        assert not check.ok and check.detail == f'{path!r} leads out of the folder'
        assert not any('resolve' in path for _, path in hub.requests)  # nothing was downloaded

    def test_pickle(self, hub, folder):
        hub.add('org/x', {**self.files(folder), 'pytorch_model.bin': b'evil'})
        (check,) = verify('hf-hub:org/x')
        assert not check.ok and check.detail.startswith('pytorch_model.bin: weights other than model.safetensors')
        assert not any('resolve' in path for _, path in hub.requests)

    @pytest.mark.parametrize('size', [2**30 + 1, '1'])
    def test_a_size_that_no_release_has(self, hub, folder, size):
        hub.add('org/x', self.files(folder))
        entry = {'type': 'file', 'oid': 'x', 'size': size}
        body = json.dumps([{**entry, 'path': file} for file in self.files(folder)])
        hub.fault('GET', 'tree', 200, times=99, body=body)
        (check,) = verify('hf-hub:org/x')
        assert not check.ok and f'its size is {size!r}, 1,073,741,824 is the most' in check.detail
        assert not any('resolve' in path for _, path in hub.requests)

    @pytest.mark.parametrize('body', ['', '[]', 'null', '{}', '"x"', '[1]', '[{"type": "file"}]', '<html>'])
    def test_a_list_of_files_that_is_nonsense(self, hub, folder, body):
        hub.add('org/x', self.files(folder))
        hub.fault('GET', 'tree', 200, times=99, body=body)
        (check,) = verify('hf-hub:org/x')
        assert check.name == 'files' and not check.ok and ('lacks' in check.detail or hub.url in check.detail)

    @pytest.mark.parametrize('kind', [200, 404, 500, 'cut'])
    @pytest.mark.parametrize('method', ['HEAD', 'GET'])
    def test_a_file_that_does_not_come(self, hub, folder, method, kind):
        hub.add('org/x', self.files(folder))
        hub.fault(method, 'resolve/.*/results.json', kind, times=99)
        checks = verify('hf-hub:org/x')
        assert not checks[-1].ok and 'results.json' in checks[-1].detail

    @pytest.mark.parametrize('file', ['config.json', 'results.json', 'README.md', 'model.safetensors'])
    @pytest.mark.parametrize('part', [0, 0.25])
    def test_empty_and_cut_files(self, hub, folder, file, part):
        files = self.files(folder)
        files[file] = files[file][: int(part * len(files[file]))]
        hub.add('org/x', files)
        checks = verify('hf-hub:org/x')
        assert not checks[-1].ok and file in checks[-1].detail

    @pytest.mark.parametrize('target', ['hf-hub:', 'hf-hub:a b/c', 'hf-hub:a/b/c', 'hf-hub:../x'])
    def test_what_names_no_repository(self, hub, target):
        with pytest.raises(UserError):
            verify(target)

    def test_flipped_on_the_way(self, hub, folder):
        hub.add('org/x', self.files(folder))
        hub.fault('GET', 'storage', 'flip')
        checks = verify('hf-hub:org/x')
        assert checks[-1].name == 'hashes' and not checks[-1].ok


#: Changes of config.json's pretrained_cfg, and a word of what is said.
CONFIGS = [
    (dict(std=[0, 0, 0]), 'std'),
    (dict(std=[-0.2, 0.2, 0.2]), 'std'),
    (dict(std=[0.2, 0.2]), 'std'),
    (dict(mean='abc'), 'mean'),
    (dict(mean=[True, 0.5, 0.5]), 'mean'),
    (dict(mean=[float('nan')] * 3), 'NaN'),
    (dict(mean=[5, 5, 5]), 'mean'),
    (dict(mean=None), 'mean'),
    (dict(interpolation='evil'), 'interpolation'),
    (dict(interpolation=['bicubic']), 'interpolation'),
    (dict(crop_mode='evil'), 'crop_mode'),
    (dict(crop_pct=0), 'crop_pct'),
    (dict(crop_pct=-1), 'crop_pct'),
    (dict(crop_pct=float('inf')), 'Infinity'),
    (dict(crop_pct='1'), 'crop_pct'),
    (dict(input_size=[3, 40000, 40000]), 'input_size'),
    (dict(input_size=[3, 64, 64]), 'input_size'),
    (dict(input_size=[0, 32, 32]), 'input_size'),
    (dict(input_size=[3, 32]), 'input_size'),
    (dict(input_size=[3, 32.5, 32]), 'input_size'),
    (dict(pool_size=[0, 0]), 'pool_size'),
    (dict(url='http://localhost/evil.pth'), 'url'),
    (dict(file='/etc/passwd'), 'file'),
    (dict(hf_hub_id='evil/evil'), 'hf_hub_id'),
    (dict(custom_load=True), 'custom_load'),
    (dict(label_offset=1), 'label_offset'),
    (dict(first_conv='evil'), 'first_conv'),
    (dict(classifier='conv1'), 'classifier'),
    (dict(tag='cifar100'), 'tag'),
    (dict(num_classes=11), 'in a part of it'),
]


@pytest.mark.parametrize('change, word', CONFIGS, ids=lambda value: str(value)[:40])
def test_pretrained_cfg(other, change, word):
    cfg = json.loads((other / 'config.json').read_text())['pretrained_cfg']
    edit(other, 'config.json', pretrained_cfg={**cfg, **change})
    assert word in fails(other, 'config')


@pytest.mark.parametrize(
    'change',
    [
        lambda names: names[1:] + names[:1],
        lambda names: [*names[:9], names[0]],
        lambda names: [[name] for name in names],
        lambda names: [*names[:9], 'tru\x1b[31mck'],
        lambda names: [*names[:9], 'tru\nck'],
        lambda names: [*names[:9], ' '],
        lambda names: [*names[:9], 'x' * 1000],
        lambda names: [*names[:9], 7],
        lambda names: dict(enumerate(names)),
        lambda names: None,
    ],
)
def test_label_names(other, change):
    config = json.loads((other / 'config.json').read_text())
    names = change(config['label_names'])
    edit(other, 'config.json', label_names=names, pretrained_cfg={**config['pretrained_cfg'], 'label_names': names})
    assert 'label name' in fails(other, 'config') or 'label_names' in fails(other, 'config')


@pytest.mark.parametrize(
    'change',
    [
        dict(global_pool=''),
        dict(global_pool='evil'),
        dict(model_args=[]),
        dict(model_args=dict(in_chans=1)),
        dict(model_args=dict(global_pool='max')),
        dict(model_args=dict(stem_stride=0)),
        dict(pretrained_cfg=None),
        dict(num_classes=True),
        dict(num_features=65),
        dict(auto_map=dict(AutoModel='evil.Evil')),
        dict(architecture=None),
        dict(architecture=['resnet20_saam']),
    ],
    ids=str,
)
def test_config(other, change):
    edit(other, 'config.json', **change)
    assert 'config.json' in fails(other, 'config')


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '"x"', '{"a": 1, "a": 2}', '\ufeff{}', '[' * 100_000])
@pytest.mark.parametrize('file', ['config.json', 'results.json'])
def test_files_that_are_no_mapping(other, file, text):
    (other / file).write_text(text)
    checks = verify(other)
    assert not checks[-1].ok and checks[-1].detail.startswith(file)


@pytest.mark.parametrize(
    'change',
    [
        *(dict(test=[]), dict(test=dict(top1=101)), dict(parameters='many'), dict(tag=None), dict(best_epoch='x')),
        *(dict(best_top1=None), dict(last_epoch_top1=[]), dict(released_by='me'), dict(seed=0.5), dict(recipe=None)),
        dict(without_gradient='none'),
    ],
    ids=str,
)
def test_results(other, change):
    edit(other, 'results.json', **change)
    assert 'results.json' in fails(other, 'header')


@pytest.mark.parametrize('names', [['gate'], [3.5], ['head.fc.bias'] * 2, ['head.fc.bias', 'conv1.weight']], ids=str)
def test_without_gradient_names_parameters_in_their_order(other, names):
    edit(other, 'results.json', without_gradient=names)
    assert fails(other, 'parameters').startswith('results.json: without_gradient must name parameters of resnet20_saam')


def test_the_card_names_what_gets_no_gradient(other):
    edit(other, 'results.json', without_gradient=['stages.0.blocks.0.gate.fc1.weight'])
    assert 'names other parameters without a gradient than results.json' in fails(other, 'card')


@pytest.mark.parametrize('gate', [None, 'spem'])
def test_a_gate_that_is_another(other, gate):
    edit(other, 'results.json', gate=gate)
    assert fails(other, 'config') == f"results.json: gate is {gate!r}, and resnet20_saam has 'saam'"


@pytest.mark.parametrize('dtype', [torch.int8, torch.bool, torch.complex64, torch.float16, torch.float64])
def test_types_of_weights(other, dtype):
    change_weights(other, lambda w: w.update({'conv1.weight': w['conv1.weight'].to(dtype)}))
    assert fails(other, 'values') == f'conv1.weight is {dtype}, and must be torch.float32'


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('bn1.running_var', -1.0, 'is negative'),
        ('bn1.num_batches_tracked', -1, 'is negative'),
        ('conv1.weight', 3e38, 'no training ends beyond'),
    ],
)
def test_values_that_cannot_be(other, name, value, message):
    change_weights(other, lambda weights: weights[name].fill_(value))
    assert message in fails(other, 'values')


def test_a_model_that_does_not_look(other):
    change_weights(other, lambda weights: weights['head.fc.weight'].zero_())
    assert 'the very same numbers' in fails(other, 'forward')


TOP1 = f'{read_results(released()[NAME])["test"]["top1"]:.2f}'


class TestCard:
    """The card and the Hub's evaluation result say what results.json says."""

    @pytest.mark.parametrize(
        'old, new, message',
        [
            (f'value: {TOP1}', 'value: 97.75', 'model-index in its head is not what results.json says'),
            ('license: apache-2.0', 'license: mit', 'license in its head'),
            ('license: apache-2.0', 'license: apache-2.0\nbase_model: evil/evil', 'base_model in its head'),
            (f'| {TOP1} |', '| 97.75 |', f'its table is not that of results.json, {TOP1}%'),
            ('---\n', '', 'README.md'),
            ('license: apache-2.0', 'license: [', 'README.md: not a model card'),
            ('license: apache-2.0', 'license: !!python/object/apply:os.system [ls]', 'README.md: not a model card'),
        ],
    )
    def test_readme(self, other, old, new, message):
        text = (other / 'README.md').read_text()
        assert old in text
        (other / 'README.md').write_text(text.replace(old, new))
        assert message in fails(other, 'card') and 'README.md' in fails(other, 'card')

    def test_not_utf_8(self, other):
        (other / 'README.md').write_bytes(b'\xff\xfe')
        assert 'README.md: not a model card' in fails(other, 'card')

    def test_the_papers_figure_may_be_corrected(self, other):
        text = (other / 'README.md').read_text()
        (other / 'README.md').write_text(text.replace('| 92.60 |', '| 92.61 |'))
        assert all(check.ok for check in verify(other))

    @pytest.mark.parametrize('text', ['', '[', '[]', 'value: 99', 'null', '- {value: 99}'])
    def test_evaluation_result(self, other, text):
        (other / '.eval_results' / 'cifar10.yaml').write_text(text)
        assert fails(other, 'card').startswith('.eval_results/cifar10.yaml: ')

    def test_evaluation_results_missing_and_of_other_data(self, other):
        path = other / '.eval_results' / 'cifar10.yaml'
        path.with_name('cifar100.yaml').write_bytes(path.read_bytes())
        assert fails(other, 'card').startswith('.eval_results/cifar100.yaml: not of a release of cifar10')
        path.with_name('cifar100.yaml').rename(path.with_name('imagenet.yaml'))
        path.unlink()
        assert fails(other, 'card').startswith('.eval_results/cifar10.yaml: is missing')

    @pytest.mark.parametrize('change', [dict(gate='evil'), dict(seed=None), dict(versions=[]), dict(checkpoint={})])
    def test_results_that_make_no_card(self, other, change):
        results = {**json.loads((other / 'results.json').read_text()), **change}
        results = {key: value for key, value in results.items() if value is not None}
        (other / 'results.json').write_text(json.dumps(results))
        checks = verify(other)
        assert not checks[-1].ok and checks[-1].detail.startswith('results.json: ')
