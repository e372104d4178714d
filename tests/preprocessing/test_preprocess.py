"Preprocessing: what it computes, what a stopped or repeated run does, and whether it can be undone."
import os, pickle, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
import blosc2, numpy as np, pytest, SimpleITK as sitk
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.data.cases import Dataset, read_case
from autounet_nb.data.find import scan
from autounet_nb.data.images import write_like
from autounet_nb.planning.fingerprint import extract_fingerprint, nonzero_mask
from autounet_nb.data.phantom import make_phantoms, phantom
from autounet_nb.planning.plan import Plan
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import sketch_fingerprint
from autounet_nb.preprocessing.preprocess import PreprocessedCase, normalize, preprocess, preprocess_case
from autounet_nb.preprocessing.resample import resample

ZSCORE, INSIDE = dict(scheme='zscore', inside_nonzero=False), dict(scheme='zscore', inside_nonzero=True)

def plan_of(dataset): return make_plan(extract_fingerprint(dataset, workers=1), 'cpu')

def a_plan(modality='MRI', cropped=1., classes=2, channels=1):
    return make_plan(sketch_fingerprint((30, 30, 30), modalities=[modality]*channels, classes=classes, cropped=cropped), 'cpu')

@pytest.fixture
def dataset(tmp_path): return make_phantoms(tmp_path/'data', n=3, shape=(16, 24, 20), seed=2)

@pytest.fixture
def plan(dataset): return plan_of(dataset)

def times(work): return {p.name: p.stat().st_mtime_ns for p in (work/'prep'/'full').iterdir()}

def changed(work, before): return {Path(k).stem.split('_label')[0].split('_points')[0] for k, t in times(work).items() if before.get(k) != t}

# what it computes

@settings(max_examples=30, deadline=None)
@given(st.floats(1e-2, 1e4), st.floats(-1e4, 1e4))
def test_zscore_is_blind_to_scale_and_shift(scale, shift):
    x = np.random.default_rng(0).normal(0, 1, (1, 6, 7, 8)).astype(np.float32)
    z = normalize((scale*x + shift).astype(np.float32), [ZSCORE])
    rounding = abs(shift)/scale*2**-22 # of the input, in units of its sd
    assert abs(z.mean()) < 1e-3 + rounding and abs(z.std() - 1) < 1e-3 + rounding
    assert np.abs(z - normalize(x, [ZSCORE])).max() < 1e-2 + 4*rounding

@settings(deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.sampled_from([ZSCORE, INSIDE, dict(scheme='ct', lower=5., upper=5., mean=5., sd=0.)]))
def test_a_constant_image_becomes_zero(value, scheme):
    x = preprocess_case(np.full((1, 5, 6, 7), value, np.float32), (1, 1, 1), replace(a_plan(), normalization=[scheme]), (.7, 1.3, 1))[0]
    assert (x == 0).all()

def test_ct_is_clipped_and_scaled_by_the_numbers_of_the_dataset():
    x = np.float32([-2000, -10, 30, 70, 4000]).reshape(1, 1, 1, 5)
    assert normalize(x, [dict(scheme='ct', lower=-10, upper=70, mean=30, sd=20)]).ravel().tolist() == [-2, -2, 0, 2, 2]

def test_large_values_and_far_means_keep_their_precision():
    x = np.random.default_rng(0).normal(30000, 20, (1, 40, 60, 60)).astype(np.float32)
    z = normalize(x, [ZSCORE])
    assert abs(z.mean(dtype=float)) < 1e-3 and abs(z.std(dtype=float) - 1) < 1e-3

def test_inside_nonzero_leaves_zero_outside():
    image, _ = phantom((16, 32, 32), skull_stripped=True, rng=1)
    box = preprocess_case(image, (1, 1, 1), a_plan(cropped=.5), (1, 1, 1))
    mask = nonzero_mask(image)[tuple(slice(*b) for b in box[2]['box'])]
    x = box[0][0]
    assert (x[~mask] == 0).all() and 0 < (~mask).mean() < 1
    assert abs(x[mask].mean()) < 1e-3 and abs(x[mask].std() - 1) < 1e-3
    finer = preprocess_case(image, (1, 1, 1), a_plan(cropped=.5), (.7, .7, .7))[0]
    assert (finer == 0).mean() == pytest.approx((~mask).mean(), abs=.02) # the mask went to the new grid, too

