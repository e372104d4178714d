"The fingerprint: its numbers against those of all values together, what is measured again, and what a file may hold."
import json, math, os, shutil
import numpy as np, pytest, SimpleITK as sitk
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.data.cases import read_case
from autounet_nb.data.find import scan
from autounet_nb.data.images import write_like
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.planning import measure
from autounet_nb.planning.fingerprint import Fingerprint, extract_fingerprint
from autounet_nb.planning.measure import fingerprint_case, key_of_files, nonzero_box

KEYS = ['version', 'name', 'dim', 'modalities', 'labels', 'cases', 'intensities', 'class_voxels', 'one_component']
BOUND = 2.**-14
few = settings(max_examples=60, deadline=None)

# --- a dataset

@pytest.fixture(scope='module')
def heads(tmp_path_factory): return make_phantoms(tmp_path_factory.mktemp('in a folder')/'heads', n=5, shape=(12, 30, 26), skull_stripped=True, seed=3)

def copy(dataset, folder): return make_phantoms(folder/'heads', n=5, shape=(12, 30, 26), skull_stripped=True, seed=3)

def change(case, f):
    s = read_case(case)
    write_like(f(s.label), s.geometry, case.label)

def measured(monkeypatch):
    "The ids of the cases that are really read"
    seen, real = [], measure.measure_case
    monkeypatch.setattr(measure, 'measure_case', lambda c: (seen.append(c.id), real(c))[1])
    return seen

def test_json_has_exactly_the_stated_fields(heads, tmp_path):
    fp = extract_fingerprint(heads, tmp_path, workers=1)
    text = (tmp_path/'fingerprint.json').read_text()
    d = json.loads(text)
    assert list(d) == KEYS
    assert {tuple(c) for c in d['cases']} == {('id', 'shape', 'spacing', 'cropped_shape')}
    assert {tuple(c) for c in d['intensities']} == {('mean', 'sd', 'p00_5', 'p50', 'p99_5', 'min', 'max')}
    assert d['name'] == 'heads' and d['modalities'] == ['MRI'] and d['labels'] == {'background': 0, 'organ': 1, 'lesion': 2}
    assert set(d['class_voxels']) == set(d['one_component']) == {'organ', 'lesion'}
    for p in (heads.root, str(tmp_path), 'folder', '.nii', '/', os.sep): assert p not in text
    assert Fingerprint.load(tmp_path/'fingerprint.json') == fp

def test_numbers_are_those_of_all_values_together(heads):
    fp, xs, boxes = extract_fingerprint(heads, workers=1), [], []
    for c in heads:
        s = read_case(c)
        at = np.nonzero(s.image[0])
        box = tuple(slice(i.min(), i.max() + 1) for i in at)
        xs.append(s.image[0][box][s.label[box] > 0]); boxes.append([b.stop - b.start for b in box])
    x, i = np.concatenate(xs).astype(float), fp.intensities[0]
    assert [c['cropped_shape'] for c in fp.cases] == boxes
    assert [i[k] for k in ('p00_5', 'p50', 'p99_5', 'min', 'max')] == pytest.approx([*np.percentile(x, [.5, 50, 99.5]), x.min(), x.max()], rel=1e-12)
    assert (i['mean'], i['sd']) == (pytest.approx(x.mean()), pytest.approx(x.std()))
    assert fp.class_voxels == {n: sum(int((read_case(c).label == v).sum()) for c in heads) for n, v in (('organ', 1), ('lesion', 2))}
    assert fp.size_ratio == pytest.approx(np.mean([np.prod(b) for b in boxes])/np.mean([np.prod(c['shape']) for c in fp.cases]))

def test_several_processes_give_the_same_to_the_last_digit(heads):
    assert extract_fingerprint(heads, workers=2) == extract_fingerprint(heads, workers=1)

def test_only_what_changed_is_measured_again(heads, tmp_path, monkeypatch):
    ds, seen = copy(heads, tmp_path), measured(monkeypatch)
    first = extract_fingerprint(ds, tmp_path/'work', workers=1)
    assert sorted(seen) == [c.id for c in ds]
    seen.clear()
    assert extract_fingerprint(ds, tmp_path/'work', workers=1) == first and seen == []
    change(ds[2], lambda y: np.where(y == 2, 1, y))
    assert extract_fingerprint(ds, tmp_path/'work', workers=1) == extract_fingerprint(ds, workers=1) != first
    assert seen[0] == ds[2].id and len(seen) == 1 + len(ds)
    seen.clear()
    os.utime(ds[0].images[0], (1, 1))
    extract_fingerprint(ds, tmp_path/'work', workers=1)
    assert seen == [ds[0].id]

