"""A page to try trained models on a photo. This file runs by itself too, as the `app.py` of a Hugging Face Space."""

# The package is imported by its name, so that a copy runs; Gradio where it is used, as the rest does without the extra.
import base64
import html
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from torch import nn

from timm_poolattn.data import open_image, to_channels
from timm_poolattn.explain.attention import block_label
from timm_poolattn.explain.figures import MAPS, Account, accounts, fa_blocks, lambdas, overlay, peak_over_mean
from timm_poolattn.inference import load_pretrained
from timm_poolattn.papers import table_rows
from timm_poolattn.report.model_list import list_models
from timm_poolattn.utils import UserError

if TYPE_CHECKING:
    import gradio

#: The largest upload, as Gradio writes it; for how many seconds one is kept, and how many visitors wait at most.
_MAX_UPLOAD, _KEPT, _QUEUE = '25mb', 3600, 20


def packaged_models() -> list[dict[str, Any]]:
    """Return `name`, `gate` and `top1` in % of the models whose weights are here, so that no network is needed."""
    return [
        dict(name=f'{row["model"]}.{tag}', gate=row['gate'], top1=top1)
        for row in list_models(trained=True)
        for tag, top1 in row['top1'].items()
        if row['weights'][tag] == 'packaged'
    ]


def look(models: dict[str, nn.Module], path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield what `models` make of a photo, as HTML: a line on the progress or a mistake, and a card for each model.

    Args:
        models: by the name to print.
        path: the photo's file.
        name: of the photo, for messages.

    Yields:
        Both once before the first model, and once after each.
    """
    cards: list[dict[str, Any]] = []
    try:
        image = to_channels(open_image(_read(path, name), name), 3, name)
        status = f'{name}, {image.width}x{image.height}'
        yield line(f'{status}: 0 of {len(models)} models'), _render(cards)
        for account in accounts(models, image, name):
            cards.append(_card(account))
            yield line(f'{status}: {len(cards)} of {len(models)} models'), _render(cards)
    except UserError as e:
        yield line(' '.join(str(e).split()), is_error=True), _render(cards)


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f'{name} is no longer here: an upload is kept for {_KEPT // 60} minutes; drop it again') from e


def line(text: str, *, is_error: bool = False) -> str:
    """Return a line below the photo."""
    kind, role = ('error', 'alert') if is_error else ('status', 'status')
    return f'<div class="pa"><p class="{kind}" role="{role}">{html.escape(text)}</p></div>'


def _render(cards: Sequence[dict[str, Any]] = ()) -> str:
    source = (files('timm_poolattn.report') / 'demo.html.jinja').read_text('utf-8')
    return jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(cards=cards)


def _card(account: Account) -> dict[str, Any]:
    """Return what the template prints of a model."""
    spem, fa = account.with_key('pool_lambda'), account.with_key('k')
    return dict(
        name=account.name,
        size='{1}x{0}'.format(*account.pixels.shape),
        seen=_picture(account.pixels),
        predictions=account.predictions,
        whose=account.whose,
        cams=[
            (label, _picture(account.grey, cam, vmin=0, vmax=1, interpolation='bilinear'), cam.any())
            for label, cam in zip(account.labels, account.cams, strict=True)
        ],
        maps=[_maps(account, key) for key in MAPS if account.with_key(key)],
        lambdas=list(zip(*lambdas(spem), strict=True)),
        blocks=fa_blocks(fa),
        has_gates=bool(account.trace),
    )


def _maps(account: Account, key: str) -> dict[str, Any]:
    caption, part = MAPS[key]
    found = [(block_label(n), t[key][0]) for n, t in account.with_key(key).items()]
    parts = max(len(maps) for _, maps in found)
    items = [
        (label, _picture(account.grey, maps.mean(0), interpolation='nearest'), peak_over_mean(maps.mean(0)))
        for label, maps in found
    ]
    return dict(caption=caption + (f', mean of {parts} {part}s' if parts > 1 else ''), items=items)


def _picture(pixels: np.ndarray, heat: np.ndarray | None = None, **kwargs: Any) -> str:
    """Write an image as a data URI, with a heat map over it if there is one."""
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(2.4, 2.4 * height / width), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    if heat is None:
        ax.imshow(pixels, vmin=0, vmax=1, interpolation='nearest', aspect='auto')
    else:
        overlay(ax, pixels, heat, **kwargs)
    file = io.BytesIO()
    figure.savefig(file, format='webp')
    return f'data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}'


def build_page(models: dict[str, nn.Module], chosen: Sequence[str] = ()) -> 'gradio.Blocks':
    """Build the page, to be launched.

    Args:
        models: in evaluation mode, by the name to print.
        chosen: those that are ticked at first. Default: all.
    """
    import gradio as gr

    uploads = Path(gr.utils.get_upload_folder()).resolve()

    def show(photo: dict[str, Any] | None, names: list[str]) -> Iterator[tuple[str, str]]:
        # whoever posts to the page may name any file of this machine
        if not photo or not Path(photo.get('path') or '').resolve().is_relative_to(uploads):
            yield line('Drop a photo first.', is_error=True), _render()
        elif not names:
            yield line('Tick a model first.', is_error=True), _render()
        else:
            name = Path(photo.get('orig_name') or 'photo').name
            yield from look({n: m for n, m in models.items() if n in names}, Path(photo['path']), name)

    top1 = {model['name']: model['top1'] for model in packaged_models()}
    choices = [(f'{name}  {top1[name]:.2f}%' if name in top1 else name, name) for name in models]
    hint = f'A photo of one thing is best. It stays on this server, for {_KEPT // 60} minutes at most.'
    with gr.Blocks(title='timm_poolattn', analytics_enabled=False, delete_cache=(600, _KEPT), fill_width=True) as page:
        gr.Markdown(
            '# Where the gates look\nDrop a photo: each model says what it sees, where, and what its gates did.'
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = gr.Image(label='Photo', sources=['upload', 'clipboard'], height=280, buttons=[])
                message = gr.HTML(line(hint), apply_default_css=False)
                ticked = gr.CheckboxGroup(choices, value=list(chosen or models), label='Models, by their top-1')
                button = gr.Button('Look', variant='primary')
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(_render(), apply_default_css=False)
        # one visitor at a time: hooks that read the gates are on the models themselves
        gr.on(
            [photo.upload, button.click],
            show,
            [photo, ticked],
            [message, result],
            preprocess=False,  # Gradio would open the photo, with limits and messages of its own
            concurrency_limit=1,
            trigger_mode='always_last',
            show_progress='minimal',
            show_progress_on=message,
            api_visibility='private',
        )
    return page.queue(max_size=_QUEUE)


def serve(names: Sequence[str] = ()) -> None:
    """Serve the page until Ctrl-C or SIGTERM ends it, at 127.0.0.1 unless GRADIO_SERVER_NAME names another address.

    Args:
        names: models as `load_pretrained` takes them. Default: those whose weights are here, one of each gate ticked.

    Raises:
        UserError: as `load_pretrained`; or an address that cannot be used.
    """
    host = os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1')
    port = os.environ.get('GRADIO_SERVER_PORT', '7860')
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f'GRADIO_SERVER_PORT={port}: a port is a number from 1 to {2**16 - 1}')
    packaged = packaged_models()
    models = {name: load_pretrained(name) for name in names or [model['name'] for model in packaged]}
    papers = {row['paper'] for row in table_rows()}  # whose gates have their names
    first = {model['gate']: model['name'] for model in reversed(packaged) if model['gate'] in papers}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the uploads go
    with tempfile.TemporaryDirectory(prefix='poolattn-demo-', ignore_cleanup_errors=True) as uploads:
        os.environ['GRADIO_TEMP_DIR'] = uploads
        import gradio as gr  # reads these variables

        page = build_page(models, names or list(first.values()))
        try:
            _, url, _ = page.launch(
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=_MAX_UPLOAD,
                ssr_mode=False,
                footer_links=[],
                theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']),
            )
        except OSError as e:
            raise UserError(
                f'{host} has no free port from {port} on; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT name another'
            ) from e
        ended = threading.Event()
        print(f'{url} has {len(models)} model{"s" * (len(models) > 1)}; Ctrl-C ends it', flush=True)
        try:
            while not ended.wait(1):  # without an end, Windows would not hear Ctrl-C
                pass
        finally:
            page.close(verbose=False)


if __name__ == '__main__':
    serve()
