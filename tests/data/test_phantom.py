"Generated scans: what the options promise, over many seeds."
import hashlib
import cc3d, numpy as np, pytest
from pathlib import Path
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.data.cases import read_case
from autounet_nb.data.phantom import make_phantoms, phantom

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)

def n_parts(mask): return cc3d.connected_components(mask, connectivity=26, return_N=True)[1]

@few
@given(seeds, st.integers(1, 6), st.integers(1, 3), st.sampled_from(['MRI', 'CT']), st.booleans())
def test_every_class_is_there(seed, classes, lesions, modality, stripped):
    x, y = phantom(classes=classes, lesions=lesions, modality=modality, skull_stripped=stripped, rng=seed)
    assert x.dtype == np.float32 and y.dtype == np.uint8 and x.shape[1:] == y.shape == (32, 48, 40)
    assert np.isfinite(x).all() and np.array_equal(x, np.rint(x))
    assert sorted(np.unique(y)) == list(range(classes + 1))
    if classes > 1: assert n_parts(y == 2) == lesions
    if modality == 'MRI': assert x.min() >= 0
    else: assert x.min() < -900 and 200 < x.max() < 700

@few
@given(seeds, st.sampled_from([(32, 48, 40), (12, 64, 64), (1, 80, 72)]), st.sampled_from(['MRI', 'CT']))
def test_organ_and_lesion_are_one_piece(seed, shape, modality):
    _, y = phantom(shape, modality=modality, rng=seed)
    assert n_parts(y == 1) == n_parts(y == 2) == n_parts(y > 0) == 1
    assert .005 < (y > 0).mean() < .25 and (y == 2).sum() >= 20

@few
@given(seeds)
def test_stripped_is_zero_outside_and_nowhere_inside(seed):
    x, y = phantom(skull_stripped=True, channels=2, rng=seed)
    assert np.array_equal(x[0] == 0, x[1] == 0) and n_parts(x[0] > 0) == 1
    assert (x[0] == 0).mean() > .5 and (x[0][y > 0] > 0).all()
    box = np.prod([np.ptp(i) + 1 for i in np.nonzero(x[0])])
    assert box/y.size < .75, 'cropping must remove more than a quarter'

def test_whole_scans_have_nothing_to_crop():
    for seed in range(5):
        assert (phantom(rng=seed)[0] == 0).mean() < .05
        assert (phantom(modality='CT', rng=seed)[0] == 0).mean() < .05

def test_scale_of_mri_is_arbitrary_and_that_of_ct_is_not():
    mri = [np.percentile(phantom(rng=i)[0], 99) for i in range(30)]
    ct = [phantom(modality='CT', rng=i) for i in range(10)]
    assert max(mri)/min(mri) > 5
    for x, y in ct: assert 80 < np.median(x[0][y == 1]) < 120 and 25 < np.median(x[0][y == 2]) < 65

def test_channels_show_one_anatomy():
    x, y = phantom(channels=3, rng=1)
    assert len(x) == 3 and np.abs(np.corrcoef(x.reshape(3, -1)) - np.eye(3)).max() < .99
    contrast = [np.median(c[y == 2])/np.median(c[y == 1]) for c in x]
    assert contrast[0] > 1.2 and contrast[1] < 1
    assert phantom(modality=('CT', 'PET'), rng=1)[0].min((1, 2, 3)).tolist()[1] >= 0

def test_seed():
    a, b, c = phantom(rng=5), phantom(rng=np.random.default_rng(5)), phantom(rng=6)
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and not np.array_equal(a[1], c[1])

def test_cases_differ():
    ys = [phantom(rng=i)[1] > 0 for i in range(8)]
    dice = [2*(a & b).sum()/(a.sum() + b.sum()) for i, a in enumerate(ys) for b in ys[:i]]
    assert np.mean(dice) < .6, 'always the same place'
    assert max(y.sum() for y in ys)/min(y.sum() for y in ys) > 1.2

def best_dice(x, y):
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 300)))
    every, hit = (np.append(0, np.cumsum(np.histogram(v, edges)[0])) for v in (x, x[y]))
    tp, n = hit[None] - hit[:, None], every[None] - every[:, None]
    return (2*tp/np.maximum(n + y.sum(), 1)).max()

@pytest.mark.parametrize('modality', ['MRI', 'CT'])
def test_no_threshold_solves_it(modality):
    "Not even the best pair of thresholds for each case and class, chosen with the mask in hand"
    scores = [[best_dice(x[0], y == k) for k in (1, 2)] for x, y in (phantom(modality=modality, rng=i) for i in range(15))]
    assert np.mean(scores) < .62

# --- on disk

def tree(folder): return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

