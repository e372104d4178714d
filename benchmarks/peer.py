"""nnU-Net's side of the benchmarks: `python peer.py WORK CASE FOLDER` prints what it measured as JSON.

Run by the Python of nnU-Net's own virtual environment. Each function is one work and has its counterpart in ours.py.
"""
import json, os, shutil, sys, time
from pathlib import Path
import numpy as np
from inputs import ADAM, BUDGET_SETS, LOADS, LOGITS, NETWORK, PATCHES, PEER_BUDGET, PEER_MIRRORED, RESAMPLE, busy_beside, memory_of, patch_batches, seconds_of

IDS = dict(hippocampus=4, openkbp=101) # of the datasets
BUDGET_IDS = {name: 900 + i for i, name in enumerate(BUDGET_SETS)}

def _folders(folder):
    "Where nnU-Net finds everything; it reads this when it is imported"
    for k in ('raw', 'preprocessed', 'results'):
        os.environ[f'nnUNet_{k}'] = str(folder/'peer'/k); (folder/'peer'/k).mkdir(parents=True, exist_ok=True)

def resample(case, folder):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    old, new = RESAMPLE[case]
    x = np.load(folder/'ct.npy', mmap_mode='r')[None, :old[0]].copy()
    spacing = [b / a for a, b in zip(old, new)]
    seconds, y = seconds_of(lambda: resample_data_or_seg_to_shape(x, new, [1, 1, 1], spacing, is_seg=False, order=3, order_z=0, force_separate_z=False))
    np.save(folder/f'resampled_{case}_peer.npy', y[0, ::7, ::7, ::7])
    return dict(seconds=seconds)

def prepare(case, folder):
    from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
    sys.argv[1:] = ['-d', str(IDS[case]), '--verify_dataset_integrity', '-c', '2d', '3d_fullres', '-np', '2', '2', '-npfp', '2', '--clean', '--no_pbar']
    return dict(seconds=seconds_of(plan_and_preprocess_entry)[0])

def logits(case, folder):
    import torch
    from functools import partial
    from types import SimpleNamespace
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    k, shape, native, _ = LOGITS[case]
    x = torch.from_numpy(np.load(folder/f'logits_{case}.npy'))
    plans = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    config = SimpleNamespace(spacing=[1., 1., 1.], resampling_fn_probabilities=partial(resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None))
    labels = LabelManager({'background': 0, **{f'class_{i}': i for i in range(1, k)}}, None)
    properties = dict(spacing=[a / b for a, b in zip(shape, native)], shape_after_cropping_and_before_resampling=native, shape_before_cropping=native, bbox_used_for_cropping=[[0, n] for n in native])
    added, seconds, y = memory_of(lambda: convert(x, plans, config, labels, properties, num_threads_torch=os.cpu_count()))
    np.save(folder/f'labels_{case}_peer.npy', y[::3, ::3, ::3])
    return dict(seconds=seconds, added=added)

def augment(case, folder):
    import torch
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    torch.set_num_threads(1)
    patch, angle = PATCHES[case], (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)
    transforms = nnUNetTrainer.get_training_transforms(patch, angle, None, (0, 1, 2), False, use_mask_for_norm=[False], foreground_labels=[1, 2])
    larger = [int(n) for n in get_patch_size(patch, angle, angle, angle, (.85, 1.25))] # what it cuts out, to have something to turn
    samples = [(torch.from_numpy(a), torch.from_numpy(b)[None]) for x, y in patch_batches(larger) for a, b in zip(x, y)]
    transforms(image=samples[0][0], segmentation=samples[0][1])
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 15:
        x, y = samples[n % len(samples)]
        out = transforms(image=x, segmentation=y); n += 1
    seconds, voxels = time.perf_counter() - start, out['image'].numel()
    assert out['image'].shape[1:] == patch
    return dict(seconds=seconds / n / voxels * 1e6, voxels_per_second=n * voxels / seconds)

