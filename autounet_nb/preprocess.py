"TEMPORARY stub"
__all__=['normalize','preprocess_case','Prepared','preprocess']
from pathlib import Path
import numpy as np, blosc2, json, os
from autounet_nb.data import *
from autounet_nb.plan import *
from autounet_nb.resample import *
def normalize(x,scheme,mask=None):
    x=x.copy()
    for c,s in zip(x,scheme):
        if s['scheme']=='ct': c[...]=(np.clip(c,s['lower'],s['upper'])-s['mean'])/max(s['sd'],1e-8)
        else: c[...]=(c-c.mean())/max(c.std(),1e-8)
    return x
def preprocess_case(image,spacing,plan,target_spacing,label=None):
    nz=np.argwhere((image!=0).any(0)); lo,hi=(nz.min(0),nz.max(0)+1) if len(nz) else (np.zeros(3,int),np.array(image.shape[1:]))
    box=[[int(a),int(b)] for a,b in zip(lo,hi)]; sl=tuple(slice(*b) for b in box)
    x=image[(slice(None),*sl)]; shape=resampled_shape(x.shape[1:],spacing,target_spacing)
    meta=dict(box=box,cropped_shape=list(x.shape[1:]),shape=list(shape))
    y=None
    if label is not None: y=resample_labels(np.searchsorted(plan.label_values,label[sl]).astype(np.uint8),shape)
    return normalize(resample(x,shape),plan.normalization),y,meta
class Prepared:
    def __init__(self,folder,id): self.folder,self.id=Path(folder),id
    @property
    def image(self): return blosc2.open(str(self.folder/f'{self.id}.b2nd'),mode='r')
    @property
    def label(self): return blosc2.open(str(self.folder/f'{self.id}_label.b2nd'),mode='r')
    @property
    def meta(self): return read_json(self.folder/f'{self.id}.json')
    @property
    def points(self):
        if not hasattr(self,'_p'):
            with np.load(self.folder/f'{self.id}_points.npz') as f: self._p={int(k):f[k] for k in f.files}
        return self._p
def preprocess(dataset,plan,work,stage='full',workers=None):
    folder=Path(work)/'prep'/stage; folder.mkdir(parents=True,exist_ok=True); out=[]
    mm=next(c.spacing for c in plan.models.values() if c.stage==stage)
    for case in dataset:
        if not (folder/f'{case.id}.json').exists():
            s=read_case(case); x,y,meta=preprocess_case(s.image,s.geometry.spacing,plan,mm,s.label)
            blosc2.asarray(np.ascontiguousarray(x),urlpath=str(folder/f'{case.id}.b2nd'),mode='w'); blosc2.asarray(np.ascontiguousarray(y),urlpath=str(folder/f'{case.id}_label.b2nd'),mode='w')
            np.savez(folder/f'{case.id}_points.npz',**{str(k):np.argwhere(y==k)[::7][:2000] for k in range(1,len(plan.label_values)) if (y==k).any()})
            write_json(folder/f'{case.id}.json',{**meta,'geometry':s.geometry.to_dict()})
        out.append(Prepared(folder,case.id))
    return out
