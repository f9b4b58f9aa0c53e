"""Greedy answers of vLLM's own engine, in a process of its own: `python vllm_child.py FOLDER`.

Reads {"engine": arguments of `LLM`, "prompts": token ids, "new": tokens} as JSON from stdin, and
writes the answers' token ids and the log-probabilities of each as JSON to FOLDER.answers.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams  # noqa: PLC0415  (the engine's own processes import this file)

    asked = json.load(sys.stdin)
    engine = LLM(sys.argv[1], dtype="float32", disable_log_stats=True, **asked["engine"])
    greedy = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=0)
    rounds = []
    for _ in range(2):  # the second finds the prompts of the first in the prefix cache
        found = engine.generate(
            [{"prompt_token_ids": ids} for ids in asked["prompts"]], greedy, use_tqdm=False
        )
        rounds.append(
            [
                {
                    "ids": list(one.outputs[0].token_ids),
                    "logprobs": [
                        next(iter(step.values())).logprob for step in one.outputs[0].logprobs
                    ],
                }
                for one in found
            ]
        )
    Path(f"{sys.argv[1]}.answers.json").write_text(json.dumps(rounds))


if __name__ == "__main__":
    main()