def test_facts_of_another_file_are_not_taken(heads, tmp_path, monkeypatch):
    fingerprint_case(heads[0], tmp_path)
    seen = measured(monkeypatch)
    other = replace(heads[1], id=heads[0].id)
    assert fingerprint_case(other, tmp_path).voxels == measure.measure_case(heads[1]).voxels and seen == [heads[0].id, heads[1].id]
    twin = shutil.copy2(heads[0].label, tmp_path/'twin.nii.gz') # same size, same time, another place
    assert key_of_files(replace(heads[0], label=twin)) != key_of_files(heads[0])

def test_after_an_interruption_the_rest_is_measured(heads, tmp_path, monkeypatch):
    ds = copy(heads, tmp_path)
    broken, good = ds[3].images[0], open(ds[3].images[0], 'rb').read()
    open(broken, 'wb').write(good[:200])
    with pytest.raises(InputError, match=f'1 of 5 cases cannot be used:\ncase {ds[3].id}: '): extract_fingerprint(ds, tmp_path/'work', workers=1)
    assert not (tmp_path/'work'/'fingerprint.json').exists()
    open(broken, 'wb').write(good)
    seen = measured(monkeypatch)
    extract_fingerprint(ds, tmp_path/'work', workers=1)
    assert seen == [ds[3].id]

def test_one_component(heads, tmp_path):
    ds = copy(heads, tmp_path)
    def apart(y): # two more voxels of class 2, in opposite corners
        y = y.copy(); y[0, 0, 0] = y[-1, -1, -1] = 2
        return y
    one = lambda: extract_fingerprint(scan(ds.root), workers=1).one_component
    assert one() == {'organ': True, 'lesion': True}
    change(ds[1], lambda y: np.where(y == 2, 1, y)) # a case without the class says nothing
    assert one() == {'organ': True, 'lesion': True}
    change(ds[2], lambda y: y*0) # neither does one without any
    assert one() == {'organ': True, 'lesion': True}
    s = read_case(ds[3])
    z, y, x = (i.start for i in nonzero_box(s.image))
    lab = s.label.copy(); lab[z:z + 2, y:y + 2, x:x + 2] = 2; lab[nonzero_box(s.image)][-2:, -2:, -2:] = 2
    write_like(lab, s.geometry, ds[3].label)
    assert one() == {'organ': True, 'lesion': False}
    for c in ds: change(c, lambda y: np.where(y == 2, 1, y)) # nor can a class that is never there be promised
    fp = extract_fingerprint(scan(ds.root), workers=1)
    assert fp.one_component['lesion'] is False and fp.class_voxels['lesion'] == 0
    for c in ds: change(c, lambda y: y*0)
    with pytest.raises(InputError, match='all 5 masks are empty'): extract_fingerprint(ds, workers=1)

def test_a_mask_beyond_the_box_is_not_called_empty(heads, tmp_path):
    ds = copy(heads, tmp_path)
    def corner(y): y = y*0; y[0, 0, 0] = 1; return y
    for c in ds: change(c, corner)
    for _ in range(2): # measured, and recalled
        with pytest.raises(InputError, match='heads: in 5 of 5 cases the foreground of the mask lies where the image is zero'): extract_fingerprint(ds, tmp_path/'work', workers=1)
    for c in ds: change(c, lambda y: y*0)
    with pytest.raises(InputError, match='all 5 masks are empty'): extract_fingerprint(ds, tmp_path/'work', workers=1)

def test_wrong_values_and_channels_name_all_cases(heads, tmp_path):
    ds = copy(heads, tmp_path)
    for i, v in ((0, 7), (4, 300)): change(ds[i], lambda y: np.where(y == 2, v, y.astype(np.uint16)))
    with pytest.raises(InputError) as e: extract_fingerprint(ds, workers=1)
    lines = str(e.value).splitlines()
    assert lines[0] == 'heads: 2 of 5 cases cannot be used:'
    assert lines[1].startswith(f'case {ds[0].id}: ') and 'the value 7' in lines[1] and ds[0].label in lines[1]
    assert lines[2].startswith(f'case {ds[4].id}: ') and 'the value 300' in lines[2]
    named = replace(ds, labels={**ds.labels, 'x': 7, 'y': 300})
    assert extract_fingerprint(named, workers=1).class_voxels['x'] > 0
    with pytest.raises(InputError, match='phantom_001: the image has 1 channels, the dataset has 2'): extract_fingerprint(replace(named, modalities=('a', 'b')), workers=1)
    two = make_phantoms(tmp_path/'two', n=1, channels=2, shape=(12, 30, 26))
    mixed = replace(named, modalities=(), cases=(*named.cases, replace(two[0], id='phantom_009')))
    with pytest.raises(InputError, match='case phantom_009: the image has 2 channels, the dataset has 1'): extract_fingerprint(mixed, workers=1)

