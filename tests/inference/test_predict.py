"Windows, the way back to the scan's grid, and what is written to files."
import shutil, time
import numpy as np, psutil, pytest, torch
import SimpleITK as sitk
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.core.files import read_json, write_json
from autounet_nb.data.images import read_image, read_label
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import sketch_fingerprint
from autounet_nb.inference.ensemble import InferenceOptions
from autounet_nb.inference.predict import Predictor, predict, segment
from autounet_nb.evaluation.prices import Price, PriceList, save_prices
from autounet_nb.preprocessing.preprocess import preprocess_case
from autounet_nb.preprocessing.resample import spline_operator
from autounet_nb.inference.export import keep_largest, export_labels, export_probabilities
from autounet_nb.inference.windows import EnsembleMember, gaussian_window, probability_slabs, sliding_window

class Threshold(torch.nn.Module):
    "Stands for a network: class 1 where the image is positive, certain of it"
    def forward(self, x): return torch.cat([-50 * x[:, :1].sign(), 50 * x[:, :1].sign()], 1)

class Leaning(torch.nn.Module):
    "Says class 1 in the lower half of whatever it is shown"
    def forward(self, x):
        s = torch.zeros_like(x[:, :1]); s[:, :, :s.shape[2] // 2] = 50
        return torch.cat([-s, s], 1)

@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.sampled_from([1, 4, 8, 16])] * 3), st.booleans(), st.integers(0, 99))
def test_windows_give_back_every_voxel(shape, patch, tta, seed):
    "Whatever the sizes: the answer at a voxel is the network's, wherever windows overlap or reach beyond the scan"
    x = np.random.default_rng(seed).choice([-1., 1.], (1, *shape)).astype(np.float32)
    p = sliding_window(Threshold(), x, patch, 2, tta=tta)
    assert p.shape == (2, *shape) and np.allclose(p.sum(0), 1, atol=1e-5)
    assert ((p[1] > .5) == (x[0] > 0)).all()

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_a_2d_network_sees_slices_along_its_axis(axis):
    seen = []
    class Spy(Threshold):
        def forward(self, x): seen.append(tuple(x.shape[2:])); return super().forward(x)
    x = np.random.default_rng(0).choice([-1., 1.], (1, 9, 10, 11)).astype(np.float32)
    p = sliding_window(Spy(), x, (8, 8), 2, slice_axis=axis, tta=False)
    assert set(seen) == {(8, 8)} and ((p[1] > .5) == (x[0] > 0)).all()

def test_mirrored_copies_are_averaged():
    x = np.zeros((1, 8, 8, 8), np.float32)
    plain, averaged = (sliding_window(Leaning(), x, (8, 8, 8), 2, tta=t)[1] for t in (False, True))
    assert plain[0, 0, 0] > .99 and abs(plain[-1] - .5).max() < .01
    assert abs(averaged - .75).max() < .01, 'half of the copies are certain everywhere, half undecided'

def test_the_middle_of_a_window_counts_most():
    g = gaussian_window((16, 8))
    assert g.shape == (16, 8) and g[7:9, 3:5].min() == g.max() and g[0, 0] < .01 * g.max()

class Random(torch.nn.Module):
    "Says something else about each window, and the same whenever it sees it again"
    def forward(self, x): return torch.cat([x, (.1 * x.sum(dim=tuple(range(2, x.ndim)), keepdim=True) + x).sin()], 1)

@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.sampled_from([1, 4, 8, 16])] * 3), st.tuples(*[st.sampled_from([4, 16])] * 2), st.integers(0, 2), st.integers(1, 9), st.integers(0, 99))
def test_two_voices_are_the_mean_of_each(shape, patch, flat, axis, batch, seed):
    "Whatever the sizes of their windows: from top to bottom, held no longer than a window is deep, or what is seen at once"
    x = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    each = sliding_window(Random(), x, patch, 2, tta=False), sliding_window(Random(), x, flat, 2, axis, tta=False)
    slabs = [s.copy() for s in probability_slabs([EnsembleMember([Random()], patch, None, False, .25), EnsembleMember([Random()], flat, axis, False, .75)], x, 2, batch=batch)]
    assert np.allclose(np.concatenate(slabs, 1), .25 * each[0] + .75 * each[1], atol=1e-5)
    assert all(s.shape[1] > 0 for s in slabs)

