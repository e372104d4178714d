__version__ = "0.2.0"
import os, warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive") # threads that wait sleep; PyTorch reads it when it is loaded, see nbs/core/00_threads.ipynb
warnings.filterwarnings("ignore", message=".*torch.jit.script.*") # of an import of fastai, nothing that a user could mend
