"Windows, mirrors and the way back for any size; files of every kind come out on the grid of their scan."
import itertools, math, tracemalloc
import numpy as np, pytest, torch, SimpleITK as sitk
from hypothesis import given, settings, strategies as st
from torch import nn
from autounet_nb.data import Case, DataError, Geometry, read_image, read_label, write_json
from autounet_nb.plan import ModelConfig, Plan
from autounet_nb.predict import gaussian_window, keep_largest, predict, predict_case, restore, restore_probabilities, segment, sliding_window
from autounet_nb.resample import resample
from autounet_nb.restore import _slabs
from autounet_nb.train import save_tensors
from autounet_nb.unet import build_unet
from autounet_nb.windows import _along, _windows

def soft(shape, k, seed=0, sharp=1.):
    return (sharp*torch.randn(k, *shape, generator=torch.Generator().manual_seed(seed))).softmax(0).numpy()

def blobs(shape, k, seed=0): return torch.from_numpy(resample(np.log(soft((3, 4, 4), k, seed))*4, shape)).softmax(0).numpy()

class Echo(nn.Module):
    "Answers with its input, which has to be probabilities; a margin of zeros gets an even answer"
    def forward(self, x): return x.clamp(1e-9).log()

class Shift(nn.Module):
    "Looks at the next voxel along one axis, so it is another network in the mirror"
    def __init__(self, axis): super().__init__(); self.axis = axis
    def forward(self, x): return x.roll(-1, self.axis).clamp(1e-9).log()

class Calls(nn.Module):
    "Notes the shapes it is asked for"
    def __init__(self, classes): super().__init__(); self.classes, self.shapes = classes, []
    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return torch.zeros(len(x), self.classes, *x.shape[2:])

# --- windows