def test_little_of_a_long_scan_is_held():
    slabs, strides = zip(*((s.shape[1], s.strides[0] // s.strides[1]) for s in probability_slabs([EnsembleMember([Threshold()], (8, 8, 8), tta=False)], np.ones((1, 200, 8, 8), np.float32), 2, batch=1)))
    assert sum(slabs) == 200 and max(slabs) <= 8 and max(strides) == 8 # slices from class to class: those that are held

@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 20)] * 3), st.tuples(*[st.integers(1, 30)] * 3), st.integers(2, 6), st.integers(0, 99))
def test_slabs_equal_the_direct_way(coarse, native, k, seed):
    p = np.random.default_rng(seed).dirichlet([.3] * k, coarse).astype(np.float32).transpose(3, 0, 1, 2)
    meta = dict(box=[[1, 1 + n] for n in native], cropped_shape=list(native))
    full = tuple(n + 2 for n in native)
    direct = np.zeros((k, *full), np.float32); direct[0] = 1
    inside = p
    for axis, (i, o) in enumerate(zip(coarse, native), 1): inside = np.moveaxis(np.tensordot(spline_operator(i, o, 1), inside, (1, axis)), 0, axis)
    direct[:, 1:-1, 1:-1, 1:-1] = inside
    assert np.allclose(export_probabilities(p, meta, full), direct, atol=1e-5)
    cuts = np.unique(np.random.default_rng(seed).integers(1, coarse[0], 3)) if coarse[0] > 1 else []
    out, best = export_labels(p, meta, full), direct.argmax(0)
    assert np.allclose(export_probabilities(np.split(p, cuts, 1), meta | dict(shape=coarse), full), direct, atol=1e-5)
    margin = np.sort(direct, 0)
    for o in (out, export_labels(np.split(p, cuts, 1), meta | dict(shape=coarse), full)): assert (o == best)[margin[-1] - margin[-2] > 1e-4].all()

@pytest.mark.parametrize('spacing', [(1, 1, 1), (3, .8, .8), (.5, 1.3, .7)])
def test_there_and_back(spacing):
    "A mask cropped, resampled and restored is the mask, nearly"
    plan = make_plan(sketch_fingerprint((30, 40, 40), (1, 1, 1)), 'cpu')
    at = np.indices((30, 44, 40)); mask = (sum(((at[i] - c) / r)**2 for i, (c, r) in enumerate(((14, 9), (22, 13), (19, 11)))) < 1).astype(np.uint8)
    image = np.zeros((1, *mask.shape), np.float32); image[:, 2:-3, 4:-2, 1:-4] = 5 + mask[2:-3, 4:-2, 1:-4]
    x, y, meta = preprocess_case(image, spacing, plan, (1, 1, 1), mask)
    back = export_labels(np.eye(2, dtype=np.float32)[y].transpose(3, 0, 1, 2), meta, mask.shape)
    assert back.shape == mask.shape and 2 * (back & mask).sum() / (back.sum() + mask.sum()) > .95

def test_only_the_largest_piece_of_the_classes_that_are_one():
    y = np.zeros((4, 9, 9), np.uint8); y[1, 1:4, 1:4] = 1; y[2, 4, 4] = 1; y[1, 7, 7] = 1; y[0, 0, 8] = 2; y[3, 8, 0:2] = 2
    out = keep_largest(y, [1])
    assert out[1, 7, 7] == 0 and out[2, 4, 4] == 1 and (out == 1).sum() == 10, 'corners touch: 26 neighbours'
    assert (out == 2).sum() == 3 and (keep_largest(y, [1, 2]) == 2).sum() == 2 and y[1, 7, 7] == 1

