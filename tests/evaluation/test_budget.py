"A run on a budget of minutes: one split first, going on with more, and nothing to do when the time is spent."
import json, time
import pytest
from autounet_nb.inference.ensemble import too_short
from autounet_nb.planning.fingerprint import extract_fingerprint
from autounet_nb.training.patches import PatchDataset, is_forced
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.planning.planner import make_plan
from autounet_nb.preprocessing.preprocess import preprocess
from autounet_nb.training.schedule import read_history
from autounet_nb.training.train import small_batches, train_fold

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp('budget')
    return root, make_phantoms(root/'scans', n=5, shape=(16, 32, 28), seed=3)

def read(path): return json.loads(path.read_text())

def test_a_training_on_the_clock_goes_on(scans):
    root, data = scans
    work = root/'train'
    plan = make_plan(extract_fingerprint(data, work, workers=1), 'cpu')
    plan.save(work/'plan.json')
    preprocess(data, plan, work, workers=1)
    folder = train_fold(work, '3d', 0, minutes=.05, device='cpu')
    first, rows = read(folder/'model.json'), read_history(folder)
    written = (folder/'weights.safetensors').stat().st_mtime_ns
    train_fold(work, '3d', 0, minutes=.05, device='cpu')
    assert (folder/'weights.safetensors').stat().st_mtime_ns == written # so long it was trained before
    train_fold(work, '3d', 0, minutes=.05, more=True, device='cpu')
    second = read(folder/'model.json')
    assert second['steps'] > first['steps'] and second['minutes'] == pytest.approx(.05 + first['seconds'] / 60)
    assert read_history(folder)[:len(rows)] == rows # one history of both cycles
    assert read_history(folder)[len(rows)]['train_loss'] < rows[0]['train_loss'] # it began where the first ended

def test_batches_of_one_hold_no_foreground_every_second_time(scans):
    root, data = scans
    work = root/'train'
    plan = make_plan(extract_fingerprint(data, work, workers=1), 'cpu')
    cases = preprocess(data, plan, work, workers=1)
    config = small_batches(plan.models['2d'])
    config = type(config)(**vars(config) | dict(batch_size=1))
    ds = PatchDataset(cases, config)
    chosen = [bool((ds[i][1] > 0).any()) for i in range(60)]
    assert all(c for i, c in enumerate(chosen) if is_forced(i, 1)) and not all(chosen)

def test_one_split_first_and_nothing_twice(scans, autounet):
    root, _ = scans
    work, began = root/'run', time.monotonic()
    p = autounet('run', root/'scans', work, '--minutes', '1', '--hardware', 'cpu')
    assert p.returncode == 0, p.stderr
    assert time.monotonic() - began < 1.1 * 60 + 30
    assert 'Race on fold 0' in p.stdout or 'too short for a race' in p.stdout
    jobs = read(work/'budget.json')['jobs']
    assert jobs and all(m == jobs[0][0] for m, _ in jobs) or {k for _, k in jobs} == set(range(5))
    weights = {f: f.stat().st_mtime_ns for f in work.rglob('weights.safetensors')}
    p = autounet('run', root/'scans', work, '--minutes', '1', '--hardware', 'cpu')
    assert p.returncode == 0 and 'minutes are spent' in p.stdout, p.stdout + p.stderr
    assert weights == {f: f.stat().st_mtime_ns for f in work.rglob('weights.safetensors')}

def test_a_training_that_is_too_short_is_named(tmp_path):
    folder = tmp_path/'models/3d/fold_0'
    folder.mkdir(parents=True)
    (folder/'weights.safetensors').write_bytes(b'')
    model = dict(recipe=dict(clock=True), steps=12, seconds=6.)
    (folder/'model.json').write_text(json.dumps(model))
    assert 'trained for 12 steps: not usable; about 14 minutes' in too_short(tmp_path, ['3d'])[0]
    (folder/'model.json').write_text(json.dumps(model | dict(recipe=dict(clock=False))))
    assert too_short(tmp_path, ['3d']) == [] # a number of steps was asked for
    (folder/'model.json').write_text(json.dumps(model | dict(steps=900)))
    assert too_short(tmp_path, ['3d']) == []
