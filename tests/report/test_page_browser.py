"""The page in a real browser: it loads nothing, fits a phone, follows the reader's colours and unfolds its origins."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from report_runs import make_everything

from wmdd.report.collect import collect
from wmdd.report.html import write_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    needs(CHROMIUM, "BROWSER", "no chromium is on the PATH (apt-get install chromium)"),
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
]

QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars"]

# Runs in the page after it has loaded: unfolds every origin, measures, and leaves what it found in the title.
PROBE = """
<script>
const errors = [];
addEventListener('error', event => errors.push(String(event.message || event.target.src)), true);
addEventListener('load', () => {
  const style = getComputedStyle(document.body);
  const measure = () => ({
    page: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll('main section > *:not(.scroll), header > *')]
      .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
      .map(element => element.outerHTML.slice(0, 80)),
  });
  const folded = measure();
  const details = [...document.querySelectorAll('td details')];
  const before = details.filter(one => one.querySelector('.origins').checkVisibility()).length;
  details.slice(0, 4).forEach(one => one.querySelector('summary').click());
  document.querySelectorAll('section > details').forEach(one => { one.open = true; });
  const first = details[0].querySelector('.origins');
  const line = document.querySelector('#plots svg path[style*="var(--barycenter)"]');
  document.title = JSON.stringify({
    errors, folded, unfolded: measure(), width: innerWidth, origins: details.length, before,
    after: details.filter(one => one.open && one.querySelector('.origins').checkVisibility()).length,
    text: first.innerText, height: first.getBoundingClientRect().height,
    background: style.backgroundColor, ink: style.color, line: line && getComputedStyle(line).stroke,
    requests: performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !/^data:/.test(name)),
    broken: [...document.images].filter(image => !image.naturalWidth).length, images: document.images.length,
    labelled: [...document.querySelectorAll('img, figure[role=img]')].every(one => one.alt || one.ariaLabel),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_everything(tmp_path_factory.mktemp("report"))
    path = folder / "report.html"
    write_html(collect([folder]), path)
    return path


def look(page: Path, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """Open a copy of the page that measures itself; return what it found and what the browser logged.

    A window of Chromium is at least 500 pixels wide: the page of a phone lies in a frame of that width.
    """
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</head>", f"{PROBE}</head>"))
    frame = folder / "frame.html"
    relay = """onload="setTimeout(() => { document.title = this.contentDocument.title }, 500)\""""
    inside = f'<iframe src="probed.html" width={width} height=800 {relay}></iframe>'
    frame.write_text(f"<!doctype html><title>-</title>{inside}")
    colours = ["--blink-settings=preferredColorScheme=0"] if dark else []
    where = ["--allow-file-access-from-files", "--virtual-time-budget=8000", "--enable-logging=stderr", *colours]
    command = [str(CHROMIUM), *QUIET, *where, f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title and title[1] != "-", f"the page did not come to its end: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(unescape(title[1]))
    found["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_a_phone_and_a_desk_loads_nothing_and_unfolds_its_origins(
    page: Path, tmp_path: Path, width: int
) -> None:
    found = look(page, tmp_path, width)

    assert found["width"] == width
    assert found["errors"] == found["console"] == []
    assert found["requests"] == [], "the page is whole by itself"
    assert found["folded"] == found["unfolded"] == {"page": width, "wide": []}, "nothing is wider than the window"
    assert found["images"] > 0 and found["broken"] == 0 and found["labelled"]
    assert found["origins"] > 100 and found["before"] == 0
    assert found["after"] == 4 and found["height"] > 50
    assert "artefact" in found["text"] and "revision" in found["text"]


def test_the_page_follows_the_readers_colours_in_text_and_plots(page: Path, tmp_path: Path) -> None:
    (tmp_path / "light").mkdir()
    (tmp_path / "dark").mkdir()
    light, dark = look(page, tmp_path / "light", 800), look(page, tmp_path / "dark", 800, dark=True)

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    assert brightness(light["background"]) > 240 and brightness(light["ink"]) < 60
    assert brightness(dark["background"]) < 40 and brightness(dark["ink"]) > 200
    assert brightness(dark["line"]) > brightness(light["line"]) + 30, "plots take their colours from the page"


def test_the_page_alone_reaches_for_no_network(page: Path) -> None:
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.read_text())

    assert not re.search(r"src=.http|@import|url\((?!#)|<script[^>]|<link[^>]*href=.http", text)
    targets = re.findall(r'(?:src|href)="([^"]*)"', text.partition("<script>")[0])
    assert all(target.startswith(("data:", "#")) for target in targets)
