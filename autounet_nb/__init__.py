__version__ = "0.1.0"
import warnings

warnings.filterwarnings("ignore", message=".*torch.jit.script.*") # of an import of fastai, nothing that a user could mend