def test_zeros_around_a_scan_change_nothing_but_the_box():
    image, label = phantom((10, 16, 14), rng=0)
    image += 1
    wide, wide_label = np.pad(image, ((0, 0), (2, 3), (0, 4), (5, 0))), np.pad(label, ((2, 3), (0, 4), (5, 0)))
    (x, y, m), (xw, yw, mw) = (preprocess_case(i, (2, 1, 1), a_plan(), (1.5, 1.1, 1.2), l) for i, l in ((image, label), (wide, wide_label)))
    assert (x == xw).all() and (y == yw).all()
    assert mw == {**m, 'box': [[2, 12], [0, 16], [5, 19]]}

def test_order_is_crop_resample_normalise():
    "The mean is 0 and the sd is 1 on the grid that the network sees"
    image, _ = phantom((20, 30, 30), rng=0)
    x = preprocess_case(image, (1, 1, 1), a_plan(), (3, 2.5, 2.5))[0]
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3

def test_values_become_class_indices():
    image, label = phantom((8, 16, 16), rng=0)
    plan = replace(a_plan(), label_values=[0, 7, 300])
    y = preprocess_case(image, (1, 1, 1), plan, (1, 1, 1), np.choose(label, [0, 300, 7]).astype(np.int32))[1]
    assert y.dtype == np.uint8 and (y == np.choose(label, [0, 2, 1])[tuple(slice(*b) for b in preprocess_case(image, (1, 1, 1), plan, (1, 1, 1))[2]['box'])]).all()

def test_the_input_is_left_alone():
    image, label = phantom((8, 16, 16), rng=0)
    a, b = image.copy(), label.copy()
    for mm in ((1, 1, 1), (1.5, 1, 1)): preprocess_case(image, (1, 1, 1), a_plan(), mm, label)
    assert (a == image).all() and (b == label).all()

@pytest.mark.parametrize('image,label,message', [
    (np.full((1, 4, 4, 4), np.inf, np.float32), None, '64 of 64 voxels'), (np.ones((2, 4, 4, 4), np.float32), None, '1 channels'),
    (np.ones((4, 4, 4), np.float32), None, '1 channels'), (np.ones((1, 4, 4, 4), np.float32), np.ones((4, 4, 5), int), 'mask has shape'),
    (np.ones((1, 4, 4, 4), np.float32), np.full((4, 4, 4), 3), 'value 3'), (np.ones((1, 4, 4, 4), np.float32), np.full((4, 4, 4), -1), 'value -1')])
def test_what_does_not_fit_the_plan_is_refused(image, label, message):
    with pytest.raises(InputError, match=message): preprocess_case(image, (1, 1, 1), a_plan(), (1, 1, 1), label)

# what is on disk

@pytest.mark.parametrize('workers', (1, 2))
def test_files_hold_what_preprocess_case_gives(dataset, plan, tmp_path, workers):
    cases = preprocess(dataset, plan, tmp_path, workers=workers)
    assert [c.id for c in cases] == [c.id for c in dataset]
    for case, p in zip(dataset, cases):
        s = read_case(case)
        x, y, meta = preprocess_case(s.image, s.geometry.spacing, plan, plan.models['3d'].spacing, s.label)
        assert (p.image[:] == x).all() and (p.label[:] == y).all()
        assert {k: p.meta[k] for k in meta} == meta and p.geometry == s.geometry
        assert sorted(p.points) == [1, 2]
        for k, v in p.points.items():
            assert (y[tuple(v.T)] == k).all() and len(np.unique(v, axis=0)) == min(2000, (y == k).sum())
        assert (pickle.loads(pickle.dumps(p)).image[0, 3:5] == x[0, 3:5]).all()

def test_points_of_large_classes_are_2000_all_over_the_class_and_always_the_same(tmp_path):
    ds = make_phantoms(tmp_path/'data', n=2, shape=(40, 64, 56), seed=0)
    plan = plan_of(ds)
    a, b = [[c.points[1] for c in preprocess(ds, plan, tmp_path/w, workers=1)] for w in 'ab']
    for p, q, case in zip(a, b, preprocess(ds, plan, tmp_path/'a', workers=1)):
        assert len(p) == 2000 and (p == q).all()
        where = np.argwhere(case.label[:] == 1)
        assert np.abs(p.mean(0) - where.mean(0)).max() < 1

