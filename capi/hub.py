"""An encoder as a Hugging Face repository: `Encoder.from_pretrained` of a name there, or of a folder on disk.

Needs the package huggingface_hub (`pip install 'capi[hub]'`).
"""

from huggingface_hub import PyTorchModelHubMixin

from capi.model import Backbone

_CARD = """---
{{ card_data }}
---

# {{ name | default("An encoder of CAPI", true) }}

A vision transformer trained by self-supervision with [CAPI](https://arxiv.org/abs/2502.08769) (cluster and predict
latent patches). It maps images to a global vector, registers, and a map of patch features.

```python
import torch
from capi.hub import Encoder

encoder = Encoder.from_pretrained("OWNER/{{ name | default("NAME", true) }}")  # or the path of this folder
images = torch.randint(0, 256, (2, 3, 480, 640), dtype=torch.uint8)
with torch.no_grad():
    global_vector, registers, feature_map = encoder(images, resize=16 * encoder.patch_size)
```

Images are bytes, or floats normalised by ImageNet's mean and standard deviation.
{%- if shape %}

{{ shape }}.
{%- endif %}
{%- if prototypes %}

`heads.safetensors` holds the teacher's {{ prototypes }} prototypes: `capi.pretrained.load_prototypes` and `clusters`
tell which of them a patch takes.
{%- endif %}
{%- if configuration %}

## Configuration of the run

```yaml
{{ configuration }}
```
{%- endif %}
"""


class Encoder(
    Backbone,
    PyTorchModelHubMixin,
    library_name="capi",
    pipeline_tag="image-feature-extraction",
    tags=["self-supervised-learning", "masked-image-modeling", "vision-transformer"],
    paper_url="https://arxiv.org/abs/2502.08769",
    model_card_template=_CARD,
):
    """A `Backbone` that saves itself to such a folder, pushes it, and comes back from there, all weights checked."""

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: object) -> "Encoder":
        return super()._from_pretrained(strict=strict, **options)
