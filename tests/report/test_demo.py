"""The page to try models: what it says of a photo, and the page itself in a real browser, run as a Space runs it."""

import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from timm_poolattn.explain import attention_trace
from timm_poolattn.inference import load_pretrained, model_input, predict
from timm_poolattn.report import demo
from timm_poolattn.utils import UserError, released

from ..cli.test_cli import fails
from ..test_readmes import ROOT, blocks

NAMES = ['resnet20_fa.cifar10', 'resnet20_saam.cifar10', 'resnet20_spem.cifar10']
skimage = pytest.importorskip('skimage')
CAT = Path(skimage.__path__[0]) / 'data' / 'chelsea.png'


def bomb(side: int) -> bytes:
    """A PNG that says that it has `side`^2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')

    head = 2 * side.to_bytes(4, 'big') + bytes([8, 2, 0, 0, 0])
    parts = chunk(b'IHDR', head), chunk(b'IDAT', zlib.compress(bytes(1000))), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def saved(image: Image.Image, format: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def uploads() -> dict[str, tuple[bytes, str]]:
    """Files by name, and a part of what the page says of each."""
    cat = Image.open(CAT).convert('RGB')
    turned = Image.Exif()
    turned[274] = 6  # to be turned by 90 degrees
    deep = np.asarray(cat.convert('L')).astype(np.uint16) * 257
    return {
        'text.png': (b'this is no image', 'text.png cannot be decoded as an image (no format that Pillow knows)'),
        '<img src=x>.png': (b'', '<img src=x>.png cannot be decoded as an image'),
        'cut.png': (CAT.read_bytes()[:60_000], 'cut.png cannot be decoded as an image (image file is truncated)'),
        'bomb.png': (bomb(50_000), 'bomb.png: more than 67,108,864 pixels; make the image smaller'),
        'small bomb.png': (bomb(9_000), 'small bomb.png: 9000x9000 are more than 67,108,864 pixels'),
        'one.png': (saved(Image.new('RGB', (1, 1), 'red'), 'png'), 'one.png, 1x1: 3 of 3 models'),
        'cmyk.jpg': (saved(cat.convert('CMYK'), 'jpeg'), 'cmyk.jpg, 451x300: 3 of 3 models'),
        'deep.png': (saved(Image.fromarray(deep), 'png'), 'deep.png, 451x300: 3 of 3 models'),
        'turned.jpg': (saved(cat.rotate(90, expand=True), 'jpeg', exif=turned), 'turned.jpg, 451x300: 3 of 3 models'),
    }


@pytest.fixture(scope='module')
def models():
    return {name: load_pretrained(name) for name in NAMES}


class TestLook:
    def test_says_what_the_models_say(self, models):
        """Predictions, lambda and k are those of the package's own functions, to the digits that are printed."""
        lines, pages = zip(*demo.look(models, CAT, 'cat.png'), strict=True)
        assert [re.search(r'(\d) of 3 models', text)[1] for text in lines] == ['0', '1', '2', '3']
        assert [page.count('<article>') for page in pages] == [0, 1, 2, 3]
        for card, (name, model) in zip(pages[-1].split('<article>')[1:], models.items(), strict=True):
            assert f'<h2>{name}</h2>' in card
            best = predict(model, [CAT], 3)[0]['predictions']
            printed = [f'<span>{p["label"]}</span><span>{100 * p["probability"]:.1f}%</span>' for p in best]
            assert best[0]['label'] == 'cat' and [card.count(text) for text in printed] == [1, 1, 1]
            trace = attention_trace(model, model_input(model, Image.open(CAT).convert('RGB')))
            values = [float(t[key][0]) for t in trace.values() for key in ('pool_lambda', 'k') if key in t]
            assert sorted(re.findall(r'<span>(\d\.\d\d)</span>', card)) == sorted(f'{v:.2f}' for v in values)
            maps = [t['score_map'][0].mean(0) for t in trace.values() if 'score_map' in t]
            peaks = re.findall(r'<figcaption>\d\.\d <span class="soft">(.*)</span>', card)
            assert peaks == [f'{m.max() / m.mean():.1f}' for m in maps]
            assert card.count('<img') == 1 + 3 + len(maps)

    def test_pictures(self, models):
        """The first is what the model sees, pixel for pixel."""
        *_, (_, page) = demo.look({NAMES[1]: models[NAMES[1]]}, CAT, 'cat.png')
        data = [base64.b64decode(found) for found in re.findall(r'base64,([^"]+)', page)]
        with Image.open(io.BytesIO(data[0])) as seen, Image.open(CAT) as cat:
            assert seen.size == (240, 240)
            expected = ImageOps.fit(cat.convert('RGB'), (32, 32), Image.Resampling.BICUBIC)
            difference = np.asarray(seen.convert('RGB').resize((32, 32), Image.Resampling.BOX)) - np.asarray(
                expected, dtype=float
            )
            assert abs(difference).mean() < 4  # webp, and the corners' rounding
        assert len(set(data)) == 13

    @pytest.mark.parametrize('name', uploads())
    def test_uploads(self, models, name, tmp_path):
        data, says = uploads()[name]
        path = tmp_path / 'upload'
        path.write_bytes(data)
        *_, (text, page) = demo.look(models, path, name)
        assert says.replace('<', '&lt;').replace('>', '&gt;') in text and str(tmp_path) not in text
        assert ('role="alert"' in text) == (' of ' not in says) and '\n' not in text
        assert page.count('<article>') == (3 if ' of ' in says else 0)

    def test_an_upload_that_is_gone(self, models, tmp_path):
        ((text, _),) = demo.look(models, tmp_path / 'upload', 'cat.png')
        assert 'cat.png is no longer here: an upload is kept for 60 minutes; drop it again' in text

    def test_names_are_text(self, models):
        model = load_pretrained(NAMES[0])
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': [f'<b>{i}' for i in range(10)]}
        *_, (_, page) = demo.look({'<i>mine': model}, CAT, 'cat.png')
        assert '<b>' not in page.replace('<b></b>', '') and '<i>mine' not in page and '&lt;i&gt;mine' in page