@given(st.integers(1, 90), st.integers(1, 48), st.sampled_from((.5, .75)))
def test_windows_cover_and_overlap(n, size, overlap):
    windows = _along(n, size, overlap)
    starts, total = [s for s, _ in windows], np.zeros(n)
    for s, w in windows:
        assert len(w) == min(n, s + size) - max(0, s) and (w > 0).all()
        total[max(0, s):s + size] += w
    assert np.abs(total - 1).max() < 1e-5
    assert all(0 < b - a <= max(1, size*(1 - overlap)) for a, b in zip(starts, starts[1:]))
    assert max(np.diff(starts), default=0) - min(np.diff(starts), default=0) <= 1 # evenly spaced
    if n > size: assert starts[0] == 0 and starts[-1] == n - size
    else: assert starts == [-((size - n)//2)]

def test_weights_are_those_of_the_gaussian_window():
    "What is divided beforehand per axis equals adding up and dividing at the end"
    shape, size = (20, 31, 9), (8, 16, 12)
    bell, total = gaussian_window(size), np.zeros(shape)
    windows = list(_windows(shape, size, .5))
    for w in windows: total[w.inside] += bell[w.part]
    for w in windows: assert np.allclose(w.weight.numpy(), bell[w.part]/total[w.inside], rtol=1e-4, atol=1e-9)

def test_gaussian_window():
    w = gaussian_window((16, 24, 9))
    z, y, x = np.mgrid[:16, :24, :9]
    want = np.exp(-.5*(((z - 7.5)/2)**2 + ((y - 11.5)/3)**2 + ((x - 4)/(9/8))**2))
    assert np.allclose(w, want, atol=1e-6)

sizes = st.tuples(*[st.integers(1, 20)]*3)

@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.booleans(), st.integers(1, 5))
def test_a_network_that_echoes_gives_back_the_scan(shape, patch, tta, batch):
    p = soft(shape, 3)
    assert np.abs(sliding_window(Echo(), p, patch, 3, tta=tta, batch=batch) - p).max() < 1e-4

@settings(max_examples=30, deadline=None)
@given(sizes, st.tuples(*[st.integers(1, 16)]*2), st.integers(0, 2), st.booleans())
def test_the_same_for_2d_networks(shape, patch, axis, tta):
    p = soft(shape, 2)
    assert np.abs(sliding_window(Echo(), p, patch, 2, slice_axis=axis, tta=tta) - p).max() < 1e-4

def test_slices_are_cut_along_the_right_axis():
    net = Calls(2)
    sliding_window(net, np.zeros((1, 5, 20, 30), np.float32), (5, 30), 2, slice_axis=1, tta=False, batch=4)
    assert set(net.shapes) == {(4, 1, 5, 30)} and len(net.shapes) == 5 # 20 slices in batches of 4

@pytest.mark.parametrize('axes', [c for n in range(4) for c in itertools.combinations((1, 2, 3), n)])
def test_mirrors(axes):
    "A network that looks to one side is averaged with one that looks to the other, along axes longer than one"
    shape = tuple(5 if a in axes else 1 for a in (1, 2, 3))
    net = Calls(2)
    sliding_window(net, soft(shape, 2), shape, 2)
    assert len(net.shapes) == 2**len(axes)
    for a in axes:
        p = soft(shape, 2)
        plain = sliding_window(Shift(a + 1), p, shape, 2, tta=False)
        both = sliding_window(Shift(a + 1), p, shape, 2, tta=True)
        assert np.allclose(plain, np.roll(p, -1, a), atol=1e-5)
        assert np.allclose(both, (np.roll(p, -1, a) + np.roll(p, 1, a))/2, atol=1e-5)
        assert np.abs(plain - both).max() > .05

def test_mirrors_change_nothing_for_a_symmetric_network():
    torch.manual_seed(0)
    net, p = nn.Conv3d(2, 2, 3, padding=1).eval(), soft((9, 10, 11), 2)
    net.weight.data[:] = sum(net.weight.data.flip(c) for n in range(4) for c in itertools.combinations((2, 3, 4), n))
    assert np.allclose(*(sliding_window(net, p, (8, 8, 8), 2, tta=t) for t in (True, False)), atol=1e-5)

def test_networks_share_one_volume():
    a, b = soft((9, 20, 7), 3, 1), soft((9, 20, 7), 3, 2)
    out = sliding_window(Echo(), a, (8, 8, 8), 3, share=.5)
    same = sliding_window(Echo(), b, (6, 10, 8), 3, out=out, share=.5)
    assert same is out and np.allclose(out, (a + b)/2, atol=1e-4)

def test_memory_of_the_windows():
    "One volume of probabilities, whatever the number of windows; and a class too few is an error"
    x = np.zeros((1, 40, 40, 40), np.float32)
    tracemalloc.start()
    out = sliding_window(Calls(10), x, (16, 16, 16), 10, tta=False, batch=2)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert out.shape == (10, 40, 40, 40) and np.allclose(out, .1) and peak < 1.3*out.nbytes
    with pytest.raises(DataError, match='tells 3 classes apart'): sliding_window(Calls(3), x, (16, 16, 16), 10)

# --- the way back

def box(shape, full, at=(0, 0, 0)): return dict(box=[[a, a + n] for a, n in zip(at, shape)], cropped_shape=list(shape))

@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 9)]*3), st.tuples(*[st.integers(1, 14)]*3), st.integers(1, 12), st.sampled_from((1., 8.)), st.integers(0, 99))
def test_restore_equals_the_direct_way(shape, native, k, sharp, seed):
    p = soft(shape, k, seed, sharp)
    full, at = tuple(n + 3 for n in native), (1, 0, 3)
    y, direct = restore(p, box(native, full, at), full), resample(p, native, order=1)
    inside = y[1:1 + native[0], :native[1], 3:]
    chosen = np.take_along_axis(direct, inside[None].astype(int), 0)[0]
    assert (direct.max(0) - chosen).max() < 1e-5
    assert y.sum(dtype=int) == inside.sum(dtype=int) and y.dtype == np.uint8

