"Every way in which a dataset can be wrong, and that a healthy one passes."
import json, shutil
import numpy as np, pytest, SimpleITK as sitk
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.core.files import read_json, write_json
from autounet_nb.data.case_rules import Problem
from autounet_nb.data.check import Report, check
from autounet_nb.data.find import scan

@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    "The same kind of scans in each layout"
    root = tmp_path_factory.mktemp('healthy')
    for layout in ('decathlon', 'nnunet', 'pairs'): make_phantoms(root/layout, n=3, shape=(8, 20, 18), layout=layout)
    make_phantoms(root/'two', n=3, shape=(8, 20, 18), layout='nnunet', channels=2)
    make_phantoms(root/'four', n=3, shape=(8, 20, 18), layout='decathlon', channels=2)
    make_phantoms(root/'ct', n=3, shape=(8, 20, 18), layout='pairs', modality='CT')
    make_phantoms(root/'png', n=3, shape=(1, 32, 30), layout='pairs', dim=2)
    return root

@pytest.fixture
def broken(healthy, tmp_path):
    "Copies a dataset, breaks it, and returns (case, kind, severity) of what `check` finds"
    def run(layout, break_it, **kw):
        root = tmp_path/layout
        shutil.copytree(healthy/layout, root)
        break_it(root)
        report = check(scan(root, **kw), workers=1)
        assert report.ok == all(p.severity == 'warning' for p in report.problems)
        return [(p.case, p.kind, p.severity) for p in report.problems]
    return run

A = 'phantom_001'
IMAGE, MASK = f'imagesTr/{A}.nii.gz', f'labelsTr/{A}.nii.gz'

def edit(path, change=lambda a: a, **header):
    im = sitk.ReadImage(str(path))
    new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(im)))
    if new.GetSize() == im.GetSize(): new.CopyInformation(im)
    for k, f in header.items(): getattr(new, f'Set{k}')(f(np.array(getattr(im, f'Get{k}')())).tolist())
    sitk.WriteImage(new, str(path))

