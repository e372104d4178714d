"""Time this package and nnU-Net side by side: `make bench`, or `make bench ONLY=resample,logits DATA=folder`.

Each work is done in turn by ours.py and by peer.py, in processes of their own, several rounds in one go. What is quoted is
the ratio of the medians, and the smallest and largest ratio of a round. Results are kept in results.json; a work that is run again replaces its own.
They are written after each case, so that what was measured is there when the rest is stopped.
"""
import argparse, datetime, json, os, platform, shutil, statistics, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, psutil

HERE = Path(__file__).resolve().parent
FOLDER, PEER, RESULTS = HERE/'work', HERE/'peer'/'venv'/'bin'/'python', HERE/'results.json'
VERSION = '2.8.1' # of nnU-Net
MOST = .9 # of this machine's memory; a process that takes more is ended, and that is its result

def works():
    "name → title, goal, cases, rounds, what has to be there first"
    from inputs import BUDGET, LOADS, LOGITS, PATCHES, PEER_BUDGET, PEER_TIMES, RESAMPLE, TIMES
    return dict(
        resample=('third-order resampling of a CT', '≥ 15×', list(RESAMPLE), 3, [ct]),
        prepare=('check, fingerprint, plan, preprocess in 2D and 3D', '≥ 6×', ['hippocampus', 'openkbp'], 3, [datasets]),
        logits=('logits to labels on the grid of the scan', '≥ 5×, ≤ 1/4 of the memory', list(LOGITS), 3, [make_logits]),
        augment=('augmentation of a million voxels on one core, each its own set', '≥ 4×', list(PATCHES), 3, []),
        step=('training step, loading and augmentation included', '≥ 1.5×', ['hippocampus'], 3, [datasets, prepared]),
        load=('training step beside other programs that compute', 'growth ≤ 1.3× the fair share', list(LOADS), 1, [datasets, prepared]),
        predict=('prediction with mirroring, file to file', '≥ 2.5×', ['hippocampus'], 3, [datasets, prepared, networks]),
        large=('CT of 600×512×512, 20 classes, file to file', '≤ 5 GB', ['large'], 1, [large_scan]),
        fast=('the default prediction against --fast', '≥ 3× at a loss of ≤ 0.005 Dice', ['hippocampus', 'large'], 1, [datasets, own_network, large_scan]),
        many=('300 predictions of small scans in one process', 'constant memory, ≤ 1.2× the computing', ['hippocampus'], 1, [datasets, own_network]),
        start=('import, and the help of the command line', '≤ 0.5 s', ['import', 'help'], 5, []),
        learn=('held-out Dice after minutes of training', '0.85 in ≤ 4 minutes, ≥ 5×', [*TIMES, *PEER_TIMES], 1, [datasets, prepared]),
        budget=('Dice on new scans after a run of some minutes', '≥ 5× fewer minutes for the same Dice', [*BUDGET, *PEER_BUDGET], 1, [budget_sets]),
        growth=('time against cases and voxels', 'linear', ['prepare_cases', 'prepare_voxels', 'train_steps', 'predict_cases', 'predict_voxels'], 1, []))

# inputs

def ct(data):
    from inputs import make_ct
    if not (FOLDER/'ct.npy').exists(): make_ct(FOLDER/'ct.npy')

def make_logits(data):
    from inputs import LOGITS, make_logits
    for case in LOGITS:
        if not (FOLDER/f'logits_{case}.npy').exists(): make_logits(case, FOLDER/f'logits_{case}.npy')

def datasets(data):
    "200 cases of Hippocampus and 40 of OpenKBP as both want them, and a folder of scans to segment"
    for name, own, theirs, n in (('hippocampus', 'Task04_Hippocampus', 'Dataset004_Hippocampus', 200), ('openkbp', 'Dataset101_OpenKBP', 'Dataset101_OpenKBP', 40)):
        source = data/own
        if not source.is_dir(): raise FileNotFoundError(f'{source} is missing; say with DATA=folder where {own} lies')
        _copy(source, FOLDER/'data'/name, FOLDER/'peer'/'raw'/theirs, n)
    ids = sorted(p.name[:-7] for p in (FOLDER/'data'/'hippocampus'/'labelsTr').iterdir())
    folds = [ids[k::5] for k in range(5)]
    write(FOLDER/'splits.json', [dict(train=[i for i in ids if i not in f], valid=f) for f in folds])
    if not (FOLDER/'scans').exists():
        for to, end in ((FOLDER/'scans', '.nii.gz'), (FOLDER/'peer'/'scans', '_0000.nii.gz')):
            to.mkdir(parents=True)
            for i in folds[0]: shutil.copy(FOLDER/'data'/'hippocampus'/'imagesTr'/f'{i}.nii.gz', to/f'{i}{end}')

