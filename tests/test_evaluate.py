"Dice against NumPy, and what is said where there is nothing to compare."
import json, shutil
import numpy as np, pytest
import SimpleITK as sitk
from hypothesis import given, strategies as st
from autounet_nb.data import DataError
from autounet_nb.evaluate import dice, evaluate

def write(path, y, spacing=1., origin=0.):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = sitk.GetImageFromArray(np.asarray(y, np.uint8)); im.SetSpacing((spacing,) * 3); im.SetOrigin((origin, 0., 0.)); sitk.WriteImage(im, str(path))

@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_dice_is_twice_the_overlap_over_the_sizes(seed, p, q):
    rng = np.random.default_rng(seed)
    a, b = rng.random((4, 5, 6)) < p, rng.random((4, 5, 6)) < q
    assert dice(a, b) == (2 * (a * b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else None)

@pytest.fixture
def pair(tmp_path):
    "Three cases with two classes: class 2 is in one case nowhere, in one only predicted"
    rng = np.random.default_rng(0)
    for i in range(3):
        y, p = (rng.integers(0, 3, (4, 5, 6)) for _ in range(2))
        if i == 1: y[y == 2] = 0; p[p == 2] = 0
        if i == 2: y[y == 2] = 0
        write(tmp_path/'labels'/f'c{i}.nii.gz', y); write(tmp_path/'predictions'/f'c{i}.nii.gz', p)
    return tmp_path/'predictions', tmp_path/'labels'

def test_json_is_as_promised(pair):
    d = json.loads(json.dumps(evaluate(*pair).to_json()))
    cases = {c['id']: c for c in d['cases']}
    assert set(cases) == {'c0', 'c1', 'c2'} and cases['c1']['2']['dice'] is None and cases['c2']['2']['dice'] == 0
    ones, twos = [cases[c]['1']['dice'] for c in cases], [cases['c0']['2']['dice'], 0]
    assert abs(d['classes']['1']['dice'] - np.mean(ones)) < 1e-12 and abs(d['classes']['2']['dice'] - np.mean(twos)) < 1e-12
    assert abs(d['mean']['dice'] - np.mean([np.mean(ones), np.mean(twos)])) < 1e-12
    assert d['classes']['2']['both_empty'] == 1

def test_both_empty_is_said(pair):
    assert 'both empty' in repr(evaluate(*pair)) and 'both empty' in evaluate(*pair)._repr_html_()

def test_names_come_from_the_dataset(pair):
    (pair[1].parent/'dataset.json').write_text(json.dumps({'labels': {'background': 0, 'organ': 1, 'tumour': 2}}))
    assert set(evaluate(*pair).to_json()['classes']) == {'organ', 'tumour'}

def test_missing_and_misfitting_are_errors_extra_is_a_warning(pair):
    predictions, labels = pair
    write(predictions/'more.nii.gz', np.zeros((2, 2, 2)))
    assert 'more' in evaluate(predictions, labels).to_json()['warnings'][0]
    write(predictions/'c0.nii.gz', np.zeros((4, 5, 7)))
    with pytest.raises(DataError, match='c0'): evaluate(predictions, labels)
    (predictions/'c0.nii.gz').unlink()
    with pytest.raises(DataError, match='c0'): evaluate(predictions, labels)

@pytest.mark.parametrize('header,kinds', [({}, []), (dict(origin=.01, spacing=1.0001), []), (dict(origin=50.), ['origin']), (dict(spacing=2., origin=50.), ['spacing', 'origin'])])
def test_masks_in_another_place_are_scored_and_warned_of_first(tmp_path, header, kinds):
    y = np.random.default_rng(0).integers(0, 2, (4, 5, 6))
    for i in range(9): # more than are listed one by one
        write(tmp_path/'labels'/f'c{i}.nii.gz', y); write(tmp_path/'predictions'/f'c{i}.nii.gz', y, **(header if i else {}))
    s = evaluate(tmp_path/'predictions', tmp_path/'labels', workers=1)
    assert s.mean == 1 and s.to_json()['warnings'] == list(s.warnings) and len(s.warnings) == len(kinds)
    for kind, said, line in zip(kinds, s.warnings, repr(s).splitlines()):
        assert f'differ in {kind} in 8 of 9 cases, as in c1' in said and line == f'Warning: {said}'
    assert repr(s).splitlines()[len(kinds)].startswith('Dice') and s._repr_html_().startswith('<p><b>' if kinds else '<table>')
