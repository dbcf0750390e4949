"""The page in a real browser: it loads nothing, fits a phone, follows the reader's colours and unfolds its origins."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from report_runs import make_everything, make_pair, make_run, make_students

from wmdd.records.files import write_records
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


# Runs in the page after it has loaded: does what a reader does, and leaves what came of it in the title.
READER = """
<script>
const errors = [];
addEventListener('error', event => errors.push(String(event.message || event.target.src)), true);
addEventListener('load', () => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const grid = document.querySelector('#accuracy .grid');
  const found = {};
  if (grid) {
    const table = grid.querySelector('table'), heads = all('thead th', table).map(one => one.textContent.trim());
    const column = name => all('tbody', table).map(body => all('tr:not(.setting):not([hidden])', body)
      .map(row => row.cells[heads.indexOf(name)].querySelector('summary, *')?.textContent
        || row.cells[heads.indexOf(name)].textContent));
    const button = name => all('thead th', table)[heads.indexOf(name)].querySelector('button');
    button('Top-1 %').click();
    found.down = column('Top-1 %');
    button('Top-1 %').click();
    found.up = column('Top-1 %');
    button('Method').click();
    found.words = column('Method');
    const field = grid.querySelector('input[type=search]');
    if (field) {
      field.value = 'IPC 10 wmdd';
      field.dispatchEvent(new Event('input'));
      found.filtered = column('Method').flat();
      found.count = grid.querySelector('.count').textContent;
    }
    all('.tools button', grid).forEach(one => one.click());
    found.latex = table.dataset.copied;
    all('.tools button', grid)[0].click();
    found.csv = table.dataset.copied;
    const box = grid.querySelector('.choices input');
    const last = () => all('thead th', table).filter(one => one.offsetParent).length;
    found.columns = box && [last(), (box.click(), last()), (box.click(), last())];
  }
  const item = document.querySelector('#plots .legend button');
  if (item) {
    item.click();
    found.raised = all('#plots .plots .raised').length;
  }
  const picture = document.querySelector('.images img');
  if (picture) {
    picture.click();
    const dialog = document.querySelector('dialog');
    found.zoom = [dialog.open, all('img', dialog).length, dialog.querySelector('img').getBoundingClientRect().width,
                  picture.getBoundingClientRect().width];
    dialog.querySelector('.close').click();
    found.closed = !dialog.open;
  }
  const boxes = all('.forest tbody tr').map(row => [...row.cells].map(cell => cell.getBoundingClientRect()));
  found.overlaps = boxes.filter(cells => cells.some((one, i) => i && one.left + 1 < cells[i - 1].right)).length;
  found.cut = all('.verdicts article').filter(one => one.scrollWidth > one.clientWidth + 1
    || one.querySelector('.forest').getBoundingClientRect().right > one.getBoundingClientRect().right)
    .map(one => one.textContent.slice(0, 40));
  found.verdicts = all('.verdicts article').length;
  found.said = document.querySelector('.said, .summary')?.textContent;
  const marks = all('#plots .legend li:not(.rest)').map(one => one.textContent);
  found.coloured = new Set(marks).size;
  found.blue = all('#plots .legend li line').map(one => one.style.stroke);
  found.requests = performance.getEntriesByType('resource').map(one => one.name).filter(name => !/^data:/.test(name));
  document.title = JSON.stringify({...found, errors});
});
</script>
"""


def read(pages: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Let a reader work with several pages in one browser; return what came of each."""
    frames = []
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page.read_text().replace("</head>", f"{READER}</head>"))
        frames.append(f'<iframe id="{name}" src="{name}.html" width=1280 height=800></iframe>')
    gather = """<script>addEventListener('load', () => setTimeout(() => {
      const found = [...document.querySelectorAll('iframe')].map(one => [one.id, one.contentDocument.title]);
      document.title = JSON.stringify(Object.fromEntries(found));
    }, 1500))</script>"""
    (folder / "frames.html").write_text(f"<!doctype html><title>-</title>{''.join(frames)}{gather}")
    titles, console = browse(folder / "frames.html")
    assert console == [], "no error of a script"
    return {name: json.loads(title) for name, title in json.loads(titles).items()}


def test_a_reader_sorts_filters_copies_zooms_and_chooses_methods_with_many_methods_one_or_none(
    page: Path, tmp_path: Path
) -> None:
    random = [0.2, 0.3]
    names = ["wmdd", *(f"method-{number:02d}" for number in range(12)), "random"]
    records = []
    for number, name in enumerate(names):
        images = names[11] if number == 12 else name  # which chose the same images
        for ipc in (1, 10):
            sets = {f"{images}{seed}{ipc}": [0.4 + min(number, 12) / 50 + seed / 100] for seed in range(3)}
            records += make_students(name, sets, ipc=ipc)
    (tmp_path / "work").mkdir()
    write_records(tmp_path / "fourteen.jsonl", records)
    write_records(tmp_path / "one.jsonl", make_students("random", {"r": random}))
    make_run(tmp_path / "none")
    make_pair(tmp_path / "pair")
    pages = {"all": page}
    for name in ("fourteen.jsonl", "one.jsonl", "none", "pair"):
        pages[name.partition(".")[0]] = tmp_path / f"{name}.page.html"
        write_html(collect([tmp_path / name]), tmp_path / f"{name}.page.html")

    found = read(pages, tmp_path / "work")

    whole = {"errors": [], "requests": [], "overlaps": 0, "cut": []}
    assert {name: {key: one[key] for key in whole} for name, one in found.items()} == dict.fromkeys(pages, whole)
    fourteen = found["fourteen"]
    for down, up, words in zip(fourteen["down"], fourteen["up"], fourteen["words"], strict=True):
        largest, least = ([float(text.split()[0]) for text in own] for own in (down, up))
        assert len(largest) == 14 and largest == sorted(largest, reverse=True) and least == sorted(least)
        assert words == sorted(words)
    assert (fourteen["filtered"], fourteen["count"]) == (["wmdd"], "1 of 28 rows")
    head, *lines = fourteen["csv"].splitlines()
    assert head.startswith("IPC,Method,Top-1 %") and lines[0].startswith("10,wmdd,41.0 ± 2.5")
    assert r"\toprule" in fourteen["latex"] and r"41.0 $\pm$ 2.5" in fourteen["latex"]
    shown, fewer, again = fourteen["columns"]
    assert fewer == shown - 1 and again == shown
    assert fourteen["coloured"] == 6, "the other lines are grey until they are asked for"
    assert fourteen["blue"].count("var(--barycenter)") == 1 and fourteen["raised"] > 0
    is_open, images, large, small = found["all"]["zoom"]
    assert is_open and images == 2 and large > 3 * small and found["all"]["closed"]
    assert found["one"]["verdicts"] == 1 and found["one"]["said"].startswith("Highest mean: random 25.0")
    assert found["none"]["said"] == "No student has been measured yet."


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
    title, console = browse(frame, ["--blink-settings=preferredColorScheme=0"] if dark else [])
    return json.loads(title) | {"console": console}


def browse(frame: Path, options: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Open a page; return the title that it leaves, and what the browser logged."""
    where = ["--allow-file-access-from-files", "--virtual-time-budget=8000", "--enable-logging=stderr", *options]
    profile = f"--user-data-dir={frame.parent / 'profile'}"
    command = [str(CHROMIUM), *QUIET, *where, profile, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title and title[1] != "-", f"the page did not come to its end: {done.stderr[-2000:]}"
    return unescape(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


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
