"""Fused models for lm-eval's command, in two ways.

    lm_eval --model meteora --model_args pretrained=FOLDER_OR_HUB_ID --tasks FILE,hellaswag …
    python -m pipelines.lm_eval_model --model meteora --model_args pretrained=… --tasks hellaswag …

FILE is `lm_eval_model.yaml` in this folder. lm-eval 0.4.13 has no plug-ins, but it imports the
functions that a task file names before it looks for the model. So FILE names the class below.
Importing the class also registers fused models with transformers, so `--model hf` takes them, too.
"""

from contextlib import ExitStack
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model

import meteora
from pipelines.evaluation.harness import MaskedModel


@register_model("meteora")
class Meteora(MaskedModel):
    """A fused model, or one of its experts alone."""

    def __init__(
        self,
        pretrained: str,
        *,
        base_folder: str | None = None,
        revision: str | None = None,
        expert: str = "",
        device: str | None = None,
        dtype: str = "auto",
        **kwargs: Any,  # noqa: ANN401  (HFLM's own arguments)
    ) -> None:
        """Load a checkpoint; every argument is possible in `--model_args`.

        Args:
            pretrained: a folder or a Hub id
            base_folder: the folder of the base, if it is not on the Hub
            expert: the expert of every token; empty for the router's choice
            kwargs: arguments of HFLM for a model that is loaded already
        """
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # `cuda:0` is lm-eval's default, and HFLM then takes the CPU, too
        model, tokenizer = meteora.load(
            pretrained, base_folder=base_folder, revision=revision, device=device, dtype=dtype
        )
        self._forced = ExitStack()  # for as long as this model lives
        if expert:
            self._forced.enter_context(meteora.force_expert(model, expert))
        super().__init__(pretrained=model, tokenizer=cast("Any", tokenizer), **kwargs)
