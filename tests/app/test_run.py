"The work folder: nothing of the user's is lost, nothing stale is used, and only what changed is done again."
import json, os, shutil
import numpy as np, pytest
import SimpleITK as sitk
from autounet_nb.data.phantom import make_phantoms

def run(autounet, root, *more, steps=3):
    return autounet('run', root/'scans', root/'work', '--models', '3d', '--folds', '0', '--steps', steps, '--hardware', 'cpu', '--workers', '1', *more)

@pytest.fixture(scope='module')
def small(tmp_path_factory, autounet):
    "scans/ of five tiny cases and a finished work/"
    root = tmp_path_factory.mktemp('small')
    make_phantoms(root/'scans', n=5, shape=(12, 20, 20), seed=4, layout='pairs')
    p = run(autounet, root)
    assert p.returncode == 0, p.stderr
    return root

@pytest.fixture
def copy(small, tmp_path):
    for d in ('scans', 'work'): shutil.copytree(small/d, tmp_path/d)
    return tmp_path

weights = lambda root: (root/'work'/'models'/'3d'/'fold_0'/'weights.safetensors').read_bytes()
held_out = lambda root: json.loads((root/'work'/'splits.json').read_text())[0]['valid']

def mask_of(root, id, change):
    "Change a mask in place"
    path = str(root/'scans'/'labels'/f'{id}.nii.gz')
    im = sitk.ReadImage(path); new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(im))); new.CopyInformation(im)
    sitk.WriteImage(new, path)

def test_the_scans_are_never_the_work_folder(autounet, one_line, tmp_path):
    make_phantoms(tmp_path/'scans', n=3, shape=(12, 20, 20))
    before = {p: p.read_bytes() for p in (tmp_path/'scans').rglob('*') if p.is_file()}
    for command in ('run', 'fingerprint'): one_line(autounet(command, tmp_path/'scans', tmp_path/'scans', *['--steps', '1'][:2 * (command == 'run')]), 'lies in the work folder')
    one_line(autounet('run', tmp_path/'scans', tmp_path, '--steps', '1'), 'lies in the work folder')
    assert {p: p.read_bytes() for p in (tmp_path/'scans').rglob('*') if p.is_file()} == before

def test_a_dataset_json_in_the_work_folder_stays(autounet, copy):
    (copy/'work'/'dataset.json').write_text('precious')
    assert run(autounet, copy).returncode == 0 and (copy/'work'/'dataset.json').read_text() == 'precious'

def test_predict_replaces_only_its_own_results(autounet, one_line, copy):
    labels = copy/'scans'/'labels'
    before = {p: p.read_bytes() for p in labels.iterdir()}
    one_line(autounet('predict', copy/'work', copy/'scans'/'images', labels, '--no-tta'), 'is there already')
    assert {p: p.read_bytes() for p in labels.iterdir()} == before
    one = sorted((copy/'scans'/'images').iterdir())[0]
    for _ in range(2): assert autounet('predict', copy/'work', one, copy/'out').returncode == 0 # its own may be replaced
    (copy/'out'/one.name).write_bytes(before[labels/one.name]) # somebody corrected it
    one_line(autounet('predict', copy/'work', one, copy/'out'), 'not what autounet wrote')

def test_a_mask_that_changed_is_learnt_anew(autounet, copy):
    before = weights(copy)
    id = json.loads((copy/'work'/'splits.json').read_text())[0]['train'][0]
    mask_of(copy, id, lambda y: np.roll(y, 3, 1))
    p = run(autounet, copy)
    assert p.returncode == 0 and 'what changed is the data' in p.stdout
    assert weights(copy) != before

def test_a_held_out_mask_that_changed_is_scored_anew(autounet, copy):
    dice = lambda: json.loads((copy/'work'/'models'/'3d'/'fold_0'/'validation'/'scores.json').read_text())['mean']['dice']
    mask_of(copy, held_out(copy)[0], lambda y: np.where(y == 0, 1, 0).astype(y.dtype))
    before = dice()
    assert run(autounet, copy).returncode == 0 and dice() != before

def test_files_that_were_only_touched_change_nothing(autounet, copy):
    before = weights(copy)
    for p in (copy/'scans').rglob('*.nii.gz'): os.utime(p, (1e9, 1e9))
    assert run(autounet, copy).returncode == 0 and weights(copy) == before

def test_a_case_removed_and_one_added(autounet, copy):
    gone = held_out(copy)[0]
    for sub in ('images', 'labels'): (copy/'scans'/sub/f'{gone}.nii.gz').unlink()
    p = run(autounet, copy)
    assert p.returncode == 0, p.stderr
    splits = (copy/'work'/'splits.json').read_text()
    assert gone not in splits
    make_phantoms(copy/'more', n=1, shape=(12, 20, 20), seed=77, layout='pairs')
    for sub in ('images', 'labels'): shutil.copy(next((copy/'more'/sub).iterdir()), copy/'scans'/sub/'added.nii.gz')
    assert run(autounet, copy).returncode == 0 and 'added' in (copy/'work'/'splits.json').read_text()