def test_not_a_number_under_the_mask(tmp_path, monkeypatch):
    ds = make_phantoms(tmp_path/'d', n=2, shape=(12, 30, 26))
    real = measure.read_case
    def broken(case):
        s = real(case); s.image[0][s.label > 0] = np.nan
        return s
    monkeypatch.setattr(measure, 'read_case', broken)
    with pytest.raises(InputError, match='case phantom_001: under the mask, .* infinite or not a number; repair the image'): extract_fingerprint(ds, workers=1)

def test_a_value_that_no_mask_can_be_written_with(heads, tmp_path):
    ds, s = copy(heads, tmp_path), read_case(heads[0])
    path = tmp_path/'large.nrrd'
    im = sitk.GetImageFromArray(s.label.astype(np.uint32)*70000)
    im.CopyInformation(sitk.ReadImage(heads[0].label)); sitk.WriteImage(im, str(path))
    with pytest.raises(InputError, match='holds values from 0 to 140000; use 0 for the background and whole numbers up to 65535'): extract_fingerprint(replace(ds, cases=(replace(ds[0], label=str(path)),)), workers=1)

def test_case_without_a_mask(heads):
    with pytest.raises(InputError, match=f'case {heads[0].id}: it has no mask'): extract_fingerprint(replace(heads, cases=(replace(heads[0], label=None),)), workers=1)

def test_a_fault_of_the_program_is_not_called_bad_data(heads, monkeypatch):
    def fault(case): raise ZeroDivisionError('ours')
    monkeypatch.setattr(measure, 'measure_case', fault)
    with pytest.raises(ZeroDivisionError): extract_fingerprint(heads, workers=1)

def test_pictures(tmp_path):
    ds = make_phantoms(tmp_path/'pictures', n=4, dim=2, shape=(40, 36), channels=3, layout='pairs')
    fp = extract_fingerprint(ds, workers=1)
    assert fp.dim == 2 and fp.labels == {'background': 0, 'class_1': 1, 'class_2': 2} and len(fp.intensities) == len(fp.modalities) == 3
    assert all(c['shape'][0] == c['cropped_shape'][0] == 1 and len(c['spacing']) == 3 for c in fp.cases)
    assert extract_fingerprint(replace(ds, modalities=()), workers=1).modalities == ['R', 'G', 'B']
    thick = make_phantoms(tmp_path/'scans', n=1, shape=(12, 40, 36))
    one = replace(ds, modalities=('x',), cases=(thick[0],))
    assert extract_fingerprint(one, workers=1).dim == 3

def test_anonymous(heads, tmp_path):
    fp = extract_fingerprint(heads, tmp_path, workers=1, anonymous=True)
    assert [c['id'] for c in fp.cases] == [f'case_{i:03}' for i in range(1, 6)]
    assert 'phantom' not in (tmp_path/'fingerprint.json').read_text()
    assert replace(fp, cases=[]) == replace(extract_fingerprint(heads, tmp_path, workers=1), cases=[])

def sketch(cases, **kw):
    stats = dict(mean=1., sd=1., p00_5=0., p50=1., p99_5=2., min=0., max=2.)
    cases = [dict(id=str(i), shape=list(sh), spacing=list(sp), cropped_shape=list(cr)) for i, (sh, sp, cr) in enumerate(cases)]
    return Fingerprint(**{**dict(version=1, name='n', dim=3, modalities=['MRI'], labels={'background': 0, 'a': 1}, cases=cases, intensities=[stats], class_voxels={'a': 1}, one_component={'a': True}), **kw})

triple = lambda e: st.tuples(e, e, e)
@few
@given(st.lists(st.tuples(triple(st.integers(20, 90)), triple(st.floats(.2, 5)), triple(st.integers(1, 20))), min_size=1, max_size=7))
def test_properties(cases):
    fp = sketch(cases)
    assert fp.n == len(cases)
    assert fp.median_spacing == tuple(np.median([c[1] for c in cases], axis=0))
    for got, (_, sp, cr) in zip(fp.shapes_at((1, 2, 3)), cases): assert got == tuple(max(1, math.floor(n*s/t + .5)) for n, s, t in zip(cr, sp, (1, 2, 3)))
    at = np.median(fp.shapes_at(fp.median_spacing), axis=0)
    assert all(abs(a - b) <= .5 for a, b in zip(fp.median_shape, at))
    assert fp.size_ratio == pytest.approx(np.mean([np.prod(c[2]) for c in cases])/np.mean([np.prod(c[0]) for c in cases]))
    assert 0 < fp.size_ratio <= 1

CASE = dict(id='a', shape=[9, 9, 9], spacing=[1, 1, 1], cropped_shape=[9, 9, 9])
STATS = dict(mean=1., sd=1., p00_5=0., p50=1., p99_5=2., min=0., max=2.)

