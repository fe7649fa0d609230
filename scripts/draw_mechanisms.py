"""Draw what a pixel can attend to under the nine mechanisms of Table 5: python scripts/draw_mechanisms.py FILE.png

Untrained models, whose attention is nearly even over what a mechanism lets through: the pictures show the mechanisms, not what they learn.
"""

import sys

import timm
import torch

import debiformer  # noqa: F401  registers the presets
from debiformer.data.blood_cells import whole_images
from debiformer.data.images import eval_transform, read_image
from debiformer.explain.comparison import attention_side_by_side
from debiformer.explain.look import look
from debiformer.models.swin_layout import MIXERS

SIZE, QUERY = 224, (92, 108)

if __name__ == "__main__":
    image = read_image(whole_images()[0][0]).resize((SIZE, SIZE))
    inputs = eval_transform(SIZE, crop_pct=1.0)(image)[None]
    looks = {}
    for mixer in MIXERS:
        if mixer == "bi_level_routing_nchw":  # differs in the last stage alone
            continue
        torch.manual_seed(0)
        model = timm.create_model("swin_layout", mixer=mixer).eval()
        looks[mixer.replace("_", " ").replace("bi level", "bi-level")] = look(model, image, inputs)
    attention_side_by_side(looks, 3, None, *QUERY).savefig(sys.argv[1], dpi=100)
