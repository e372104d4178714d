"""This package's side of the benchmarks: `python ours.py WORK CASE FOLDER` prints what it measured as JSON.

FOLDER holds the inputs, see inputs.py. Each function is one work and has its counterpart in peer.py.
"""
import json, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np
from inputs import BUDGET, LOADS, LOGITS, NETWORK, PATCHES, RESAMPLE, TIMES, busy_beside, memory_of, patch_batches, seconds_of

def resample(case, folder):
    from autounet_nb.preprocessing.resample import resample
    old, new = RESAMPLE[case]
    x = np.load(folder/'ct.npy', mmap_mode='r')[:old[0]].copy()
    seconds, y = seconds_of(lambda: resample(x, new))
    np.save(folder/f'resampled_{case}_ours.npy', y[::7, ::7, ::7])
    return dict(seconds=seconds)

def prepare(case, folder):
    from autounet_nb.data.find import scan
    from autounet_nb.app.run import prepare
    work = folder/'ours'/case
    if work.exists(): shutil.rmtree(work)
    return dict(seconds=seconds_of(lambda: prepare(scan(folder/'data'/case), work, ['2d', '3d'], 'cpu'))[0])

def logits(case, folder):
    from autounet_nb.inference.export import export_labels
    x, native = np.load(folder/f'logits_{case}.npy'), LOGITS[case][2]
    meta = dict(box=[[0, n] for n in native], cropped_shape=list(native), shape=list(x.shape[1:]))
    slabs = (_softmax(x[:, z:z + 8]) for z in range(0, x.shape[1], 8))
    added, seconds, y = memory_of(lambda: export_labels(slabs, meta, native))
    np.save(folder/f'labels_{case}_ours.npy', y[::3, ::3, ::3])
    return dict(seconds=seconds, added=added)

def _softmax(logits):
    p = logits.astype(np.float32)
    p -= p.max(0); np.exp(p, out=p); p /= p.sum(0)
    return p

def augment(case, folder):
    import torch
    from autounet_nb.training.augment import augment, step_generator
    torch.set_num_threads(1)
    batches = [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in patch_batches(PATCHES[case])]
    augment(*batches[0], step_generator(0, 0))
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 15:
        augment(*batches[n % len(batches)], step_generator(0, n)); n += 1
    seconds = time.perf_counter() - start
    return dict(seconds=seconds / n / batches[0][0].numel() * 1e6, voxels_per_second=n * batches[0][0].numel() / seconds)

def _learner(folder, cbs=(), **budget):
    from dataclasses import replace
    from autounet_nb.training.augment import Augment
    from autounet_nb.core.files import read_json
    from autounet_nb.training.patches import patch_dls
    from autounet_nb.planning.plan import Plan
    from autounet_nb.training.schedule import Budget
    from autounet_nb.training.train import get_learner, preprocessed_cases
    work = folder/'ours'/'hippocampus'
    config = replace(Plan.load(work/'plan.json').models['3d'], patch_size=NETWORK['patch_size'], batch_size=NETWORK['batch_size'], features_per_stage=NETWORK['features_per_stage'])
    split = read_json(folder/'splits.json')[0]
    train, valid = (preprocessed_cases(work, config, split[k]) for k in ('train', 'valid'))
    dls = patch_dls(train, valid, config)
    return get_learner(dls, config, schedule=Budget(**budget), augment=False, cbs=[Augment(3), *cbs]), config

def _step_seconds(folder, skipped, timed, **budget):
    "Mean seconds of some training steps after others that are not timed"
    from fastai.callback.core import Callback, CancelFitException
    class Clock(Callback):
        "Notes when each training step ends, and stops after the last that is wanted"
        run_valid = False
        def before_fit(self): self.at = []
        def after_batch(self):
            self.at.append(time.perf_counter())
            if len(self.at) == skipped + timed: raise CancelFitException()
    learn, _ = _learner(folder, [Clock()], **budget)
    with learn.no_bar(), learn.no_logging(): learn.fit(2) # on the clock the first epoch has but a few steps
    return float(np.mean(np.diff(learn.clock.at[skipped:])))

def step(case, folder):
    seconds = _step_seconds(folder, 10, 50, steps=10**6)
    return dict(seconds=seconds, images_per_second=NETWORK['batch_size'] / seconds)

def load(case, folder):
    "A training step beside other programs that compute"
    with busy_beside(LOADS[case]): return dict(seconds=_step_seconds(folder, 60, 60, minutes=60))