def _trainer(folder, fold=0, base='nnUNetTrainerNoDeepSupervision', **settings):
    "nnU-Net's trainer for the network of both sides: its own layers, with the max pooling of the paper"
    import torch
    from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
    from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as module
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
    dataset = folder/'peer'/'preprocessed'/'Dataset004_Hippocampus'
    plans = json.loads((dataset/'nnUNetPlans.json').read_text())
    c = plans['configurations']['3d_fullres']
    n = len(NETWORK['features'])
    c['patch_size'], c['batch_size'] = list(NETWORK['patch']), NETWORK['batch']
    c['architecture']['arch_kwargs'] |= dict(n_stages=n, features_per_stage=list(NETWORK['features']), kernel_sizes=[[3] * 3] * n, strides=[[1] * 3] + [[2] * 3] * (n - 1), n_conv_per_stage=[2] * n, n_conv_per_stage_decoder=[2] * (n - 1))
    cls = recursive_find_python_class(str(Path(module.__file__).parent), base, 'nnunetv2.training.nnUNetTrainer')

    class Pooled(torch.nn.Module):
        def __init__(self, channels, classes, deep):
            super().__init__()
            norm, act = dict(eps=1e-5, affine=True), dict(inplace=True)
            self.encoder = PlainConvEncoder(channels, n, list(NETWORK['features']), torch.nn.Conv3d, [[3] * 3] * n, [[1] * 3] + [[2] * 3] * (n - 1), [2] * n, True,
                                            torch.nn.InstanceNorm3d, norm, None, None, torch.nn.LeakyReLU, act, return_skips=True, pool='max')
            self.decoder = UNetDecoder(self.encoder, classes, [2] * (n - 1), deep)
        def forward(self, x): return self.decoder(self.encoder(x))

    class Trainer(cls):
        @staticmethod
        def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True):
            net = Pooled(num_input_channels, num_output_channels, enable_deep_supervision)
            net.apply(InitWeights_He(1e-2))
            return net
        def plot_network_architecture(self): pass

    trainer = Trainer({**plans, 'continue_training': False}, '3d_fullres', fold, json.loads((dataset/'dataset.json').read_text()), torch.device('cpu'))
    for k, v in settings.items(): setattr(trainer, k, v)
    return trainer

def _step_seconds(folder, skipped, timed):
    "Mean seconds of some training steps after others that are not timed"
    trainer = _trainer(folder)
    trainer.on_train_start(); trainer.on_train_epoch_start()
    at = []
    for _ in range(skipped + timed):
        trainer.train_step(next(trainer.dataloader_train)); at.append(time.perf_counter())
    trainer.dataloader_train._finish(); trainer.dataloader_val._finish()
    return float(np.mean(np.diff(at[skipped:])))

def step(case, folder):
    seconds = _step_seconds(folder, 10, 50)
    return dict(seconds=seconds, images_per_second=NETWORK['batch'] / seconds)

def load(case, folder):
    with busy_beside(LOADS[case]): return dict(seconds=_step_seconds(folder, 10, 30))

def network(case, folder):
    "Not timed: a network that has learnt a little, for prediction"
    import torch
    trainer = _trainer(folder, base='nnUNetTrainerVanillaAdam1en3', enable_deep_supervision=False)
    trainer.on_train_start(); trainer.on_train_epoch_start()
    start = time.perf_counter()
    for _ in range(120): trainer.train_step(next(trainer.dataloader_train))
    trainer.dataloader_train._finish(); trainer.dataloader_val._finish()
    torch.save(trainer.network.state_dict(), folder/'peer'/'network.pth')
    return dict(seconds=time.perf_counter() - start)

def _predictor(trainer, mirror):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    import torch
    p = nnUNetPredictor(use_mirroring=mirror, perform_everything_on_device=False, device=torch.device('cpu'), allow_tqdm=False)
    trainer.network.decoder.deep_supervision = False
    p.manual_initialization(trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()], trainer.dataset_json, 'Trainer', (0, 1, 2))
    return p

def predict(case, folder):
    import torch
    trainer, out = _trainer(folder, enable_deep_supervision=False), folder/'peer'/'predicted'
    trainer.initialize()
    trainer.network.load_state_dict(torch.load(folder/'peer'/'network.pth', weights_only=True))
    shutil.rmtree(out, ignore_errors=True)
    p = _predictor(trainer, True)
    return dict(seconds=seconds_of(lambda: p.predict_from_files(str(folder/'peer'/'scans'), str(out), num_processes_preprocessing=2, num_processes_segmentation_export=2))[0])

def learn(case, folder):
    "Train for some minutes with nnU-Net's short recipes, and segment the held-out cases: Dice against the minutes of training"
    from inputs import PEER_TIMES
    base, rate, minutes = PEER_TIMES[case]
    trainer = _trainer(folder, 1, base, initial_lr=rate)
    seconds, steps = _train_for(trainer, minutes, 10, 25)
    return dict(seconds=seconds, steps=steps, dice=_held_out_dice(trainer, folder))