def test_models_that_are_here():
    here = {name for name, folder in released().items() if (folder / 'model.safetensors').is_file()}
    assert {model['name'] for model in demo.packaged_models()} == here


def test_only_uploads_are_opened(tmp_path):
    """Gradio compares a path with its uploads only where the data say that they are a file."""
    pytest.importorskip('gradio')
    (function,) = demo.build_page({}).fns.values()
    (tmp_path / 'cat.png').write_bytes(CAT.read_bytes())
    for photo in ({'path': str(CAT)}, {'path': str(tmp_path / 'cat.png')}, {'path': '/etc/hostname'}, {'path': ''}, {}):
        ((text, _),) = function.fn(photo, ['x'])
        assert 'Drop a photo first.' in text


def test_mistakes(monkeypatch):
    monkeypatch.setenv('GRADIO_SERVER_PORT', '70000')
    with pytest.raises(UserError, match='GRADIO_SERVER_PORT=70000: a port is a number from 1 to 65535'):
        demo.serve()
    monkeypatch.setattr('timm_poolattn.utils.extras.find_spec', lambda name: None)
    assert "pip install 'timm_poolattn[app]'" in fails('demo')


def test_front_matter_of_the_space():
    (text,) = blocks(ROOT / 'hub_configs' / 'README.md', 'yaml')
    front = next(yaml.safe_load_all(text))
    assert (front['sdk'], front['app_file']) == ('gradio', 'app.py') and int(front['sdk_version'].split('.')[0]) >= 6


#: Runs the Space's file, and tells of every connection that would leave this machine.
_RUN = """
import runpy, socket
look_up, connect = socket.getaddrinfo, socket.socket.connect
def local(host): return host in (None, '', 'localhost', '127.0.0.1', '::1', b'localhost', b'127.0.0.1')
def looked_up(host, *args, **kwargs):
    if not local(host): print('LEAVES', host, flush=True); raise OSError('no network')
    return look_up(host, *args, **kwargs)
def connected(self, address):
    if isinstance(address, tuple) and not local(address[0]): print('LEAVES', address, flush=True); raise OSError('no')
    return connect(self, address)
socket.getaddrinfo, socket.socket.connect = looked_up, connected
runpy.run_path('app.py', run_name='__main__')
"""


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """Its address, as that of a Space that has the file alone. What it leaves behind and whom it calls is checked."""
    pytest.importorskip('gradio')
    place = tmp_path_factory.mktemp('space')
    shutil.copy(demo.__file__, place / 'app.py')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(place), 'GRADIO_SERVER_PORT': str(port)}
    env |= dict(GRADIO_SHARE='true')  # which is not listened to
    for name in ('GRADIO_SERVER_NAME', 'GRADIO_ANALYTICS_ENABLED'):
        env.pop(name, None)
    with open(place / 'log', 'w') as log:
        process = subprocess.Popen([sys.executable, '-c', _RUN], cwd=place, env=env, stdout=log, stderr=log)
    try:
        while 'Ctrl-C' not in (said := (place / 'log').read_text()):
            assert process.poll() is None, said
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        url, number = re.match(r'(http://127\.0\.0\.1:\d+/) has (\d+) models', said.splitlines()[-1]).groups()
        assert int(number) == len(demo.packaged_models())
        yield url
        assert list(place.glob('poolattn-demo-*/*/*.*')), 'uploads are in a folder of their own'
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    said = (place / 'log').read_text()
    assert code == 128 + signal.SIGTERM and 'Traceback' not in said and 'LEAVES' not in said, said
    assert {path.name for path in place.iterdir()} == {'app.py', 'log'}


