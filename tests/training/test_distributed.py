"Several processes that share a training: the curve of one, whatever the loss; how they end; loaders that die; how batches are laid out."
import os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, psutil, pytest, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from torch.utils.data import get_worker_info
from autounet_nb.core.errors import InputError, WorkerDied
from autounet_nb.core.files import read_json, write_json
from autounet_nb.data.find import scan
from autounet_nb.planning.fingerprint import Fingerprint
from autounet_nb.training.patches import patch_dls
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.planning.plan import Plan
from autounet_nb.planning.planner import make_plan
from autounet_nb.preprocessing.store import PreprocessedCase, write_array
from autounet_nb.app.run import prepare
from autounet_nb.training.log import read_history
from autounet_nb.training.schedule import Budget
from autounet_nb.core.distributed import rank_and_size
from autounet_nb.training.learner import BFloat16Autocast, fit_learner, get_learner
from autounet_nb.training.train import preprocessed_cases, train_fold

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Six generated scans, prepared for all four models with batches of 4, and the truth as a first stage"
    root = tmp_path_factory.mktemp('together')
    make_phantoms(root/'scans', n=6, shape=(20, 32, 28), seed=3)
    prepare(scan(root/'scans'), root/'work', hardware='cpu', workers=1)
    make_plan(Fingerprint.load(root/'work/fingerprint.json'), 'cpu', ['cascade=yes']).save(root/'work/plan.json')
    for f in (root/'work/prep/full').glob('*.json'):
        write_array(root/'work/first_stage'/f'{f.stem}.b2nd', PreprocessedCase(f.parent, f.stem).label[:], 0)
        shutil.copy(f, root/'work/first_stage')
    return root/'work'

def planned(work, **changes):
    "Change the plan of all models"
    d = read_json(work/'plan.json')
    for m in d['models'].values(): m.update(changes)
    write_json(work/'plan.json', d)

def outcome(folder):
    "Losses, Dice and weights of a training"
    curves = [[r[k] for k in ('step', 'lr', 'train_loss', 'valid_loss', 'dice')] for r in read_history(folder)]
    return np.array(curves), load_file(folder/'weights.safetensors')

class SinglePrecision(Callback):
    "The rounding of bfloat16 would hide what is looked for here"
    def before_fit(self): self.learn.remove_cb(BFloat16Autocast)

def trained_again(work, model, cbs=(), **options):
    "What comes out of a training that begins without any files"
    shutil.rmtree(work/'models', ignore_errors=True)
    return outcome(train_fold(work, model, 0, device='cpu', seed=1, cbs=[SinglePrecision(), *cbs], **options))

def same(a, b):
    """Sums are taken in another order, so they are rounded in another way, and training makes the difference grow:
    from 1e-7 to a few 1e-4 within ten steps, when some voxels change sides"""
    np.testing.assert_array_equal(a[0][:, 0], b[0][:, 0])
    np.testing.assert_allclose(a[0][:, 1:4], b[0][:, 1:4], atol=2e-3)
    np.testing.assert_allclose(a[0][:, 4], b[0][:, 4], atol=5e-3)
    for k in a[1]: np.testing.assert_allclose(a[1][k], b[1][k], atol=2e-2)

class Layouts(Callback):
    "Notes the channels of the batches that the network gets, and whether those of a voxel lie side by side"
    order = 99
    seen = set()
    def before_batch(self): self.seen.add((self.x.shape[1], self.x.is_contiguous(memory_format=torch.channels_last_3d), self.x.is_contiguous()))

def test_batches_are_laid_out_when_all_their_channels_are_there(work):
    trained_again(work, '3d_cascade', cbs=[Layouts()], steps=2)
    assert Layouts.seen == {(3, True, False)} # image, and two classes of the first stage