def _train_for(trainer, minutes, first, per_epoch):
    "Train for some minutes, of which the first steps say how long the schedule may be; seconds and steps"
    trainer.num_iterations_per_epoch = per_epoch
    trainer.on_train_start(); trainer.network.train()
    def steps(n):
        for _ in range(n): trainer.train_step(next(trainer.dataloader_train))
        return n
    start = time.perf_counter(); n = steps(first)
    trainer.num_epochs = max(1, round((60 * minutes - time.perf_counter() + start) / ((time.perf_counter() - start) / n * per_epoch)))
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers() # whose learning rate falls over just these epochs
    for trainer.current_epoch in range(trainer.num_epochs):
        trainer.lr_scheduler.step(trainer.current_epoch); n += steps(per_epoch)
    seconds = time.perf_counter() - start
    trainer.dataloader_train._finish(); trainer.dataloader_val._finish()
    return seconds, n

def _held_out_dice(trainer, folder):
    held, out = json.loads((folder/'splits.json').read_text())[1]['valid'], folder/'peer'/'held_out'
    raw = folder/'peer'/'raw'/'Dataset004_Hippocampus'
    shutil.rmtree(out, ignore_errors=True); out.mkdir()
    _predictor(trainer, True).predict_from_files([[str(raw/'imagesTr'/f'{i}_0000.nii.gz')] for i in held], [str(out/i) for i in held], num_processes_preprocessing=1, num_processes_segmentation_export=1)
    return _mean_dice(out, raw, held)

def budget(case, folder):
    """Train one configuration on one fold for some minutes with Adam, and segment the cases that took no part

    Planning, preprocessing and prediction cost it nothing here: all the minutes are training.
    """
    name, minutes, configuration = PEER_BUDGET[case]
    _prepare_budget(name, folder)
    trainer = _budget_trainer(name, configuration, folder)
    seconds, steps = _train_for(trainer, minutes, 3, 5)
    data, out = folder/'budget'/name/'unseen', folder/'peer'/'budget'/case
    shutil.rmtree(out, ignore_errors=True)
    _predictor(trainer, name in PEER_MIRRORED).predict_from_files(str(data/'imagesTr'), str(out), num_processes_preprocessing=1, num_processes_segmentation_export=1)
    return dict(minutes=minutes, seconds_of_training=seconds, steps=steps, dice=_mean_dice(out, data, sorted(f.name[:-7] for f in (data/'labelsTr').iterdir())))

def _prepare_budget(name, folder):
    "Plan for a GPU of a quarter of a GB: with 2 GB there are 18 steps in 5 minutes; and preprocess"
    from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
    full = f'Dataset{BUDGET_IDS[name]}_{name}'
    raw = folder/'peer'/'raw'/full
    if not raw.exists(): raw.symlink_to(folder/'budget'/name/'given')
    if (folder/'peer'/'preprocessed'/full/'small.json').exists(): return
    sys.argv[1:] = ['-d', str(BUDGET_IDS[name]), '-c', '2d', '3d_fullres', '-np', '2', '2', '-npfp', '2', '--no_pbar', '-gpu_memory_target', '.25', '-overwrite_plans_name', 'small']
    plan_and_preprocess_entry()

def _budget_trainer(name, configuration, folder):
    "nnU-Net's trainer with Adam"
    import torch
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as module
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
    cls = recursive_find_python_class(str(Path(module.__file__).parent), ADAM, 'nnunetv2.training.nnUNetTrainer')
    dataset = folder/'peer'/'preprocessed'/f'Dataset{BUDGET_IDS[name]}_{name}'
    plans = json.loads((dataset/'small.json').read_text())
    class Trainer(cls):
        def plot_network_architecture(self): pass
    return Trainer({**plans, 'continue_training': False}, configuration, 0, json.loads((dataset/'dataset.json').read_text()), torch.device('cpu'))

def _mean_dice(out, data, ids):
    "Mean over the classes of the mean over the cases, as our side takes it"
    import SimpleITK as sitk
    read = lambda f: sitk.GetArrayFromImage(sitk.ReadImage(str(f)))
    labels, dice = json.loads((data/'dataset.json').read_text())['labels'], {}
    for i in ids:
        p, y = read(out/f'{i}.nii.gz'), read(data/'labelsTr'/f'{i}.nii.gz')
        for k in set(labels.values()) - {0}:
            if (total := (p == k).sum() + (y == k).sum()): dice.setdefault(k, []).append(2 * ((p == k) & (y == k)).sum() / total)
    return float(np.mean([np.mean(d) for d in dice.values()]))

if __name__ == '__main__':
    work, case, folder = sys.argv[1:]
    folder = Path(folder).resolve()
    _folders(folder)
    stdout, sys.stdout = sys.stdout, sys.stderr # it prints a lot
    res = globals()[work](case, folder)
    print(json.dumps(res), file=stdout)
