"On a cluster everything comes out as it does here, whatever happens to the workers."
import json, os, re, shutil, signal, subprocess, sys, threading, time
import pytest
pytest.importorskip('distributed', reason='distributed is not installed: pip install autounet_nb[cluster]')
pytest.importorskip('cryptography', reason='cryptography is not installed: pip install autounet_nb[cluster]')
from autounet_nb.core.errors import InputError
from autounet_nb.planning.planner import replan
from autounet_nb.app.cluster import cluster_client, run_trainings
from autounet_nb.core.executor import pmap
from autounet_nb.data.cases import Dataset
from autounet_nb.planning.fingerprint import Fingerprint
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.app.train_all import cross_validate
from autounet_nb.app.run import prepare

@pytest.fixture(scope='module')
def client():
    with cluster_client('local:2') as client: yield client

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    "scans/ of five tiny cases and a work/ in which everything waits for training, with a 2D network and a planned cascade"
    root = tmp_path_factory.mktemp('cluster')
    data = make_phantoms(root/'scans', n=5, shape=(12, 24, 24), seed=4, layout='pairs')
    prepare(data, root/'work', models=['2d'], hardware='cpu', workers=1)
    replan(Fingerprint.load(root/'work'/'fingerprint.json'), root/'work'/'plan.json', 'cpu', ['cascade=yes'])[0].save(root/'work'/'plan.json')
    prepare(data, root/'work', workers=1)
    return root

@pytest.fixture
def work(prepared, tmp_path):
    shutil.copytree(prepared/'work', tmp_path/'work')
    return tmp_path/'work'

@pytest.fixture(scope='module')
def here(prepared, tmp_path_factory):
    "What comes out without a cluster"
    work = tmp_path_factory.mktemp('here')/'work'
    shutil.copytree(prepared/'work', work)
    cross_validate(work, Dataset.load(work/'cases.json'), ['2d', '3d_cascade'], [0, 1], steps=4, device='cpu')
    return work

dataset = lambda work: Dataset.load(work/'cases.json')
def scores(work): return {str(p.relative_to(work)): json.loads(p.read_text())['cases'] for p in work.glob('models/*/*/validation/scores.json')}
def same(rows): return [{k: v for k, v in r.items() if k != 'seconds'} for r in rows]

def test_the_same_scores_and_the_cascade_in_order(client, work, here, capsys):
    rows = cross_validate(work, dataset(work), ['2d', '3d_cascade'], [0, 1], steps=4, device='cpu', client=client)
    assert same(rows) == same(json.loads((here/'scores.json').read_text()))
    assert len(scores(work)) == 9 and scores(work) == scores(here)
    ends = re.findall(r'^(\S+), fold \d is done', capsys.readouterr().out, re.M)
    assert len(ends) == 9 and ends.index('3d_cascade') > max(i for i, m in enumerate(ends) if m == '3d_lowres')
    logs = [p.read_text() for p in work.glob('models/*/*/log.txt')]
    assert len(logs) == 9 and all('epoch 0' in t for t in logs)

def test_a_killed_worker(client, work, prepared, here):
    rows, folder = [], work/'models'/'2d'/'fold_0'
    steps = 60
    alone = work.parent/'alone'
    shutil.copytree(prepared/'work', alone)
    expected = cross_validate(alone, dataset(alone), ['2d'], [0], steps=steps, device='cpu')
    t = threading.Thread(target=lambda: rows.extend(cross_validate(work, dataset(work), ['2d'], [0], steps=steps, device='cpu', client=client)))
    t.start()
    while not (folder/'checkpoint.safetensors').exists(): assert t.is_alive(); time.sleep(.01)
    victim = json.loads((folder/'progress.json').read_text())['pid']
    assert victim in client.run(os.getpid).values()
    os.kill(victim, signal.SIGKILL)
    finished = (folder/'weights.safetensors').exists()
    t.join(300)
    assert not finished, 'the training was over before the worker was killed'
    assert same(rows) == same(expected)
    assert victim not in client.run(os.getpid).values()
    assert (folder/'weights.safetensors').read_bytes() == (alone/'models'/'2d'/'fold_0'/'weights.safetensors').read_bytes()

def test_a_failing_training_leaves_the_others_alone(client, work):
    (work/'prep'/'lowres'/f'{dataset(work)[0].id}.json').unlink()
    with pytest.raises(InputError, match='5 of 7 trainings failed') as e: cross_validate(work, dataset(work), ['2d', '3d_cascade'], [0], steps=1, device='cpu', client=client)
    assert 'the others are done' in str(e.value) and e.value.code == 'training-failed'
    assert '3d_lowres, fold 0' in str(e.value) and 'preprocessed' in str(e.value) and '3d_cascade' not in str(e.value)
    assert (work/'models'/'2d'/'fold_0'/'validation'/'scores.json').exists()
    assert json.loads((work/'models'/'3d_lowres'/'fold_0'/'failed.json').read_text())['error']

def test_a_case_that_kills_its_workers_is_named():
    def deadly(x): return os.kill(os.getpid(), signal.SIGKILL) if x == 'b' else x.upper()
    with cluster_client('local:2') as client: found = dict(pmap(deadly, 'abc', client))
    assert (found['a'], found['c']) == ('A', 'C')
    assert isinstance(found['b'], InputError) and 'case b: the worker that was on it died' in str(found['b'])

def test_a_work_folder_that_is_not_shared(client, tmp_path):
    def train(model, fold): return 1
    (_, row), = run_trainings(client, tmp_path/'elsewhere', [('2d', 0)], train)
    assert isinstance(row, InputError) and 'all machines share' in str(row)

def test_minutes_of_each_training_hold_its_judging(client, work, capsys):
    rows = cross_validate(work, dataset(work), ['2d'], [0, 1, 2], minutes=.1, device='cpu', client=client)
    assert '3 trainings on 2 workers, 6 s each' in capsys.readouterr().out
    assert json.loads((work/'run.json').read_text())['minutes'] == .2 # two of them follow one another on a worker
    asked = [json.loads((work/'models'/'2d'/f'fold_{r["fold"]}'/'model.json').read_text())['minutes'] for r in rows]
    assert asked == pytest.approx([.08] * 3) # a fifth is kept for judging

def test_the_command(autounet, one_line, tmp_path, prepared):
    p = autounet('run', prepared/'scans', 'work', '--models', '2d', '--folds', '0', '--steps', '2', '--hardware', 'cpu', '--device', 'cpu', '--cluster', 'local:2', cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert '2d, fold 0 is done' in p.stdout and (tmp_path/'work'/'ensemble.json').exists()
    one_line(autounet('run', prepared/'scans', tmp_path/'other', '--cluster', 'tcp://127.0.0.1:9'), 'tcp://127.0.0.1:9: no scheduler answers')
    one_line(autounet('run', prepared/'scans', prepared/'scans', '--cluster', 'local:1'), 'lies in the work folder')

def test_everything_can_be_imported_without_dask():
    code = 'import sys; from autounet_nb.all import *; sys.exit(any(m in sys.modules for m in ("dask", "distributed")))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_without_the_package_it_says_how_to_get_it():
    code = 'import sys; sys.modules["distributed"] = None\nfrom autounet_nb.app.cluster import *\ntry: cluster_client("local:1").__enter__()\nexcept InputError as e: print(e)'
    p = subprocess.run([sys.executable, '-c', code.replace('cluster import *', 'cluster import *; from autounet_nb.core.errors import InputError')], capture_output=True, text=True)
    assert 'pip install autounet_nb[cluster]' in p.stdout, p.stderr