def test_single_slices_with_three_channels(tmp_path):
    ds = make_phantoms(tmp_path/'data', n=2, dim=2, channels=3, shape=(40, 50), layout='pairs', seed=0)
    plan = plan_of(ds)
    for c, s in zip(preprocess(ds, plan, tmp_path, workers=1), map(read_case, ds)):
        assert c.image.shape[:2] == (3, 1) and c.label.shape == c.image.shape[1:]
        assert (c.label[:] == _classes(s, plan)).all()

def _classes(s, plan):
    y = np.searchsorted(plan.label_values, s.label)
    return y[tuple(slice(*b) for b in preprocess_case(s.image, s.geometry.spacing, plan, s.geometry.spacing)[2]['box'])]

def test_both_stages_of_a_cascade(tmp_path):
    ds = make_phantoms(tmp_path/'data', n=2, shape=(12, 24, 20), seed=0)
    plan = plan_of(ds)
    low = replace(plan.models['3d'], name='3d_lowres', stage='lowres', spacing=tuple(2*s for s in plan.models['3d'].spacing))
    plan = replace(plan, models={**plan.models, '3d_lowres': low})
    full, half = (preprocess(ds, plan, tmp_path, stage, workers=1) for stage in ('full', 'lowres'))
    for a, b in zip(full, half):
        assert a.folder != b.folder and all(abs(n/2 - k) <= 1 for n, k in zip(a.meta['shape'], b.meta['shape']))

def test_nothing_is_unpickled(dataset, plan, tmp_path):
    case = preprocess(dataset, plan, tmp_path, workers=1)[0]
    np.savez(case.folder/f'{case.id}_points.npz', **{'1': np.array([{'any': 'object'}], object)})
    with pytest.raises(ValueError, match='allow_pickle'): PreprocessedCase(case.folder, case.id).points[1]

# again, changed, killed, bad

def test_again_does_nothing(dataset, plan, tmp_path):
    preprocess(dataset, plan, tmp_path, workers=1); before = times(tmp_path)
    plan.save(tmp_path/'plan.json')
    preprocess(Dataset.load(_saved(dataset, tmp_path)), Plan.load(tmp_path/'plan.json'), tmp_path, workers=1) # as the command line does
    assert times(tmp_path) == before

def _saved(dataset, folder): dataset.save(folder/'dataset.json'); return folder/'dataset.json'

def test_only_the_changed_case_is_redone(dataset, plan, tmp_path):
    preprocess(dataset, plan, tmp_path, workers=1); before = times(tmp_path)
    s = read_case(dataset[1])
    write_like(np.where(s.label == 2, 1, s.label), s.geometry, dataset[1].label)
    cases = preprocess(dataset, plan, tmp_path, workers=1)
    assert changed(tmp_path, before) == {dataset[1].id}
    assert cases[1].label[:].max() == 1 and cases[0].label[:].max() == 2

@pytest.mark.parametrize('change', [dict(normalization=[dict(scheme='ct', lower=0, upper=9, mean=5, sd=2)]), dict(label_values=[0, 1, 2, 3])])
def test_another_plan_redoes_all(dataset, plan, tmp_path, change):
    preprocess(dataset, plan, tmp_path, workers=1); before = times(tmp_path)
    preprocess(dataset, replace(plan, **change), tmp_path, workers=1)
    assert changed(tmp_path, before) == {c.id for c in dataset}

def test_what_does_not_matter_redoes_nothing(dataset, plan, tmp_path):
    preprocess(dataset, plan, tmp_path, workers=1); before = times(tmp_path)
    preprocess(dataset, replace(plan, hardware='gpu-12gb', reasons={}, models={k: replace(m, batch_size=m.batch_size + 1) for k, m in plan.models.items()}), tmp_path, workers=1)
    assert times(tmp_path) == before

