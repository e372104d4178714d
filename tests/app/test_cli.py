"The command line as a process: what a user types, what comes back, and what happens to mistakes."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import SimpleITK as sitk
from autounet_nb.data.phantom import make_phantoms

def test_help_is_quick_and_names_every_command(autounet):
    p = autounet('--help')
    assert p.returncode == 0
    for c in 'check fingerprint run plan explore preprocess train status report predict evaluate demo'.split():
        assert f'\n    {c}' in p.stdout
        assert autounet(c, '--help').returncode == 0
    code = 'import sys, autounet_nb, autounet_nb.app.cli; print([m for m in ("torch", "fastai", "SimpleITK", "matplotlib", "numpy") if m in sys.modules])'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert loaded.stdout.strip() == '[]'

def processor_seconds(code):
    "The least of three"
    def once():
        before = sum(os.times()[2:4])
        subprocess.run([sys.executable, '-c', code], capture_output=True)
        return sum(os.times()[2:4]) - before
    return min(once() for _ in range(3))

def test_help_takes_a_tenth_of_a_second():
    help = processor_seconds('import sys; from autounet_nb.app.cli import main; sys.exit(main(["--help"]))')
    assert help - processor_seconds('pass') < .1

def test_version(autounet):
    from autounet_nb import __version__
    p = autounet('--version')
    assert p.returncode == 0 and p.stdout.strip() == f'autounet_nb {__version__}'

def test_a_folder_without_a_fingerprint(trained, autounet, one_line):
    one_line(autounet('plan', trained/'scans'), 'has no fingerprint yet', 'autounet fingerprint')

def test_run_leaves_everything_that_is_promised(trained):
    work = trained/'work'
    for f in ('cases.json', 'fingerprint.json', 'plan.json', 'splits.json', 'scores.json'): json.loads((work/f).read_text())
    for model in ('2d', '3d'):
        names = {p.name for p in (work/'models'/model/'fold_0').iterdir()}
        assert {'weights.safetensors', 'model.json', 'history.csv', 'curves.png', 'worst.png', 'median.png', 'validation'} <= names
        held_out = json.loads((work/'splits.json').read_text())[0]['valid']
        assert {f'{i}.nii.gz' for i in held_out} <= {p.name for p in (work/'models'/model/'fold_0'/'validation'/'masks').iterdir()}

def test_run_again_does_nothing(trained, autounet):
    watched = [p for p in (trained/'work').rglob('*') if p.suffix in ('.safetensors', '.b2nd', '.npz', '.gz')]
    before = {p: p.stat().st_mtime_ns for p in watched}
    p = autounet('run', trained/'scans', trained/'work', '--models', '2d,3d', '--folds', '0', '--steps', '30')
    assert p.returncode == 0, p.stderr
    assert len(before) > 20 and {p: p.stat().st_mtime_ns for p in watched} == before

def test_predict_lies_on_the_scans_grid(trained, autounet, tmp_path):
    p = autounet('predict', trained/'work', trained/'new'/'imagesTr', tmp_path/'out', '--model', '3d', '--folds', '0', '--no-tta')
    assert p.returncode == 0, p.stderr
    scans = sorted((trained/'new'/'imagesTr').glob('*.nii.gz'))
    assert len(scans) == 2
    for s in scans:
        a, b = sitk.ReadImage(str(s)), sitk.ReadImage(str(tmp_path/'out'/s.name))
        assert a.GetSize() == b.GetSize() and a.GetOrigin() == b.GetOrigin() and a.GetDirection() == b.GetDirection() and a.GetSpacing() == b.GetSpacing()
        assert set(np.unique(sitk.GetArrayFromImage(b))) <= {0, 1, 2}

def test_the_work_folder_is_all_that_predict_needs(trained, autounet, tmp_path):
    "Copied without the preprocessed cases, to another place, the scans gone"
    shutil.copytree(trained/'work', tmp_path/'elsewhere', ignore=shutil.ignore_patterns('prep', 'fingerprint', 'validation', 'cases.json', 'check.json'))
    one = next((trained/'new'/'imagesTr').glob('*.nii.gz'))
    for out, work in (('a', trained/'work'), ('b', tmp_path/'elsewhere')):
        assert autounet('predict', work, one, tmp_path/out, '--model', '2d', '--no-tta').returncode == 0
    a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/o/one.name))) for o in 'ab')
    assert (a == b).all()

