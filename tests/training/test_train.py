"Training: schedules, patches, and a process that is killed and goes on."
import json, signal, subprocess, sys, time
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.planning.fingerprint import extract_fingerprint
from autounet_nb.preprocessing.preprocess import read_patch
from autounet_nb.training.patches import PatchDataset, forced_foreground, patch_start
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.planning.planner import make_plan
from autounet_nb.preprocessing.preprocess import preprocess
from autounet_nb.training.schedule import PaperSchedule, one_cycle
from autounet_nb.training.train import small_batches, train_fold
from autounet_nb.training.weights import load_model, load_tensors, save_tensors

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    "A work folder with preprocessed generated scans: (work, plan, cases)"
    root = tmp_path_factory.mktemp('train')
    data = make_phantoms(root/'scans', n=4, shape=(12, 20, 20), seed=1)
    plan = make_plan(extract_fingerprint(data, root/'work', workers=1), 'cpu')
    plan.save(root/'work'/'plan.json')
    return root/'work', plan, preprocess(data, plan, root/'work', workers=1)

@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=3), st.integers(0, 999), st.data())
def test_patches_lie_where_they_may(sizes, seed, data):
    shape, patch = zip(*sizes)
    rng = np.random.default_rng(seed)
    voxel = [data.draw(st.integers(0, n - 1)) for n in shape]
    for v in (None, voxel):
        start = patch_start(shape, patch, rng, v)
        assert all(min(0, n - k) <= s <= max(0, n - k) for s, n, k in zip(start, shape, patch))
    assert all(s <= v < s + k for s, v, k in zip(start, voxel, patch))
    x = rng.random(shape)
    p = read_patch(x, start, patch)
    assert p.shape == tuple(patch) and p[tuple(v - s for v, s in zip(voxel, start))] == x[tuple(voxel)]

@pytest.mark.parametrize('model', ['2d', '3d'])
def test_more_than_a_third_of_each_batch_has_foreground(prepared, model):
    _, plan, cases = prepared
    c = plan.models[model]
    ds = PatchDataset(cases, c)
    for b in range(6):
        n = sum(bool((ds[b * c.batch_size + i][1] > 0).any()) for i in range(c.batch_size))
        assert n >= forced_foreground(c.batch_size) > c.batch_size / 3

def test_the_papers_schedule_counts_epochs():
    s = PaperSchedule()
    ends = [s.epoch_done(1., 1.) for _ in range(121)]
    assert s.state['lr'] == pytest.approx(3e-4 / 5**4) and ends.index(True) == 120 # 30 epochs four times after the first
    early = PaperSchedule()
    assert not any(early.epoch_done(1 - .01 * e, 1.) for e in range(200)) and early.state['lr'] == 3e-4 # the validation loss alone doesn't end it

def test_one_cycle_rises_once_and_falls_once():
    lr = [one_cycle(p) for p in np.linspace(0, 1, 101)]
    top = int(np.argmax(lr))
    assert lr == lr[:1] + sorted(lr[1:top + 1]) + sorted(lr[top + 1:], reverse=True) and lr[-1] < 1e-6 and max(lr) == pytest.approx(3e-3, rel=.01)

def test_minutes_on_a_cpu_have_small_steps_and_their_number_does_not(prepared):
    work, plan, _ = prepared
    batch = lambda **kw: json.loads((train_fold(work, '2d', 0, device='cpu', **kw)/'model.json').read_text())['config']['batch_size']
    asked = plan.models['2d']
    few = small_batches(asked).batch_size
    assert few == max(1, min(asked.batch_size, 2**15 // (asked.patch_size[0] * asked.patch_size[1])))
    assert batch(steps=2) == asked.batch_size and batch(minutes=.02) == few

def test_minutes_are_minutes(prepared):
    "On the clock: between 0.5 and 1.5 of the time asked for, and the learning rate has come down"
    work, *_ = prepared
    started = time.monotonic()
    folder = train_fold(work, '3d', 0, minutes=.2, device='cpu')
    took = time.monotonic() - started
    last = json.loads((folder/'model.json').read_text())['last']
    assert 6 < took < 40 and 0 <= last['lr'] < 1e-3 and last['step'] > 10

TRAIN = '''
import sys
from autounet_nb.training.train import train_fold
train_fold(sys.argv[1], '3d', 1, steps=24, device='cpu')
'''

def test_killed_and_continued_is_the_same_to_the_bit(prepared, tmp_path):
    "kill -9 after a checkpoint; what comes out in the end equals an undisturbed training"
    import shutil
    work, *_ = prepared
    a, b = tmp_path/'a', tmp_path/'b'
    for w in (a, b): shutil.copytree(work, w, ignore=shutil.ignore_patterns('models'))
    subprocess.run([sys.executable, '-c', TRAIN, a], check=True, capture_output=True, timeout=300)
    p = subprocess.Popen([sys.executable, '-c', TRAIN, b], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = b/'models'/'3d'/'fold_1'/'checkpoint.safetensors'
    while not checkpoint.exists() and p.poll() is None: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert checkpoint.exists() and not (b/'models'/'3d'/'fold_1'/'weights.safetensors').exists(), 'killed too late to show anything'
    subprocess.run([sys.executable, '-c', TRAIN, b], check=True, capture_output=True, timeout=300)
    x, y = (load_tensors(w/'models'/'3d'/'fold_1'/'weights.safetensors')[0] for w in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)

def test_a_model_from_somebody_else_is_only_numbers(prepared, tmp_path):
    "A pickle in place of weights, a network of another size, a description that is none: refused in a sentence"
    import shutil
    work, *_ = prepared
    train_fold(work, '3d', 0, steps=2, device='cpu')
    shutil.copytree(work/'models', tmp_path/'models')
    fold = tmp_path/'models'/'3d'/'fold_0'
    good = (fold/'weights.safetensors').read_bytes()
    torch.save({'x': torch.zeros(1)}, fold/'weights.safetensors')
    with pytest.raises(InputError, match='not a whole safetensors file'): load_model(tmp_path, '3d', 0)
    save_tensors(fold/'weights.safetensors', {'x': torch.zeros(1)})
    with pytest.raises(InputError, match='another network'): load_model(tmp_path, '3d', 0)
    (fold/'weights.safetensors').write_bytes(good)
    load_model(tmp_path, '3d', 0)
    (fold/'model.json').write_text('{"config": {"name": "3d"}}')
    with pytest.raises(InputError, match='does not describe a model'): load_model(tmp_path, '3d', 0)

def test_a_loss_a_network_and_a_callback_of_ones_own(prepared):
    from fastai.callback.core import Callback
    from autounet_nb.training.unet import build_unet
    work, plan, _ = prepared
    seen = []
    class Watch(Callback):
        def after_loss(self): seen.append(float(self.learn.loss.detach()))
    c = plan.models['3d']
    net = build_unet(c, pool='conv')
    folder = train_fold(work, '3d', 2, steps=2, device='cpu', net=net, loss=lambda p, y: torch.nn.functional.cross_entropy(p, y), cbs=[Watch()])
    assert len(seen) >= 2 and all(v > 0 for v in seen)
    loaded, _ = load_model(work, '3d', 2, net=build_unet(c, pool='conv'))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values())) and folder.name == 'fold_2'
