"The line on real scans of every kind, without a word of configuration."
import json
import pytest

SETS = [('Task04_Hippocampus', 3, 2, 200), ('Dataset101_OpenKBP', 3, 5, 40), ('oasis_brains', 3, 3, 8), ('sarcoma_mr', 3, 1, 3), ('nuclei2d', 2, 1, 60)]

@pytest.mark.parametrize('name,dim,classes,n', SETS)
def test_measured_and_planned(name, dim, classes, n, real_data, autounet, tmp_path):
    p = autounet('check', real_data/name, '--json')
    problems = json.loads(p.stdout)
    assert p.returncode == 0, problems
    p = autounet('fingerprint', real_data/name, tmp_path)
    assert p.returncode == 0, p.stderr
    fp = json.loads((tmp_path/'fingerprint.json').read_text())
    assert (fp['dim'], len(fp['labels']) - 1, len(fp['cases'])) == (dim, classes, n)
    p = autounet('plan', tmp_path, '--hardware', 'gpu-12gb', '--json')
    plan = json.loads(p.stdout)
    assert p.returncode == 0 and set(plan['models']) >= ({'2d'} if dim == 2 else {'2d', '3d'})

def test_sarcoma_from_scans_to_a_segmentation(real_data, autounet, tmp_path):
    "Three thick-slice scans: two to train on, one held out, a handful of steps"
    p = autounet('run', real_data/'sarcoma_mr', tmp_path/'work', '--models', '3d', '--folds', '0', '--steps', '6', '--hardware', 'cpu')
    assert p.returncode == 0, p.stderr
    assert '\nDice on validation scans\n' in p.stdout
