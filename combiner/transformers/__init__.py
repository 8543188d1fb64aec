# SPDX-License-Identifier: Apache-2.0
"""Combiner attention in Hugging Face's models: training, padded and packed batches, generation with a cache::

    import combiner.transformers

    combiner.transformers.register(combiner.Fixed(64))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="combiner")

A layer with a sliding window runs `combiner.Window`, the other layers the pattern, by default `combiner.Dense`. A model
that is there takes ``model.set_attn_implementation("combiner")`` or, to be told which layers took which pattern,
``print(combiner.transformers.swap(model, combiner.Fixed(64)))``.
"""

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "combiner.transformers needs PyTorch and Transformers: pip install 'combiner-attention[transformers]'"
    ) from error

from .cache import CombinerLayer
from .registration import Swapped, register, swap

__all__ = ["CombinerLayer", "Swapped", "register", "swap"]