@pytest.mark.parametrize('change,word', [
    (dict(version=2), 'version 2'), (dict(extra=1), 'this is not a fingerprint'), (dict(cases=[]), 'lists no case'), (dict(modalities=['a', 'b']), 'describes 1 channels and names 2'),
    (dict(cases=[dict(id='a')]), r"cases\[0\] lacks 'cropped_shape'"), (dict(cases=['a']), r"cases\[0\] is 'a' instead"), (dict(cases=[CASE | dict(spacing=[1, -1, 1])]), r'spacing\[1\] is -1'),
    (dict(cases=[CASE | dict(spacing=[1, 'x', 1])]), r"spacing\[1\] is 'x'"), (dict(cases=[CASE | dict(shape=[1, 2])]), r'shape is \[1, 2\] instead of a list of 3'), (dict(cases=[CASE | dict(id=5)]), 'id is 5'),
    (dict(modalities=5), 'modalities is 5'), (dict(cases=[CASE | dict(shape=[1e300, 9, 9])]), r'shape\[0\] is 1e\+300 instead of a whole'), (dict(cases=[CASE | dict(shape=[9., 9, 9])]), r'shape\[0\] is 9.0'),
    (dict(cases=[CASE | dict(cropped_shape=[1, 1, 10**9])]), r'cropped_shape\[2\] is 1000000000'), (dict(cases=[CASE | dict(cropped_shape=[9, 9, 10])]), 'more than its shape'), (dict(cases=[CASE | dict(spacing=[1, 1, 1e5])]), r'spacing\[2\]'),
    (dict(intensities=[STATS | dict(mean='a')]), r"mean is 'a'"), (dict(intensities=[STATS | dict(sd=-1)]), 'sd is -1'), (dict(intensities=[STATS | dict(p99_5=-1)]), 'do not ascend'), (dict(intensities=[]), 'describes 0 channels'),
    (dict(labels={'background': 0, 'a': '1'}), r"labels\['a'\] is '1'"), (dict(labels={'background': 0, 'a': 1, 'b': 1}), 'values of their own'), (dict(labels={'a': 1}), 'a background of 0'), (dict(labels={'background': 0}), 'a background of 0'),
    (dict(one_component={'b': True}), r"one_component has the classes \['b'\]"), (dict(one_component={'a': 1}), 'true or false'), (dict(class_voxels={}), 'class_voxels has the classes'), (dict(dim=2), 'dim is 2'), (dict(version=True), 'version is True'),
    (dict(dim=2.), r'dim is 2.0'), (dict(modalities=[], intensities=[]), 'lists no channel'), (dict(name='x'*10**5), 'name is'),
    (dict(modalities=['a']*1001, intensities=[STATS]*1001), 'more than 1000'), (dict(labels={'background': 0, 'a': 65536}), r"labels\['a'\] is 65536")])
def test_a_file_that_is_no_fingerprint(change, word, tmp_path):
    p = tmp_path/'f.json'
    sketch([((9, 9, 9), (1, 1, 1), (9, 9, 9))]).save(p)
    assert Fingerprint.load(p).n == 1
    p.write_text(json.dumps({**json.loads(p.read_text()), **change}))
    with pytest.raises(InputError, match=word) as e: Fingerprint.load(p)
    assert str(p) in str(e.value) and len(str(e.value)) < 400 and '\n' not in str(e.value)

def test_shown(heads):
    fp = extract_fingerprint(replace(heads, labels={'background': 0, 'a<b>': 1, 'lesion': 2}), workers=1)
    for s in (repr(fp), fp._repr_html_()):
        for w in ('5, 3D', 'MRI', 'lesion', 'one component', ' mm'): assert w in s
    assert 'a<b>' in repr(fp) and 'a<b>' not in fp._repr_html_() and 'a&lt;b&gt;' in fp._repr_html_()

@pytest.mark.parametrize('name', ['sarcoma_mr', 'sarcoma_ct', 'nuclei2d'])
def test_real_values(name, real_data):
    ds = scan(real_data/name)
    fp, xs = extract_fingerprint(ds, workers=1), [[] for _ in ds.modalities]
    for s in map(read_case, ds):
        for c, x in zip(s.image, xs): x.append(c[s.label > 0])
    for i, x in zip(fp.intensities, xs):
        x = np.concatenate(x).astype(float)
        assert [i[k] for k in ('p00_5', 'p50', 'p99_5')] == pytest.approx(np.percentile(x, [.5, 50, 99.5]), rel=BOUND)
        assert (i['mean'], i['sd'], i['min'], i['max']) == pytest.approx((x.mean(), x.std(), x.min(), x.max()))