def _copy(source, ours, theirs, n):
    "The first n cases of a Decathlon or nnU-Net folder, in the names of both"
    if ours.exists(): return
    d = json.loads((source/'dataset.json').read_text())
    masks = sorted(p for p in (source/'labelsTr').iterdir() if p.name.endswith('.nii.gz') and not p.name.startswith('.'))[:n]
    plain = (source/'imagesTr'/masks[0].name).exists()
    for to in (ours, theirs):
        for k in ('imagesTr', 'labelsTr'): (to/k).mkdir(parents=True)
        for m in masks:
            shutil.copy(m, to/'labelsTr')
            image = m.name if plain else f'{m.name[:-7]}_0000.nii.gz'
            shutil.copy(source/'imagesTr'/image, to/'imagesTr'/(m.name if plain and to is ours else f'{m.name[:-7]}_0000.nii.gz'))
    labels = {str(v): int(k) for k, v in d['labels'].items()} if plain else d['labels']
    write(theirs/'dataset.json', dict(channel_names=d.get('channel_names') or d['modality'], labels={'background': 0} | {k: v for k, v in labels.items() if v}, numTraining=len(masks), file_ending='.nii.gz'))
    names = [m.name for m in masks]
    write(ours/'dataset.json', d | dict(numTraining=len(names)) | (dict(training=[dict(image=f'./imagesTr/{i}', label=f'./labelsTr/{i}') for i in names], test=[], numTest=0) if plain else {}))

def prepared(data):
    "Both have preprocessed Hippocampus, and share the folds"
    if not (FOLDER/'ours'/'hippocampus'/'plan.json').exists(): run('ours', 'prepare', 'hippocampus')
    if not (FOLDER/'peer'/'preprocessed'/'Dataset004_Hippocampus'/'nnUNetPlans.json').exists(): run('peer', 'prepare', 'hippocampus')
    write(FOLDER/'peer'/'preprocessed'/'Dataset004_Hippocampus'/'splits_final.json', [dict(train=s['train'], val=s['valid']) for s in json.loads((FOLDER/'splits.json').read_text())])

def networks(data):
    for side in ('ours', 'peer'): run(side, 'network', 'hippocampus')

def own_network(data):
    "The same of this package alone"
    work = FOLDER/'ours'/'hippocampus'
    if not (work/'plan.json').exists(): run('ours', 'prepare', 'hippocampus')
    if not (work/'models'/'3d'/'fold_0'/'weights.safetensors').exists(): run('ours', 'network', 'hippocampus')

def large_scan(data):
    import SimpleITK as sitk
    if (FOLDER/'large').exists(): return
    ct(data)
    x = np.load(FOLDER/'ct.npy', mmap_mode='r')
    image = sitk.GetImageFromArray(np.concatenate([x[::s] for s in (1, -1, 1, -1, 1)]).astype(np.int16))
    (FOLDER/'large').mkdir(); sitk.WriteImage(image, FOLDER/'large'/'ct.nii.gz')

def budget_sets(data):
    "Every set in two folders: the cases that are given, and those that take no part"
    from autounet_nb.data.find import scan
    from inputs import BUDGET_SETS
    for name, (source, n) in BUDGET_SETS.items():
        if (FOLDER/'budget'/name).exists(): continue
        if not (data/source).is_dir(): raise FileNotFoundError(f'{data/source} is missing; say with DATA=folder where {source} lies')
        d = scan(data/source)
        cases = list(d)
        unseen = cases[len(cases) // n // 2::len(cases) // n][:n]
        for part, some in (('unseen', unseen), ('given', [c for c in cases if c not in unseen])): _raw(d, some, FOLDER/'budget'/name/part)

def _raw(dataset, cases, to):
    "Cases with one image each in nnU-Net's layout, which both sides read; pictures in colour as pairs of files, which ours does"
    from autounet_nb.data.images import read_label
    from autounet_nb.data.formats import split_name
    end, colour = split_name(cases[0].images[0])[1], len(dataset.modalities) > 1
    folders = ('images', 'labels') if colour else ('imagesTr', 'labelsTr')
    for k in folders: (to/k).mkdir(parents=True)
    for c in cases:
        for k, f, name in zip(folders, (c.images[0], c.label), (c.id + '_0000' * (not colour), c.id)): shutil.copy(f, to/k/f'{name}{end}')
    if colour: return
    found = {int(v) for c in cases for v in np.unique(read_label(c.label)[0])}
    labels = dataset.labels or {f'class {v}': v for v in sorted(found - {0})}
    write(to/'dataset.json', dict(channel_names={'0': dataset.modalities[0]}, labels={'background': 0} | labels, numTraining=len(cases), file_ending=end))

def write(path, d): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(d, indent=1))