def one(v):
    def change(a): a = a.copy(); a[tuple(n//2 for n in a.shape)] = v; return a
    return change

def cut(path): path.write_bytes(path.read_bytes()[:-500])
def dead_link(path): path.unlink(); path.symlink_to('gone.nii.gz')
def half_zero(a): a = a.copy(); a[..., :a.shape[-1]//2] = 0; return a
def rim_only(a): a = a.copy(); a[..., 1:-1] = 0; return a
def labels(r, **d): write_json(r/'dataset.json', {**read_json(r/'dataset.json'), 'labels': d})
def header(path, at, value): # a number in the header of a NIfTI file, which SimpleITK would not write
    import gzip
    b = bytearray(gzip.decompress(path.read_bytes()))
    b[at:at + 4] = np.float32(value).tobytes()
    path.write_bytes(gzip.compress(bytes(b)))

@pytest.mark.parametrize('layout', ['decathlon', 'nnunet', 'pairs', 'two', 'four', 'png'])
def test_healthy(healthy, layout):
    report = check(healthy/layout, workers=1)
    assert report.ok and report.problems == ()
    assert report.to_json()['problems'] == [] and '3 cases, 0 errors, 0 warnings' in report.table()

ERRORS = {
    'truncated image': ('decathlon', lambda r: cut(r/IMAGE), 'unreadable'),
    'truncated mask': ('decathlon', lambda r: cut(r/MASK), 'unreadable'),
    'no image at all': ('decathlon', lambda r: (r/IMAGE).write_bytes(b'hello'), 'unreadable'),
    'listed, not there': ('decathlon', lambda r: [(r/p).unlink() for p in (IMAGE, MASK)], 'missing'),
    'missing mask': ('pairs', lambda r: (r/f'labels/{A}.nii.gz').unlink(), 'missing'),
    'link to no image': ('pairs', lambda r: dead_link(r/f'images/{A}.nii.gz'), 'missing'),
    'link to no mask': ('decathlon', lambda r: dead_link(r/MASK), 'missing'),
    'more than 16 bits': ('pairs', lambda r: edit(r/f'labels/{A}.nii.gz', lambda a: one(65536)(a.astype(np.uint32))), 'too-large'),
    'missing channel': ('two', lambda r: (r/f'imagesTr/{A}_0001.nii.gz').unlink(), 'missing'),
    'size': ('decathlon', lambda r: edit(r/MASK, lambda a: a[1:], Spacing=lambda v: v, Origin=lambda v: v), 'size'),
    'spacing': ('decathlon', lambda r: edit(r/MASK, Spacing=lambda v: v*1.05), 'spacing'),
    'origin': ('decathlon', lambda r: edit(r/MASK, Origin=lambda v: v + .5), 'origin'),
    'direction': ('decathlon', lambda r: edit(r/MASK, Direction=lambda v: v*[-1, 1, 1, -1, 1, 1, -1, 1, 1]), 'direction'),
    'channels': ('two', lambda r: edit(r/f'imagesTr/{A}_0001.nii.gz', Origin=lambda v: v + 2), 'channels'),
    'channel of another size': ('two', lambda r: edit(r/f'imagesTr/{A}_0001.nii.gz', lambda a: a[:, 1:]), 'channels'),
    '4D': ('decathlon', lambda r: sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(r/IMAGE))]*4), str(r/IMAGE)), 'dimensions'),
    '3D for two channels': ('four', lambda r: sitk.WriteImage(sitk.ReadImage(str(r/IMAGE))[..., 0], str(r/IMAGE)), 'dimensions'),
    '4D among channels': ('two', lambda r: (p := str(r/f'imagesTr/{A}_0000.nii.gz'), sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(p)]*2), p)), 'dimensions'),
    'broken values': ('decathlon', lambda r: edit(r/MASK, lambda a: a*.5), 'not-whole'),
    'unlisted value': ('decathlon', lambda r: edit(r/MASK, one(7)), 'unlisted'),
    '255 where names are given': ('decathlon', lambda r: edit(r/MASK, one(255)), 'unlisted'),
    'negative value': ('pairs', lambda r: edit(r/f'labels/{A}.nii.gz', lambda a: one(-1)(a.astype(np.int16))), 'negative'),
    'NaN': ('decathlon', lambda r: edit(r/IMAGE, lambda a: one(np.nan)(a.astype(np.float32))), 'not-finite'),
    'infinite': ('decathlon', lambda r: edit(r/IMAGE, lambda a: one(np.inf)(a.astype(np.float64))), 'not-finite'),
    'zero spacing': ('decathlon', lambda r: header(r/IMAGE, 80, 0), 'spacing'),
    'negative spacing': ('decathlon', lambda r: header(r/IMAGE, 84, -1), 'spacing'),
    'spacing in metres': ('decathlon', lambda r: [edit(r/p, Spacing=lambda v: v/1e4) for p in (IMAGE, MASK)], 'spacing'),
    'spacing of half a mile': ('decathlon', lambda r: [edit(r/p, Spacing=lambda v: v*[1, 1, 8e5]) for p in (IMAGE, MASK)], 'spacing')}

@pytest.mark.parametrize('name', ERRORS)
def test_errors(broken, name):
    layout, break_it, kind = ERRORS[name]
    assert (A, kind, 'error') in broken(layout, break_it)

def test_values_of_16_bits(broken): assert [k for _, k, _ in broken('pairs', lambda r: edit(r/f'labels/{A}.nii.gz', lambda a: one(65535)(a.astype(np.uint16))))] == ['gaps']

def test_a_class_called_id(broken):
    assert broken('nnunet', lambda r: labels(r, background=0, id=1, lesion=2)) == [('', 'name', 'error')]

