"Killed at any moment: what comes out in the end is what would have come out anyway."
import csv, json, os, random, re, shutil, signal, subprocess, sys, time
import blosc2, numpy as np, psutil, pytest, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from autounet_nb.core.errors import InputError
from autounet_nb.core.executor import pmap
from autounet_nb.data.find import scan
from autounet_nb.data.images import read_label
from autounet_nb.planning.fingerprint import extract_fingerprint
from autounet_nb.training.patches import patch_dls
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.planning.planner import make_plan
from autounet_nb.preprocessing.preprocess import _prepare, preprocess
from autounet_nb.training.schedule import PaperSchedule
from autounet_nb.training.train import fit_learner, get_learner

COMMAND = 'import sys, autounet_nb.training.train as t; t.EVERY = float(sys.argv[1]); from autounet_nb.app.cli import main; sys.exit(main(sys.argv[2:]))'

def start(*args, every=180):
    "The command in a process group of its own, with a checkpoint after so many seconds"
    return subprocess.Popen([sys.executable, '-c', COMMAND, str(every), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

def finish(p):
    "Let it end; what it printed"
    out, _ = p.communicate(timeout=600)
    assert p.returncode == 0, out
    return out

files = lambda root: {str(f.relative_to(root)) for f in root.rglob('*') if f.is_file()}

def moments(root, began, n=10, seed=7):
    "Random moments of a finished run, one in each n-th of it: the file written last, and seconds since then. Every second one counts files instead of time, because the short steps write the most"
    rng = random.Random(seed)
    line = sorted((f.stat().st_mtime, str(f.relative_to(root))) for f in root.rglob('*') if f.is_file() and f.name != 'status.txt' and f.stat().st_mtime > began)
    times = [t for t, _ in line]
    for i in range(n):
        part = (i + rng.random()) / n
        at = int(part * len(line)) if i % 2 else max(0, int(np.searchsorted(times, began + part * (times[-1] - began))) - 1)
        gap = times[min(at + 1, len(line) - 1)] - times[at]
        yield line[at][1], gap * rng.random() / 2

def phase(work):
    "What was going on in this work folder"
    if (work/'scores.json').exists(): return 'choosing'
    if not (work/'splits.json').exists(): return 'preparing'
    return 'judging' if any(not (f.parent/'scores.json').exists() for f in work.glob('models/*/*/validation/key.json')) else 'training'

def kill_at(p, work, file, delay):
    "SIGKILL for the process and all that it started, some time after a file has appeared"
    while not (work/file).exists() and p.poll() is None: time.sleep(.002)
    time.sleep(delay)
    ended = p.poll() is not None
    if not ended: os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    return None if ended else phase(work)

def timeless(d):
    "Without times: seconds, and keys that hold when a file was written"
    if isinstance(d, dict): return {k: timeless(v) for k, v in d.items() if k not in ('seconds', 'memory', 'key')}
    return [timeless(v) for v in d] if isinstance(d, list) else d

def content(path):
    "What a file says, times aside"
    if path.name in ('status.txt', 'report.html'): return None
    if path.name == 'key.json': return json.loads(path.read_text())[1:]
    if path.suffix == '.json': return timeless(json.loads(path.read_text()))
    if path.suffix == '.csv': return [{k: v for k, v in r.items() if k != 'seconds'} for r in csv.DictReader(path.read_text().splitlines())]
    if path.suffix == '.safetensors': return {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in load_file(path).items()}
    if path.suffix == '.b2nd': x = blosc2.open(str(path)); return x.dtype, x.shape, x[:].tobytes()
    if path.suffix == '.npz':
        with np.load(path, allow_pickle=False) as f: return {k: (f[k].dtype, f[k].tobytes()) for k in f.files}
    if path.name.endswith('.nii.gz'): y, g = read_label(path); return y.tobytes(), g
    return path.read_bytes()

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "Four tiny scans, and a work folder with nothing but a plan of all four models"
    root = tmp_path_factory.mktemp('kill')
    data = make_phantoms(root/'scans', n=4, shape=(12, 20, 20), seed=4)
    ids = [c.id for c in data]
    (root/'own.json').write_text(json.dumps([dict(train=ids[:2], valid=ids[2:]), dict(train=ids[2:], valid=ids[:2])]))
    extract_fingerprint(data, root/'base', workers=1)
    finish(start('plan', root/'base', '--set', 'cascade=yes', '--hardware', 'cpu'))
    shutil.rmtree(root/'base'/'fingerprint')
    return root

def test_a_run_killed_ten_times_ends_with_the_same_files(base):
    "Preparation, 2D, 3D and cascade on two folds, and the choice: one run is left alone, one is killed in all parts of it"
    whole, killed = base/'whole', base/'killed'
    for w in (whole, killed): shutil.copytree(base/'base', w)
    run = lambda work, **kw: start('run', base/'scans', work, '--splits', base/'own.json', '--steps', 12, '--seed', 3, '--hardware', 'cpu', '--workers', 2, **kw)
    began = time.time()
    finish(run(whole))
    seen = [kill_at(run(killed, every=0), killed, *m) for m in moments(whole, began)]
    print(seen)
    assert len([p for p in seen if p]) >= 9 and {'preparing', 'training', 'judging', 'choosing'} <= set(seen), seen
    finish(run(killed, every=0))
    assert files(whole) == files(killed)
    assert not [f for f in files(killed) if re.search(r'(^|/)\.|checkpoint|progress|failed', f)]
    assert [f for f in sorted(files(whole)) if content(whole/f) != content(killed/f)] == []

class Kill(Callback):
    "Ends everything at one batch, epoch or at the end, as if the power was cut"
    order = 85 # when the checkpoint is written
    def __init__(self, at): self.left = at
    def after_batch(self):
        self.left -= 1
        if self.left == 0: raise InterruptedError('killed')
    after_epoch = after_cancel_fit = after_batch

class Short(PaperSchedule):
    "The paper's rule in fast motion: it stops by itself after three epochs"
    def epoch_done(self, train_loss, valid_loss): return super().epoch_done(train_loss, valid_loss) or len(self.learn.training_log.history) == 3

def test_the_papers_schedule_killed_in_the_middle_of_an_epoch(base):
    "At every batch and at every end of an epoch: the same weights, losses and learning rates"
    work = base/'paper'
    data = scan(base/'scans')
    plan = make_plan(extract_fingerprint(data, work, workers=1), 'cpu')
    cases, c = preprocess(data, plan, work, workers=1), plan.models['2d']
    def train(folder, at=0):
        learn = get_learner(patch_dls(cases[:2], cases[2:], c, steps=2, valid_steps=1), c, schedule=Short(), folder=folder, cbs=[Kill(at)])
        learn.checkpoint.every = 0
        try: fit_learner(learn)
        except InterruptedError: return None
        return {k: v.clone() for k, v in learn.model.state_dict().items()}, timeless(learn.training_log.history)
    weights, history = train(work/'whole')
    assert [r['step'] for r in history] == [2, 4, 6]
    for at in range(1, 3 * (2 + 1 + 1) + 1):
        assert train(work/str(at), at) is None
        w, h = train(work/str(at))
        assert h == history and all(torch.equal(w[k], weights[k]) for k in weights), at

SLEEP = '''
import sys, time
from autounet_nb.core.executor import pmap
def nap(i): time.sleep(.3); return i
for i, r in pmap(nap, range(1000), 2): print(r, flush=True)
'''

def test_workers_end_when_their_parent_is_killed():
    p = subprocess.Popen([sys.executable, '-c', SLEEP], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(6): p.stdout.readline() # both workers have been at work
    children = psutil.Process(p.pid).children(recursive=True)
    p.kill(); p.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    for c in alive: c.kill()
    assert len(children) >= 2 and not alive

def test_a_case_that_kills_its_process_is_named_and_the_others_are_done(tmp_path, monkeypatch):
    data = make_phantoms(tmp_path/'scans', n=5, shape=(12, 20, 20), seed=4)
    plan = make_plan(extract_fingerprint(data, tmp_path, workers=1), 'cpu')
    def prepare_or_die(case, **kw): # a function in a function is sent to the workers as it is
        if case.id.endswith('2'): os.kill(os.getpid(), signal.SIGKILL)
        return _prepare(case, **kw)
    monkeypatch.setattr('autounet_nb.preprocessing.preprocess._prepare', prepare_or_die)
    with pytest.raises(InputError, match='1 of 5 cases .*\ncase phantom_002: its process was killed .SIGKILL') as e: preprocess(data, plan, tmp_path, workers=2)
    assert str(e.value).count('case phantom') == 1
    assert {f.stem for f in (tmp_path/'prep'/'full').glob('*.json')} == {c.id for c in data if c.id != 'phantom_002'}

def test_two_that_kill_their_process():
    def die(i):
        if i in (3, 7): os.kill(os.getpid(), signal.SIGKILL)
        return i
    res = dict(pmap(die, range(10), 2))
    assert {i for i, r in res.items() if isinstance(r, InputError)} == {3, 7} and all(res[i] == i for i in set(range(10)) - {3, 7})
