"""The functions that make masks, and nothing else: what each file of masks lists in its `__all__`.

`qkv` and `qkv.masks` export them from here, and `qkv mask` knows them, so that a new one stands in its own file only.
"""

from qkv.masks.base import *
from qkv.masks.function import *
from qkv.masks.segments import *
from qkv.masks.selected import *
from qkv.masks.shapes import *
from qkv.masks.sparse import *
