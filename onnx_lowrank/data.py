from __future__ import annotations
import dataclasses, numpy as np
@dataclasses.dataclass(frozen=True)
class InputSpec:
    name: str
    dtype: object
    shape: tuple
class Source:
    synthetic=False; description='tmp'
    def __init__(self, items): self.items=items
    def __iter__(self): return iter(self.items)
def open_source(specs, data, *, limit=256, seed=0, shapes={}):
    z=np.load(data[0] if isinstance(data,(list,tuple)) else data)
    n=len(z[specs[0].name])
    arrs={s.name:z[s.name] for s in specs}
    return Source([{k:v[i:i+1] for k,v in arrs.items()} for i in range(min(n,limit))])
def split(s):
    it=list(s)
    return Source([x for i,x in enumerate(it) if i%4!=3]),Source([x for i,x in enumerate(it) if i%4==3]),False
