"""Fused models among those that lm-eval knows, for its own command or by ours.

    lm_eval --model meteora --model_args pretrained=FOLDER_OR_HUB_ID --tasks FILE,hellaswag …
    python -m pipelines.lm_eval_model --model meteora --model_args pretrained=… --tasks hellaswag …

FILE is `lm_eval_model.yaml` beside this module. lm-eval 0.4.13 asks for no plug-ins, and only reads
the names of what lies in an `--include_path`; but a task that is given as a file is loaded with the
functions that it names, and that is before the model is looked for. So that file names the class
below. With it `--model hf` takes fused models, too, by transformers' own registration.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import meteora


@register_model("meteora")
class Meteora(HFLM):
    """A fused model, or one expert of it."""

    def __init__(
        self,
        pretrained: str,
        *,
        base_folder: str | None = None,
        revision: str | None = None,
        expert: str = "",
        device: str | None = None,
        dtype: str = "auto",
        **asked: Any,  # noqa: ANN401  (HFLM's own arguments)
    ) -> None:
        """Load a checkpoint; every argument can stand in `--model_args`.

        Args:
            pretrained: a folder or a Hub id
            base_folder: where the base lies, if it is on no Hub
            expert: send every token to this one
            asked: what HFLM takes for a model that is loaded already
        """
        model, tokenizer = meteora.load(
            pretrained, base_folder=base_folder, revision=revision, device=device, dtype=dtype
        )
        self._forced = ExitStack()  # for as long as this model lives
        if expert:
            self._forced.enter_context(meteora.force_expert(model, expert))
        super().__init__(pretrained=model, tokenizer=cast("Any", tokenizer), **asked)