@pytest.mark.parametrize('shape,native', [((20, 40, 40), (31, 90, 80)), ((40, 30, 50), (9, 70, 20)), ((12, 20, 20), (12, 20, 20)), ((1, 64, 64), (1, 200, 150))])
def test_restore_smooth_probabilities(shape, native):
    "Most classes are skipped in most places; none that wins"
    p = blobs(shape, 30)
    y, direct = restore(p, box(native, native), native), resample(p, native, order=1)
    assert (direct.max(0) - np.take_along_axis(direct, y[None].astype(int), 0)[0]).max() < 1e-5
    if shape == native: assert (y == p.argmax(0)).all()

def test_restore_in_several_slabs(monkeypatch):
    p, native = blobs((10, 16, 16), 5), (23, 30, 31)
    whole = restore(p, box(native, native), native)
    monkeypatch.setattr('autounet_nb.restore.SLAB_VOXELS', 2*30*31)
    assert len(_slabs(box(native, native))) == 12
    assert (restore(p, box(native, native), native) == whole).all()

def test_more_than_256_classes():
    p = np.zeros((300, 2, 3, 4), np.float32); p[299] = 1
    y = restore(p, box((4, 3, 4), (4, 3, 4)), (4, 3, 4))
    assert y.dtype == np.uint16 and (y == 299).all()

def test_memory_of_the_way_back_does_not_grow_with_classes():
    native, peaks = (40, 120, 120), {}
    for k in (3, 60):
        for make in (soft, blobs):
            p = make((20, 60, 60), k); restore(p, box(native, native), native)
            tracemalloc.start(); restore(p, box(native, native), native)
            peaks[k, make] = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert max(peaks.values()) < 1.15*min(peaks.values()) + 2e6, peaks
    assert max(peaks.values()) < 60*4*math.prod(native)/8

def test_restore_probabilities():
    p, native, full = soft((6, 9, 8), 4), (11, 17, 9), (15, 17, 20)
    q = restore_probabilities(p, box(native, full, (2, 0, 5)), full)
    inside = (slice(None), slice(2, 13), slice(None), slice(5, 14))
    assert np.allclose(q[inside], resample(p, native, order=1), atol=1e-6)
    assert np.allclose(q.sum(0), 1, atol=1e-5)
    outside = np.ones(full, bool); outside[inside[1:]] = False
    assert (q[0][outside] == 1).all()

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_keep_largest(seed):
    "Against SciPy, class by class"
    from scipy import ndimage
    y = (np.random.default_rng(seed).random((6, 7, 8)) < .12).astype(np.uint8)*3
    y[np.random.default_rng(seed + 1).random(y.shape) < .12] = 1
    kept = keep_largest(y, [3])
    assert (kept[y != 3] == y[y != 3]).all() and set(np.unique(kept[y == 3])) <= {0, 3}
    pieces, n = ndimage.label(y == 3, np.ones((3, 3, 3)))
    counts = np.bincount(pieces.ravel())[1:]
    if n:
        assert (kept == 3).sum() == counts.max()
        assert ndimage.label(kept == 3, np.ones((3, 3, 3)))[1] == 1

# --- scans and files, with a network that finds a bright body without a mistake

def bright_plan(patch=(16, 24, 24), dim=3, slice_axis=None, channels=('CT',), one=False):
    c = ModelConfig('3d' if dim == 3 else '2d', dim, 'full', (1., 1., 1.), (16, 24, 24), slice_axis, patch, 2, (0,)*dim, ((1,)*dim,), ((1,)*dim,), (1,), 'batch', len(channels), 2)
    norm = [dict(scheme='ct', lower=0., upper=100., mean=50., sd=50.)]*len(channels)
    return Plan(1, 'bright', 'cpu', 3, list(channels), {'background': 0, 'body': 7}, [0, 7], norm, {'body': one}, {c.name: c})

def bright_net(c):
    net = build_unet(c).eval()
    for n, w in net.named_parameters(): (nn.init.zeros_ if n.endswith('bias') else nn.init.ones_)(w)
    head = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))][-1]
    head.weight.data[0] = -1; head.bias.data[0] = .01
    return net

def bright_work(folder, folds=(0,), **kw):
    plan = bright_plan(**kw); plan.save(folder/'plan.json')
    for c in plan.models.values():
        for k in folds:
            save_tensors(folder/'models'/c.name/f'fold_{k}'/'weights.safetensors', bright_net(c).state_dict())
            write_json(folder/'models'/c.name/f'fold_{k}'/'model.json', dict(config=c.__dict__))
    return folder