def both(f): return lambda r: [f(p) for p in sorted((r/'labels').iterdir())]
WARNINGS = {
    'extra mask': ('pairs', lambda r: (r/f'images/{A}.nii.gz').unlink(), (A, 'extra')),
    'mask that the list lacks': ('decathlon', lambda r: shutil.copy(r/MASK, r/'labelsTr/more.nii.gz'), ('more', 'extra')),
    'empty mask': ('decathlon', lambda r: edit(r/MASK, np.zeros_like), (A, 'empty')),
    'constant image': ('decathlon', lambda r: edit(r/IMAGE, np.ones_like), (A, 'constant')),
    'constant channel': ('two', lambda r: edit(r/f'imagesTr/{A}_0001.nii.gz', np.zeros_like), (A, 'constant')),
    'the same scan': ('pairs', lambda r: [shutil.copy(r/f'{f}/{A}.nii.gz', r/f'{f}/zz.nii.gz') for f in ('images', 'labels')], ('zz', 'twice')),
    '0/255': ('pairs', both(lambda p: edit(p, lambda a: (255*(a > 0)).astype(np.uint8))), ('', '0/255')),
    'gaps': ('pairs', both(lambda p: edit(p, lambda a: a*2)), ('', 'gaps')),
    'no background': ('pairs', both(lambda p: edit(p, lambda a: a + 1)), ('', 'gaps')),
    'gaps in the list': ('decathlon', lambda r: write_json(r/'dataset.json', {**read_json(r/'dataset.json'), 'labels': {'0': 'background', '1': 'a', '2': 'b', '5': 'c'}}), ('', 'gaps')),
    'class that is nowhere': ('decathlon', lambda r: write_json(r/'dataset.json', {**read_json(r/'dataset.json'), 'labels': {'0': 'background', '1': 'a', '2': 'b', '3': 'c'}}), ('', 'absent')),
    'mask beside the image': ('pairs', lambda r: edit(r/f'images/{A}.nii.gz', half_zero), (A, 'cropped')),
    'fat fraction': ('nnunet', lambda r: write_json(r/'dataset.json', {**read_json(r/'dataset.json'), 'channel_names': {'0': 'fat fraction'}}), ('', 'modality')),
    'CT without a name': ('ct', lambda r: None, ('', 'modality'))}

@pytest.mark.parametrize('name', WARNINGS)
def test_warnings(broken, name):
    layout, break_it, (case, kind) = WARNINGS[name]
    found = broken(layout, break_it)
    assert (case, kind, 'warning') in found
    assert not [f for f in found if f[2] == 'error']

NO_PROBLEM = {
    'zeros inside': ('decathlon', lambda r: edit(r/IMAGE, rim_only)),
    'zeros in one channel': ('two', lambda r: edit(r/f'imagesTr/{A}_0001.nii.gz', half_zero)),
    'noise in the header': ('decathlon', lambda r: edit(r/MASK, Spacing=lambda v: v*(1 + 1e-5), Origin=lambda v: v + 1e-4, Direction=lambda v: v + [1e-7, -1e-5, 0, 1e-5, 0, 0, 0, 0, 0])),
    'mask with decimals': ('decathlon', lambda r: edit(r/MASK, lambda a: a.astype(np.float32))),
    'case without one class': ('pairs', lambda r: edit(r/f'labels/{A}.nii.gz', lambda a: np.where(a == 1, 0, a))),
    'hidden file': ('pairs', lambda r: (r/f'labels/._{A}.nii.gz').write_bytes(b'x'))}

@pytest.mark.parametrize('name', NO_PROBLEM)
def test_no_problem(broken, name): assert broken(*NO_PROBLEM[name]) == []

def test_ct_with_a_name(healthy): assert check(scan(healthy/'ct', modalities=['CT']), workers=1).problems == ()

@pytest.mark.parametrize('name', ['shifted', 'shifted and cut', 'window', 'resampled'])
def test_ct_that_is_stored_otherwise(healthy, tmp_path, name):
    change = {'shifted': lambda a: (a + 1100).astype(np.uint16), 'shifted and cut': lambda a: (a + 1024).clip(0, 1300), 'window': lambda a: a.clip(-160, 240), 'resampled': lambda a: a + np.float32(.3)}[name]
    shutil.copytree(healthy/'ct', tmp_path/'ct')
    for p in (tmp_path/'ct/images').iterdir(): edit(p, change)
    assert check(scan(tmp_path/'ct', modalities=['venous CT']), workers=1).problems == ()

def test_names_that_hold_ct_by_chance(healthy, tmp_path):
    shutil.copytree(healthy/'pairs', tmp_path/'mr')
    for scale in (1, .01, 5): # MR has no absolute scale
        for name in ('bias-corrected', 'OCT', 'Spectral'):
            p, = check(scan(tmp_path/'mr', modalities=[name]), workers=1).problems
            assert (p.kind, p.severity) == ('modality', 'warning') and name in p.message and '3 of 3 cases' in p.message and '--modalities' in p.fix
        for f in (tmp_path/'mr/images').iterdir(): edit(f, lambda a: (a*scale).astype(np.float32))
    assert check(scan(tmp_path/'mr', modalities=['T1']), workers=1).problems == ()

