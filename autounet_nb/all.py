"Everything public, for notebooks: `from autounet_nb.all import *`"
from .data import *
from .phantom import *
from .check import *
from .fingerprint import *
from .plan import *
from .resample import *
from .preprocess import *
from .unet import *
from .loss import *
from .augment import *
from .patches import *
from .train import *
from .windows import *
from .restore import *
from .predict import *
from .evaluate import *
from .crossval import *