@pytest.mark.parametrize('model, dice', [('2d', True), ('3d', False), ('3d_cascade', True)])
def test_two_processes_give_the_curve_of_one(work, model, dice):
    planned(work, batch_dice=dice, batch_size=4)
    same(trained_again(work, model, steps=10), trained_again(work, model, steps=10, processes=2))

class Die(Callback):
    "Kills the second process at a step"
    order = 90
    def after_batch(self):
        if rank_and_size()[0] and self.learn.training_log.step == 7: os.kill(os.getpid(), signal.SIGKILL)

def test_one_process_goes_on_where_two_were_killed(work):
    planned(work, batch_dice=True, batch_size=4)
    undisturbed = trained_again(work, '3d', steps=10)
    with pytest.raises(InputError, match='Process 1 of the 2 that shared a training was ended'):
        trained_again(work, '3d', steps=10, processes=2, cbs=[Die()])
    checkpoint = work/'models/3d/fold_0/checkpoint.safetensors'
    assert checkpoint.exists() and read_history(checkpoint.parent)[-1]['step'] < 7
    same(undisturbed, outcome(train_fold(work, '3d', 0, device='cpu', seed=1, steps=10, cbs=[SinglePrecision()])))

def test_a_budget_on_the_clock_ends_for_both_at_once(work):
    planned(work, batch_dice=False, batch_size=4)
    rows, _ = trained_again(work, '3d', minutes=.15, processes=2)
    assert rows[-1, 0] > 1 and rows[-1, 1] < 1e-3

def test_a_batch_that_cannot_be_shared_is_refused(work, autounet, one_line):
    planned(work, batch_size=4)
    done = autounet('train', work, '--model', '3d', '--steps', '2', '--device', 'cpu', '--processes', '3')
    one_line(done, 'model 3d', 'a batch of 4', '3 processes cannot share')

def test_without_accelerate_it_says_what_to_install(work, monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(InputError, match=r'pip install autounet_nb\[multigpu\]'): train_fold(work, '3d', 0, steps=2, device='cpu', processes=2)

def test_a_cluster_and_shared_trainings_are_not_mixed(work, autounet, one_line):
    one_line(autounet('run', work.parent/'scans', work.parent/'other', '--cluster', 'local:2', '--processes', '2'), '--processes')

def test_ctrl_c_leaves_a_usable_model_and_no_process(work):
    planned(work, batch_size=4)
    shutil.rmtree(work/'models', ignore_errors=True)
    command = [str(Path(sys.executable).with_name('autounet')), 'train', str(work), '--model', '3d', '--steps', '2000']
    p = subprocess.Popen([*command, '--device', 'cpu', '--processes', '2'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, start_new_session=True)
    until = time.monotonic() + 120
    while not (work/'models/3d/fold_0/progress.json').exists() and time.monotonic() < until: time.sleep(.2)
    members = psutil.Process(p.pid).children(recursive=True)
    assert len(members) >= 2
    p.send_signal(signal.SIGINT) # to the parent alone
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 130 and 'stopped' in out and 'Traceback' not in out, out
    assert read_json(work/'models/3d/fold_0/model.json')['finished'] is False
    assert not psutil.wait_procs(members, timeout=10)[1]

class Deadly(PreprocessedCase):
    "A case that kills the process that loads it"
    @property
    def image(self):
        if get_worker_info(): os.kill(os.getpid(), signal.SIGKILL)
        return super().image

def test_a_loader_that_is_killed_names_the_case(work):
    planned(work, batch_dice=False, batch_size=4)
    config = Plan.load(work/'plan.json').models['3d']
    cases = preprocessed_cases(work, config, sorted(f.stem for f in (work/'prep/full').glob('*.json')))
    dls = patch_dls([*cases[:4], Deadly(cases[4].folder, cases[4].id)], cases[5:], config, workers=2)
    learn = get_learner(dls, config, schedule=Budget(steps=50))
    with pytest.raises(WorkerDied, match=f'case {cases[4].id}: the process that loaded patches of it was killed'): fit_learner(learn)