def test_evaluate_json(trained, autounet, tmp_path):
    labels = trained/'new'/'labelsTr'
    d = json.loads(autounet('evaluate', labels, labels, '--json').stdout)
    assert d['mean']['dice'] == 1 and len(d['cases']) == 2 and all(v['dice'] == 1 for v in d['classes'].values())
    first = sorted(labels.glob('*.nii.gz'))[0]
    shutil.copy(first, tmp_path)
    p = autounet('evaluate', tmp_path, labels)
    assert p.returncode == 1 and 'Traceback' not in p.stderr

def test_plan_json_is_the_plan(trained, autounet, tmp_path):
    fp = trained/'work'/'fingerprint.json'
    p = autounet('plan', fp, '--json', '--hardware', 'gpu-12gb', '-o', tmp_path/'plan.json')
    assert p.returncode == 0 and json.loads(p.stdout) == json.loads((tmp_path/'plan.json').read_text())
    why = autounet('plan', fp, '--why', '--hardware', 'cpu').stdout
    assert '3d.patch_size' in why and 'because' in why

def test_mistakes_get_one_sentence(trained, autounet, one_line, tmp_path):
    work, scans = trained/'work', trained/'scans'
    one_line(autounet('run', tmp_path/'nowhere', tmp_path/'w'), 'nowhere')
    one_line(autounet('run', tmp_path, tmp_path/'w'))
    one_line(autounet('plan', tmp_path/'no.json'), 'no.json')
    one_line(autounet('plan', work, '--hardware', 'abacus', '-o', tmp_path/'p.json'), 'abacus', 'cpu')
    one_line(autounet('run', scans, work, '--models', '4d', '--steps', '1'), '4d')
    one_line(autounet('train', work, '--folds', '9', '--steps', '1'), 'fold 9')
    one_line(autounet('predict', work, tmp_path/'no.nii.gz', tmp_path/'o'), 'no.nii.gz')
    one_line(autounet('predict', work, scans/'imagesTr', tmp_path/'o', '--model', '3d', '--folds', '3'), 'fold 3')
    one_line(autounet('predict', tmp_path, scans/'imagesTr', tmp_path/'o'))
    for bad in (['run', 'a', 'b', '--minutes', '-3'], ['run', 'a', 'b', '--steps', 'x'], ['run', 'a', 'b', '--steps', '3', '--minutes', '3'], ['walk'], ['predict', 'a']):
        p = autounet(*bad)
        assert p.returncode == 2 and 'Traceback' not in p.stderr

def test_a_broken_scan_stops_run_before_anything_long(autounet, tmp_path):
    make_phantoms(tmp_path/'scans', n=4, shape=(16, 24, 24))
    victim = sorted((tmp_path/'scans'/'imagesTr').glob('*.nii.gz'))[1]
    victim.write_bytes(victim.read_bytes()[:2000])
    p = autounet('run', tmp_path/'scans', tmp_path/'work', '--steps', '2')
    assert p.returncode == 1 and victim.name.split('.')[0] in p.stdout + p.stderr and 'Traceback' not in p.stderr
    assert not (tmp_path/'work'/'models').exists()

def test_ctrl_c_leaves_a_usable_model_and_run_goes_on(autounet, tmp_path):
    make_phantoms(tmp_path/'scans', n=4, shape=(16, 24, 24))
    words = ['run', str(tmp_path/'scans'), str(tmp_path/'work'), '--models', '3d', '--folds', '0', '--steps', '400', '--hardware', 'cpu']
    p = subprocess.Popen([str(Path(sys.executable).with_name('autounet')), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8', start_new_session=True)
    fold = tmp_path/'work'/'models'/'3d'/'fold_0'
    for _ in range(1200):
        if (fold/'checkpoint.safetensors').exists() or p.poll() is not None: break
        time.sleep(.1)
    assert p.poll() is None, p.communicate()
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'stopped' in err and 'Traceback' not in err
    assert json.loads((fold/'model.json').read_text())['finished'] is False
    one = next((tmp_path/'scans'/'imagesTr').glob('*.nii.gz'))
    assert autounet('predict', tmp_path/'work', one, tmp_path/'out', '--model', '3d', '--no-tta').returncode == 0
    at = json.loads((fold/'model.json').read_text())['steps']
    again = autounet(*words)
    assert again.returncode == 0, again.stderr
    done = json.loads((fold/'model.json').read_text())
    assert done['finished'] is True and done['steps'] == 400 > at
