"""The layout of the code: a name means one thing, and a module can be read in one sitting."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = sorted(file for name in ("wmdd", "bench", "slurm", "sweeps") for file in (ROOT / name).rglob("*.py"))


def test_no_class_name_exists_twice() -> None:
    places = defaultdict(list)
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(file.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_packages_stay_few_and_modules_short() -> None:
    assert len(list((ROOT / "wmdd").glob("*.py"))) <= 14
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}
