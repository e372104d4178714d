"Every notebook runs from top to bottom, and is committed with its outputs."
import json
from pathlib import Path
import pytest
from nbdev.test import test_nb as run_notebook

NBS = sorted(p for p in (Path(__file__).parent.parent/'nbs').glob('*.ipynb') if not p.name.startswith('_'))

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    ok, _ = run_notebook(path)
    assert ok, f'{path.name} fails: see the traceback above'

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_notebook_has_outputs(path):
    "A reader on the web sees the outputs; none of them is an error, and the file stays small"
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs, f'{path.name} was committed without outputs'
    assert not [o for o in outputs if o['output_type'] == 'error']
    assert path.stat().st_size < 1_000_000