def body(shape):
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing='ij')
    mask = z**2 + y**2 + x**2 + .8*y*x + .3*x**3 < .5
    return (100*mask).astype(np.float32)[None], (mask*7).astype(np.uint8)

IMAGE, TRUTH = body((20, 28, 32))
C, S = np.cos(.4), np.sin(.4)
ASKEW = Geometry(IMAGE.shape[1:], (1., 1., 1.), (-31.5, 12.25, 830.), (C, -S, 0., S, C, 0., 0., 0., -1.))

def save(path, image=IMAGE, geometry=ASKEW, dtype=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = sitk.GetImageFromArray(image[0].astype(dtype))
    im.SetSpacing(geometry.spacing[::-1]); im.SetOrigin(geometry.origin); im.SetDirection(geometry.direction)
    sitk.WriteImage(im, str(path)); return path

def save_series(folder):
    folder.mkdir(parents=True)
    for i, a in enumerate(IMAGE[0].astype(np.int16)):
        im = sitk.GetImageFromArray(a[None]); im.SetSpacing((1., 1., 1.))
        tags = {'0008|0060': 'CT', '0020|000d': '1.2.3', '0020|000e': '1.2.3.4', '0020|0013': str(i), '0020|0037': r'0\1\0\0\0\-1', '0020|0032': fr'{-i - .5}\5\7'}
        for t, v in tags.items(): im.SetMetaData(t, v)
        w = sitk.ImageFileWriter(); w.KeepOriginalImageUIDOn(); w.SetFileName(str(folder/f'{i:03}.dcm')); w.Execute(im)
    return folder

@pytest.mark.parametrize('kw', [{}, dict(patch=(40, 48, 56)), dict(patch=(16, 16), dim=2, slice_axis=0), dict(patch=(48, 16), dim=2, slice_axis=1), dict(patch=(16, 16), dim=2, slice_axis=2)])
def test_the_mask_is_exact_where_nothing_is_interpolated(kw):
    p = bright_plan(**kw); models = [(bright_net(c), c) for c in p.models.values()]
    for tta in (True, False): assert (predict_case(IMAGE, (1, 1, 1), p, models*2, tta=tta) == TRUTH).all()

def test_round_trip_through_another_spacing():
    p = bright_plan(); models = [(bright_net(c), c) for c in p.models.values()]
    y = predict_case(IMAGE, (1.6, .7, .8), p, models)
    assert y.shape == TRUTH.shape and 2*(y & TRUTH).astype(bool).sum()/(y.astype(bool).sum() + TRUTH.astype(bool).sum()) > .93
    shifted = [np.argwhere(m).mean(0) for m in (y, TRUTH)]
    assert np.abs(shifted[0] - shifted[1]).max() < .3

@pytest.mark.parametrize('suffix', ('.nii.gz', '.nii', '.nrrd', '.mha'))
def test_a_file_has_the_grid_of_its_scan(tmp_path, suffix):
    f = save(tmp_path/'in'/f'a{suffix}')
    path, = predict(bright_work(tmp_path), f, tmp_path/'out', device='cpu')
    assert path == tmp_path/'out'/f'a{suffix}'
    y, g = read_label(path)
    assert (y == TRUTH).all() and g.differences(read_image(f)[1]) == {}
    im, own = sitk.ReadImage(str(path)), sitk.ReadImage(str(f))
    assert im.GetSize() == own.GetSize() and np.allclose(im.GetDirection(), own.GetDirection(), atol=1e-6) and np.allclose(im.GetOrigin(), own.GetOrigin(), atol=1e-4)

def test_dicom(tmp_path):
    f = save_series(tmp_path/'in'/'series')
    path, = predict(bright_work(tmp_path), f, tmp_path/'out', device='cpu')
    y, g = read_label(path)
    assert path.name == 'series.nii.gz' and (y == TRUTH).all()
    assert g.differences(read_image(f)[1]) == {} and g.direction[2] == -1

def test_pictures_stay_flat(tmp_path):
    x, truth = body((1, 40, 50))
    (tmp_path/'in').mkdir()
    for name in ('a.png', 'b.tif', 'c.jpg'): sitk.WriteImage(sitk.GetImageFromArray(x[0, 0].astype(np.uint8)), str(tmp_path/'in'/name))
    paths = predict(bright_work(tmp_path, patch=(24, 24), dim=2, slice_axis=0), tmp_path/'in', tmp_path/'out', device='cpu')
    assert [p.name for p in paths] == ['a.png', 'b.tif', 'c.png']
    for p in paths:
        assert (read_label(p)[0] == truth).all() and sitk.ReadImage(str(p)).GetDimension() == 2

def test_channels_in_files_of_their_own(tmp_path):
    for name in 'ab':
        for c in range(2): save(tmp_path/'in'/f'{name}_{c:04}.nii.gz')
    paths = predict(bright_work(tmp_path, channels=('CT', 'CT 2')), tmp_path/'in', tmp_path/'out', device='cpu')
    assert [p.name for p in paths] == ['a.nii.gz', 'b.nii.gz'] and (read_label(paths[1])[0] == TRUTH).all()

def test_a_list_of_cases_and_folds(tmp_path):
    work = bright_work(tmp_path, folds=(0, 1))
    cases = [Case('z', (str(save(tmp_path/'in'/'a.mha')),)), Case('b', (str(save(tmp_path/'in'/'b.mha')),))]
    for folds in (None, [1], [0, 1]):
        paths = predict(work, cases, tmp_path/'out', folds=folds, tta=False, suffix='.nrrd', device='cpu')
        assert [p.name for p in paths] == ['z.nrrd', 'b.nrrd'] and (read_label(paths[0])[0] == TRUTH).all()
    with pytest.raises(DataError, match='no trained fold 4'): predict(work, cases, tmp_path/'out', folds=[4], device='cpu')

def test_probabilities(tmp_path):
    f = save(tmp_path/'in'/'a.nii.gz')
    path, = predict(bright_work(tmp_path), f, tmp_path/'out', probabilities=True, device='cpu')
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['a.nii.gz', 'probabilities']
    im = sitk.ReadImage(str(tmp_path/'out'/'probabilities'/'a.nrrd'))
    p, g = read_image(tmp_path/'out'/'probabilities'/'a.nrrd')
    assert im.GetNumberOfComponentsPerPixel() == 2 and im.GetPixelID() == sitk.sitkVectorFloat32
    assert g.differences(read_label(path)[1]) == {} and np.allclose(im.GetDirection(), ASKEW.direction, atol=1e-5)
    assert ((p[1] > .5) == (TRUTH > 0)).all() and np.abs(p.sum(0) - 1).max() < 2/1024

def test_failures_are_named_and_the_others_finished(tmp_path):
    f = save(tmp_path/'in'/'good.nii.gz'); whole = f.read_bytes()
    (tmp_path/'in'/'cut.nii.gz').write_bytes(whole[:len(whole)//2])
    sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(f))]*2), str(tmp_path/'in'/'two.nii.gz'))
    save(tmp_path/'in'/'nan.mha', np.where(IMAGE > 0, np.nan, IMAGE), dtype=np.float32)
    with pytest.raises(DataError) as e: predict(bright_work(tmp_path), tmp_path/'in', tmp_path/'out', device='cpu')
    text = str(e.value)
    assert text.startswith('3 of 4 scans failed') and 'good' not in text
    for words in ('case cut: ', 'case two: the scan has 2 channels, the networks were trained on 1 (CT)', 'case nan: ', 'NaN'): assert words in text
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['good.nii.gz'] and (read_label(tmp_path/'out'/'good.nii.gz')[0] == TRUTH).all()