def test_any_direction_and_format_comes_back_on_its_own_grid(trained, tmp_path):
    scan = next((trained/'new'/'imagesTr').glob('*.nii.gz'))
    im = sitk.ReadImage(str(scan))
    im.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1)); im.SetOrigin((-12.5, 7, 100))
    sitk.WriteImage(im, str(tmp_path/'turned.nrrd'))
    one, = predict(trained/'work', tmp_path/'turned.nrrd', tmp_path/'out', model='3d', tta=False)
    two, = predict(trained/'work', tmp_path/'turned.nrrd', tmp_path/'out', model='3d', tta=False, suffix='.nii.gz', probabilities=True)
    for p in (one, two):
        out = sitk.ReadImage(str(p))
        assert out.GetSize() == im.GetSize() and np.allclose(out.GetOrigin(), im.GetOrigin()) and np.allclose(out.GetDirection(), im.GetDirection())
    assert one.name == 'turned.nrrd' and (read_label(one)[0] == read_label(two)[0]).all()
    probs = sitk.ReadImage(str(tmp_path/'out'/'probabilities'/'turned.nrrd'))
    assert probs.GetNumberOfComponentsPerPixel() == 3 and probs.GetSize() == im.GetSize() and np.allclose(probs.GetDirection(), im.GetDirection())
    a = sitk.GetArrayFromImage(probs)
    assert np.abs(a.sum(-1) - 1).max() < .01

def test_dicom_series_and_arrays(trained, tmp_path):
    scan = next((trained/'new'/'imagesTr').glob('*.nii.gz'))
    x, g = read_image(scan)
    (tmp_path/'series').mkdir()
    for z, s in enumerate(x[0]):
        im = sitk.GetImageFromArray(s.astype(np.int16)[None]); im.SetSpacing(g.spacing[::-1]); im.SetOrigin((0, 0, z * g.spacing[0]))
        for tag, v in (('0008|0060', 'MR'), ('0020|000e', '1.2.3'), ('0020|000d', '1.2'), ('0020|0013', str(z)), ('0020|0032', f'0\\0\\{z * g.spacing[0]}'), ('0020|0037', '1\\0\\0\\0\\1\\0'), ('0008|0018', f'1.2.3.{z}')): im.SetMetaData(tag, v)
        w = sitk.ImageFileWriter(); w.KeepOriginalImageUIDOn(); w.SetFileName(str(tmp_path/'series'/f'{z:03}.dcm')); w.Execute(im)
    out, = predict(trained/'work', tmp_path/'series', tmp_path/'out', model='2d', tta=False)
    y, gy = read_label(out)
    assert out.name == 'series.nii.gz' and y.shape == x.shape[1:]
    direct = segment(trained/'work', np.round(x[0]).astype(np.int16).astype(np.float32), gy.spacing, model='2d', tta=False)
    assert direct.shape == y.shape and (direct == y).mean() > .99

def test_one_bad_scan_is_named_and_the_others_are_done(trained, tmp_path):
    shutil.copytree(trained/'new'/'imagesTr', tmp_path/'scans')
    names = sorted(p.name for p in (tmp_path/'scans').iterdir())
    (tmp_path/'scans'/names[0]).write_bytes((tmp_path/'scans'/names[0]).read_bytes()[:999])
    with pytest.raises(InputError, match=names[0].split('.')[0]): predict(trained/'work', tmp_path/'scans', tmp_path/'out', model='2d', tta=False)
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == sorted([*names[1:], 'predictions.json'])

def test_inputs_are_never_replaced_and_wrong_channels_refused(trained, tmp_path):
    shutil.copytree(trained/'new'/'imagesTr', tmp_path/'scans')
    before = {p: p.read_bytes() for p in (tmp_path/'scans').iterdir()}
    with pytest.raises(InputError, match='another folder'): predict(trained/'work', tmp_path/'scans', tmp_path/'scans', model='2d', tta=False)
    assert {p: p.read_bytes() for p in (tmp_path/'scans').iterdir()} == before
    with pytest.raises(InputError, match='2 channels'): segment(trained/'work', np.zeros((2, 8, 16, 16)), (1, 1, 1), model='2d', tta=False)