def network(case, folder):
    "Not timed: a network that has learnt a little, for prediction"
    from autounet_nb.core.files import write_json
    from autounet_nb.training.weights import save_tensors
    learn, config = _learner(folder, steps=120)
    with learn.no_bar(), learn.no_logging(): learn.fit(10)
    out = folder/'ours'/'hippocampus'/'models'/'3d'/'fold_0'
    save_tensors(out/'weights.safetensors', learn.model.state_dict())
    write_json(out/'model.json', dict(config=config.__dict__, mirrored=True, finished=True))
    return dict(seconds=learn.training_log.seconds)

def predict(case, folder):
    from autounet_nb.inference.predict import predict
    out = folder/'ours'/'predicted'
    if out.exists(): shutil.rmtree(out)
    return dict(seconds=seconds_of(lambda: predict(folder/'ours'/'hippocampus', folder/'scans', out, model='3d', folds=[0], largest=False))[0])

def large(case, folder):
    "A CT of 600×512×512 with 20 classes, at the spacing of the plan, from file to file"
    from autounet_nb.inference.predict import predict
    work, out = folder/'ours'/'large', folder/'ours'/'large_predicted'
    _untrained(work, (600, 512, 512), 19, (64, 96, 96))
    if out.exists(): shutil.rmtree(out)
    return dict(seconds=seconds_of(lambda: predict(work, folder/'large', out, tta=False))[0])

def fast(case, folder):
    "The default against `--fast`, file to file: 39 hippocampi by a network that has learnt a little, or the large CT"
    from autounet_nb.core.files import read_json, write_json
    from autounet_nb.data.find import scan
    from autounet_nb.evaluation.cross_validation import validate_fold
    from autounet_nb.evaluation.scores import evaluate
    from autounet_nb.inference.predict import predict
    from autounet_nb.evaluation.prices import measure_prices
    from autounet_nb.evaluation.whole_scans import QUICK
    out = folder/'ours'/'fast'
    if case == 'large':
        _untrained(work := folder/'ours'/'large', (600, 512, 512), 19, (64, 96, 96))
        scans, options, res = folder/'large', QUICK, {}
    else:
        work, scans, data = folder/'ours'/'hippocampus', folder/'scans', scan(folder/'data'/'hippocampus')
        write_json(work/'splits.json', read_json(folder/'splits.json'))
        validate_fold(work, data, '3d', 0)
        prices = measure_prices(work, data, ['3d'])
        options, res = prices.fast(), dict(prices=[dict(vars(p.options), seconds=p.seconds, batch_dice=p.dice) for p in prices.prices])
    for name, o in (('default', None), ('fast', options)):
        shutil.rmtree(out, ignore_errors=True)
        res[name], paths = seconds_of(lambda: predict(work, scans, out, model='3d', folds=[0], options=o))
        if case != 'large': res[f'dice_{name}'] = evaluate(out, list(data[p.name.split('.')[0]] for p in paths)).mean
    return res | dict(times=res['default'] / res['fast'])

def many(case, folder):
    "300 predictions of small scans in one process: memory and handles, and seconds after the first against those of the computing alone"
    import psutil
    from autounet_nb.inference.predict import Predictor, native_labels
    from autounet_nb.preprocessing.preprocess import preprocess_case
    from autounet_nb.inference.ensemble import mean_softmax
    predictor = Predictor(folder/'ours'/'hippocampus', '3d', [0])
    scans = [(v[0], (1., 1., 1.)) for v, _ in patch_batches((36, 50, 35))]
    me, at, memory, handles = psutil.Process(), [time.perf_counter()], [], []
    for _ in predictor.each(scans[i % len(scans)] for i in range(300)):
        at.append(time.perf_counter()); memory.append(me.memory_info().rss); handles.append(me.num_fds() + me.num_threads())
    e, alone = predictor.ensemble, []
    for x, mm in scans * 10:
        began = time.perf_counter()
        ready, _, meta = preprocess_case(x if x.ndim == 4 else x[None], mm, e.plan, e.models[0][1].spacing)
        native_labels(mean_softmax(ready, e.models, len(e.plan.label_values)), meta, x.shape[-3:], e.plan)
        alone.append(time.perf_counter() - began)
    each = float(np.median(np.diff(at)[1:]))
    return dict(seconds=each, first=at[1] - at[0], computing=float(np.median(alone)), times=each / float(np.median(alone)),
                grown_mb=(memory[-1] - memory[30]) / 1e6, handles_grown=handles[-1] - handles[30])