def test_an_unforeseen_failure_is_named_too(tmp_path, monkeypatch):
    def broken(*args, **kw): raise RuntimeError('out of memory')
    monkeypatch.setattr('autounet_nb.predict.sliding_window', broken)
    save(tmp_path/'in'/'a.mha')
    with pytest.raises(DataError, match='case a: RuntimeError: out of memory') as e: predict(bright_work(tmp_path), tmp_path/'in', tmp_path/'out', device='cpu')
    assert isinstance(e.value.__cause__, RuntimeError)

def test_an_input_is_never_overwritten(tmp_path):
    f = save(tmp_path/'in'/'a.nii.gz'); before = f.read_bytes()
    work = bright_work(tmp_path)
    (tmp_path/'link').symlink_to(tmp_path/'in')
    for out in (tmp_path/'in', tmp_path/'link', tmp_path/'in'/'..'/'in'):
        with pytest.raises(DataError, match='would replace'): predict(work, f, out, device='cpu')
    label = save(tmp_path/'labels'/'a.nii.gz')
    with pytest.raises(DataError, match='would replace'): predict(work, [Case('a', (str(f),), str(label))], tmp_path/'labels', device='cpu')
    assert f.read_bytes() == before
    assert predict(work, f, tmp_path/'in', suffix='.nrrd', device='cpu') == [tmp_path/'in'/'a.nrrd'] and f.read_bytes() == before