# measuring

def _peak(process, most, res, done):
    "Follow the memory of a process and its children, shared pages counted once; end it where it takes too much"
    pause = .1
    while not done.wait(pause):
        began = time.perf_counter()
        try: family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess: return
        used = 0
        for p in family:
            try: used += p.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess): pass
        res['memory'] = max(res.get('memory', 0), used)
        pause = max(.1, 20 * (time.perf_counter() - began)) # adding up the pages of a large process takes time that is the process's own
        if used > most:
            res['ended'] = True
            for p in reversed(family):
                try: p.kill()
                except psutil.NoSuchProcess: pass

def measured(command):
    "Run a command: how long it took, its peak memory, and the JSON that it printed last"
    res, done, start = {}, threading.Event(), time.perf_counter()
    p = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    watch = threading.Thread(target=_peak, args=(psutil.Process(p.pid), MOST * psutil.virtual_memory().total, res, done)); watch.start()
    out, err = p.communicate(); done.set(); watch.join()
    res['wall'] = time.perf_counter() - start
    if res.pop('ended', False): return res | dict(ended=f'more than {MOST * psutil.virtual_memory().total / 1e9:.0f} GB')
    if p.returncode: raise SystemExit(f'bench: {" ".join(map(str, command[1:]))} failed\n{err[-3000:]}')
    lines = out.strip().splitlines()
    return res | (json.loads(lines[-1]) if lines and lines[-1].startswith('{') else dict(seconds=res['wall']))

def run(side, work, case):
    "One case of a work by one side"
    python = sys.executable if side == 'ours' else PEER
    if work == 'start': return measured(START[side][case])
    return measured([python, HERE/f'{side}.py', work, case, FOLDER])

START = dict(
    ours={'import': [sys.executable, '-c', 'import autounet_nb'], 'help': [Path(sys.executable).with_name('autounet'), '--help']},
    peer={'import': [PEER, '-c', 'import nnunetv2.inference.predict_from_raw_data'], 'help': [PEER, '-c', 'import sys; sys.argv = ["nnUNetv2_predict", "--help"]; from nnunetv2.inference.predict_from_raw_data import predict_entry_point as f; f()']})
ALONE = ('large', 'growth', 'fast', 'many') # this package only

def compare(work, case, rounds):
    "Both sides in turn, some rounds"
    got = dict(ours=[], peer=[])
    for i in range(rounds):
        for side in got:
            if side == 'peer' and work in ALONE or any('ended' in r for r in got[side]): continue
            got[side].append(run(side, work, case))
            show = {k: round(v, 3) if isinstance(v, float) else v for k, v in got[side][-1].items()}
            print(f'{work} {case}, round {i + 1}, {side}: {show}', flush=True)
    return got | _ratio(got) | _difference(work, case)

def _ratio(got):
    "Ratio of the medians, its spread over the rounds, ratios of the memory of the process and of what the work adds to it"
    seconds = {k: [r['seconds'] for r in v if 'seconds' in r] for k, v in got.items()}
    res = {}
    if all(seconds.values()):
        each = [b / a for a, b in zip(seconds['ours'], seconds['peer'])]
        res = dict(ratio=statistics.median(seconds['peer']) / statistics.median(seconds['ours']), spread=[min(each), max(each)])
    for what in ('memory', 'added'):
        used = {k: [r[what] for r in v if what in r] for k, v in got.items()}
        if all(used.values()): res[f'{what}_ratio'] = statistics.median(used['ours']) / statistics.median(used['peer'])
    return res

def _difference(work, case):
    "How far apart the two results are"
    kept = dict(resample='resampled', logits='labels').get(work)
    both = [FOLDER/f'{kept}_{case}_{side}.npy' for side in ('ours', 'peer')]
    if not all(f.exists() for f in both): return {}
    a, b = map(np.load, both)
    if work == 'logits': return dict(same=float(np.mean(a == b)))
    x = np.load(FOLDER/'ct.npy', mmap_mode='r')
    a = a.clip(x.min(), x.max()) # nnU-Net cuts values off that the spline has made smaller or larger than any in the image
    return dict(difference=float(np.abs(a - b).max() / x.std()))

def measure(work, cases, rounds, got):
    "One case after the other; `got` is what there is so far, and comes back with each one more"
    for c in cases:
        got = got | {c: compare(work, c, rounds)}
        yield got

