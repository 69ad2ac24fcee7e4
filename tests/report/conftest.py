"""A browser, where one is installed."""

import shutil

import pytest


@pytest.fixture(scope='module')
def browser():
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no chromium to open the page in: apt-get install chromium')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        browser = playwright.chromium.launch(executable_path=chromium, args=args)
        yield browser
        browser.close()