@pytest.mark.parametrize('lost', ('.b2nd', '_label.b2nd', '_points.npz', '.json'))
def test_a_lost_file_is_made_again(dataset, plan, tmp_path, lost):
    cases = preprocess(dataset, plan, tmp_path, workers=1); x, y = cases[2].image[:], cases[2].label[:]
    (cases[2].folder/f'{cases[2].id}{lost}').unlink()
    case = preprocess(dataset, plan, tmp_path, workers=1)[2]
    assert (case.image[:] == x).all() and (case.label[:] == y).all() and case.points and case.meta

KILLED = '''
import os, signal, sys, blosc2
import autounet_nb.preprocessing.preprocess as p
from autounet_nb.data.cases import Dataset
from autounet_nb.planning.plan import Plan
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
asarray, points, calls = blosc2.asarray, p._points, []
def half(x, urlpath, **kw):
    asarray(x, urlpath=urlpath, **kw)
    calls.append(urlpath)
    if len(calls) == 4: # the mask of the second case
        with open(urlpath, 'r+b') as f: f.truncate(os.path.getsize(urlpath)//2)
        kill()
def late(y, id): return points(y, id) if id.endswith('1') else kill()
if sys.argv[2] == 'half': blosc2.asarray = half
else: p._points = late
p.preprocess(Dataset.load(sys.argv[1] + '/dataset.json'), Plan.load(sys.argv[1] + '/plan.json'), sys.argv[1], workers=1)
'''

@pytest.mark.parametrize('finished_before', (False, True))
@pytest.mark.parametrize('when', ('half', 'late'))
def test_a_killed_run_goes_on_where_it_was(dataset, plan, tmp_path, when, finished_before):
    "Killed inside a file, or between files; also where the case had been finished before and its mask was changed since"
    good = preprocess(dataset, plan, tmp_path/'good', workers=1)
    if finished_before:
        preprocess(dataset, replace(plan, label_values=[0, 1, 2, 3]), tmp_path, workers=1)
    dataset.save(tmp_path/'dataset.json'); plan.save(tmp_path/'plan.json')
    done = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path), when], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder, second = tmp_path/'prep'/'full', dataset[1].id
    assert (folder/f'{dataset[0].id}.json').exists() and not (folder/f'{second}.json').exists(), 'killed elsewhere than the test means to'
    first = (folder/f'{dataset[0].id}.json').stat().st_mtime_ns
    cases = preprocess(dataset, plan, tmp_path, workers=1)
    assert (folder/f'{dataset[0].id}.json').stat().st_mtime_ns == first
    for a, b in zip(cases, good): assert (a.image[:] == b.image[:]).all() and (a.label[:] == b.label[:]).all() and a.meta['key']['label_values'] == [0, 1, 2]

def test_no_array_is_there_by_halves(dataset, plan, tmp_path):
    dataset.save(tmp_path/'dataset.json'); plan.save(tmp_path/'plan.json')
    subprocess.run([sys.executable, '-c', KILLED, str(tmp_path), 'half'], capture_output=True)
    for p in (tmp_path/'prep'/'full').glob('[!.]*.b2nd'):
        assert blosc2.open(str(p))[:].size