def curves(work, cases, got, own):
    "The same for Dice against minutes, for which each side has cases of its own"
    got = dict(ours=[], peer=[]) | got
    for name in cases:
        side = 'ours' if name in own else 'peer'
        point = dict(case=name) | run(side, work, name); print(work, side, point, flush=True)
        got = got | {side: sorted([r for r in got[side] if r['case'] != name] + [point], key=lambda r: r.get('seconds', r['case']))}
        yield got

def minutes_ratios(got):
    "Set → nnU-Net's minutes, and ours for at least the same Dice, for every length of its training that ours reaches"
    from inputs import BUDGET, PEER_BUDGET
    res, better = {}, {}
    for r in got['peer']:
        name, minutes, _ = PEER_BUDGET[r['case']]
        better[name, minutes] = max(r['dice'], better.get((name, minutes), 0))
    for (name, minutes), dice in sorted(better.items()):
        own = [r['minutes'] for r in got['ours'] if BUDGET[r['case']][0] == name and r['dice'] >= dice]
        if own: res.setdefault(name, []).append(dict(peer=minutes, ours=min(own), dice=dice))
    return res

def chosen(work, cases, asked):
    "The cases of a work that were asked for"
    if not asked: return cases
    if some := [c for c in cases if c in asked]: return some
    raise SystemExit(f'bench: {work} has no such case; it has {", ".join(cases)}')

def kept(work, old, asked, any_day=False):
    "Results of the cases that were not asked for: only those of the same machine and versions stand beside new ones, and of the same day where sides are compared case by case"
    if not asked or not old: return {}
    same = lambda m: {k: v for k, v in m.items() if k != 'date' or not any_day}
    if same(old['machine']) != same(machine()): raise SystemExit(f'bench: the other results of {work} are of another day, machine or version; measure all its cases')
    return old['cases']

def _last_time(result):
    "How long a work took when it was measured last"
    sides = [result['cases']] if 'ours' in result['cases'] else result['cases'].values()
    return f'{sum(r["wall"] for c in sides for side in ("ours", "peer") for r in c[side]) / 60:.0f} minutes the last time'

def machine():
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    from importlib.metadata import version
    return dict(cpu=cpu, cores=os.cpu_count(), memory_gb=round(psutil.virtual_memory().total / 2**30), system=platform.platform(), python=platform.python_version(),
                versions={'nnunetv2': VERSION} | {k: version(k) for k in ('autounet_nb', 'torch', 'numpy', 'scipy', 'fastai', 'SimpleITK')}, date=datetime.date.today().isoformat())

def install():
    "nnU-Net in an environment of its own"
    if PEER.exists(): return
    print(f'installing nnunetv2=={VERSION} into {PEER.parents[1]}', flush=True)
    subprocess.run([sys.executable, '-m', 'venv', PEER.parents[1]], check=True)
    subprocess.run([PEER, '-m', 'pip', 'install', '-q', f'nnunetv2=={VERSION}'], check=True)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', default='', help='names of works, separated by commas')
    p.add_argument('--cases', default='', help='only these cases, separated by commas; results of the others, if of the same day, stay')
    p.add_argument('--data', type=Path, default=HERE.parent/'data', help='folder with Task04_Hippocampus and Dataset101_OpenKBP')
    a = p.parse_args()
    sys.path.insert(0, str(HERE))
    from inputs import BUDGET, TIMES
    own = dict(learn=TIMES, budget=BUDGET) # works of which each side has cases of its own
    todo, known = works(), json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    asked = {c for c in a.cases.split(',') if c}
    names = [n for n in a.only.split(',') if n] or list(todo)
    if wrong := [n for n in names if n not in todo]: raise SystemExit(f'bench: there is no work {wrong[0]!r}; there are {", ".join(todo)}')
    FOLDER.mkdir(exist_ok=True); install()
    print('; '.join(f'{n}: {_last_time(known[n]) if n in known else "time unknown"}' for n in names), flush=True)
    for name in names:
        title, goal, cases, rounds, needs = todo[name]
        try:
            for need in needs: need(a.data)
        except FileNotFoundError as e: print(f'bench: {name} is left out: {e}'); continue
        some, others = chosen(name, cases, asked), kept(name, known.get(name), asked, name in own)
        for got in curves(name, some, others, own[name]) if name in own else measure(name, some, rounds, others):
            known[name] = dict(title=title, goal=goal, machine=machine(), cases=got)
            write(RESULTS, known)
        if name == 'budget':
            for k, pairs in minutes_ratios(known[name]['cases']).items(): print(f'{k}: ' + ', '.join(f'{p["peer"]} minutes of nnU-Net are reached in {p["ours"]}: {p["peer"] / p["ours"]:.1f}×' for p in pairs))
    print(f'results: {RESULTS}')

if __name__ == '__main__': main()