def _untrained(work, shape, classes, patch):
    "A work folder with a plan for CTs of this shape, and a small network that has learnt nothing"
    import torch
    from autounet_nb.core.files import write_json
    from autounet_nb.planning.planner import make_plan
    from autounet_nb.planning.rules import sketch_fingerprint
    from autounet_nb.training.weights import save_tensors
    from autounet_nb.training.unet import build_unet
    plan = make_plan(sketch_fingerprint(shape, classes=classes, modalities=('CT',)), 'cpu', {'3d.features_per_stage': 8, '3d.patch_size': list(patch)})
    plan.save(work/'plan.json')
    torch.manual_seed(0)
    net = build_unet(plan.models['3d'])
    torch.nn.init.zeros_(net.head.bias); torch.nn.init.normal_(net.head.weight)
    out = work/'models'/'3d'/'fold_0'
    save_tensors(out/'weights.safetensors', net.state_dict())
    write_json(out/'model.json', dict(config=plan.models['3d'].__dict__, mirrored=False, finished=True))

def learn(case, folder):
    "Train for some minutes, and segment the held-out cases: Dice against the minutes of training"
    from autounet_nb.data.find import scan
    from autounet_nb.evaluation.cross_validation import validate_fold
    from autounet_nb.training.train import train_fold
    work, minutes = folder/'ours'/'hippocampus', TIMES[case]
    shutil.rmtree(work/'models'/'3d'/'fold_1', ignore_errors=True)
    shutil.copy(folder/'splits.json', work/'splits.json')
    seconds, _ = seconds_of(lambda: train_fold(work, '3d', 1, minutes=minutes))
    return dict(seconds=seconds, batch_dice=validate_fold(work, scan(folder/'data'/'hippocampus'), '3d', 1)['mean']['dice'])

def budget(case, folder):
    "`autounet run` with some minutes and nothing else said; then Dice on the cases that took no part"
    from autounet_nb.core.files import read_json
    from autounet_nb.data.cases import Case
    from autounet_nb.data.find import scan
    from autounet_nb.evaluation.scores import evaluate
    from autounet_nb.inference.predict import predict
    name, minutes = BUDGET[case]
    data, work = folder/'budget'/name, folder/'ours'/'budget'/case
    shutil.rmtree(work, ignore_errors=True)
    command = [Path(sys.executable).with_name('autounet'), 'run', data/'given', work, '--minutes', str(minutes)]
    took, done = seconds_of(lambda: subprocess.run(list(map(str, command)), capture_output=True, text=True))
    if done.returncode: raise SystemExit(done.stderr)
    unseen = scan(data/'unseen')
    predicted = predict(work, [Case(c.id, c.images) for c in unseen], work/'unseen')
    scores = evaluate(dict(zip((c.id for c in unseen), predicted)), list(unseen), names=unseen.labels)
    kept = read_json(work/'budget.json')
    return dict(minutes=minutes, took=took, batch_dice=scores.mean, classes=scores.classes, models=read_json(work/'ensemble.json')['models'], trainings=kept['jobs'], decisions=kept['said'])

def growth(case, folder):
    "Seconds for one, two, four and eight times as much, on generated scans; what both share, such as imports, is not timed"
    from autounet_nb.data.find import scan
    from autounet_nb.data.phantom import make_phantoms
    from autounet_nb.inference.predict import predict
    from autounet_nb.app.run import prepare
    from autounet_nb.training.train import train_fold
    kind, what = case.split('_')
    root, seconds = folder/'growth'/case, {}
    shutil.rmtree(root, ignore_errors=True)
    for k, shape in {1: (96, 96, 96), 2: (192, 96, 96), 4: (192, 192, 96), 8: (192, 192, 192)}.items():
        n, shape = (4, shape) if what == 'voxels' else (8 * k if what == 'cases' else 8, (40, 48, 40))
        scans, work = make_phantoms(root/f'scans{k}', n=n, shape=shape), root/f'work{k}'
        if kind == 'predict':
            _untrained(work, shape, 2, (24, 24, 24))
            seconds[k] = seconds_of(lambda: predict(work, scans, root/f'out{k}', tta=False))[0]
            continue
        seconds[k] = seconds_of(lambda: prepare(scan(root/f'scans{k}'), work, ['3d'], 'cpu', workers=1))[0]
        if kind == 'train': seconds[k] = seconds_of(lambda: train_fold(work, '3d', 0, steps=20 * k))[0]
    x, y = np.log(list(seconds)), np.log(list(seconds.values()))
    return dict(seconds=seconds[8], each=list(seconds.values()), exponent=float(np.polyfit(x, y, 1)[0]))

if __name__ == '__main__':
    work, case, folder = sys.argv[1:]
    print(json.dumps(globals()[work](case, Path(folder))))