def test_many_predictions_leave_nothing_behind(trained):
    "Neither memory nor open files nor threads"
    predictor, me = Predictor(trained/'work', '3d', device='cpu'), psutil.Process()
    scans = [(np.random.default_rng(i).normal(size=(16, 24, 24)), (1, 1, 1)) for i in range(3)]
    def held():
        time.sleep(.3) # the system counts a thread for a moment after it has ended
        return me.num_fds(), me.num_threads(), me.memory_info().rss
    seen = [held() for i, _ in enumerate(predictor.each(scans[i % 3] for i in range(60))) if i in (20, 59)]
    (files, threads, memory), (files_then, threads_then, memory_then) = seen
    assert files_then <= files and threads_then <= threads and memory_then - memory < 20e6

def test_each_fold_is_asked_and_none_twice(trained, tmp_path):
    "Folds of one model share the reading of a window, and a quick prediction may ask fewer of them"
    shutil.copytree(trained/'work', tmp_path/'work')
    folds = tmp_path/'work'/'models'/'3d'
    if not (folds/'fold_1').exists(): shutil.copytree(folds/'fold_0', folds/'fold_1')
    predictor, calls = Predictor(tmp_path/'work', '3d', [0, 1], 'cpu', InferenceOptions(tta=False)), []
    for k, (net, _) in enumerate(predictor.ensemble.models): net.register_forward_hook(lambda *_, k=k: calls.append(k))
    x = np.random.default_rng(0).normal(size=(16, 24, 24)).astype(np.float32)
    predictor(x, (1, 1, 1))
    assert calls.count(0) == calls.count(1) > 0
    predictor.options = lambda voxels: InferenceOptions(tta=False, folds=1)
    calls.clear(); predictor(x, (1, 1, 1))
    assert set(calls) == {0}

def test_the_next_scan_is_read_while_one_is_segmented(trained, tmp_path, monkeypatch):
    shutil.copytree(trained/'new'/'imagesTr', tmp_path/'scans')
    predictor, reads = Predictor(trained/'work', '3d', device='cpu', options=InferenceOptions(tta=False)), []
    load, segment_one = Predictor._load, Predictor._segment
    monkeypatch.setattr(Predictor, '_load', lambda self, scan: reads.append(scan.id) or load(self, scan))
    seen = []
    def slow(self, loaded, path, probabilities):
        loaded(); time.sleep(.5); seen.append(len(reads))
        return segment_one(self, loaded, path, probabilities)
    monkeypatch.setattr(Predictor, '_segment', slow)
    paths = predictor.write(tmp_path/'scans', tmp_path/'out')
    assert len(paths) > 1 and seen[0] == 2 # the second was read before the first was done

def test_fast_is_chosen_from_what_was_measured(trained, tmp_path, autounet):
    shutil.copytree(trained/'work', tmp_path/'work')
    (tmp_path/'work'/'prices.json').unlink(missing_ok=True)
    done = autounet('predict', tmp_path/'work', trained/'new'/'imagesTr', tmp_path/'a', '--model', '3d', '--fast')
    assert 'no price list' in done.stdout and read_json(tmp_path/'a'/'predictions.json')['options'] == dict(tta=False, overlap=.25, coarse_to_fine=False, mirrors=None, folds=None)
    slow, quick = InferenceOptions(), InferenceOptions(coarse_to_fine=True)
    save_prices(PriceList(['3d'], 4, 1e4, [Price(slow, 2., .8), Price(quick, .5, .799)]), tmp_path/'work')
    done = autounet('predict', tmp_path/'work', trained/'new'/'imagesTr', tmp_path/'b', '--model', '3d', '--fast')
    assert '4.0 times as fast' in done.stdout and read_json(tmp_path/'b'/'predictions.json')['options']['coarse_to_fine']
    write_json(tmp_path/'work'/'prices.json', dict(models=['3d'], prices='none'))
    done = autounet('predict', tmp_path/'work', trained/'new'/'imagesTr', tmp_path/'c', '--model', '3d', '--seconds', '2')
    assert done.returncode == 1 and 'this is no price list' in done.stderr and not (tmp_path/'c').exists()