def test_formats_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr('autounet_nb.predict.sliding_window', lambda *a, **k: pytest.fail('it went to work'))
    f, work = save(tmp_path/'in'/'a.nii.gz'), bright_work(tmp_path)
    with pytest.raises(DataError, match='no format for masks'): predict(work, f, tmp_path/'out', suffix='.jpg', device='cpu')
    with pytest.raises(DataError, match='1 of 1 scans failed.*PNG holds one slice'): predict(work, f, tmp_path/'out', suffix='.png', device='cpu')

def test_largest_component(tmp_path):
    x = IMAGE.copy(); x[0, :3, :3, :3] = 100
    work = bright_work(tmp_path, one=True)
    assert (segment(work, x[0], (1, 1, 1), device='cpu') == TRUTH).all()
    y = segment(work, x[0], (1, 1, 1), largest=False, device='cpu')
    assert y[:3, :3, :3].all() and (y == 7).sum() == (TRUTH == 7).sum() + 27

def test_arrays(tmp_path):
    work = bright_work(tmp_path)
    before = IMAGE.copy()
    for x in (IMAGE, IMAGE[0], IMAGE.astype(np.int16)): assert (segment(work, x, (1, 1, 1), device='cpu') == TRUTH).all()
    assert (IMAGE == before).all()
    assert not segment(work, np.zeros((10, 12, 14)), (2, 1, 1), device='cpu').any()
    with pytest.raises(DataError, match='NaN'): segment(work, np.where(IMAGE > 0, np.nan, 0), (1, 1, 1), device='cpu')
    with pytest.raises(DataError, match='axes'): segment(work, IMAGE[0, 0], (1, 1), device='cpu')
    with pytest.raises(DataError, match='no trained model'):
        (tmp_path/'new').mkdir(); bright_plan().save(tmp_path/'new'/'plan.json'); segment(tmp_path/'new', IMAGE, (1, 1, 1))

def test_the_best_model_is_taken(tmp_path):
    "2D and 3D network are trained, and the 2D one scored better on held-out scans; its mask is told by its value"
    work = bright_work(tmp_path); p3 = Plan.load(work/'plan.json')
    bright_work(tmp_path, patch=(16, 16), dim=2, slice_axis=0); p2 = Plan.load(work/'plan.json')
    Plan(*[getattr(p3, f) for f in Plan.__dataclass_fields__ if f not in ('models', 'reasons')], models={**p3.models, **p2.models}).save(work/'plan.json')
    from autounet_nb.predict import _load
    assert _load(work, None, None, 'cpu')[1][0][1].name == '3d' # unscored
    for name, d in (('3d', .5), ('2d', .6)): write_json(work/'models'/name/'fold_0'/'validation'/'scores.json', dict(mean=dict(dice=d)))
    assert _load(work, None, None, 'cpu')[1][0][1].name == '2d'
    assert _load(work, '3d', None, 'cpu')[1][0][1].name == '3d'