@pytest.fixture
def open_tab(browser, server):
    """Opens the page in a new tab; an error of a script, or a request to another place, fails the test."""
    wrong, tabs = [], []

    def open_(width=1600, scheme='light'):
        tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        tab.on('pageerror', lambda error: wrong.append(error))
        tab.on('dialog', lambda dialog: wrong.append(dialog.message))
        tab.on('request', lambda r: wrong.append(r.url) if not r.url.startswith((server, 'data:', 'blob:')) else None)
        tab.goto(server)
        tab.wait_for_selector('input[type=file]', state='attached')
        tab.wait_for_timeout(500)  # until Gradio listens
        tabs.append(tab)
        return tab

    yield open_
    for tab in tabs:
        tab.close()
    assert not wrong


def says(tab, text):
    tab.locator('.pa [role]', has_text=text).wait_for(timeout=60_000)


@pytest.mark.compat
class TestPage:
    @pytest.mark.parametrize('scheme', ['light', 'dark'])
    @pytest.mark.parametrize('width', [400, 1600])
    def test_a_photo(self, open_tab, width, scheme):
        tab = open_tab(width, scheme)
        says(tab, 'A photo of one thing is best')
        tab.set_input_files('input[type=file]', CAT)
        says(tab, 'chelsea.png, 451x300: 3 of 3 models')
        assert tab.locator('article h2').all_inner_texts() == NAMES
        assert tab.locator('.guess:first-child span:first-child').all_inner_texts() == ['cat'] * 3
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        boxes = [card.bounding_box() for card in tab.locator('article').all()]
        assert len({box['x'] for box in boxes}) == (1 if width == 400 else 3) and all(b['width'] > 300 for b in boxes)
        luminance = """(e, property) => {
            const [r, g, b] = getComputedStyle(e)[property].match(/[\\d.]+/g).map(v => {
                v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
        paper = tab.locator('article').first.evaluate(luminance, 'backgroundColor')
        assert (paper < 0.1) == (scheme == 'dark')
        for selector in ('h2', 'h3', '.guess', 'figcaption', '.soft', '.bars span'):  # WCAG AA
            ink = tab.locator(f'article {selector}').first.evaluate(luminance, 'color')
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector

    def test_one_line_for_each_upload_and_it_goes_on(self, open_tab, tmp_path):
        tab = open_tab(400)
        tab.get_by_role('button', name='Look').click()
        says(tab, 'Drop a photo first.')
        for name, (data, text) in uploads().items():
            (tmp_path / name).write_bytes(data)
            tab.set_input_files('input[type=file]', tmp_path / name)
            says(tab, text)
            tab.get_by_role('button', name='Remove Image').click()
        (tmp_path / 'large.png').write_bytes(bytes(30_000_000))
        tab.set_input_files('input[type=file]', tmp_path / 'large.png')
        tab.get_by_text('exceed the maximum allowed size of 25').wait_for()

    def test_two_visitors(self, open_tab):
        """Each sees the own photo by all models, though the gates' hooks are on the same ones."""
        photos, n = {'chelsea.png': 'cat', 'rocket.jpg': 'ship'}, len(demo.packaged_models())
        tabs = [open_tab() for _ in photos]
        for tab in tabs:
            for box in tab.locator('input[type=checkbox]').all():
                box.check()
        for tab, photo in zip(tabs, photos, strict=True):
            tab.set_input_files('input[type=file]', CAT.with_name(photo))
        for tab, (photo, label) in zip(tabs, photos.items(), strict=True):
            says(tab, re.compile(f'{photo}.*{n} of {n} models'))
            assert tab.locator('.guess:first-child span:first-child').first.inner_text() == label
        tab = tabs[0]
        for box in tab.locator('input[type=checkbox]').all():
            box.uncheck()
        tab.get_by_role('button', name='Look').click()
        says(tab, 'Tick a model first.')