@pytest.mark.parametrize('workers', (1, 2))
def test_bad_cases_are_named_and_the_others_done(tmp_path, workers):
    ds = make_phantoms(tmp_path/'data', n=5, shape=(12, 16, 14), seed=0)
    plan = plan_of(ds)
    image, s = Path(ds[0].images[0]), read_case(ds[2])
    whole = image.read_bytes(); image.write_bytes(whole[:len(whole)//2])
    write_like(np.where(s.label == 1, 17, s.label), s.geometry, ds[2].label)
    Path(ds[4].label).unlink()
    with pytest.raises(InputError) as e: preprocess(ds, plan, tmp_path, workers=workers)
    text = str(e.value)
    assert '3 of 5' in text and 'case phantom_003: the mask holds the value 17, the plan knows 0, 1, 2' in text
    assert [f'case {c.id}: ' in text for c in ds] == [True, False, True, False, True] and text.count('case phantom') == 3
    assert {p.stem for p in (tmp_path/'prep'/'full').glob('*.json')} == {ds[1].id, ds[3].id}
    before = times(tmp_path)
    image.write_bytes(whole); write_like(s.label, s.geometry, ds[2].label); write_like(read_case(ds[4], label=False).image[0] > 1e9, read_case(ds[4], label=False).geometry, ds[4].label)
    assert len(preprocess(ds, plan, tmp_path, workers=workers)) == 5
    assert changed(tmp_path, before) == {ds[0].id, ds[2].id, ds[4].id}

def test_errors_that_are_nobodys_data_are_named_too(dataset, plan, tmp_path, monkeypatch):
    import autounet_nb.preprocessing.preprocess as module
    whole = module.preprocess_case
    def out_of_memory(image, *a):
        if image.shape == read_case(dataset[1]).image.shape: raise MemoryError('no more')
        return whole(image, *a)
    monkeypatch.setattr(module, 'preprocess_case', out_of_memory)
    with pytest.raises(InputError, match=f'case {dataset[1].id}: MemoryError: no more'): preprocess(dataset, plan, tmp_path, workers=1)
    assert len(list((tmp_path/'prep'/'full').glob('*.json'))) == 2

def test_a_stage_that_the_plan_lacks_and_a_case_that_is_not_there(dataset, plan, tmp_path):
    with pytest.raises(InputError, match="stage 'lowres'"): preprocess(dataset, plan, tmp_path, 'lowres', workers=1)
    with pytest.raises(InputError, match='nobody'): assert PreprocessedCase(tmp_path, 'nobody').image
    with pytest.raises(InputError, match='nobody'): assert PreprocessedCase(tmp_path, 'nobody').meta

# and back

def there_and_back(s, plan, spacing):
    "Dice per class between a mask and itself after crop, resampling and the way back by probabilities"
    _, y, meta = preprocess_case(s.image, s.geometry.spacing, plan, spacing, s.label)
    probs = np.stack([y == k for k in range(len(plan.label_values))]).astype(np.float32)
    back = np.zeros(s.label.shape, int)
    back[tuple(slice(*b) for b in meta['box'])] = np.take(plan.label_values, resample(probs, meta['cropped_shape'], order=1).argmax(0))
    return [2*((back == v) & (s.label == v)).sum()/((back == v).sum() + (s.label == v).sum()) if (s.label == v).any() else np.nan for v in plan.label_values[1:]]

@pytest.mark.parametrize('kw', [dict(), dict(skull_stripped=True), dict(modality='CT'), dict(shape=(20, 70, 64), spacing=(3, 1, 1)), dict(dim=2, suffix='.nii.gz', shape=(80, 90))],
                         ids=['MRI', 'skull-stripped', 'CT', 'thick slices', '2D'])
def test_preprocessing_is_reversible(tmp_path, kw):
    ds = make_phantoms(tmp_path, n=3, seed=3, **{'shape': (40, 64, 56), **kw})
    plan = plan_of(ds)
    dice = [there_and_back(read_case(c), plan, plan.models['2d'].spacing) for c in ds]
    assert np.nanmean(dice, 0).min() > .95 and np.nanmin(dice) > .9, dice

ROOT = os.environ.get('AUTOUNET_TEST_DATA')
REAL = 'Task04_Hippocampus', 'Dataset101_OpenKBP', 'oasis_brains', 'sarcoma_mr', 'sarcoma_ct', 'nuclei2d'

def spacing_of(case):
    "From the header alone"
    r = sitk.ImageFileReader()
    r.SetFileName(case.images[0]); r.ReadImageInformation()
    return r.GetSpacing()[::-1] if r.GetDimension() == 3 else (1., 1., 1.)

@pytest.mark.skipif(not ROOT, reason='the environment variable AUTOUNET_TEST_DATA names no folder of real data')
@pytest.mark.parametrize('name', REAL)
def test_real_data(tmp_path, name):
    "Preprocessed without NaN, and back with a mean Dice above 0.95 for every class"
    ds = scan(Path(ROOT)/name, modalities=['CT'] if name == 'sarcoma_ct' else None)
    spacing = np.median([spacing_of(c) for c in ds], axis=0).tolist()
    ds = replace(ds, cases=tuple(list(ds)[::max(1, len(ds)//4)][:4]))
    plan = plan_of(ds)
    for c in preprocess(ds, plan, tmp_path, workers=1): assert np.isfinite(c.image[:]).all() and c.points
    dice = [there_and_back(read_case(c), plan, spacing) for c in ds]
    assert np.nanmean(dice, 0).min() > .95, dice