@pytest.mark.parametrize('kw,files,layout', [
    (dict(), ['imagesTr/phantom_001.nii.gz', 'labelsTr/phantom_001.nii.gz', 'dataset.json'], 'decathlon'),
    (dict(channels=2), ['imagesTr/phantom_001.nii.gz', 'labelsTr/phantom_001.nii.gz', 'dataset.json'], 'decathlon'),
    (dict(channels=2, layout='nnunet'), ['imagesTr/phantom_001_0000.nii.gz', 'imagesTr/phantom_001_0001.nii.gz', 'labelsTr/phantom_001.nii.gz', 'dataset.json'], 'nnunet'),
    (dict(modality=('CT', 'PET'), layout='nnunet', suffix='.nrrd'), ['imagesTr/phantom_001_0001.nrrd', 'labelsTr/phantom_001.nrrd'], 'nnunet'),
    (dict(layout='pairs'), ['images/phantom_001.nii.gz', 'labels/phantom_001.nii.gz'], 'pairs'),
    (dict(dim=2), ['imagesTr/phantom_001.png', 'labelsTr/phantom_001.png', 'dataset.json'], 'decathlon'),
    (dict(dim=2, channels=3, layout='pairs'), ['images/phantom_001.png', 'labels/phantom_001.png'], 'pairs'),
    (dict(dim=2, channels=2, layout='nnunet'), ['imagesTr/phantom_001_0001.png'], 'nnunet'),
    (dict(dim=2, suffix='.nii.gz', channels=2), ['imagesTr/phantom_001.nii.gz'], 'decathlon')])
def test_layouts(kw, files, layout, tmp_path):
    ds = make_phantoms(tmp_path/'d', n=2, seed=1, **kw)
    assert len(ds) == 2 and ds.layout == layout and not ds.unpaired
    assert set(files) <= set(tree(tmp_path/'d')) and not any('tmp' in f or f.startswith('.') for f in tree(tmp_path/'d'))
    if layout != 'pairs': assert ds.labels == {'background': 0, 'organ': 1, 'lesion': 2}
    dim, channels = kw.get('dim', 3), len(kw['modality']) if 'modality' in kw else kw.get('channels', 1)
    for s in map(read_case, ds):
        assert s.geometry.ndim == dim and s.image.shape == (channels, *s.label.shape) and (s.label.shape[0] == 1) == (dim == 2)
        assert set(np.unique(s.label)) == {0, 1, 2}
    if kw.get('suffix', '.nii.gz') != '.png' and dim == 3: assert any(o != 0 for o in s.geometry.origin), 'a place in the room'
    assert tree(make_phantoms(tmp_path/'e'/'d', n=2, seed=1, **kw).root) == tree(tmp_path/'d')

def test_files_hold_the_voxels(tmp_path):
    ds = make_phantoms(tmp_path/'d', n=1, shape=(20, 30, 28), jitter=0, seed=4)
    x, y = phantom((20, 30, 28), rng=next(iter(_draws(4))))
    s = read_case(ds[0])
    assert np.array_equal(s.image, x) and np.array_equal(s.label, y)

def _draws(seed):
    "The generator of the first case, after its shape and spacing were drawn"
    rng = np.random.default_rng(seed).spawn(1)[0]
    rng.uniform(size=3); rng.uniform(size=2)
    yield rng

def test_jitter(tmp_path):
    kw = dict(n=12, shape=(20, 30, 28), spacing=(3, .8, .8))
    still = [read_case(c).geometry for c in make_phantoms(tmp_path/'a', jitter=0, **kw)]
    moved = [read_case(c).geometry for c in make_phantoms(tmp_path/'b', jitter=.2, **kw)]
    assert {g.shape for g in still} == {(20, 30, 28)} and all(g.spacing == pytest.approx((3, .8, .8)) for g in still)
    assert len({g.shape for g in moved}) > 6
    for g in moved:
        assert all(.79*n - 1 <= m <= 1.21*n + 1 for m, n in zip(g.shape, (20, 30, 28))) and g.spacing[1] == g.spacing[2]
        assert all(.79*n <= m <= 1.21*n for m, n in zip(g.spacing, (3, .8, .8)))

def test_what_cannot_be_written(tmp_path):
    for kw, word in ((dict(dim=4), 'dim is 4'), (dict(layout='x'), "layout 'x'"),
                     (dict(dim=2, channels=2), 'a .png cannot hold 2D images of 2 channels'), (dict(suffix='.png'), 'a .png cannot hold 3D'),
                     (dict(classes=0), 'classes is 0'), (dict(lesions=4), 'lesions is 4')):
        with pytest.raises(InputError, match=word): make_phantoms(tmp_path/'d', n=1, **kw)
        assert not (tmp_path/'d').exists()
    with pytest.raises(TypeError, match='knots'): make_phantoms(tmp_path/'d', knots=3)
    with pytest.raises(TypeError, match='jitter'): phantom(jitter=.1) # of a dataset, not of one scan
    make_phantoms(tmp_path/'d', n=3, shape=(12, 30, 26)); make_phantoms(tmp_path/'d', n=3, shape=(12, 30, 26))
    with pytest.raises(InputError, match='already holds phantom_003'): make_phantoms(tmp_path/'d', n=2)
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'scan.nii.gz').write_bytes(b'')
    with pytest.raises(InputError, match='already holds scan.nii.gz'): make_phantoms(tmp_path/'mine')
    assert tree(tmp_path/'mine') == {'scan.nii.gz': hashlib.sha1(b'').hexdigest()}

# --- imports

def test_importing_needs_no_matplotlib():
    import subprocess, sys
    code = "import sys, autounet_nb.data.phantom, autounet_nb.planning.fingerprint, autounet_nb.viz.scan; sys.exit(any(m in sys.modules for m in ('matplotlib.pyplot', 'torch', 'fastai')))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
