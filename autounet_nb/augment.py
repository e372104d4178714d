"TEMPORARY stub"
__all__=['Augment']
import torch
from fastai.callback.core import Callback
class Augment(Callback):
    order=0
    def __init__(self,dim=3,seed=0): self.dim,self.seed,self.step=dim,seed,0
    def before_batch(self):
        if not self.training: return
        g=torch.Generator().manual_seed(self.seed*1000003+self.step)
        dims=[i for i in range(2,self.x.ndim) if torch.rand(1,generator=g)<.5]
        self.learn.xb,self.learn.yb=(self.x.flip(dims),),(self.y.flip([d-1 for d in dims]),)