def test_same_scan_in_another_format(broken, healthy):
    def again(r):
        for f in ('images', 'labels'): sitk.WriteImage(sitk.ReadImage(str(r/f'{f}/{A}.nii.gz')), str(r/f'{f}/other.mha'))
    assert broken('pairs', again) == [(A, 'twice', 'warning')]

@pytest.mark.parametrize('modality', ['MRI', 'CT'])
def test_a_scan_that_was_resampled_and_rescaled(tmp_path, modality):
    data = make_phantoms(tmp_path/'scans', n=7, layout='pairs', modality=modality)
    assert [p for p in check(data, workers=1).problems if p.kind == 'alike'] == []
    im = sitk.ReadImage(data[2].images[0])
    size = [round(n*.75) for n in im.GetSize()]
    spacing = [s*n/m for s, n, m in zip(im.GetSpacing(), im.GetSize(), size)]
    origin = [o + (b - a)/2 for o, a, b in zip(im.GetOrigin(), im.GetSpacing(), spacing)]
    coarse = sitk.Resample(im, size, sitk.Transform(), sitk.sitkLinear, origin, spacing, im.GetDirection())
    sitk.WriteImage(sitk.Cast(coarse, sitk.sitkFloat32)*.5 + 3, data[6].images[0])
    sitk.WriteImage(sitk.Cast(coarse*0, sitk.sitkUInt8), data[6].label)
    p, = [p for p in check(data, workers=1).problems if p.kind == 'alike']
    assert (p.case, p.other, p.severity) == (data[6].id, data[2].id, 'warning') and '--patients' in p.fix

def test_blank_images_are_no_twins(broken):
    found = broken('pairs', lambda r: [edit(p, lambda a: np.zeros((8, 20, 18), a.dtype), Spacing=lambda v: v*0 + 1, Origin=lambda v: v*0) for p in (r/'images').iterdir()])
    assert 'twice' not in [kind for _, kind, _ in found]

def test_one_problem_of_a_kind_per_case(broken):
    def many(r):
        for c in (0, 1): edit(r/f'imagesTr/{A}_{c:04}.nii.gz', np.ones_like)
    assert broken('two', many) == [(A, 'constant', 'warning')]

def test_everything_at_once(healthy, tmp_path):
    shutil.copytree(healthy/'decathlon', tmp_path/'d')
    before = lambda: {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path/'d').rglob('*') if p.is_file()}
    cut(tmp_path/'d'/IMAGE); edit(tmp_path/'d'/MASK, one(9)); edit(tmp_path/'d/labelsTr/phantom_003.nii.gz', np.zeros_like)
    files = before()
    report = check(tmp_path/'d', workers=2)
    assert before() == files # nothing is changed
    assert [(p.case, p.kind) for p in report.problems] == [(A, 'unlisted'), (A, 'unreadable'), ('phantom_003', 'empty')] # a broken image does not hide its mask
    d = json.loads(json.dumps(report.to_json()))
    assert not d['ok'] and set(d['problems'][0]) == {'case', 'file', 'severity', 'kind', 'message', 'fix', 'other'}
    for p in report.problems:
        assert p.file.startswith(str(tmp_path)) and p.fix and p.message
        assert p.case in report.table() and p.message in report.table() and p.fix in report.table() and p.kind in report._repr_html_()
    assert 'imagesTr/phantom_001.nii.gz' in report.table() and '2 errors, 1 warning' in report.table()

def test_table_is_no_flood(healthy):
    ds = scan(healthy/'pairs')
    r = Report(ds, tuple(Problem(f'c{i}', f'{ds.root}/c{i}', 'error', 'size', 'm', 'f') for i in range(300)))
    assert r.table().count('size') == 21 and '280 more' in r.table() and len(r.to_json()['problems']) == 300

def test_unforeseen_failures_name_their_case(healthy, monkeypatch):
    import autounet_nb.data.check as module
    def fail(case, dataset): raise MemoryError('too large') if case.id == A else KeyError
    monkeypatch.setattr(module, 'check_case', fail)
    report = check(healthy/'pairs', workers=1)
    assert not report.ok and len(report.problems) == 3 and 'MemoryError: too large' in report.problems[0].message
