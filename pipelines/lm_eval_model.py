"""Where lm-eval's own command finds fused models: users' copies of the YAML file hold this name."""

from lm_eval.__main__ import cli_evaluate

from pipelines.evaluation.lm_eval_model import Meteora

__all__ = ["Meteora"]

if __name__ == "__main__":
    cli_evaluate()
