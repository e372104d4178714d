"Every notebook runs from top to bottom, and is committed with its outputs."
import json, subprocess, sys
from pathlib import Path
import pytest

NBS = sorted(p for p in (Path(__file__).parent.parent/'nbs').rglob('*.ipynb') if p.name[0] not in '._')

RUN = 'import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1])[0])'

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    "In a process of its own, as a reader's kernel is"
    p = subprocess.run([sys.executable, '-c', RUN, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
    assert p.returncode == 0, p.stdout

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_notebook_has_outputs(path):
    "A reader on the web sees the outputs; none of them is an error, and the file stays small"
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs, f'{path.name} was committed without outputs'
    assert not [o for o in outputs if o['output_type'] == 'error']
    assert 'site-packages' not in json.dumps(outputs), f'{path.name} shows a path of the machine that ran it'
    assert path.stat().st_size < 1_000_000
