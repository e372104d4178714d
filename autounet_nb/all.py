"The names that a notebook needs, in the order of the line: `from autounet_nb.all import *`"

# Errors and the work folder
from .core.errors import InputError
from .core.work import Work

# Data: scans and masks in, a list of cases out
from .data.find import scan, find_scans
from .data.cases import Case, Dataset, read_case
from .data.geometry import Geometry
from .data.images import read_image, read_label, write_like
from .data.phantom import make_phantoms, phantom
from .data.check import check

# Planning: a dataset is measured, and every decision follows
from .planning.fingerprint import Fingerprint, extract_fingerprint
from .planning.rules import sketch_fingerprint
from .planning.plan import Plan
from .planning.config import ModelConfig
from .planning.planner import make_plan, replan, diff
from .planning.what_if import what_if, explain

# Preprocessing
from .preprocessing.resample import resample, resample_labels
from .preprocessing.preprocess import preprocess_case, preprocess
from .preprocessing.folds import kfold_splits

# Pictures
from .viz.scan import show_case
from .viz.dataset import plot_fingerprint, plot_intensities, plot_montage
from .viz.plan import plot_plan, plot_step
from .viz.patch import plot_patch, plot_cascade
from .viz.unet_drawing import plot_unet

# Training: one network on one fold
from .training.unet import UNet, build_unet
from .training.loss import SoftDice, DiceCELoss
from .training.augment import augment, Augment
from .training.patches import PatchDataset, patch_dls
from .training.schedule import PaperSchedule, Budget
from .training.learner import get_learner, fit_learner
from .training.train import train_fold
from .training.weights import load_model
from .training.log import plot_history, read_history

# Inference: from a scan to a mask on its own grid
from .inference.ensemble import InferenceOptions, load_ensemble
from .inference.windows import sliding_window
from .inference.predict import Predictor, predict, segment

# Evaluation: how good it is, and the choice of the best
from .evaluation.metrics import dice, hd95, surface_dice, case_metrics
from .evaluation.scores import Scores, plot_scores
from .evaluation.evaluate import evaluate
from .evaluation.cross_validation import validate_fold
from .evaluation.choose import choose

# Everything in one call
from .app.forecast import forecast
from .app.run import run, demo
from .app.train_all import cross_validate
from .app.status import status
from .app.report import report
from .app.explorer import PlanExplorer

__all__ = [
    'InputError', 'Work', 'scan', 'find_scans', 'Case', 'Dataset', 'Geometry', 'read_case', 'read_image',
    'read_label', 'write_like', 'make_phantoms', 'phantom', 'check', 'Fingerprint', 'extract_fingerprint',
    'sketch_fingerprint', 'Plan', 'ModelConfig', 'make_plan', 'replan', 'what_if', 'explain', 'diff', 'resample',
    'resample_labels', 'preprocess_case', 'preprocess', 'kfold_splits', 'show_case', 'plot_fingerprint',
    'plot_intensities', 'plot_montage', 'plot_plan', 'plot_patch', 'plot_unet', 'plot_step', 'plot_cascade',
    'UNet', 'build_unet', 'SoftDice', 'DiceCELoss', 'augment', 'Augment', 'PatchDataset', 'patch_dls',
    'PaperSchedule', 'Budget', 'get_learner', 'fit_learner', 'train_fold', 'load_model', 'plot_history',
    'read_history', 'InferenceOptions', 'sliding_window', 'load_ensemble', 'Predictor', 'predict', 'segment',
    'dice', 'hd95', 'surface_dice', 'case_metrics', 'Scores', 'evaluate', 'plot_scores', 'validate_fold', 'choose',
    'forecast', 'run', 'cross_validate', 'status', 'report', 'demo', 'PlanExplorer',
]
