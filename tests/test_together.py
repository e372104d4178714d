"Several processes that share a training: the curve of one, whatever the loss; what stops them; loaders that die."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, psutil, pytest, torch
from safetensors.torch import load_file
from autounet_nb.all import *

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Six generated scans, prepared for a 2D and a 3D network with batches of 4, and a made-up first stage"
    root = tmp_path_factory.mktemp('together')
    make_phantoms(root/'scans', n=6, shape=(20, 32, 28), seed=3)
    prepare(scan(root/'scans'), root/'work', hardware='cpu', workers=1)
    return root/'work'

def planned(work, **changes):
    "Change the plan of both models"
    d = read_json(work/'plan.json')
    for m in d['models'].values(): m.update(changes)
    write_json(work/'plan.json', d)

def outcome(work, model, **kw):
    "Losses, Dice and weights after a training of a few steps"
    folder = train_fold(work, model, 0, device='cpu', **kw)
    return np.array([[r[k] for k in ('step', 'lr', 'train_loss', 'valid_loss', 'dice')] for r in read_history(folder)]), load_file(folder/'weights.safetensors')

@pytest.mark.parametrize('model, dice', [('2d', 'batch'), ('3d', 'batch'), ('3d', 'sample')])
def test_two_processes_give_the_curve_of_one(work, model, dice):
    planned(work, dice=dice, batch=4)
    one = outcome(work, model, steps=10, seed=1)
    import shutil; shutil.rmtree(work/'models') # otherwise it is done already
    two = outcome(work, model, steps=10, seed=1, processes=2)
    print(np.abs(one[0] - two[0]).max(0), max((one[1][k] - two[1][k]).abs().max().item() for k in one[1]))
