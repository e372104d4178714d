"What both sides work on: sizes, and arrays that are made once. Nothing but NumPy and SciPy, so that both can import it."
import os, re, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np

RESAMPLE = { # (z,y,x) before and after
    'isotropic_down': ((120, 512, 512), (90, 384, 384)),
    'isotropic_up': ((120, 512, 512), (150, 640, 640)),
    'thick_in_plane': ((60, 512, 512), (60, 400, 400)),
    'thick_to_thin': ((40, 512, 512), (120, 512, 512))}
LOGITS = { # classes, (z,y,x) at the spacing of the plan and of the scan, type
    '14_classes': (14, (60, 128, 128), (80, 256, 256), np.float32),
    '100_classes': (100, (150, 256, 256), (200, 512, 512), np.float16)}
PATCHES = {'40x56x40': (40, 56, 40), '64x128x128': (64, 128, 128)}
NETWORK = dict(patch=(40, 56, 40), batch=2, features=(16, 32, 64, 128)) # 3D, max pooling, kernels of 3³
TIMES = {'quarter_of_a_minute': .25, 'half_a_minute': .5, 'one_minute': 1, 'two_minutes': 2, 'four_minutes': 4} # of training
ADAM, SGD = 'nnUNetTrainerVanillaAdam1en3', 'nnUNetTrainer'
PEER_TIMES = { # trainer, learning rate at first, minutes
    'adam_1_minute': (ADAM, 1e-3, 1), 'adam_2_minutes': (ADAM, 1e-3, 2), 'adam_5_minutes': (ADAM, 1e-3, 5), 'adam_10_minutes': (ADAM, 1e-3, 10), 'adam_20_minutes': (ADAM, 1e-3, 20),
    'adam_3e-3_10_minutes': (ADAM, 3e-3, 10), 'sgd_10_minutes': (SGD, 1e-2, 10)}

BUDGET_SETS = { # folder of the data, cases that take no part
    'hippocampus': ('Task04_Hippocampus', 40), 'openkbp': ('Dataset101_OpenKBP', 8), 'oasis': ('oasis_brains', 2),
    'nuclei': ('nuclei2d', 10), 'sarcoma_mr': ('sarcoma_mr', 1), 'sarcoma_ct': ('sarcoma_ct', 1)}
BUDGET_MINUTES = 2, 5, 10, 30
PEER_MIRRORED = 'hippocampus', 'oasis' # sets that nnU-Net segments with mirror images; OpenKBP takes it 5 minutes a case so
BUDGET = {f'{name}_{m}': (name, m) for m in BUDGET_MINUTES for name in BUDGET_SETS}
PEER_BUDGET = {f'{name}_{m}_{configuration}': (name, m, configuration) # both configurations at 5 minutes, the better one at the others
    for name, better, other in (('hippocampus', '3d_fullres', '2d'), ('openkbp', '3d_fullres', '2d'), ('oasis', '3d_fullres', '2d'))
    for m, configuration in ((5, better), (5, other), (2, better), (10, better), (30, better))}

LOADS = {'alone': 0, 'beside_1': 1, 'beside_2': 2} # other programs that compute

@contextmanager
def busy_beside(n):
    "So many other programs that compute all the time, each with one thread"
    multiply = 'import numpy as np; a = np.random.rand(500, 500)\nwhile True: a @ a'
    others = [subprocess.Popen([sys.executable, '-c', multiply], env=os.environ | dict(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')) for _ in range(n)]
    try:
        time.sleep(2 * (n > 0)) # until they have begun
        yield
    finally:
        for p in others: p.kill(); p.wait()

def seconds_of(f):
    "How long a call takes, and what it returns"
    start = time.perf_counter(); res = f()
    return time.perf_counter() - start, res

def memory_of(f):
    "By how many bytes a call raises the memory of this process at its peak (on Linux), how long it takes, and what it returns"
    peak = lambda: int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    Path('/proc/self/clear_refs').write_text('5') # the peak so far is forgotten
    before = peak(); seconds, res = seconds_of(f)
    return peak() - before, seconds, res

def _noise(shape, coarse, seed, dtype=np.float32):
    "Smooth random values between coarse random ones"
    x = np.random.default_rng(seed).normal(size=coarse).astype(np.float32)
    for axis, (n, m) in enumerate(zip(shape, coarse)):
        at = np.linspace(0, m - 1, n); i = np.minimum(at.astype(int), m - 2); w = (at - i).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        x = x.take(i, axis) * (1 - w) + x.take(i + 1, axis) * w
    return x.astype(dtype)

def make_ct(path):
    "A body in air with organs and noise, in Hounsfield units, 120×512×512"
    shape = (120, 512, 512)
    x = 60 * _noise(shape, (12, 40, 40), 0) + 15 * np.random.default_rng(1).normal(size=shape).astype(np.float32)
    y, z = np.mgrid[-1:1:512j, -1:1:512j]
    np.save(path, np.where(y**2 / .5 + z**2 / .8 < 1, x, -1000 + x / 10).astype(np.float32))

def make_logits(case, path):
    "Logits of regions with soft borders, of which background is the largest"
    k, shape, _, dtype = LOGITS[case]
    out = np.lib.format.open_memmap(path, 'w+', dtype, (k, *shape))
    for i in range(k): out[i] = 4 * _noise(shape, (6, 10, 10), i) + 6 * (i == 0)

def patch_batches(patch, n=4):
    "Batches of two patches and their masks, (2,1,*patch) float32 and (2,*patch) int16"
    rng = np.random.default_rng(0)
    x = [_noise(patch, [max(4, p // 8) for p in patch], seed) + .1 * rng.normal(size=patch).astype(np.float32) for seed in range(2 * n)]
    y = [np.digitize(v, [.3, .8]).astype(np.int16) for v in x]
    return [(np.stack(x[i:i + 2])[:, None], np.stack(y[i:i + 2])) for i in range(0, 2 * n, 2)]