def test_the_plan_follows_the_data_unless_it_was_edited(autounet, copy):
    plan = lambda: json.loads((copy/'work'/'plan.json').read_text())
    assert 'Planned again' not in run(autounet, copy).stdout and 'as it is' not in run(autounet, copy).stdout
    make_phantoms(copy/'more', n=9, shape=(12, 40, 40), spacing=(3, 1, 1), seed=8, layout='pairs')
    for sub in ('images', 'labels'):
        for f in (copy/'more'/sub).iterdir(): shutil.copy(f, copy/'scans'/sub/f'new_{f.name}')
    before = plan()
    p = run(autounet, copy, steps=1)
    assert p.returncode == 0 and 'Planned again' in p.stdout and plan()['models']['3d']['spacing'] != before['models']['3d']['spacing']
    assert autounet('plan', copy/'work', '--set', '3d.batch_size=3').returncode == 0
    p = run(autounet, copy, steps=1)
    assert p.returncode == 0 and plan()['edits'] == {'3d.batch_size': 3} and 'what changed is the plan' in p.stdout
    text = (copy/'work'/'plan.json').read_text()
    (copy/'work'/'plan.json').write_text(text.replace('"batch_size": 3', '"batch_size": 2'))
    p = run(autounet, copy, steps=1)
    assert p.returncode == 0 and 'changed in an editor' in p.stdout and plan()['models']['3d']['batch_size'] == 2
    assert autounet('plan', copy/'work').returncode == 1 and plan()['models']['3d']['batch_size'] == 2

def test_a_plan_with_another_normalisation_does_not_use_old_weights(autounet, one_line, copy):
    assert autounet('plan', copy/'work', '--set', 'normalization=nonzero').returncode == 0
    scan = sorted((copy/'scans'/'images').iterdir())[0]
    one_line(autounet('predict', copy/'work', scan, copy/'out'), 'trained with another normalisation')
    before = weights(copy)
    assert run(autounet, copy).returncode == 0 and weights(copy) != before
    assert autounet('predict', copy/'work', scan, copy/'out').returncode == 0

def test_a_copy_of_a_fold_and_a_leftover_do_not_matter(autounet, copy):
    shutil.copytree(copy/'work'/'models'/'3d'/'fold_0', copy/'work'/'models'/'3d'/'fold_0_old')
    (copy/'work'/'prep'/'full'/'.4242.case.json').write_text('{')
    (copy/'work'/'cases.json').unlink()
    assert autounet('predict', copy/'work', sorted((copy/'scans'/'images').iterdir())[0], copy/'out').returncode == 0
    assert autounet('train', copy/'work', '--steps', '1').returncode == 0

@pytest.mark.parametrize('option,words', [(('--seed', '-1'), 'from 0'), (('--seed', '9' * 40), 'from 0'), (('--minutes', 'inf'), 'above 0')])
def test_numbers_that_make_no_sense(autounet, tmp_path, option, words):
    p = autounet('run', tmp_path, tmp_path/'w', *option)
    assert p.returncode == 2 and words in p.stderr and 'Traceback' not in p.stderr

def test_a_device_that_is_not_there_is_said_first(autounet, one_line, copy):
    one_line(run(autounet, copy, '--device', 'abacus'), 'no device')
    one_line(autounet('predict', copy/'work', copy/'scans'/'images', copy/'out', '--device', 'abacus'), 'no device')

def test_one_case_is_too_few_and_said_first(autounet, one_line, tmp_path):
    make_phantoms(tmp_path/'scans', n=1, shape=(12, 20, 20))
    one_line(autounet('run', tmp_path/'scans', tmp_path/'work', '--steps', '1'), 'at least 2')
    assert not (tmp_path/'work').exists()

@pytest.mark.parametrize('file,text,words', [('splits.json', '[1]', 'list of folds'), ('models/3d/fold_0/model.json', '{"config": []}', 'does not describe'), ('models/3d/fold_0/model.json', '7', 'does not describe')])
def test_damaged_files_are_named(autounet, one_line, copy, file, text, words):
    (copy/'work'/file).write_text(text)
    p = autounet('train', copy/'work', '--steps', '1') if file == 'splits.json' else autounet('predict', copy/'work', copy/'scans'/'images', copy/'out')
    one_line(p, words, file.split('/')[-1])

def test_scores_that_are_damaged_do_not_stop_predict(autounet, copy):
    (copy/'work'/'models'/'3d'/'fold_0'/'validation'/'scores.json').write_text('{"mean": "x"}')
    assert autounet('predict', copy/'work', sorted((copy/'scans'/'images').iterdir())[0], copy/'out').returncode == 0
