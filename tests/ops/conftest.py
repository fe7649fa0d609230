import os

import torch

# Before a kernel is decorated: without a GPU, they run on Triton's interpreter. Nothing else takes notice.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
