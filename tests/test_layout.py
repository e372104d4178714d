"The folders of the package form a line: a module uses its own folder and those before it, and none after it."
import ast
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT/'autounet_nb'
FOLDERS = ['core', 'data', 'planning', 'preprocessing', 'viz', 'training', 'inference', 'evaluation', 'app']
MODULES = sorted(p for p in PACKAGE.glob('*/*.py') if p.name != '__init__.py')

def imports(path):
    "(folder, module, names) of every import from the package"
    here = ('autounet_nb', *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom): continue
        base = here[:len(here) + 1 - node.level] if node.level else ()
        parts = (*base, *(node.module or '').split('.'))
        if parts[0] == 'autounet_nb' and len(parts) > 2: yield parts[1], parts[2], [a.name for a in node.names]

def test_every_folder_is_known():
    assert sorted({p.parent.name for p in MODULES}) == sorted(FOLDERS)
    assert {p.name for p in PACKAGE.glob('*.py')} == {'__init__.py', '__main__.py', 'all.py', '_modidx.py'}

def test_the_imports_are_found():
    found = {(folder, module) for folder, module, _ in imports(PACKAGE/'app'/'run.py')}
    assert {('core', 'errors'), ('data', 'find'), ('evaluation', 'choose')} <= found

@pytest.mark.parametrize('path', MODULES, ids=lambda p: f'{p.parent.name}.{p.stem}')
def test_imports_point_down(path):
    allowed = FOLDERS[:FOLDERS.index(path.parent.name) + 1]
    for folder, module, names in imports(path):
        assert folder in allowed, f'{path.parent.name}.{path.stem} imports {", ".join(names)} from {folder}.{module}'
        assert names != ['*'], f'{path.parent.name}.{path.stem} imports all of {folder}.{module}'

@pytest.mark.parametrize('folder', FOLDERS)
def test_a_folder_stays_small(folder):
    modules = [p.stem for p in MODULES if p.parent.name == folder]
    assert len(modules) <= 10, modules

def test_notebooks_and_modules_have_the_same_folders():
    notebooks = {p.parent.name for p in (ROOT/'nbs').glob('*/*.ipynb')}
    assert notebooks == {*FOLDERS, 'tutorials'}

def test_notebook_numbers_are_unique_and_in_the_order_of_the_folders():
    stems = sorted(((p.stem[:2], p.parent.name) for p in (ROOT/'nbs').glob('*/*.ipynb')))
    numbers = [n for n, _ in stems]
    assert all(n.isdigit() for n in numbers) and len(set(numbers)) == len(numbers)
    order = [*FOLDERS, 'tutorials']
    assert [order.index(f) for _, f in stems] == [int(n[0]) for n in numbers]
