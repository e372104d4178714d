"The benchmarks' own measuring: time, memory, what takes too much, ratios."
import importlib.util, sys
from pathlib import Path
import numpy as np, pytest

@pytest.fixture(scope='module')
def bench():
    "benchmarks/bench.py as a module"
    path = Path(__file__).parents[1]/'benchmarks'/'bench.py'
    spec = importlib.util.spec_from_file_location('bench', path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    sys.path.insert(0, str(path.parent))
    yield module
    sys.path.remove(str(path.parent))

TAKES = "import json, time; b = bytearray(300 * 10**6); b[::4096] = b'x' * len(b[::4096]); time.sleep(.6); print('words'); print(json.dumps(dict(seconds=1.5)))"

def test_memory_of_children_counts_and_the_last_line_is_taken(bench):
    child = [sys.executable, '-c', f'import subprocess, sys; subprocess.run([sys.executable, "-c", {TAKES!r}])']
    for command in ([sys.executable, '-c', TAKES], child):
        res = bench.measured(command)
        assert res['seconds'] == 1.5 and .5 < res['wall'] < 20 and 290e6 < res['memory'] < 400e6

def test_what_takes_too_much_memory_is_ended_and_said(bench, monkeypatch):
    monkeypatch.setattr(bench, 'MOST', 1e-3)
    res = bench.measured([sys.executable, '-c', TAKES.replace('.6', '30')])
    assert res['wall'] < 20 and 'more than' in res['ended'] and 'seconds' not in res

def test_a_failure_ends_the_benchmark_with_its_error(bench):
    with pytest.raises(SystemExit, match='no such luck'): bench.measured([sys.executable, '-c', 'raise OSError("no such luck")'])

def test_the_ratio_is_that_of_the_medians_with_its_spread(bench):
    got = dict(ours=[dict(seconds=s, memory=10, added=1) for s in (1, 2, 9)], peer=[dict(seconds=s, memory=40, added=8) for s in (8, 6, 27)])
    assert bench._ratio(got) == dict(ratio=4, spread=[3, 8], memory_ratio=.25, added_ratio=.125)
    assert 'ratio' not in bench._ratio(dict(ours=[dict(seconds=1)], peer=[dict(ended='more than 1 GB')]))

def test_what_a_call_adds_to_the_memory_is_its_own(bench):
    from inputs import memory_of
    added, seconds, res = memory_of(lambda: len(np.ones(10**8)))
    assert res == 10**8 and .7e9 < added < .9e9 and seconds > 0

def test_inputs_are_the_same_for_both_whenever_they_are_made(bench, tmp_path):
    from inputs import RESAMPLE, patch_batches
    a, b = patch_batches((8, 12, 8)), patch_batches((8, 12, 8))
    assert all(np.array_equal(x, v) and np.array_equal(y, w) for (x, y), (v, w) in zip(a, b)) and a[0][0].shape == (2, 1, 8, 12, 8) and set(np.unique(a[0][1])) == {0, 1, 2}
    assert all(o[0] <= 120 and o[1:] == (512, 512) for o, _ in RESAMPLE.values())
