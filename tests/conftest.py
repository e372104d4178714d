"What several tests need: a small trained work folder, the command line as a process, and the real data where it is."
import locale, os, signal, subprocess, sys
from pathlib import Path
import pytest
from autounet_nb.data.phantom import make_phantoms

signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs are deaf to Ctrl-C, and so would be the processes that tests stop by it

def pytest_collection_modifyitems(items):
    "Where tests run side by side, those of a file stay together, because they share what was made for the first; notebooks share nothing"
    for item in items:
        if item.path.stem != 'test_notebooks': item.add_marker(pytest.mark.xdist_group(item.path.stem))

@pytest.fixture(autouse=True)
def same_locale():
    "SimpleITK leaves the process in the C locale when it writes DICOM, as some tests do"
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)

@pytest.fixture(scope='session')
def autounet():
    "Runs the installed command in a process of its own"
    def run(*args, **kw):
        return subprocess.run([str(Path(sys.executable).with_name('autounet')), *map(str, args)], capture_output=True, encoding='utf-8', timeout=900, **kw)
    return run

@pytest.fixture(scope='session')
def trained(tmp_path_factory, autounet):
    "A folder with generated scans/, new/ and a work/ in which a 2D and a 3D network were trained for a few steps"
    root = tmp_path_factory.mktemp('trained')
    make_phantoms(root/'scans', n=6, seed=1)
    make_phantoms(root/'new', n=2, seed=2)
    p = autounet('run', root/'scans', root/'work', '--models', '2d,3d', '--folds', '0', '--steps', '30', '--hardware', 'cpu')
    assert p.returncode == 0, p.stderr
    return root

@pytest.fixture(scope='session')
def real_data():
    "The folder of real datasets, named by AUTOUNET_TEST_DATA"
    root = os.environ.get('AUTOUNET_TEST_DATA')
    if not root: pytest.skip('AUTOUNET_TEST_DATA is not set: there is no real data to test with')
    return Path(root)

@pytest.fixture(scope='session')
def one_line():
    "Asserts that a command failed with one sentence and no traceback, and returns the sentence"
    def check(p, *words):
        assert p.returncode == 1, (p.returncode, p.stderr)
        assert 'Traceback' not in p.stderr
        lines = [l for l in p.stderr.strip().splitlines() if l.startswith('autounet: ')]
        assert len(lines) == 1, p.stderr
        for w in words: assert w in lines[0], lines[0]
        return lines[0]
    return check
